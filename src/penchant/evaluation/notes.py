"""What a reader must know of the protocol before believing a table."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from penchant.data.history import Targets
from penchant.data.likeness import words_shared
from penchant.data.split import Split
from penchant.evaluation.ranking import Seen, newest
from penchant.evaluation.rows import Average
from penchant.evaluation.systems import Queries
from penchant.schema import TITLE


def protocol_notes(
    split: Split,
    targets: Targets,
    seen: Seen,
    seen_last: int | None,
    candidates: NDArray[np.integer] | None,
    average: Average,
) -> list[str]:
    """How targets were ranked and averaged, and what of them no system can find."""
    log = split.log
    masked = "repeats count, seen items are not masked"
    if seen == "mask":
        masked = "seen items masked" if seen_last is None else f"the last {seen_last} seen items masked"
    if candidates is None:
        ranking = f"full ranking over the catalogue, {masked}"
    else:
        ranking = (
            f"ranked among sampled candidates only ({candidates.shape[1]} a target), nothing masked: comparable with "
            "nothing but the same candidates"
        )
    mean = "over targets" if average == "event" else "over users, each the mean of the user's targets"
    notes = [
        f"{ranking}, ties counted against us; mean {mean} [95% bootstrap interval, whole users drawn again]",
        split.summary(),
    ]
    if split.spec["kind"].startswith("leave-last-out"):
        notes.append(
            "leave-last-out: whatever is trained on all users has seen other users' events later than a target"
        )
    shared = words_shared(log.user, log.item, split.dataset.items[TITLE].to_list())
    if shared is not None and shared.strange:
        notes.append(f"{shared}: are the titles of these items, or of another numbering?")
    repeated = _repeated(targets)
    masking = seen == "mask" and candidates is None
    lost = _repeated(targets, seen_last) if masking else 0
    if lost:
        notes.append(
            f"{lost:,} targets are repeats of an item the user has already; masked, they cannot be found and count "
            "as misses (--seen keep lets repeats count; prepare with --repeats first takes them out)"
        )
    if repeated > lost:
        notes.append(
            f"{repeated - lost:,} targets are repeats of an item the user has already; they count like any other"
        )
    cold = int((split.train_counts[targets.item] == 0).sum())
    if cold:
        notes.append(f"{cold:,} targets are items without any training event")
    nothing = int((targets.position == log.start[targets.user]).sum())
    if nothing:
        notes.append(f"{nothing:,} targets have no history: popularity stands in for every system there")
    return notes


def counted(targets: Targets) -> str:
    """How many, and of how few users where these have several: intervals are over users."""
    users = len(np.unique(targets.user))
    return f"{len(targets):,} test targets" + (f" of {users:,} users" if users < len(targets) else "")


def _repeated(targets: Targets, last: int | None = None) -> int:
    """Targets whose item stands in their own history, or among its ``last`` events."""
    history = [newest(items, last) for items in Queries.of(targets).history]
    length = np.array([len(h) for h in history])
    item = np.repeat(targets.item, length)
    same = np.concatenate([np.zeros(0, dtype=np.int32), *history]) == item
    return len(np.unique(np.repeat(np.arange(len(targets)), length)[same]))
