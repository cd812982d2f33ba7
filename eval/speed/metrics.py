"""Ranking metrics of a million users' top 100: seconds and peak memory, with one relevant item a user and with several.

python eval/speed/metrics.py --out eval/results/metrics.json

Each of the two is measured in a process of its own, that its peak be its own. The lists (int32) are made first and
count in the peak, but not in the seconds. The intervals that a report puts around the means are timed apart.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer
from numpy.typing import NDArray

from penchant import metrics
from penchant.cli.script import script
from penchant.environment import made_by, process_mib
from penchant.evaluation.statistics import bootstrap_mean
from penchant.files import write_json

Kind = Literal["one", "several"]

_ITEMS = 100_000
_CUTS = (10, 50, 100)
_SINGLE = (
    metrics.hit_rate,
    metrics.recall,
    metrics.precision,
    metrics.f1,
    metrics.ndcg,
    metrics.mrr,
    metrics.average_precision,
)


def lists_of(users: int, length: int, rng: np.random.Generator) -> NDArray[np.int32]:
    """Lists of different items: steps of random size round a circle of all items."""
    steps = rng.integers(1, _ITEMS // length, size=(users, length), dtype=np.int32)
    steps[:, 0] = rng.integers(_ITEMS, size=users)
    np.cumsum(steps, axis=1, dtype=np.int32, out=steps)
    steps %= _ITEMS
    return steps


def measure(kind: Kind, users: int, length: int, relevant: int) -> dict[str, Any]:
    """Every metric at every cut, one value a user; seconds of the whole, of the intervals, and peak memory."""
    rng = np.random.default_rng(0)
    lists = lists_of(users, length, rng)
    before = process_mib(peak=True)
    # Half of the relevant items are to be found.
    wanted = rng.integers(_ITEMS, size=(users, relevant if kind == "several" else 1), dtype=np.int32)
    found = rng.random(wanted.shape) < 0.5
    wanted = np.where(found, lists[np.arange(users)[:, None], rng.integers(length, size=wanted.shape)], wanted)
    begun = time.perf_counter()
    if kind == "one":
        rank = metrics.list_rank(lists, wanted[:, 0])
        values = {f"{m.__name__}@{k}": m(rank, k) for m in _SINGLE for k in _CUTS}
    else:
        row = np.repeat(np.arange(users), relevant)
        hits = metrics.Hits.of(lists, metrics.Relevant.of_pairs(row, wanted.ravel(), users))
        values = {f"{m.__name__}@{k}": getattr(hits, m.__name__)(k) for m in _SINGLE for k in _CUTS}
    means = {name: float(value.mean()) for name, value in values.items()}
    seconds = time.perf_counter() - begun
    peak = process_mib(peak=True)
    begun = time.perf_counter()
    estimate = bootstrap_mean(values["ndcg@10"])
    return {
        "users": users,
        "places": length,
        "relevant_items_a_user": wanted.shape[1],
        "metrics": len(values),
        "seconds": round(seconds, 2),
        "peak_mib": round(peak),
        "mib_with_the_lists_alone": round(before),
        "seconds_of_one_bootstrap_interval": round(time.perf_counter() - begun, 2),
        "ndcg@10": [round(x, 5) for x in (means["ndcg@10"], estimate.low, estimate.high)],
    }


def main(
    out: Annotated[Path | None, typer.Option(help="The JSON file to write.")] = None,
    users: Annotated[int, typer.Option(help="Users.")] = 1_000_000,
    length: Annotated[int, typer.Option(help="Places of each list.")] = 100,
    relevant: Annotated[int, typer.Option(help="Relevant items of each user, where there are several.")] = 10,
    only: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Seed 0, 100,000 items."""
    if only:
        print(json.dumps(measure("one" if only == "one" else "several", users, length, relevant)))
        return
    sizes = ["--users", str(users), "--length", str(length), "--relevant", str(relevant)]
    found: dict[str, Any] = made_by(__file__)
    for kind in ("one", "several"):
        command = [sys.executable, __file__, "--only", kind, *sizes]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
        found[kind] = json.loads(lines[-1])
        print(kind, found[kind])
    if out is not None:
        write_json(out, found)


if __name__ == "__main__":
    script(main)
