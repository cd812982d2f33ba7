"""What ranked lists are like besides right: how wide, how varied, how popular, and whether they are real.

Everything reads top lists (n, k) of item indices, best first, a place left empty being -1. Any other index
that no item has is an answer which names no item. Items are looked up a block of lists at a time, so that
memory stays bounded for millions of users.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy import sparse

from penchant.errors import ConfigError, DataError
from penchant.schema import ITEM, VALUES

Lists = NDArray[np.integer]
Values = NDArray[np.float64]

# Looked-up values held at once: 16M float32 are 64 MB.
_BLOCK = 16_000_000


@dataclass(frozen=True, slots=True)
class Beyond:
    """One system's lists in numbers; means over the users that have one, NaN (or None) where nothing can be said.

    ``coverage`` and ``gini`` are of the whole catalogue, ``novelty`` is in bits, ``genre_calibration`` in nats (0:
    the history's own genres), ``popularity_lift`` 0 where lists are as popular as histories, 1 where twice so.
    """

    coverage: float
    intra_list_distance: float | None
    novelty: float
    popularity_lift: float
    gini: float
    genre_calibration: float | None
    duplicates: float
    invalid: float
    missing: float

    def to_dict(self) -> dict[str, float | None]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Validity:
    """Shares of all places: ``missing`` empty, ``invalid`` naming no item, ``duplicates`` repeating one above it."""

    missing: float
    invalid: float
    duplicates: float


def describe(
    top: Lists,
    *,
    train_counts: NDArray[np.integer],
    histories: Sequence[NDArray[np.integer]],
    vectors: NDArray[np.floating] | None = None,
    genres: NDArray[np.bool_] | None = None,
) -> Beyond:
    """All of this file for one system's lists (n, k).

    ``train_counts`` (n_items,) are training events of each item, ``histories`` (n,) what each user had before,
    ``vectors`` (n_items, d) and ``genres`` (n_items, g) the items'; without them their measures are None.
    """
    n_items = len(train_counts)
    real = validity(top, n_items)
    return Beyond(
        coverage=coverage(top, n_items),
        intra_list_distance=None if vectors is None else _mean(intra_list_distance(top, vectors)),
        novelty=_mean(novelty(top, train_counts)),
        popularity_lift=popularity_lift(top, histories, train_counts),
        gini=gini(exposure(top, n_items)),
        genre_calibration=None if genres is None else _mean(genre_calibration(top, histories, genres)),
        duplicates=real.duplicates,
        invalid=real.invalid,
        missing=real.missing,
    )


# -- the catalogue's side --------------------------------------------------------------------------


def exposure(top: Lists, n_items: int) -> NDArray[np.int64]:
    """How many places each item has in all lists: (n_items,)."""
    shown = np.zeros(n_items, dtype=np.int64)
    for rows in _blocks(len(top), max(1, top.shape[1])):
        part = top[rows]
        shown += np.bincount(part[_is_item(part, n_items)], minlength=n_items)
    return shown


def coverage(top: Lists, n_items: int) -> float:
    """Share of the catalogue that stands in anybody's list."""
    return float((exposure(top, n_items) > 0).mean())


def gini(shown: NDArray[np.integer]) -> float:
    """Gini coefficient of exposure (n_items,): 0 where all items are shown alike, near 1 where one has it all.

    Items never shown count. NaN where nothing is shown.
    """
    n, total = len(shown), int(shown.sum())
    if total == 0:
        return float("nan")
    ordered = np.sort(shown).astype(np.float64)
    return float((2 * np.arange(1, n + 1) - n - 1) @ ordered / (n * total))


# -- the lists' side -------------------------------------------------------------------------------


def intra_list_distance(top: Lists, vectors: NDArray[np.floating]) -> Values:
    """Mean cosine distance of all pairs in each list (Ziegler et al. 2005): (n,), NaN with fewer than two items."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = (vectors / np.where(length > 0, length, 1)).astype(np.float32)
    out = np.full(len(top), np.nan)
    for rows in _blocks(len(top), max(1, top.shape[1] * vectors.shape[1])):
        part = top[rows]
        real = _is_item(part, len(vectors))
        m = real.sum(axis=1).astype(np.float64)
        looked_up = unit[np.where(real, part, 0)] * real[:, :, None]
        # The sum over pairs of their products, from the square of the sum.
        whole = (looked_up.sum(axis=1, dtype=np.float64) ** 2).sum(axis=1)
        own = np.einsum("nkd,nkd->n", looked_up, looked_up, dtype=np.float64)
        pairs = np.where(m > 1, m * (m - 1), np.nan)
        out[rows] = 1 - (whole - own) / pairs
    return out


def novelty(top: Lists, train_counts: NDArray[np.integer]) -> Values:
    """Mean self-information of each list's items, -log2 of their share of training events, in bits: (n,).

    Vargas and Castells 2011, section 4. An item without a training event counts as if it had one. NaN: no item.
    """
    share = np.maximum(train_counts, 1) / max(1, int(train_counts.sum()))
    return _list_mean(top, -np.log2(share))


def popularity_lift(top: Lists, histories: Sequence[NDArray[np.integer]], train_counts: NDArray[np.integer]) -> float:
    """How much more popular lists are than histories: (GAP_lists - GAP_histories) / GAP_histories.

    GAP is the mean over users of their items' mean popularity (Abdollahpouri et al. 2019, "The Unfairness of
    Popularity Bias in Recommendation"); users without a list or a history are in neither. NaN where nobody is left.
    """
    popular = train_counts.astype(np.float64)
    given = _list_mean(top, popular)
    had = _ratio(_sums(_history_matrix(histories, len(popular)), popular[:, None])[:, 0], _lengths(histories))
    both = ~(np.isnan(given) | np.isnan(had))
    base = had[both].mean() if both.any() else 0.0
    return float((given[both].mean() - base) / base) if base > 0 else float("nan")


def genre_calibration(
    top: Lists, histories: Sequence[NDArray[np.integer]], genres: NDArray[np.bool_], *, alpha: float = 0.01
) -> Values:
    """KL divergence of each list's genres from its history's, in nats: (n,), 0 at best (Steck 2018, section 3).

    An item's genres (``genres`` is (n_items, g)) share its weight alike, and items of a list or history count alike.
    The list's are smoothed by ``alpha`` of the history's. NaN where the list or the history has no genre at all.
    """
    kinds = genres.sum(axis=1, keepdims=True)
    weights = genres / np.where(kinds > 0, kinds, 1)
    out = np.full(len(top), np.nan)
    for rows in _blocks(len(top), max(1, 2 * weights.shape[1] + top.shape[1])):
        wanted = _shares(_history_matrix(histories[rows], len(weights)), weights)
        given = _shares(_list_matrix(top[rows], len(weights)), weights)
        smoothed = (1 - alpha) * given + alpha * wanted
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = np.where(wanted > 0, wanted * np.log(wanted / smoothed), 0.0)
        known = ~(np.isnan(wanted).any(axis=1) | np.isnan(given).any(axis=1))
        out[rows] = np.where(known, terms.sum(axis=1), np.nan)
    return out


def validity(top: Lists, n_items: int) -> Validity:
    """What of the places asked for is missing, names no item, or repeats an item higher up the same list."""
    missing = invalid = duplicates = 0
    for rows in _blocks(len(top), max(1, top.shape[1])):
        part = top[rows]
        real = _is_item(part, n_items)
        missing += int((part == -1).sum())
        invalid += int((~real & (part != -1)).sum())
        # Places without an item get a number of their own, so that only items are found equal.
        filled = np.sort(np.where(real, part, n_items + np.arange(part.shape[1])), axis=1)
        duplicates += int((filled[:, 1:] == filled[:, :-1]).sum())
    places = max(1, top.size)
    return Validity(missing / places, invalid / places, duplicates / places)


# -- genres ----------------------------------------------------------------------------------------


def genre_matrix(items: pl.DataFrame, column: str, *, separator: str = VALUES) -> tuple[NDArray[np.bool_], list[str]]:
    """Which item has which genre (n_items, g), and their names in order, from a column of separated texts or lists.

    ConfigError where the items have no such column.
    """
    if column not in items.columns:
        raise ConfigError(
            f"the items have no column {column!r}",
            where="genres",
            remedy=f"use one of {', '.join(c for c in items.columns if c != ITEM)}",
        )
    values = items[column]
    lists = values if isinstance(values.dtype, pl.List) else values.cast(pl.String).str.split(separator)
    long = (
        pl.DataFrame({"row": np.arange(len(items)), "genre": lists})
        .explode("genre")
        .with_columns(pl.col("genre").cast(pl.String).str.strip_chars())
        .filter(pl.col("genre").is_not_null() & (pl.col("genre") != ""))
    )
    if not len(long):
        return np.zeros((len(items), 0), dtype=bool), []
    names = long["genre"].unique().sort().to_list()
    code = long["genre"].replace_strict(names, np.arange(len(names)), return_dtype=pl.Int64).to_numpy()
    matrix = np.zeros((len(items), len(names)), dtype=bool)
    matrix[long["row"].to_numpy(), code] = True
    return matrix, names


# -- in common -------------------------------------------------------------------------------------


def _blocks(n: int, each: int) -> Iterator[slice]:
    """Slices of rows that hold about _BLOCK values together, ``each`` a row."""
    step = max(1, _BLOCK // each)
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


def _is_item(top: Lists, n_items: int) -> NDArray[np.bool_]:
    return (top >= 0) & (top < n_items)


def _list_mean(top: Lists, values: Values) -> Values:
    """Mean of an item's value over each list's items, NaN where it has none."""
    out = np.full(len(top), np.nan)
    for rows in _blocks(len(top), max(1, top.shape[1])):
        part = top[rows]
        real = _is_item(part, len(values))
        out[rows] = _ratio((values[np.where(real, part, 0)] * real).sum(axis=1), real.sum(axis=1))
    return out


def _lengths(histories: Sequence[NDArray[np.integer]]) -> NDArray[np.int64]:
    return np.fromiter(map(len, histories), dtype=np.int64, count=len(histories))


def _history_matrix(histories: Sequence[NDArray[np.integer]], n_items: int) -> sparse.csr_matrix:
    """(n, n_items), how often each user had each item."""
    items = np.concatenate([np.zeros(0, dtype=np.int64), *histories])
    if items.size and not _is_item(items, n_items).all():
        raise DataError("a history holds an index that no item has", where="beyond accuracy")
    return _matrix(items, _lengths(histories), n_items)


def _list_matrix(top: Lists, n_items: int) -> sparse.csr_matrix:
    real = _is_item(top, n_items)
    return _matrix(top[real], real.sum(axis=1), n_items)


def _matrix(items: NDArray[np.integer], lengths: NDArray[np.integer], n_items: int) -> sparse.csr_matrix:
    start = np.concatenate([[0], np.cumsum(lengths)])
    return sparse.csr_matrix((np.ones(len(items)), items, start), shape=(len(lengths), n_items))


def _sums(rows: sparse.csr_matrix, values: Values) -> Values:
    return np.asarray(rows @ values, dtype=np.float64)


def _shares(rows: sparse.csr_matrix, weights: Values) -> Values:
    """Each row's distribution over genres, NaN where it has none."""
    summed = _sums(rows, weights)
    total = summed.sum(axis=1, keepdims=True)
    return summed / np.where(total > 0, total, np.nan)


def _ratio(sums: Values, counts: NDArray[np.integer]) -> Values:
    return sums / np.where(counts > 0, counts, np.nan)


def _mean(values: Values) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")
