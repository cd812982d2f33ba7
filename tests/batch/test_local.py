"""Reading, the engine and writing overlap; the order rows are asked in."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
from tests.batch.conftest import USERS

from penchant.batch.local import run_local
from penchant.batch.options import BatchOptions
from penchant.batch.rows import Preparer
from penchant.recommend import Recommender

SHARDS = 4
_LONG = 10.0  # seconds: a loop that does one thing at a time would wait for ever


def test_the_next_shard_is_read_and_the_last_one_written_while_the_engine_is_at_work() -> None:
    events = {name: [threading.Event() for _ in range(SHARDS)] for name in ("prepared", "answering", "writing")}

    def prepare(shard: int, start: int, frame: Any) -> int:
        events["prepared"][shard].set()
        return shard

    def answer(shard: int, batch: Any) -> int:
        events["answering"][shard].set()
        if shard + 1 < SHARDS:
            assert events["prepared"][shard + 1].wait(_LONG), "the next shard is read only when this one is answered"
        if shard:
            assert events["writing"][shard - 1].wait(_LONG), "the last shard is not written meanwhile"
        return shard

    def write(shard: int, seconds: float) -> dict[str, Any]:
        events["writing"][shard].set()
        if shard + 1 < SHARDS:
            assert events["answering"][shard + 1].wait(_LONG), "the engine waits until this shard is written"
        return {"shard": shard}

    done: list[int] = []
    run_local(
        SimpleNamespace(prepare=prepare, answer=answer),  # type: ignore[arg-type]
        SimpleNamespace(read=iter),  # type: ignore[arg-type]
        SimpleNamespace(range=lambda shard: range(shard, shard + 1), write=write),  # type: ignore[arg-type]
        range(SHARDS),
        batch=lambda n: None,
        done=lambda record: done.append(record["shard"]),
        stopped=lambda: False,
    )
    assert done == list(range(SHARDS))


def test_rows_are_asked_by_length_and_among_like_lengths_by_how_they_begin(model: Recommender, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [(f"g{i}", [str(x) for x in rng.integers(1, 4, size=rng.integers(1, 7))]) for i in range(60)]
    frame = pl.DataFrame(rows, schema=USERS, orient="row")
    found = Preparer(model, BatchOptions(), np.zeros(0, dtype=np.int64))(0, 0, frame)
    assert sorted(found.order) == list(range(60))
    lengths = [found.tokens[place] // 32 for place in found.order]
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > 2
    begins = [(length, found.histories[at].item[0]) for length, at in zip(lengths, found.order, strict=True)]
    changes = sum(a != b for a, b in itertools.pairwise(begins))
    assert changes == len(set(begins)) - 1, "those that begin alike stand together"
