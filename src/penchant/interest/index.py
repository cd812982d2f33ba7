"""Item vectors searched by dot product, with filters and seen items masked inside the search: exactly, by default."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from penchant.errors import ConfigError, DataError
from penchant.interest.index_folder import index_written, load_array, read_index, save_arrays
from penchant.interest.top import Found, nothing, top_k

Vectors = NDArray[np.float32]
Items = NDArray[np.integer]

# Scores held at once, in values: 16M float32 are 64 MB.
_BLOCK = 16_000_000
# Queries scored together: more make the product no faster, and would leave few items to a block.
_QUERIES = 256


class Index(Protocol):
    """The vectors of a catalogue, found by dot product.

    ``vectors`` (n_items, d) float32 are the items', in the order of their index; deleted ones keep their place.
    ``model`` is the hash of what made them. ``len`` counts the items that are not deleted.
    """

    @property
    def model(self) -> str: ...

    @property
    def vectors(self) -> Vectors: ...

    @property
    def n_items(self) -> int: ...

    def __len__(self) -> int: ...

    def search(
        self,
        queries: Vectors,
        k: int,
        *,
        exclude: Sequence[Items] | None = None,
        allowed: NDArray[np.bool_] | None = None,
    ) -> Found:
        """The k best items of each query (n, d): items int32 and scores float32, both (n, k), best first.

        Scores are dot products; equal ones come in the order of their items. ``exclude`` holds items to leave out
        for each query (the seen ones); ``allowed`` (n_items,) is a filter for all of them. Where fewer than k are
        left the row is padded with item -1 and score -inf, so a filter that leaves nothing gives padding alone.
        DataError where queries are not finite or of another width than the items, or the filters do not fit.
        """

    def add(self, vectors: Vectors) -> int:
        """Put new items (n, d) after the others; the index of the first of them."""

    def replace(self, items: Items, vectors: Vectors) -> None:
        """Give items (n,) other vectors (n, d)."""

    def delete(self, items: Items) -> None:
        """Never return these items again. Their indices are not used again."""

    def save(self, folder: Path) -> None:
        """Write the index into a folder of its own, whole or not at all."""

    @classmethod
    def load(cls, folder: Path, *, model: str, mmap: bool = True) -> Self:
        """Open a saved index whose vectors ``model`` made, by default without reading them into memory.

        ModelError where another model did; StorageError where a file is missing or torn.
        """


class ExactIndex:
    """Every item is scored: exact, and memory stays bounded whatever the catalogue and the number of queries."""

    def __init__(self, vectors: Vectors, *, model: str = "") -> None:
        """``vectors`` (n_items, d), which are not copied until they change; DataError where one is not finite."""
        self.model = model
        self._rows = _checked_vectors(vectors, np.arange(len(vectors)))
        self._n = len(self._rows)  # the rest of the rows is room to grow
        self._ours = False  # the caller's array, or a file's, is not written to
        self._live = np.ones(self._n, dtype=bool)

    @property
    def vectors(self) -> Vectors:
        return self._rows[: self._n]

    @property
    def n_items(self) -> int:
        return self._n

    def __len__(self) -> int:
        return int(self._live.sum())

    # -- searching -----------------------------------------------------------------------------

    def search(
        self,
        queries: Vectors,
        k: int,
        *,
        exclude: Sequence[Items] | None = None,
        allowed: NDArray[np.bool_] | None = None,
    ) -> Found:
        """As ``Index.search`` says. Of a filter that leaves less than half, only those items are scored."""
        queries = self.checked_queries(queries, k, exclude)
        may = self.eligible(allowed)
        # Where few are left their vectors are gathered: positions are then places among them.
        few = np.flatnonzero(may) if 2 * np.count_nonzero(may) < self._n else None
        items, values = nothing(len(queries), k)
        for start in range(0, len(queries), _QUERIES):
            part = slice(start, start + _QUERIES)
            row, column = _pairs(exclude[part] if exclude is not None else [])
            items[part], values[part] = self._scan(queries[part], k, row, column, may, few)
        return items, values

    def _scan(
        self,
        queries: Vectors,
        k: int,
        row: NDArray[np.int64],
        column: NDArray[np.int64],
        may: NDArray[np.bool_],
        few: NDArray[np.int64] | None,
    ) -> Found:
        """The best of blocks of items, one after the other. Query ``row`` may not have the item ``column``."""
        n, d = queries.shape
        total = self._n if few is None else len(few)
        width = max(1, _BLOCK // n if few is None else _BLOCK // max(n, d))
        if few is not None:
            few = np.append(few, -1)  # what stands at the place -1 of nothing, and after the last
            at = np.searchsorted(few[:-1], column)
            there = few[at] == column
            row, column = row[there], at[there]
        room = np.empty(n * min(width, total), dtype=np.float32)  # for every block in turn: fresh memory is slow
        items, values = nothing(n, k)
        for first in range(0, total, width):
            block = slice(first, min(first + width, total))
            vectors = self._rows[block] if few is None else self._rows[few[block]]
            scores = np.matmul(queries, vectors.T, out=room[: n * len(vectors)].reshape(n, len(vectors)))
            if few is None and not may[block].all():
                scores[:, ~may[block]] = -np.inf
            here = (column >= block.start) & (column < block.stop)
            scores[row[here], column[here] - first] = -np.inf
            # An equal of the k-th best so far has the larger index, and comes after it.
            found = top_k(scores, k, above=values[:, -1], where="index")
            items, values = _merged((items, values), (found[0] + np.int32(first), found[1]), k)
        return items if few is None else few[items].astype(np.int32), values

    def checked_queries(self, queries: Vectors, k: int, exclude: Sequence[Items] | None) -> Vectors:
        """The queries as float32; DataError or ConfigError where this index cannot answer them."""
        if k < 1:
            raise ConfigError(f"k is {k}", where="search", remedy="ask for at least 1 item")
        if queries.ndim != 2 or queries.shape[1] != self._rows.shape[1]:
            raise DataError(
                f"queries of shape {queries.shape} for items of {self._rows.shape[1]} dimensions",
                where="search",
                remedy="give (n, d) vectors of the encoder that made the index",
            )
        queries, bad = _as_float32(queries)
        if bad is not None:
            raise DataError(f"query {bad} is not finite", where="search", remedy="encode the history again")
        if exclude is not None:
            if len(exclude) != len(queries):
                raise DataError(
                    f"{len(exclude)} lists of items to exclude for {len(queries)} queries",
                    where="search",
                    remedy="give one list a query, empty where nothing is excluded",
                )
            _, column = _pairs(exclude)
            self._check_range(column, "exclude")
        return queries

    def eligible(self, allowed: NDArray[np.bool_] | None) -> NDArray[np.bool_]:
        """(n_items,) which items are allowed and not deleted; DataError where the filter is of another size."""
        if allowed is None:
            return self._live
        if allowed.shape != (self._n,) or allowed.dtype != np.bool_:
            raise DataError(
                f"a filter {allowed.dtype} of shape {allowed.shape}, and not bool of shape {(self._n,)}",
                where="search",
                remedy="say of every item, the deleted ones too, whether it is allowed",
            )
        return allowed & self._live

    # -- changing ------------------------------------------------------------------------------

    def add(self, vectors: Vectors) -> int:
        """As ``Index.add`` says; DataError where a vector is not finite or of another width."""
        first = self._n
        vectors = self.checked_like(vectors, first + np.arange(len(vectors)))
        self._own(first + len(vectors))
        self._rows[first : first + len(vectors)] = vectors
        self._n += len(vectors)
        self._live = np.append(self._live, np.ones(len(vectors), dtype=bool))
        return first

    def replace(self, items: Items, vectors: Vectors) -> None:
        """As ``Index.replace`` says; DataError where an item is unknown, deleted or named twice, or a vector is bad."""
        items = self.checked_items(items)
        vectors = self.checked_like(vectors, items)
        self._own(self._n)
        self._rows[items] = vectors

    def delete(self, items: Items) -> None:
        """As ``Index.delete`` says; DataError where an item is unknown, deleted before or named twice."""
        self._live[self.checked_items(items)] = False

    def _own(self, n: int) -> None:
        """Make the rows ours, with room for n of them: twice as many, so that adding one by one stays cheap."""
        if self._ours and n <= len(self._rows):
            return
        room = self._n if n == self._n else max(n, 2 * self._n)
        rows = np.empty((room, self._rows.shape[1]), dtype=np.float32)
        rows[: self._n] = self.vectors
        self._rows, self._ours = rows, True

    def checked_like(self, vectors: Vectors, items: Items) -> Vectors:
        """New vectors for ``items`` as float32; DataError where one is not finite or of another width."""
        if vectors.shape != (len(items), self._rows.shape[1]):
            raise DataError(
                f"vectors of shape {vectors.shape}, and not {(len(items), self._rows.shape[1])}",
                where="index",
                remedy="give one vector an item, of the width of the others",
            )
        return _checked_vectors(vectors, items)

    def checked_items(self, items: Items) -> NDArray[np.int64]:
        """The items' indices; DataError where one is unknown, deleted or named twice."""
        at: NDArray[np.int64] = np.asarray(items, dtype=np.int64)
        self._check_range(at, "index")
        deleted = at[~self._live[at]]
        if deleted.size:
            raise DataError(f"item {int(deleted[0])} was deleted", where="index", remedy="add it as a new item")
        if len(np.unique(at)) != len(at):
            raise DataError("an item is named twice", where="index", remedy="name each once")
        return at

    def _check_range(self, items: Items, where: str) -> None:
        bad = items[(items < 0) | (items >= self._n)]
        if bad.size:
            raise DataError(
                f"there is no item {int(bad[0])}", where=where, remedy=f"the {self._n} items are numbered from 0"
            )

    # -- saving --------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """As ``Index.save`` says; ConfigError where the index names no model."""
        with index_written(Path(folder), "exact", self.model, {}) as stage:
            self.write(stage)

    def write(self, stage: Path) -> None:
        """The files without the manifest."""
        save_arrays(stage, vectors=self.vectors, live=self._live)

    @classmethod
    def load(cls, folder: Path, *, model: str, mmap: bool = True) -> Self:
        """As ``Index.load`` says. Mapped vectors are copied when they first change."""
        read_index(Path(folder), "exact", model)
        return cls.read(Path(folder), model, mmap)

    @classmethod
    def read(cls, folder: Path, model: str, mmap: bool) -> Self:
        """The index of the files that ``write`` wrote, which were checked."""
        index = cls(load_array(folder / "vectors.npy", mmap=mmap), model=model)
        index._live = load_array(folder / "live.npy")
        return index


