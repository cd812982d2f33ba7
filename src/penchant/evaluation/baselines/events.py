"""What a baseline may learn from: the training events, and nothing else of a split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from penchant.data.split import Split
from penchant.evaluation.systems import Queries


@dataclass(frozen=True, eq=False)
class TrainingEvents:
    """The training events of a split as flat arrays (n,), by user and within a user by time.

    A baseline that is given this cannot see a validation or a test event. ``time`` is in microseconds.
    """

    n_users: int
    n_items: int
    user: NDArray[np.int32]
    item: NDArray[np.int32]
    time: NDArray[np.int64]

    @classmethod
    def of(cls, split: Split) -> TrainingEvents:
        log, kept = split.log, split.train
        return cls(log.n_users, log.n_items, log.user[kept], log.item[kept], log.time[kept])

    @cached_property
    def counts(self) -> NDArray[np.float32]:
        """Training events of each item (n_items,)."""
        return np.bincount(self.item, minlength=self.n_items).astype(np.float32)

    @cached_property
    def matrix(self) -> sparse.csr_array:
        """Who had what, (n_users, n_items) float32 of ones; repeats count once."""
        return multi_hot(np.split(self.item, np.searchsorted(self.user, np.arange(1, self.n_users))), self.n_items)

    def sequences(self) -> list[NDArray[np.int32]]:
        """Each user's training items, oldest first; users without any are left out."""
        return np.split(self.item, np.flatnonzero(np.diff(self.user)) + 1) if len(self.item) else []


def multi_hot(histories: Sequence[NDArray[np.integer]], n_items: int) -> sparse.csr_array:
    """Histories as rows of ones and zeros, (n, n_items) float32, whatever their order and repeats."""
    start = np.concatenate([[0], np.cumsum([len(h) for h in histories])]).astype(np.int32)
    item = np.concatenate([*histories, np.zeros(0, dtype=np.int32)]).astype(np.int32)
    rows = sparse.csr_array((np.ones(len(item), dtype=np.float32), item, start), shape=(len(histories), n_items))
    rows.sum_duplicates()
    rows.data[:] = 1
    return rows


def fading(histories: Sequence[NDArray[np.integer]], n_items: int, decay: float) -> sparse.csr_array:
    """Histories as rows, (n, n_items) float32: an item's newest event weighs decay to the power of the events after it.

    With a decay of 1 it is ``multi_hot``.
    """
    if decay == 1:
        return multi_hot(histories, n_items)
    kept = [np.unique(history[::-1], return_index=True) for history in histories]
    rows = multi_hot([item for item, _ in kept], n_items)
    ages = np.concatenate([*(age for _, age in kept), np.zeros(0, dtype=np.int64)])
    rows.data[:] = np.power(decay, ages, dtype=np.float64)
    return rows


def newest(histories: Sequence[NDArray[np.int32]], n: int | None) -> list[NDArray[np.int32]]:
    """The n newest events of each history, oldest first; all of them for None."""
    return [h if n is None else h[-n:] for h in histories]


def popular_where_empty(
    scores: NDArray[np.float32], queries: Queries, counts: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Put the popularity from training where a history is empty, in place; returns ``scores``."""
    scores[[len(h) == 0 for h in queries.history]] = counts
    return scores


def popular_behind(scores: NDArray[np.float32], counts: NDArray[np.float32]) -> NDArray[np.float32]:
    """Order what has no evidence (a score of 0; none is below) by popularity, in place; returns ``scores``.

    Thousands of items equal at 0 would all count against a baseline that has little to say about a short
    history. In [-1, 0) they stand behind everything that has a score of its own.
    """
    behind = counts / np.float32(counts.max(initial=0) + 1) - 1
    np.copyto(scores, behind, where=scores == 0)
    return scores
