"""Paired differences of what systems reach on average over their seeds.

Chance in training is averaged, not removed: intervals and p are over users, with these seeds as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penchant.data.history import Targets
from penchant.data.split import Split
from penchant.evaluation.notes import counted
from penchant.evaluation.rows import Ranks, Table, corrected
from penchant.evaluation.slices import COLD_USERS, OWN_TIME, by_history_length, by_order
from penchant.evaluation.tasks import Asked, Task

# Users without whom a difference says nothing.
_FEWEST = 30


def over_seeds(
    split: Split,
    asked: Asked,
    task: Task,
    ranks: Mapping[str, Mapping[int, Ranks]],
    ours: Sequence[str],
) -> dict[str, Any]:
    """The first of ``ours`` that was made with every seed, against every other system.

    ``ranks`` has, by system and seed, one array (n_targets,); a system that lacks a seed is left out, and said to be.
    On all targets, on those that no tie in time made a target (where there are any), on cold items, and of cold users
    (1 to 3 events before the target); on none with fewer than 30 users. As JSON: ``rows``, whose p are corrected over
    all of them (Holm), and ``notes``.
    """
    whole = {name: list(made.values()) for name, made in ranks.items() if set(made) == set(task.seeds)}
    one = next((name for name in ours if name in whole), None)
    protocol = asked.protocol(task)
    table = Table(protocol.k, split.log.n_items, asked.targets.user, protocol.average, protocol.seed)
    rows = [
        table.take(at).difference(
            group, f"{one} minus {other}", *([r[at] for r in whole[name]] for name in (one, other))
        )
        for group, at in _groups(split, asked.targets)
        for other in whole
        if one is not None and other != one
    ]
    rows, notes = corrected(rows)
    for name, made in ranks.items():
        if name not in whole:
            notes.append(
                f"{name} is left out of the differences: it was made with {len(made)} of {len(task.seeds)} seeds"
            )
    return {"rows": [asdict(row) for row in rows], "notes": notes}


def _groups(split: Split, targets: Targets) -> list[tuple[str, NDArray[np.int64]]]:
    alone = [part.mask for part in by_order(targets) if part.value == OWN_TIME]
    short = [part.mask for part in by_history_length(targets) if part.value == COLD_USERS]
    masks = [
        ("all {}", np.ones(len(targets), dtype=np.bool_)),
        *((f"the {{}} {OWN_TIME}", mask) for mask in alone),
        ("the {} that are cold items", split.train_counts[targets.item] == 0),
        *(("the {} with 1 to 3 events before them (cold users)", mask) for mask in short),
    ]
    found = [(group, np.flatnonzero(mask)) for group, mask in masks]
    return [
        (group.format(counted(targets.take(at))), at)
        for group, at in found
        if len(np.unique(targets.user[at])) >= _FEWEST
    ]
