"""What a job would be and cost: rows and shards counted, rates measured on some of its rows, here and now."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from penchant.batch.asked import asked
from penchant.batch.identity import identity_of
from penchant.batch.options import BatchOptions
from penchant.batch.quarantine import faults, reasons
from penchant.batch.setup import needs_prior, prior_of
from penchant.batch.shards import Shards
from penchant.batch.worker import Worker
from penchant.recommend import Recommender

# Places of the input that are tried, and rows of each.
_PLACES, _LLM_ROWS, _ROWS = 4, 8, 128


def dry_run(
    model: Recommender | Path | str,
    rows: Path | str | None = None,
    options: BatchOptions | None = None,
    *,
    n_threads: int | None = None,
    **settings: object,
) -> dict[str, Any]:
    """As ``run``, but nothing is written. Keys: rows, shards, shard_rows, sample_rows, bad_in_sample, tokens,
    users_per_s, seconds (of one process, the model's loading left out).
    """
    job = asked(model, rows, options, n_threads=n_threads, **settings)
    shards = Shards(Path(), job.source.rows, job.options.rows)
    nothing = np.zeros(0, dtype=np.int64)  # duplicates are found when the job starts
    worker = Worker(job.model, job.options, identity_of(job.model, job.options), nothing)
    size = _LLM_ROWS if job.options.asks_llm else _ROWS
    starts = np.unique(np.linspace(0, max(0, job.source.rows - size), _PLACES).astype(int)).tolist()
    parts, at = [], 0
    for start in starts:
        parts.append(range(max(start, at), min(max(start, at) + size, job.source.rows)))
        at = parts[-1].stop
    parts = [part for part in parts if len(part)]
    prior = 0
    if needs_prior(job.model, job.options):
        prior = sum(map(len, job.model.ranker.tokens(np.flatnonzero(np.isnan(prior_of(job.model, job.options))))))
    prepared = []
    begun = time.perf_counter()
    for part, frame in zip(parts, job.source.read(parts), strict=True):
        prepared.append(worker.prepare(0, part.start, frame))
    preparing = time.perf_counter() - begun
    with _priors_known(job.model) if prior and job.options.method == "rank" else nullcontext():
        worker.answer(prepared[0], lambda n: None)  # the first forwards of a process are slower
        begun = time.perf_counter()
        answered = [worker.answer(one, lambda n: None) for one in prepared]
        seconds = time.perf_counter() - begun
    sample = sum(one.n_rows for one in answered)
    tokens = sum(one.run or one.asked for one in answered)
    scale = job.source.rows / sample
    # Preparing runs beside the engine; the slower of the two decides.
    whole = max(seconds, preparing) * scale + (prior * seconds / tokens if tokens else 0.0)
    return {
        "rows": job.source.rows,
        "shards": len(shards),
        "shard_rows": job.options.rows,
        "sample_rows": sample,
        "bad_in_sample": faults(reasons([bad for one in answered for bad in one.bad])),
        "tokens": round(tokens * scale) + prior,
        "users_per_s": round(sample / max(seconds, preparing), 3),
        "seconds": round(whole, 1),
    }


@contextmanager
def _priors_known(model: Recommender) -> Iterator[None]:
    """No likelihood without history is asked for: a job has it before its first shard, so that it is no part of what
    rows take. The answers are nobody's.
    """
    known = model.ranker.prior
    model.ranker.prior = np.nan_to_num(known)
    try:
        yield
    finally:
        model.ranker.prior = known
