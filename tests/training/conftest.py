"""Fixtures of the training tests: templates whose yes_no has one-token labels, a corpus, and clean accelerate state."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.training.helpers import corpus_of, fresh_accelerate, letter_prompts

from penchant.data.dataset import Dataset
from penchant.training.corpus import Corpus


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """One thread, and no accelerator left over from another test."""
    torch.set_num_threads(1)
    with fresh_accelerate():
        yield


@pytest.fixture
def picture() -> None:
    """For tests that want the curves drawn."""


@pytest.fixture(autouse=True)
def _no_picture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes a third of these short runs' time."""
    if "picture" not in request.fixturenames:
        monkeypatch.setattr("penchant.training.recipes.plot", lambda *args: None)


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a yes_no template whose labels are single tokens of the tiny model."""
    return letter_prompts(tmp_path_factory.mktemp("prompts"))


@pytest.fixture
def corpus(toy: Dataset, byte_folder: Path, prompts: Path) -> Corpus:
    return corpus_of(toy, byte_folder, prompts)
