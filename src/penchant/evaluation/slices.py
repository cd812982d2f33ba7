"""Groups of targets that an average hides: short histories, unseen items, the tail, ties, any column of the data.

Each family of slices says of every target where it belongs, by what was known before it and by the answer;
a system is shown neither. Slices without a target are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from penchant.data.history import Targets
from penchant.data.split import Split, tied
from penchant.errors import ConfigError, DataError
from penchant.schema import ITEM, USER, VALUES

Mask = NDArray[np.bool_]

COLD_USERS = "1-3 (cold users)"
_LENGTHS = (("0", 0, 0), (COLD_USERS, 1, 3), ("4-10", 4, 10), ("11-50", 11, 50), ("over 50", 51, None))
OWN_TIME = "at a time of their own"
_NOTHING = "(none)"
_OTHER = "(other)"


@dataclass(frozen=True, eq=False)
class Slice:
    """Targets whose ``name`` is ``value``: ``mask`` (n_targets,). Genres may overlap, all else does not."""

    name: str
    value: str
    mask: Mask

    def __len__(self) -> int:
        return int(self.mask.sum())


def slices(
    split: Split,
    targets: Targets,
    *,
    item_columns: Sequence[str] = (),
    user_columns: Sequence[str] = (),
    users: pl.DataFrame | None = None,
    max_values: int = 10,
    separator: str = VALUES,
) -> list[Slice]:
    """History length, item coldness, popularity and ties in time, then the columns asked for, in that order.

    ``users`` is a table with USER and the ``user_columns``, for a Dataset holds none. A column of numbers with more
    than ``max_values`` different ones is cut into quartiles of the targets; one of texts with ``separator`` in them,
    or of lists, gives a slice a member; of texts the ``max_values`` commonest stand alone and the rest is "(other)".
    ConfigError for a column that isn't there.
    """
    if max_values < 1:
        raise ConfigError(f"max_values is {max_values}", where="slices", remedy="give 1 or more")
    out = [
        *by_history_length(targets),
        *by_coldness(split, targets),
        *by_popularity(split, targets),
        *by_order(targets),
    ]
    for column in item_columns:
        values = _column(split.dataset.items, column, "items")[targets.item]
        out += by_values(f"item {column}", values, max_values=max_values, separator=separator)
    for column in user_columns:
        values = _user_column(users, column, targets)
        out += by_values(f"user {column}", values, max_values=max_values, separator=separator)
    return out


# -- what every data set has -----------------------------------------------------------------------


def by_history_length(targets: Targets) -> list[Slice]:
    """By how many events the user had before the target: 0, 1 to 3 (cold users), 4 to 10, 11 to 50, more."""
    length = targets.position - targets.log.start[targets.user]
    masks = [(value, (length >= low) & (length <= (np.inf if high is None else high))) for value, low, high in _LENGTHS]
    return _filled("history length", masks)


def by_coldness(split: Split, targets: Targets) -> list[Slice]:
    """By whether the target's item has a training event."""
    cold = split.train_counts[targets.item] == 0
    return _filled("item coldness", [("cold items (no training event)", cold), ("warm items", ~cold)])


