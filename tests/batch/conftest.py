"""A toy run whose LLM (the fake engine) has half the say, users for it, and jobs in processes that can be killed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from tests.conftest import toy_frames
from tests.fake_engine import FakeEngine

from penchant.data.dataset import Dataset
from penchant.data.split import leave_last_out
from penchant.fusion import Fusion
from penchant.interest.config import EncoderConfig
from penchant.recommend import Recommender
from penchant.run_folder import FitConfig

ENCODER = EncoderConfig(
    dim=16, blocks=1, heads=2, dropout=0.1, max_length=12, epochs=2, batch_rows=8, learning_rate=1e-2
)
CONFIG = FitConfig(encoder=ENCODER, candidates=4, validation_users=6, max_history=6)
USERS = {"user_id": pl.String, "history": pl.List(pl.String)}


@pytest.fixture(autouse=True, scope="session")
def _quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of these tests' own before anything is fitted; one thread, for models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PENCHANT_CACHE", str(tmp_path_factory.mktemp("batch-cache")))
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory, _quick: None) -> Path:
    model = Recommender.fit(leave_last_out(Dataset.read(*toy_frames())), FakeEngine(), CONFIG)
    model.fusion = Fusion(0.5, 1.0)
    folder = tmp_path_factory.mktemp("fitted") / "run"
    model.save(folder)
    return folder


@pytest.fixture
def model(run_folder: Path) -> Recommender:
    return Recommender.load(run_folder, FakeEngine())


def people(n: int = 11) -> pl.DataFrame:
    """n users of the run, one with a history of their own, and one that nobody knows."""
    rows: list[tuple[str, list[str] | None]] = [(f"u{i}", None) for i in range(n)]
    return pl.DataFrame([*rows, ("guest", ["3", "4"]), ("nobody", None)], schema=USERS, orient="row")


@pytest.fixture
def users(tmp_path: Path) -> Path:
    path = tmp_path / "users.parquet"
    people().write_parquet(path, row_group_size=4)
    return path


def made(out: Path) -> dict[str, bytes]:
    """Every result and quarantine file of the published run, by name."""
    run = out / "latest"
    return {str(p.relative_to(run)): p.read_bytes() for kind in ("parts", "quarantine") for p in run.glob(f"{kind}/*")}


def results(out: Path) -> pl.DataFrame:
    return pl.read_parquet(out / "latest" / "parts" / "*.parquet")


def quarantined(out: Path) -> pl.DataFrame:
    files = sorted((out / "latest" / "quarantine").glob("*.parquet"))
    return pl.concat([pl.read_parquet(file) for file in files])


@dataclass
class Ended:
    """How a job in a process of its own ended: its wait status (a signal if negative) and what it said."""

    status: int
    said: str
    calls: int


Jobs = Callable[..., Ended]


@pytest.fixture(scope="session")
def jobs(run_folder: Path) -> Iterator[Jobs]:
    """``jobs(out, rows, **how)``: a job in a forked process (see jobs.py), so that the libraries are loaded once."""
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("jobs.py")), str(run_folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert server.stdin is not None
    assert server.stdout is not None

    def job(out: Path, rows: Path, **how: Any) -> Ended:
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps({"out": str(out), "rows": str(rows), **how}) + "\n")
        server.stdin.flush()
        return Ended(**json.loads(server.stdout.readline()))

    yield job
    server.stdin.close()
    server.wait(timeout=30)
    server.stdout.close()
