"""A finished table of recommendations, from whatever made it, scored on a split's targets beside popularity."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from penchant.data.history import Targets
from penchant.data.split import Split
from penchant.evaluation.baselines.events import TrainingEvents
from penchant.evaluation.baselines.popularity import fit_popularity
from penchant.evaluation.evaluate import Protocol, tabulate
from penchant.evaluation.lists import score_lists
from penchant.evaluation.ranking import Ranked
from penchant.evaluation.report import Report
from penchant.evaluation.rows import Average


def evaluate_lists(
    split: Split,
    targets: Targets,
    table: pl.DataFrame | Path,
    *,
    k: int = 10,
    seed: int = 0,
    average: Average = "event",
    repeats: bool = False,
) -> Report:
    """The report of a table with user_id, item_id and rank or score, by the rules of penchant.evaluation.lists.

    ``repeats``: an item that the user had before may be hit. Whether the lists were made from the past alone cannot
    be told from a table; the report says so.
    """
    scored = score_lists(table, targets, k, repeats=repeats)
    name = table.stem if isinstance(table, Path) else "recommendations"
    protocol = Protocol(k=k, llm_users=0, seed=seed, average=average, seen="keep" if repeats else "mask")
    popular = protocol.rank(fit_popularity(TrainingEvents.of(split)), targets)
    given = Ranked(name, scored.rank, scored.top, float("nan"))
    report = tabulate(split, targets, protocol, [given, popular], [popular.system])
    report.notes.extend(scored.findings.notes(k, repeats=repeats))
    report.notes.append(
        "a table of recommendations does not say what it was made from: that nothing later than a target was used is "
        "for its maker to show"
    )
    report.settings["lists"] = scored.findings.to_dict()
    return report