def by_popularity(split: Split, targets: Targets) -> list[Slice]:
    """Head, middle and tail: the most popular items that make up a third of all training events, the next, the rest.

    Items are taken by falling number of training events (equal ones by index); one belongs where the events before
    it end. Items without a training event are in none of them: they are the cold ones.
    """
    counts = split.train_counts
    order = np.lexsort((np.arange(len(counts)), -counts))
    before = np.empty(len(counts), dtype=np.int64)
    before[order] = np.cumsum(counts[order]) - counts[order]
    third = np.minimum(3 * before // max(1, int(counts.sum())), 2)
    warm = counts[targets.item] > 0
    masks = [(value, warm & (third[targets.item] == i)) for i, value in enumerate(("head", "middle", "tail"))]
    return _filled("item popularity", masks)


def by_order(targets: Targets) -> list[Slice]:
    """By whether a target has the time of the event before or after it: then the items' order made it the target.

    Who reads sequences can learn that order, which no real user follows. Nothing where no target is tied.
    """
    mask = tied(targets)
    return (
        _filled("time", [("tied with another event (ordered by item)", mask), (OWN_TIME, ~mask)]) if mask.any() else []
    )


# -- any column ------------------------------------------------------------------------------------


def by_values(name: str, values: pl.Series, *, max_values: int = 10, separator: str = VALUES) -> list[Slice]:
    """Slices of one value a target (n_targets,): numbers, texts, separated texts or lists, as ``slices`` says."""
    if isinstance(values.dtype, pl.List):
        return _by_member(name, values.cast(pl.List(pl.String)), max_values)
    numbers = _numbers(values)
    if numbers is not None and numbers.drop_nulls().n_unique() > max_values:
        return _by_quartile(name, numbers)
    texts = values.cast(pl.String).str.strip_chars().replace("", None)
    if texts.str.contains(separator, literal=True).any():
        return _by_member(name, texts.str.split(separator), max_values)
    return _by_member(name, pl.select(pl.concat_list(texts)).to_series(), max_values)


def _numbers(values: pl.Series) -> pl.Series | None:
    """As numbers, with nulls for what is missing; None where any value isn't one. (Items' columns are all texts.)"""
    if values.dtype.is_numeric():
        return values.cast(pl.Float64).fill_nan(None)
    if values.dtype != pl.String:
        return None
    texts = values.str.strip_chars().replace("", None)
    numbers = texts.cast(pl.Float64, strict=False)
    fine = (numbers.is_finite() | texts.is_null()).fill_null(False)
    return numbers if fine.all() and len(texts.drop_nulls()) else None


def _told(value: float) -> str:
    """A number in few digits, or in all of them where few are another number."""
    if value.is_integer() and abs(value) < 1e15:
        return f"{value:.0f}"
    short = f"{value:g}"
    return short if float(short) == value else repr(float(value))


def _by_quartile(name: str, numbers: pl.Series) -> list[Slice]:
    """Four slices of about as many targets each; fewer where one value is that common."""
    known = numbers.is_not_null().to_numpy()
    value = numbers.fill_null(0.0).to_numpy()
    edges = np.unique(np.quantile(value[known], [0.25, 0.5, 0.75], method="inverted_cdf"))
    part = np.searchsorted(edges, value, side="left")
    masks = []
    for i in range(len(edges) + 1):
        mask = known & (part == i)
        if mask.any():
            low, high = value[mask].min(), value[mask].max()
            masks.append((_told(low) if low == high else f"{_told(low)} to {_told(high)}", mask))
    return _filled(name, [*masks, (_NOTHING, ~known)])


def _by_member(name: str, lists: pl.Series, max_values: int) -> list[Slice]:
    """A slice for each of the commonest members; "(other)" are the targets that have members, but none of those."""
    n = len(lists)
    long = (
        pl.DataFrame({"row": np.arange(n), "member": lists})
        .explode("member")
        .with_columns(pl.col("member").str.strip_chars())
        .filter(pl.col("member").is_not_null() & (pl.col("member") != ""))
        .unique(["row", "member"])
    )
    counted = long.group_by("member").len().sort(["len", "member"], descending=[True, False])
    common = counted["member"].head(max_values).to_list()
    masks, left = [], np.zeros(n, dtype=bool)
    left[long["row"].to_numpy()] = True
    nothing = ~left
    for member in common:
        mask = np.zeros(n, dtype=bool)
        mask[long.filter(pl.col("member") == member)["row"].to_numpy()] = True
        masks.append((member, mask))
        left &= ~mask
    return _filled(name, [*masks, (_OTHER, left), (_NOTHING, nothing)])


def _filled(name: str, masks: Sequence[tuple[str, Mask]]) -> list[Slice]:
    return [Slice(name, value, mask) for value, mask in masks if mask.any()]


def _column(frame: pl.DataFrame, column: str, what: str) -> pl.Series:
    if column not in frame.columns:
        there = ", ".join(c for c in frame.columns if c not in (USER, ITEM)) or "no further ones"
        raise ConfigError(f"the {what} have no column {column!r}", where="slices", remedy=f"they have {there}")
    return frame[column]


def _user_column(users: pl.DataFrame | None, column: str, targets: Targets) -> pl.Series:
    """The column's value for each target's user, null where the table lacks the user."""
    if users is None:
        raise ConfigError(
            f"slices by the users' {column!r} were asked for, and there is no table of users",
            where="slices",
            remedy=f"give users=, a table with {USER} and that column; interactions and items hold none",
        )
    _column(users, USER, "users")
    values = _column(users, column, "users")
    ids = users[USER].cast(pl.String)
    if ids.is_duplicated().any():
        raise DataError(
            f"user {ids.filter(ids.is_duplicated())[0]!r} stands there twice",
            where="slices, table of users",
            remedy="give one row a user",
        )
    index = {user: row for row, user in enumerate(ids.to_list())}
    rows = [index.get(targets.log.user_ids[u]) for u in targets.user]
    return values.gather(pl.Series(rows, dtype=pl.UInt32))
