"""Quality in numpy: where the target stands, what a ranked list finds, and how good a prediction is.

Everything comes as one value a target (or event), so that it can be averaged per event or per user and
given an interval. Three kinds: from the ``rank`` of the one relevant item; from ranked lists and several
relevant items (``Hits``); and from pointwise predictions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from penchant.errors import DataError

Values = NDArray[np.float64]
Kind = TypeVar("Kind", bound=np.generic)

# Places of ranked lists looked at in one go: few enough for their keys to stay in the processor's cache.
_BLOCK = 250_000
# Probabilities are kept this far from 0 and 1 in the log loss: a sure mistake costs 34.5 nats, not infinity.
_LEAST = 1e-15


# -- one relevant item: the target ---------------------------------------------------------------


def target_rank(scores: NDArray[np.floating], target: NDArray[np.integer]) -> NDArray[np.int64]:
    """Rank, from 1, of each row's target among the columns of ``scores`` (n, m); ties count against us.

    A target scored -inf (masked) or NaN can't be found: its rank is m + 1.
    """
    own = scores[np.arange(len(scores)), target]
    # Not "at least as good" but "not worse": a competitor that is NaN counts against us too.
    rank = (~(scores < own[:, None])).sum(axis=1)
    return np.where(np.isneginf(own) | np.isnan(own), scores.shape[1] + 1, rank)


def list_rank(lists: NDArray[np.integer], target: NDArray[np.integer]) -> NDArray[np.int64]:
    """Rank, from 1, of each row's target in a ranked list (n, k) padded with -1; k + 1 where it is absent."""
    hit = lists == target[:, None]
    return np.where(hit.any(axis=1), hit.argmax(axis=1) + 1, lists.shape[1] + 1)


def recall(rank: NDArray[np.integer], k: int) -> Values:
    """1 where the target is among the first k, else 0. With one relevant item this is also the hit rate."""
    _check_cut_off(k)
    return (rank <= k).astype(np.float64)


def hit_rate(rank: NDArray[np.integer], k: int) -> Values:
    """1 where the target is among the first k, else 0."""
    return recall(rank, k)


def precision(rank: NDArray[np.integer], k: int) -> Values:
    """1 / k where the target is among the first k, else 0: the places that are right, of k."""
    return recall(rank, k) / k


def f1(rank: NDArray[np.integer], k: int) -> Values:
    """The harmonic mean of precision and recall: 2 / (k + 1) where the target is among the first k, else 0."""
    return recall(rank, k) * (2.0 / (k + 1))


def ndcg(rank: NDArray[np.integer], k: int) -> Values:
    """1 / log2(rank + 1) within the first k, else 0 (Jaervelin and Kekaelaeinen 2002; the ideal is 1)."""
    _check_cut_off(k)
    return np.where(rank <= k, 1.0 / np.log2(rank + 1.0), 0.0)


def mrr(rank: NDArray[np.integer], k: int) -> Values:
    """1 / rank within the first k, else 0; its mean is the MRR."""
    _check_cut_off(k)
    return np.where(rank <= k, 1.0 / rank, 0.0)


def average_precision(rank: NDArray[np.integer], k: int) -> Values:
    """Average precision within the first k; its mean is the MAP. With one relevant item it is 1 / rank."""
    return mrr(rank, k)


def _check_cut_off(k: int) -> None:
    if k < 1:
        raise DataError(f"a metric at {k}", where="metrics", remedy="give k of 1 or more")


