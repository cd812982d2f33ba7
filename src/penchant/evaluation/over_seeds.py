"""Paired differences of what systems reach on average over their seeds: chance in training is no part of them."""

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
from penchant.evaluation.slices import by_order
from penchant.evaluation.tasks import Asked, Task

# Users without whom a difference says nothing.
_FEWEST = 30


def over_seeds(
    split: Split,
    asked: Asked,
    task: Task,
    ranks: Mapping[str, Mapping[int, Ranks]],
    ours: Sequence[str],
    variants: Sequence[str],
) -> dict[str, Any]:
    """Each of ``ours`` against every system that is none of our ``variants``, and our first against the others of ours.

    ``ranks`` has, by system and seed, one array (n_targets,); a system that lacks a seed is left out. On all targets,
    on those that no tie in time with the event before decided (where there are any), and on cold items; on none with
    fewer than 30 users. As JSON: ``rows``, whose p are corrected over all of them (Holm), and ``notes``.
    """
    whole = {name: list(made.values()) for name, made in ranks.items() if set(made) == set(task.seeds)}
    theirs = [name for name in whole if name not in variants]
    pairs = [(one, other) for one in ours for other in theirs] + [(ours[0], other) for other in ours[1:]]
    protocol = asked.protocol(task)
    table = Table(protocol.k, split.log.n_items, asked.targets.user, protocol.average, protocol.seed)
    rows = [
        table.take(at).difference(
            group, f"{one} minus {other}", *([r[at] for r in whole[name]] for name in (one, other))
        )
        for group, at in _groups(split, asked.targets)
        for one, other in pairs
        if one in whole and other in whole
    ]
    rows, notes = corrected(rows)
    return {"rows": [asdict(row) for row in rows], "notes": notes}


def _groups(split: Split, targets: Targets) -> list[tuple[str, NDArray[np.int64]]]:
    later = [part.mask for part in by_order(targets) if part.value.startswith("later")]
    masks = [
        ("all {}", np.ones(len(targets), dtype=np.bool_)),
        *(("the {} later than the event before them", mask) for mask in later),
        ("the {} that are cold items", split.train_counts[targets.item] == 0),
    ]
    found = [(group, np.flatnonzero(mask)) for group, mask in masks]
    return [
        (group.format(counted(targets.take(at))), at)
        for group, at in found
        if len(np.unique(targets.user[at])) >= _FEWEST
    ]
