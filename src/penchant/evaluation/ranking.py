"""The one place where scores become ranks: full ranking, seen items masked, ties counted against the target.

Scores come in blocks, so that memory stays bounded whatever the catalogue. A block is read twice: once to find the
top of the list, and once to count what is not worse than the target.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from penchant.data.history import Targets
from penchant.errors import ConfigError, DataError, ModelError
from penchant.evaluation.systems import Queries, System
from penchant.interest.top import best_of, not_a_number, top_k

Seen = Literal["mask", "keep"]
Floats = NDArray[np.floating]

# Scores held at once: 8M float32 are 32 MB.
BLOCK = 8_000_000


@dataclass(frozen=True, eq=False)
class Ranked:
    """What one system made of n targets.

    ``rank`` (n,) is the target's place from 1, n_items + 1 where it cannot be found. ``top`` (n, k) are the best
    items, -1 where there were fewer. ``seconds`` is what the system's own scoring took.
    """

    system: str
    rank: NDArray[np.int64]
    top: NDArray[np.int32]
    seconds: float

    def take(self, rows: NDArray[np.integer]) -> Ranked:
        """The same of some targets; the seconds in proportion."""
        share = len(rows) / len(self.rank) if len(self.rank) else 0.0
        return Ranked(self.system, self.rank[rows], self.top[rows], self.seconds * share)


def newest(history: NDArray[np.int32], last: int | None) -> NDArray[np.int32]:
    """The newest ``last`` events of a history (oldest first); all of them where that is None."""
    return history if last is None else history[max(0, len(history) - last) :]


def rank_targets(
    system: System,
    targets: Targets,
    *,
    k: int = 100,
    seen: Seen = "mask",
    seen_last: int | None = None,
    candidates: NDArray[np.integer] | None = None,
    block: int = BLOCK,
    done: Callable[[int], None] | None = None,
) -> Ranked:
    """Rank every target among the whole catalogue by the system's scores, ``block`` scores at a time.

    ``seen="mask"`` takes the items of a target's own history out, the target too where it repeats one: it then
    cannot be found. ``seen_last`` masks the newest so many events only, as some published protocols do. ``"keep"``
    leaves every item in, for domains where people come back to an item. Of the target and its equals the target
    comes last in ``rank``; ``top`` orders equals by index.

    ``candidates`` (n, c), padded with -1, ranks among those items alone, an item counted once, and masks nothing;
    say so wherever the numbers are shown. ``done`` is told of targets as they are finished.
    Raises ModelError where the scores have another shape than (n, n_items) or hold a NaN.
    """
    if k < 1 or block < 1:
        raise ConfigError(f"k is {k} and block {block}", where="rank_targets", remedy="give 1 or more")
    if seen not in ("mask", "keep"):
        raise ConfigError(f"unknown seen={seen!r}", where="rank_targets", remedy="use mask or keep")
    if seen_last is not None and seen_last < 0:
        raise ConfigError(f"seen_last is {seen_last}", where="rank_targets", remedy="give 0 or more")
    n, n_items = len(targets), targets.log.n_items
    if candidates is not None:
        _check_candidates(candidates, n, n_items)
    queries, item = Queries.of(targets), targets.item
    rank = np.zeros(n, dtype=np.int64)
    top = np.full((n, k), -1, dtype=np.int32)
    seconds = 0.0
    rows = max(1, block // max(1, n_items))
    for start in range(0, n, rows):
        part = slice(start, min(start + rows, n))
        asked = queries.take(part)
        begun = time.perf_counter()
        scores = system.scores(asked)
        seconds += time.perf_counter() - begun
        _check_scores(scores, len(asked), n_items, system.name)
        if candidates is not None:
            rank[part], top[part] = _among(scores, item[part], candidates[part], k, system.name)
        else:
            masked = asked.history if seen == "mask" else []
            rank[part], top[part] = _whole(scores, item[part], masked, seen_last, k, system.name)
        if done is not None:
            done(len(asked))
    return Ranked(system.name, rank, top, seconds)


def _check_candidates(candidates: NDArray[np.integer], n: int, n_items: int) -> None:
    if candidates.ndim != 2 or len(candidates) != n:
        raise DataError(
            f"candidates of shape {candidates.shape} for {n} targets",
            where="rank_targets",
            remedy="give one row of items a target, padded with -1",
        )
    if candidates.size and (candidates.min() < -1 or candidates.max() >= n_items):
        raise DataError(
            f"a candidate is no item of the {n_items} in the catalogue",
            where="rank_targets",
            remedy="give indices of the log's items, and -1 for none",
        )


def _check_scores(scores: Floats, n: int, n_items: int, name: str) -> None:
    if scores.shape != (n, n_items) or not np.issubdtype(scores.dtype, np.floating):
        raise ModelError(
            f"gave scores {scores.dtype} of shape {scores.shape}, and not floats of shape {(n, n_items)}",
            where=name,
            remedy="return one row a query and one column an item",
        )


def _whole(
    scores: Floats,
    target: NDArray[np.integer],
    masked: list[NDArray[np.int32]],
    last: int | None,
    k: int,
    name: str,
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Ranks and top lists of one block. The seen items' scores are put back: the array may be the system's own."""
    if last is not None:
        masked = [newest(history, last) for history in masked]
    if not masked or not sum(map(len, masked)):
        return _ranks(scores, target, k, name)
    if not scores.flags.writeable:
        scores = scores.copy()
    row = np.repeat(np.arange(len(scores)), [len(h) for h in masked])
    column = np.concatenate(masked)
    kept = scores[row, column]
    if np.isnan(kept).any():
        raise not_a_number(name)
    scores[row, column] = -np.inf
    try:
        return _ranks(scores, target, k, name)
    finally:
        scores[row, column] = kept


def _ranks(
    scores: Floats, target: NDArray[np.integer], k: int, name: str
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    n, m = scores.shape
    top, _ = top_k(scores, k, where=name)  # first: it refuses what is not a number
    own = scores[np.arange(n), target]
    rank = np.fromiter((np.count_nonzero(row >= o) for row, o in zip(scores, own, strict=True)), np.int64, n)
    rank[np.isneginf(own)] = m + 1
    return rank, top


def _among(
    scores: Floats, target: NDArray[np.integer], candidates: NDArray[np.integer], k: int, name: str
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Ranks and top lists among each row's distinct candidates; n_items + 1 where the target is none of them."""
    n, m = scores.shape
    items = np.sort(candidates, axis=1)
    fresh = items >= 0
    fresh[:, 1:] &= items[:, 1:] != items[:, :-1]
    value = np.take_along_axis(scores, np.maximum(items, 0), axis=1)
    if np.isnan(value[fresh]).any():
        raise not_a_number(name)
    own = scores[np.arange(n), target]
    rank = ((value >= own[:, None]) & fresh).sum(axis=1)
    lost = np.isneginf(own) | ~((items == target[:, None]) & fresh).any(axis=1)
    row, at = np.nonzero(fresh & (value > -np.inf))
    top, _ = best_of(row, items[row, at], value[row, at], n, k)
    return np.where(lost, m + 1, rank), top
