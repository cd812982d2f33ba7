"""Fixtures for all tests: tiny models on disk, their engines, a toy dataset, and a cache of their own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import settings

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from penchant.data.dataset import Dataset
from penchant.engine.loading import load_engine
from penchant.engine.transformers import TransformersEngine
from tests import tiny
from tests.fake_engine import FakeEngine

# Two threads on tiny models wait for each other longer than they work; test_smollm2.py asks for more.
torch.set_num_threads(1)

# How long an example takes says more of the machine than of the code.
settings.register_profile("penchant", deadline=None)
settings.load_profile("penchant")

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="module")
def module_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of a module's own, for modules that fit once for several tests: named in their ``pytestmark``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PENCHANT_CACHE", str(tmp_path_factory.mktemp("module-cache")))
        yield


@pytest.fixture(autouse=True)
def _own_cache(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No test reads or writes the user's cache, but those that want the real model."""
    if request.node.get_closest_marker("smollm2") or request.node.get_closest_marker("registry"):
        return
    monkeypatch.setenv("PENCHANT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20261124)


@pytest.fixture(scope="session", params=["byte", "sentencepiece"])
def tiny_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model of each kind of tokenizer, on disk."""
    return tiny.save_model(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.fixture(scope="session")
def byte_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with the byte-level tokenizer, on disk."""
    return tiny.save_model(tmp_path_factory.mktemp("byte") / "model", "byte")


@pytest.fixture(scope="session")
def tiny_engine(tiny_folder: Path) -> TransformersEngine:
    return load_engine(tiny_folder, dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def byte_engine(byte_folder: Path) -> TransformersEngine:
    return load_engine(byte_folder, dtype="float32", device="cpu")


@pytest.fixture
def fake_engine() -> FakeEngine:
    return FakeEngine()


def toy_frames(n_users: int = 30, n_events: int = 9, seed: int = 0) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Users who walk the circle of titles from where they start, mostly one step at a time."""
    rng = np.random.default_rng(seed)
    titles = tiny.TITLES
    rows = []
    for user in range(n_users):
        at = int(rng.integers(len(titles)))
        for event in range(n_events):
            rows.append((f"u{user}", str(at + 1), 1_000_000 + 60 * event + user))
            at = (at + (1 if rng.random() < 0.9 else 2)) % len(titles)
    interactions = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    items = pl.DataFrame(
        {
            "item_id": [str(i + 1) for i in range(len(titles))],
            "title": titles,
            "genres": ["Comedy|Drama" if i % 2 else "Thriller" for i in range(len(titles))],
            "year": [str(1950 + i) for i in range(len(titles))],
        }
    )
    return interactions, items


@pytest.fixture
def toy() -> Dataset:
    return Dataset.read(*toy_frames())
