"""A finished table of recommendations, from whatever made it, scored on a split's targets beside popularity."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from penchant.data.history import Targets
from penchant.data.split import Split
from penchant.errors import ConfigError
from penchant.evaluation.baselines.events import TrainingEvents
from penchant.evaluation.baselines.popularity import fit_popularity
from penchant.evaluation.evaluate import check_targets, tabulate
from penchant.evaluation.lists import score_lists
from penchant.evaluation.protocol import Protocol
from penchant.evaluation.ranking import Ranked
from penchant.evaluation.report import Report


def evaluate_lists(
    split: Split,
    targets: Targets,
    table: pl.DataFrame | Path,
    protocol: Protocol | None = None,
    *,
    item_columns: Sequence[str] = (),
    users: pl.DataFrame | None = None,
) -> Report:
    """The report of a table with user_id, item_id and rank or score, by the rules of penchant.evaluation.lists.

    ``seen`` of the protocol: under "keep" an item that the user had before may be hit. ``item_columns`` and ``users``
    are those of ``evaluate``. Whether the lists were made from the past alone cannot be told from a table; the report
    says so. ConfigError for a protocol that a finished list cannot follow: candidates, or seen_last.
    """
    protocol = protocol or Protocol()
    if protocol.candidates is not None:
        raise ConfigError(
            "a table of recommendations cannot be ranked among sampled candidates",
            where="evaluate lists",
            remedy="give a task without candidates, or none",
        )
    if protocol.seen_last is not None:
        raise ConfigError(
            f"whether lists were made with the last {protocol.seen_last} seen items masked cannot be told from a table",
            where="evaluate lists",
            remedy="give a task without seen_last, or none",
        )
    check_targets(split, targets)
    repeats = protocol.seen == "keep"
    scored = score_lists(table, targets, protocol.k, repeats=repeats)
    popular = protocol.rank(fit_popularity(TrainingEvents.of(split)), targets)
    name = table.stem if isinstance(table, Path) else "recommendations"
    name = f"{name} (given)" if name == popular.system else name  # beside the baseline, not in its place
    given = Ranked(name, scored.rank, scored.top, float("nan"))
    report = tabulate(
        split, targets, protocol, [given, popular], [popular.system], item_columns=item_columns, users=users
    )
    report.notes.extend(scored.findings.notes(protocol.k, repeats=repeats))
    report.notes.append(
        "a table of recommendations does not say what it was made from: that nothing later than a target was used is "
        "for its maker to show"
    )
    report.settings["lists"] = scored.findings.to_dict()
    return report
