"""How far the seeds of a task lie apart, row by row of their tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from penchant.evaluation.statistics import Spread


def spread(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean, range and deviation over the seeds of every row that each of them has, differences left out."""
    out = []
    for row in runs[0]["rows"]:
        same = [other for run in runs for other in run["rows"] if row_key(other) == row_key(row)]
        if row["difference"] or len(same) != len(runs):
            continue
        metrics = {}
        for name in row["metrics"]:
            found = Spread.of([other["metrics"][name]["mean"] for other in same])
            metrics[name] = {
                "mean": found.mean,
                "low": found.low,
                "high": found.high,
                "sd": found.sd if found.n > 1 else None,
                "n": found.n,
            }
        out.append({"group": row["group"], "system": row["system"], "metrics": metrics})
    return out


def row_key(row: dict[str, Any]) -> tuple[str, str]:
    """A row's group and system, whatever the seed."""
    return plain(row["group"]), plain(row["system"])


def plain(name: str) -> str:
    """A group's or a system's name without what differs between seeds: the sample's seed, the fusion's numbers."""
    return name.partition(" (seed")[0].partition(" (weight")[0]
