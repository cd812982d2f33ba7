"""The likelihood of all items without history: in pieces, stopped, killed and gone on with."""

from __future__ import annotations

import fcntl
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.batch.conftest import made
from tests.fake_engine import FakeEngine

from penchant.batch import dry_run, run, status
from penchant.errors import StorageError
from penchant.recommend import Recommender

HOW: dict[str, Any] = {"shard_rows": 5, "k": 3, "max_bad_share": 0.2}


@pytest.fixture(autouse=True)
def _four_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penchant.batch.setup._PIECE", 5)  # of 16 items


class Counting(FakeEngine):
    """Knows which items were scored without history, and dies, as by a kill, before the ``dies``-th such call."""

    def __init__(self, dies: int = 100) -> None:
        super().__init__()
        self.alone: list[int] = []
        self.dies = dies
        self.empty = ""

    def score(self, prompts: Any, continuations: Any, *, progress: Any = None) -> Any:
        if getattr(prompts[0], "text", None) == self.empty:
            if len(self.alone) + 1 == self.dies:
                raise KeyboardInterrupt
            self.alone.append(len(continuations[0]))
        return super().score(prompts, continuations, progress=progress)


def opened(run_folder: Path, dies: int = 100) -> tuple[Recommender, Counting]:
    """The run, as if its fit had asked for no likelihood without history."""
    engine = Counting(dies)
    model = Recommender.load(run_folder, engine)
    model.ranker.prior[:] = np.nan
    engine.empty = model.ranker.prompt(np.zeros(0, dtype=np.int32)).prompt.text
    return model, engine


def test_a_stop_between_pieces_is_gone_on_with(run_folder: Path, users: Path, tmp_path: Path) -> None:
    whole, engine = opened(run_folder)
    summary = run(whole, tmp_path / "whole", users, **HOW)
    assert engine.alone == [5, 5, 5, 1]
    prompt = whole.ranker.prompt(np.zeros(0, dtype=np.int32)).n_tokens or 0
    assert summary["setup"]["items"] == 16
    assert summary["setup"]["tokens_asked"] == 16 * prompt + sum(map(len, whole.ranker.tokens(range(16))))
    assert summary["setup"]["seconds"] > 0

    out, stop = tmp_path / "recs", threading.Event()
    told: list[dict[str, Any]] = []

    def tell(numbers: dict[str, Any]) -> None:
        told.append(numbers)
        if len(told) == 2:
            stop.set()

    model, _ = opened(run_folder)
    ended = run(model, out, users, stop=stop, tell=tell, **HOW)
    assert (ended["state"], ended["shards_left"]) == ("stopped", 3)
    assert ended["setup"] == {"items": 16, "items_done": 10}
    assert [one["items_done"] for one in told] == [5, 10]
    with pytest.raises(StorageError, match=r"stopped in its set-up: 10 of 16 items"):
        status(out)

    model, engine = opened(run_folder)
    again = run(model, out, users, **HOW)
    assert engine.alone == [5, 1], "what was on disk is not scored again"
    assert made(out) == made(tmp_path / "whole")
    names = ("items", "tokens_asked", "tokens_run")
    assert [again["setup"][name] for name in names] == [summary["setup"][name] for name in names]
    assert not (out / "setup").exists()


@pytest.mark.parametrize("question", ["likelihood", "choose", "yes_no"])
def test_calibrated_titles_have_their_set_up_whatever_the_run_asks(
    run_folder: Path, users: Path, tmp_path: Path, question: Any
) -> None:
    model, engine = opened(run_folder)
    model.ranker.question = question
    run(model, tmp_path / "recs", users, method="generate", calibration=1.0, **HOW)
    assert engine.alone == [5, 5, 5, 1], "in pieces, and not again by the first shard"
    kept = np.load(tmp_path / "recs" / "run-0001" / "prior.npy")
    assert np.isfinite(kept).all()
    assert (kept < 0).all()


def test_a_kill_costs_the_piece_in_hand_and_a_torn_piece_is_scored_again(
    run_folder: Path, users: Path, tmp_path: Path
) -> None:
    run(opened(run_folder)[0], tmp_path / "whole", users, **HOW)
    out = tmp_path / "recs"
    with pytest.raises(KeyboardInterrupt):
        run(opened(run_folder, dies=4)[0], out, users, **HOW)
    pieces = sorted((out / "setup").glob("*.json"))
    assert len(pieces) == 3
    pieces[1].write_bytes(pieces[1].read_bytes()[:-10])
    model, engine = opened(run_folder)
    run(model, out, users, **HOW)
    assert engine.alone == [5, 1]
    assert made(out) == made(tmp_path / "whole")


def test_pieces_of_another_job_are_not_taken(run_folder: Path, users: Path, tmp_path: Path) -> None:
    out = tmp_path / "recs"
    with pytest.raises(KeyboardInterrupt):
        run(opened(run_folder, dies=3)[0], out, users, **HOW)
    model, engine = opened(run_folder)
    run(model, out, users, **(HOW | {"k": 2}))
    assert engine.alone == [5, 5, 5, 1]
    assert not (out / "setup").exists()


def test_a_dry_run_counts_the_pieces_once_and_leaves_the_model_as_it_was(run_folder: Path, users: Path) -> None:
    model, engine = opened(run_folder)
    found = dry_run(model, users, shard_rows=5)
    assert engine.alone == [], "they are no part of what is timed"
    assert np.isnan(model.ranker.prior).all()
    without = dry_run(model, users, shard_rows=5, method="generate")
    assert found["tokens"] > sum(map(len, model.ranker.tokens(range(16)))) > 0 == without["tokens"]


def test_a_part_that_waits_for_another_s_set_up_can_be_stopped(run_folder: Path, users: Path, tmp_path: Path) -> None:
    out, stop = tmp_path / "recs", threading.Event()
    model, engine = opened(run_folder)
    out.mkdir()
    with (out / "lock.setup").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        threading.Timer(0.3, stop.set).start()
        ended = run(model, out, users, part="1/2", stop=stop, **HOW)
    assert (ended["state"], ended["shards_done"], ended["shards_left"]) == ("stopped", 0, 3)
    assert engine.alone == []
    assert run(model, out, users, part="1/2", **HOW)["state"] == "part"
