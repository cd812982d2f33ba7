"""The top of blocks of scores, found without sorting the rest: for the index and for the evaluation alike.

A block is read once, for the largest score of each group of items; those say which few of its scores can be among
the best.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from penchant.errors import NotFiniteError

Floats = NDArray[np.floating]
# Items and their scores, both (n, k).
Found = tuple[NDArray[np.int32], NDArray[np.float32]]

# Items whose largest score is looked at together.
_GROUP = 16
# Groups of groups there are for each of the k items: the more, the nearer is the k-th of them to the k-th item.
_SPARE = 8


def top_k(scores: Floats, k: int, *, above: Floats | None = None, where: str = "scores") -> Found:
    """The k largest of each row (n, m), best first, equal scores in index order; -inf is never returned.

    ``above`` (n,) leaves out whatever is not larger. Rows with fewer than k are padded with item -1 and score
    -inf. NotFiniteError, naming ``where``, if a score is not a number.
    """
    n, m = scores.shape
    if k == 0:
        return nothing(n, k)
    group = max(1, min(_GROUP, m // k))
    best = _group_best(scores, group)
    if np.isnan(best).any():  # the largest of a group is NaN where any of it is
        raise not_a_number(where)
    row, column = _contenders(scores, best, group, k, above)
    return best_of(row, column, scores[row, column], n, k)


def best_of(row: NDArray[np.integer], column: NDArray[np.integer], value: Floats, n: int, k: int) -> Found:
    """The k best of each row's (column, value) pairs, which come by row and by column: padded as in ``top_k``."""
    count = np.bincount(row, minlength=n)
    width = int(count.max()) if n else 0
    place = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
    values = np.full((n, width), -np.inf, dtype=value.dtype)
    columns = np.full((n, width), -1, dtype=np.int32)
    values[row, place], columns[row, place] = value, column
    order = np.argsort(-values, axis=1, kind="stable")[:, :k]
    best, score = nothing(n, k)
    best[:, : order.shape[1]] = np.take_along_axis(columns, order, axis=1)
    with np.errstate(over="ignore"):  # a float64 past float32's range is infinite here
        score[:, : order.shape[1]] = np.take_along_axis(values, order, axis=1)
    return best, score


def nothing(n: int, k: int) -> Found:
    """Padding alone: items -1 and scores -inf, (n, k)."""
    return np.full((n, k), -1, dtype=np.int32), np.full((n, k), -np.inf, dtype=np.float32)


def not_a_number(where: str) -> NotFiniteError:
    return NotFiniteError(
        "gave a score that is not a number", where=where, remedy="score what cannot be served with -inf"
    )


def _group_best(scores: Floats, group: int) -> Floats:
    """The largest score of each group. Item i of the first group * c items is in group i % c; the rest stand alone.

    Groups of items that far apart are read in long rows, at the speed of memory.
    """
    n, m = scores.shape
    c = m // group
    inner: Floats = scores[:, : c * group].reshape(n, group, c).max(axis=1)
    return np.concatenate([inner, scores[:, c * group :]], axis=1)


def _contenders(
    scores: Floats, best: Floats, group: int, k: int, above: Floats | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and columns, in order, of all scores that can be among the k best of their row.

    The k-th largest of the best of groups (of groups) is a floor: k items at least stand on or above it, so an
    item below is none of them, and neither is any of a group whose best is.
    """
    n, m = scores.shape
    c, groups = m // group, best.shape[1]
    coarse = _group_best(best, max(1, min(_GROUP, groups // (_SPARE * k))))
    last = coarse.shape[1] - k
    nothing_less = np.full(n, -np.inf, best.dtype)
    floor = np.partition(coarse, last, axis=1)[:, last] if last >= 0 else nothing_less
    bar = nothing_less if above is None else above
    row, at = np.nonzero((best >= floor[:, None]) & (best > bar[:, None]))
    alone = at >= c
    column = np.where(alone[:, None], at[:, None] - c + c * group, at[:, None] + c * np.arange(group))
    value = scores[row[:, None], column]
    kept = (value >= floor[row][:, None]) & (value > bar[row][:, None])
    kept[alone, 1:] = False
    flat = np.sort((row[:, None] * m + column)[kept])
    return flat // m, flat % m