def _checked_vectors(vectors: Vectors, items: Items) -> Vectors:
    """The vectors (n, d) of ``items`` as float32, not copied where they are; DataError where one is not finite."""
    if vectors.ndim != 2:
        raise DataError(f"vectors of shape {vectors.shape}", where="index", remedy="give a matrix of one row an item")
    vectors, bad = _as_float32(vectors)
    if bad is not None:
        raise DataError(f"the vector of item {int(items[bad])} is not finite", where="index", remedy="embed it again")
    return vectors


def _as_float32(vectors: NDArray[np.floating]) -> tuple[Vectors, int | None]:
    """The vectors (n, d), not copied where they are float32 already, and the first row that is not finite."""
    with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and not finite
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    rows = max(1, _BLOCK // max(1, vectors.shape[1]))
    for start in range(0, len(vectors), rows):
        bad = np.flatnonzero(~np.isfinite(vectors[start : start + rows]).all(axis=1))
        if bad.size:
            return vectors, start + int(bad[0])
    return vectors, None


def _pairs(exclude: Sequence[Items]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and items of what is excluded, one pair each."""
    row = np.repeat(np.arange(len(exclude)), [len(items) for items in exclude])
    column = np.concatenate([np.zeros(0, dtype=np.int64), *exclude]).astype(np.int64)
    return row, column


def _merged(first: Found, second: Found, k: int) -> Found:
    """The k best of two lists a row, whose equals come from the first before the second."""
    items = np.concatenate([first[0], second[0]], axis=1)
    at, values = top_k(np.concatenate([first[1], second[1]], axis=1), k)
    return np.where(at < 0, np.int32(-1), np.take_along_axis(items, at, axis=1)), values
