"""The memorisation probe: how much of a result is what the model had read of these very items.

Two questions. What does the model know by heart (recall.py)? And what is left of each system when every title is
replaced by a neutral name (neutral.py)? Fit and evaluate once on each dataset, then `probe` the two reports.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from penchant.data.dataset import Dataset
from penchant.errors import DataError
from penchant.evaluation.neutral import neutral_dataset, neutral_names
from penchant.evaluation.recall import TitleRecall, YearRecall, title_recall, year_recall
from penchant.evaluation.report import Row
from penchant.files import without_nan
from penchant.schema import TITLE
from penchant.tokens import clean

if TYPE_CHECKING:
    from penchant.engine import Engine
    from penchant.evaluation.ranking import Ranked
    from penchant.evaluation.rows import Table

__all__ = [
    "TitleRecall",
    "YearRecall",
    "memorisation",
    "neutral_dataset",
    "neutral_names",
    "paired_rows",
    "probe",
    "title_recall",
    "year_recall",
]

# What a fit chose for itself and put into a system's name; the other run may have chosen otherwise.
_CHOSEN = re.compile(r" \(weight [^)]*\)$")
CONSERVATIVE = (
    "neutral minus real titles: the intervals treat the two runs as if on different users, so they are wider than "
    "those of the paired differences"
)


def memorisation(engine: Engine, dataset: Dataset, n: int = 200, seed: int = 0) -> dict[str, Any]:
    """What the model knows of this catalogue by heart, for JSON: ``titles`` and ``years`` (None without years)."""
    texts = [clean(title) for title in dataset.items[TITLE]]
    titles = title_recall(engine, texts, n=n, seed=seed)
    years = year_recall(engine, texts, n=n, seed=seed)
    return {
        "model": engine.fingerprint,
        "data": dataset.content_hash,
        "n": n,
        "seed": seed,
        "titles": without_nan(asdict(titles)),
        "years": None if years is None else without_nan(asdict(years)),
    }


def paired_rows(group: str, real: Sequence[Ranked], neutral: Sequence[Ranked], table: Table) -> list[Row]:
    """Each system with real titles, with neutral names, and the paired difference with its test.

    Both runs must hold the ranks of the same targets in the same order. ``p`` is not yet corrected
    (`rows.corrected`). Systems that only one run has are left out.
    """
    others = {_plain(one.system): one for one in neutral}
    out = []
    for one in real:
        other = others.get(_plain(one.system))
        if other is None:
            continue
        if len(one.rank) != len(other.rank):
            raise DataError(
                f"{one.system} has {len(one.rank):,} targets with real titles, {len(other.rank):,} with neutral names",
                where="memorisation probe",
                remedy="evaluate both on the same targets",
            )
        out += [
            table.row(group, f"{one.system}, real titles", one.rank),
            table.row(group, f"{other.system}, neutral names", other.rank),
            table.difference(group, f"{_plain(one.system)}: neutral minus real", other.rank, one.rank),
        ]
    return out


def probe(real: Mapping[str, Any], neutral: Mapping[str, Any]) -> dict[str, Any]:
    """Rows and notes for a table of what is left, from two reports' dicts (`Report.to_dict`).

    ``rows`` have the shape of a report's: for each group and system the real, the neutral and the difference. The
    dicts hold no ranks, so the differences' intervals join the two runs' as if independent; both rank the same
    users, whose luck is in common, so the true ones are narrower (`paired_rows` gives those). Raises DataError
    where the two are of different numbers of targets.
    """
    others = {(row["group"], _plain(row["system"])): row for row in neutral["rows"] if not row["difference"]}
    rows, unmatched = [], []
    for row in real["rows"]:
        if row["difference"]:
            continue
        other = others.get((row["group"], _plain(row["system"])))
        if other is None:
            unmatched.append(row["system"])
            continue
        both = [name for name in row["metrics"] if name in other["metrics"]]
        group = f"memorisation probe, {row['group']}"
        rows += [
            _row(group, f"{row['system']}, real titles", {name: row["metrics"][name] for name in both}),
            _row(group, f"{other['system']}, neutral names", {name: other["metrics"][name] for name in both}),
            _row(
                group,
                f"{_plain(row['system'])}: neutral minus real",
                {name: _minus(other["metrics"][name], row["metrics"][name], row["system"]) for name in both},
                difference=True,
            ),
        ]
    notes = [CONSERVATIVE] if rows else []
    if unmatched:
        notes.append(f"in one of the two runs only, and so not compared: {', '.join(dict.fromkeys(unmatched))}")
    return {"rows": rows, "notes": notes}


def _plain(system: str) -> str:
    return _CHOSEN.sub("", system)


def _row(group: str, system: str, metrics: dict[str, Any], *, difference: bool = False) -> dict[str, Any]:
    return {"group": group, "system": system, "metrics": metrics, "difference": difference, "p": None, "more": {}}


def _minus(one: Mapping[str, Any], other: Mapping[str, Any], system: str) -> dict[str, Any]:
    """The difference of two means, with the interval of independent ones: half widths add as squares."""
    if one["n"] != other["n"]:
        raise DataError(
            f"{system} has {other['n']:,} users with real titles and {one['n']:,} with neutral names",
            where="memorisation probe",
            remedy="evaluate both on the same targets",
        )
    known = all(value is not None for end in (one, other) for value in (end["mean"], end["low"], end["high"]))
    if not known:
        means = one["mean"] is not None and other["mean"] is not None
        return {"mean": one["mean"] - other["mean"] if means else None, "low": None, "high": None, "n": one["n"]}
    mean = one["mean"] - other["mean"]
    below = math.hypot(one["mean"] - one["low"], other["high"] - other["mean"])
    above = math.hypot(one["high"] - one["mean"], other["mean"] - other["low"])
    return {"mean": mean, "low": mean - below, "high": mean + above, "n": one["n"]}
