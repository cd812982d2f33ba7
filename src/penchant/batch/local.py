"""Shards one after the other in this process: while the engine is at one, the next is read and tokenised and the last
is written.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from penchant.batch.rows import Prepared
from penchant.batch.shards import Record, Shards
from penchant.batch.source import Source
from penchant.batch.worker import Worker


def run_local(
    worker: Worker,
    source: Source,
    shards: Shards,
    todo: Sequence[int],
    *,
    batch: Callable[[int], None],
    done: Callable[[Record], None],
    stopped: Callable[[], bool],
) -> None:
    """Make the shards of ``todo`` (ascending), or those there is time for: once ``stopped`` says so, the one in hand is
    finished and no other is begun.

    ``batch`` hears of rows just answered, ``done`` of each shard on disk; both are called in this thread.
    """

    def prepared() -> Iterator[Prepared]:
        ranges = [shards.range(shard) for shard in todo]
        for shard, rows, frame in zip(todo, ranges, source.read(ranges), strict=True):
            yield worker.prepare(shard, rows.start, frame)

    coming = prepared()
    writing: Future[Record] | None = None
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        ahead = reader.submit(next, coming, None)
        while not stopped() and (ready := ahead.result()) is not None:
            ahead = reader.submit(next, coming, None)
            begun = time.perf_counter()
            answered = worker.answer(ready, batch)
            seconds = time.perf_counter() - begun
            if writing is not None:
                done(writing.result())
            writing = writer.submit(shards.write, answered, seconds)
        if writing is not None:
            done(writing.result())
