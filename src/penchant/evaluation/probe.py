"""The memorisation probe: how much of a result is what the model had read of these very items.

Two questions. What does the model know by heart (recall.py)? And what is left of each system when every title is
replaced by a neutral name (neutral.py)? Fit once on each dataset, then `probe` the two models.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from penchant.data.dataset import Dataset
from penchant.errors import DataError
from penchant.evaluation.evaluate import check_targets
from penchant.evaluation.leaks import check_run
from penchant.evaluation.llm_stage import run_llm_stage
from penchant.evaluation.neutral import neutral_dataset, neutral_names
from penchant.evaluation.notes import protocol_notes
from penchant.evaluation.ours import own_systems
from penchant.evaluation.protocol import Protocol
from penchant.evaluation.ranking import Ranked
from penchant.evaluation.recall import TitleRecall, YearRecall, title_recall, year_recall
from penchant.evaluation.report import Report, Row
from penchant.evaluation.rows import Table, corrected
from penchant.files import without_nan
from penchant.recommend import Recommender, silent
from penchant.schema import TITLE
from penchant.tokens import clean

if TYPE_CHECKING:
    from penchant.engine import Engine

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


def probe(real: Recommender, neutral: Recommender, *, llm_users: int = 500, seed: int = 0) -> Report:
    """What is left of each system, from a model fitted with real titles and one with neutral names.

    Both must be of the same events and split. All systems are ranked on all test targets, and on ``llm_users`` of
    them, drawn with ``seed``, the LLM's stage too; the differences are paired, for the users are the same.
    Raises DataError where the two are of other events, there are no targets, or the leak check finds something.
    """
    targets, other = real.split.test, neutral.split.test
    if not (np.array_equal(targets.position, other.position) and np.array_equal(real.log.item, neutral.log.item)):
        raise DataError(
            "the two runs are not of the same events and split",
            where="memorisation probe",
            remedy="fit both with the same split, one on the dataset and one on its neutral_dataset",
        )
    protocol = Protocol(llm_users=llm_users, seed=seed)
    chosen = protocol.sampled(targets)
    made = [_ranked(model, protocol, chosen) for model in (real, neutral)]
    table = Table(protocol.k, real.log.n_items, targets.user, seed=seed)
    every = f"memorisation probe, all {len(targets):,} test targets, {protocol.whole(real.log.n_items)}"
    rows = paired_rows(every, made[0][0], made[1][0], table)
    some = f"memorisation probe, the same {len(chosen):,} of them (seed {seed}) for every system"
    rows += paired_rows(some, made[0][1], made[1][1], table.take(chosen)) if len(chosen) else []
    rows, tests = corrected(rows)
    notes = protocol_notes(real.split, targets, protocol.seen, None, None, protocol.average)
    settings = {**protocol.to_dict(), "split": real.split.spec, "model": real.fingerprint}
    for name, model in (("real", real), ("neutral", neutral)):
        settings[name] = {"data": model.split.dataset.content_hash, "fusion": model.fusion.to_dict()}
    return Report(rows, [*notes, *tests], settings, title="What is left when titles mean nothing")


def _ranked(model: Recommender, protocol: Protocol, chosen: NDArray[np.integer]) -> tuple[list[Ranked], list[Ranked]]:
    """The model's systems on all its test targets, and on those ``chosen`` with the LLM's stage."""
    targets = model.split.test
    check_targets(model.split, targets)
    check_run(model, targets, targets.take(chosen))
    every = [protocol.rank(system, targets) for system in own_systems(model)]
    some = [one.take(chosen) for one in every]
    if len(chosen):
        stage = run_llm_stage(
            model,
            targets.take(chosen),
            some[0],
            seen=protocol.seen,
            seen_last=protocol.seen_last,
            candidates=None,
            stages=silent,
        )
        some += stage.ranked
    return every, some


def _plain(system: str) -> str:
    return _CHOSEN.sub("", system)