# -- several relevant items a user -----------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Hits:
    """Where ranked lists hold relevant items: what every metric of several relevant items is made of.

    ``row`` and ``place`` (from 1), one entry a hit, ordered by row and place; ``n_relevant`` (n,) says how many
    items are relevant in each row, ``length`` how many places the lists have. An item that stands in a list twice
    is found once, at its better place. Methods give one value a row, for the first k places.
    """

    row: NDArray[np.int64]
    place: NDArray[np.int64]
    n_relevant: NDArray[np.int64]
    length: int

    @classmethod
    def of(cls, lists: NDArray[np.integer], relevant: Sequence[NDArray[np.integer]] | Relevant) -> Hits:
        """Find each row's relevant items in its ranked list (n, k), padded with -1.

        DataError where a row has no relevant item: it has no recall, and must be left out knowingly.
        """
        relevant = relevant if isinstance(relevant, Relevant) else Relevant.of(relevant)
        n, k = lists.shape
        sizes = np.diff(relevant.start)
        if len(sizes) != n:
            raise DataError(f"{n} lists and {len(sizes)} sets of relevant items", where="metrics")
        if not sizes.all():
            raise DataError(
                f"{int((sizes == 0).sum())} rows have no relevant item",
                where=f"metrics, row {int(np.flatnonzero(sizes == 0)[0])}",
                remedy="leave these rows out of the average, and say how many they are",
            )
        flat = [np.zeros(0, dtype=np.int64)]
        block = max(1, _BLOCK // max(1, k))
        for first in range(0, n, block):
            found = _found(lists[first : first + block], relevant, first)
            flat.append(found + first * k)
        at = np.concatenate(flat)
        return cls(at // max(1, k), at % max(1, k) + 1, sizes, k)

    def _within(self, k: int) -> NDArray[np.bool_]:
        _check_cut_off(k)
        if k > self.length:
            raise DataError(f"a metric at {k} of lists with {self.length} places", where="metrics", remedy="lower k")
        return self.place <= k

    def _sum(self, within: NDArray[np.bool_], values: Values | None = None) -> Values:
        weights = None if values is None else values[within]
        counted = np.bincount(self.row[within], weights=weights, minlength=len(self.n_relevant))
        return counted.astype(np.float64, copy=False)

    def hit_rate(self, k: int) -> Values:
        """1 where any relevant item is among the first k."""
        return (self._sum(self._within(k)) > 0).astype(np.float64)

    def recall(self, k: int) -> Values:
        """The share of the relevant items that are among the first k."""
        return self._sum(self._within(k)) / self.n_relevant

    def precision(self, k: int) -> Values:
        """The share of the first k places that hold a relevant item; places left empty are wrong."""
        return self._sum(self._within(k)) / k

    def f1(self, k: int) -> Values:
        """The harmonic mean of precision and recall."""
        return 2 * self._sum(self._within(k)) / (k + self.n_relevant)

    def ndcg(self, k: int) -> Values:
        """DCG with gains of 1 over that of the best list of k (Jaervelin and Kekaelaeinen 2002)."""
        gained = self._sum(self._within(k), 1.0 / np.log2(self.place + 1.0))
        ideal = np.cumsum(1.0 / np.log2(np.arange(2, k + 2)))
        return gained / ideal[np.minimum(self.n_relevant, k) - 1]

    def mrr(self, k: int) -> Values:
        """1 over the place of the first relevant item within the first k, else 0."""
        first = np.append(True, self.row[1:] != self.row[:-1])[: len(self.row)]
        return self._sum(self._within(k) & first, 1.0 / self.place)

    def average_precision(self, k: int) -> Values:
        """Precision at each relevant item found within the first k, summed, over the number of relevant items.

        The divisor is trec_eval's: all relevant items, also where they are more than k.
        """
        starts = np.searchsorted(self.row, np.arange(len(self.n_relevant)))
        ordinal = np.arange(1, len(self.row) + 1) - starts[self.row]
        return self._sum(self._within(k), ordinal / self.place) / self.n_relevant


@dataclass(frozen=True, eq=False)
class Relevant:
    """Sets of relevant items, flat: row i has ``item[start[i]:start[i + 1]]``, ascending and each once."""

    start: NDArray[np.int64]  # (n + 1,)
    item: NDArray[np.int64]

    @classmethod
    def of(cls, sets: Sequence[NDArray[np.integer]]) -> Relevant:
        """From one array of item indices a row; an item named twice counts once."""
        sizes = np.array([len(s) for s in sets], dtype=np.int64)
        row = np.repeat(np.arange(len(sets)), sizes)
        return cls.of_pairs(row, np.concatenate([*sets, np.zeros(0, dtype=np.int64)]), len(sets))

    @classmethod
    def of_pairs(cls, row: NDArray[np.integer], item: NDArray[np.integer], n: int) -> Relevant:
        """From (row, item) pairs in any order, of ``n`` rows."""
        row, item = np.asarray(row, dtype=np.int64), np.asarray(item, dtype=np.int64)
        if item.size and item.min() < 0:
            raise DataError("a relevant item has a negative index", where="metrics")
        stride = int(item.max()) + 1 if item.size else 1
        keys = np.sort(row * stride + item)  # np.unique's hashing takes many times as long
        keys = keys[np.append(True, keys[1:] != keys[:-1])[: len(keys)]]
        return cls(np.searchsorted(keys, np.arange(n + 1) * stride), keys % stride)


def _found(lists: NDArray[np.integer], relevant: Relevant, first: int) -> NDArray[np.int64]:
    """Flat places of a block of lists, whose first row is ``first``, that hold a relevant item not seen above."""
    n = len(lists)
    start = relevant.start[first : first + n + 1]
    item = relevant.item[start[0] : start[-1]]
    stride = int(max(item.max(initial=0), lists.max(initial=0))) + 1
    rows = np.arange(n, dtype=np.int64)[:, None] * stride
    # Ascending, since rows ascend and items do within each row; the last key is past every item.
    wanted = np.append(np.repeat(rows[:, 0], np.diff(start)) + item, n * stride)
    keys = (rows + lists).ravel()
    at = np.flatnonzero((wanted[np.searchsorted(wanted, keys)] == keys) & (lists.ravel() >= 0))
    _, once = np.unique(keys[at], return_index=True)
    return at[np.sort(once)]


# -- pointwise predictions -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GroupedAuc:
    """AUC within users: the weighted mean, over how many users, and how many had one class only."""

    value: float
    n_users: int
    left_out: int


def auc(score: NDArray[np.floating], label: NDArray[np.generic]) -> float:
    """Chance that a positive event scores above a negative one, a tie counting 1/2; NaN where one class is absent."""
    return float(user_auc(score, label, np.zeros(len(score), dtype=np.int64))[1][0]) if len(score) else float("nan")


def user_auc(
    score: NDArray[np.floating], label: NDArray[np.generic], user: NDArray[np.integer]
) -> tuple[NDArray[np.int64], Values, NDArray[np.int64]]:
    """Each user's AUC: users (ascending), their AUC (NaN where a class is absent) and their numbers of events."""
    score, positive = _pairs(_scores(score), _labels(label))
    if len(user) != len(score):
        raise DataError(f"{len(score)} predictions and {len(user)} users", where="metrics", remedy="give one an event")
    users, code = np.unique(user, return_inverse=True)
    events = np.bincount(code)
    positives = np.bincount(code, weights=positive)
    negatives = events - positives
    order = np.lexsort((score, code))
    by_user, by_score, hit = code[order], score[order], positive[order]
    # The mean rank of a run of equal scores is halfway between its first and its last place.
    new = np.append(True, (by_user[1:] != by_user[:-1]) | (by_score[1:] != by_score[:-1]))[: len(order)]
    edges = np.append(np.flatnonzero(new), len(order))
    mean_rank = ((edges[:-1] + edges[1:] + 1) / 2)[np.cumsum(new) - 1]
    within = mean_rank - np.searchsorted(by_user, np.arange(len(users)))[by_user]
    ranks = np.bincount(by_user, weights=within * hit, minlength=len(users))
    pairs = positives * negatives
    value = (ranks - positives * (positives + 1) / 2) / np.where(pairs > 0, pairs, np.nan)
    return users.astype(np.int64), value, events


def gauc(
    score: NDArray[np.floating],
    label: NDArray[np.generic],
    user: NDArray[np.integer],
    *,
    by_events: bool = True,
) -> GroupedAuc:
    """AUC within each user, averaged with the user's events as weight (Zhu et al. 2017, section 4.2), or all alike.

    Users with one class only have no AUC: they are left out and counted. NaN where nobody is left.
    """
    _, value, events = user_auc(score, label, user)
    kept = ~np.isnan(value)
    weight = events[kept].astype(np.float64) if by_events else np.ones(int(kept.sum()))
    mean = float((value[kept] * weight).sum() / weight.sum()) if kept.any() else float("nan")
    return GroupedAuc(mean, int(kept.sum()), int((~kept).sum()))


def log_loss(probability: NDArray[np.floating], label: NDArray[np.generic]) -> Values:
    """-log of the probability given to what happened, in nats, one value an event.

    Probabilities are kept 1e-15 away from 0 and 1. DataError for one outside [0, 1].
    """
    p, positive = _pairs(_scores(probability), _labels(label))
    if p.size and not (p.min() >= 0 and p.max() <= 1):
        raise DataError("a probability is outside [0, 1]", where="log loss", remedy="give probabilities, not logits")
    p = np.clip(p, _LEAST, 1 - _LEAST)
    return -np.where(positive, np.log(p), np.log1p(-p))


def accuracy(score: NDArray[np.floating], label: NDArray[np.generic], threshold: float = 0.5) -> Values:
    """1 where "score above the threshold" is what happened, else 0; at the threshold itself it says no."""
    given, positive = _pairs(_scores(score), _labels(label))
    return ((given > threshold) == positive).astype(np.float64)


def squared_error(predicted: NDArray[np.floating], true: NDArray[np.floating]) -> Values:
    """(predicted - true) squared, one value an event; the RMSE is the root of its mean, so are the interval's ends."""
    given, wanted = _pairs(_scores(predicted), _scores(true))
    return (given - wanted) ** 2


def absolute_error(predicted: NDArray[np.floating], true: NDArray[np.floating]) -> Values:
    """|predicted - true|, one value an event; its mean is the MAE."""
    given, wanted = _pairs(_scores(predicted), _scores(true))
    return np.abs(given - wanted)


def rmse(predicted: NDArray[np.floating], true: NDArray[np.floating]) -> float:
    """The root of the mean squared error."""
    return float(np.sqrt(squared_error(predicted, true).mean()))


def mae(predicted: NDArray[np.floating], true: NDArray[np.floating]) -> float:
    """The mean absolute error."""
    return float(absolute_error(predicted, true).mean())


def _pairs(predicted: Values, true: NDArray[Kind]) -> tuple[Values, NDArray[Kind]]:
    """Both as they are; a shape that differs would be broadcast to pairs that nobody meant."""
    if predicted.shape != true.shape or predicted.ndim != 1:
        raise DataError(
            f"predictions of shape {predicted.shape} and truths of shape {true.shape}",
            where="metrics",
            remedy="give one of each an event, both of shape (n,)",
        )
    return predicted, true


def _scores(values: NDArray[np.floating]) -> Values:
    """As float64; a prediction that is NaN compares with nothing, and must not vanish in a mean."""
    scores = np.asarray(values, dtype=np.float64)
    if np.isnan(scores).any():
        raise DataError("a prediction or a value is not a number", where="metrics", remedy="score every event")
    return scores


def _labels(label: NDArray[np.generic]) -> NDArray[np.bool_]:
    values = np.asarray(label)
    if not np.isin(values, (0, 1)).all():
        raise DataError("a label is neither 0 nor 1", where="metrics", remedy="make them binary first")
    return values.astype(bool)
