"""Item vectors searched through a graph (faiss HNSW): for catalogues too large to score whole, with measured recall.

The graph leads to the candidates; it holds the vectors in half precision, which is faster and smaller. Scores are the
float32 dot products of the vectors themselves, as in exact search.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from penchant.errors import ConfigError, StorageError
from penchant.interest.index import ExactIndex, Items, Vectors
from penchant.interest.index_folder import index_written, load_array, read_index, save_arrays
from penchant.interest.top import Found

# The largest value of half precision, with room for rounding.
_HALF = 65_000.0
# Vectors put into the graph together: 64k of 128 are 32 MB.
_ROWS = 65_536
# Vectors of candidates gathered at once, in values: 4M float32 are 16 MB.
_GATHERED = 4_000_000


class HNSWConfig(BaseModel):
    """How dense the graph is, and how far it is searched."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    m: int = Field(default=32, ge=2, le=512, description="neighbours of an item in the graph; twice that at its base")
    ef_construction: int = Field(default=100, ge=1, description="candidates looked at for the neighbours of a new item")
    ef_search: int = Field(default=100, ge=1, description="candidates looked at for a query; more than this where k is")
    exact_share: float = Field(
        default=0.25, ge=0, le=1, description="share of the graph: where fewer items are allowed those are all scored"
    )


class HNSWIndex:
    """The same calls as ``ExactIndex``, answered through a graph: faster by far, and nearly as good; see ``recall``.

    Filters and excluded items are masked while the graph is walked, and the more they take out the further it is
    walked. Where a filter leaves few items (``exact_share``), or the walk finds fewer than k though more are left,
    the items that are left are scored exactly. What was replaced or deleted stays in the graph as a way to others,
    and is never returned: after many changes a new index is faster.
    """

    def __init__(self, vectors: Vectors, config: HNSWConfig | None = None, *, model: str = "") -> None:
        """Build the graph of ``vectors`` (n_items, d). DataError where one is not finite, ConfigError without faiss."""
        faiss = _faiss()
        self.config = config or HNSWConfig()
        self.exact = ExactIndex(vectors, model=model)
        vectors = self.exact.vectors
        self._graph = faiss.IndexHNSWSQ(
            vectors.shape[1], faiss.ScalarQuantizer.QT_fp16, self.config.m, faiss.METRIC_INNER_PRODUCT
        )
        self._graph.hnsw.efConstruction = self.config.ef_construction
        self._ours = True  # a mapped graph cannot grow
        # The order of dot products is the same at any scale; at this one half precision is at its best.
        largest = max(float(vectors.max(initial=0)), -float(vectors.min(initial=0)))
        self._scale = 1 / max(largest, float(np.finfo(np.float32).tiny))
        self._item = np.zeros(0, dtype=np.int32)  # of each row of the graph; -1: replaced or deleted
        self._row = np.zeros(0, dtype=np.int64)  # of each item
        self._measured: dict[str, Any] | None = None
        self._append(vectors, np.arange(len(vectors)))

    @property
    def model(self) -> str:
        return self.exact.model

    @property
    def vectors(self) -> Vectors:
        return self.exact.vectors

    @property
    def n_items(self) -> int:
        return self.exact.n_items

    def __len__(self) -> int:
        return len(self.exact)

    # -- searching -----------------------------------------------------------------------------

    def search(
        self,
        queries: Vectors,
        k: int,
        *,
        exclude: Sequence[Items] | None = None,
        allowed: NDArray[np.bool_] | None = None,
    ) -> Found:
        """As ``Index.search`` says, but that a few of the k best may be missed."""
        queries = self.exact.checked_queries(queries, k, exclude)
        may = self.exact.eligible(allowed)
        n_may = int(np.count_nonzero(may))
        if n_may < max(1.0, self.config.exact_share * len(self._item)):
            return self.exact.search(queries, k, exclude=exclude, allowed=allowed)
        items, values = self._scored(queries, self._walk(queries, k, exclude, may, n_may / len(self._item)))
        short = np.flatnonzero((items >= 0).sum(axis=1) < min(k, n_may))
        if short.size:
            without = None if exclude is None else [exclude[int(i)] for i in short]
            items[short], values[short] = self.exact.search(queries[short], k, exclude=without, allowed=allowed)
        return items, values

    def _walk(
        self, queries: Vectors, k: int, exclude: Sequence[Items] | None, may: NDArray[np.bool_], share: float
    ) -> NDArray[np.int32]:
        """The k items (n, k) that the graph leads to for each query, in no order, -1 where it found fewer."""
        faiss = _faiss()
        bits = self._bits(may)
        selector = faiss.IDSelectorBitmap(bits)  # it reads the bits where they are
        ef, most = max(self.config.ef_search, k), len(self._item)
        if exclude is None:
            how = faiss.SearchParametersHNSW(efSearch=min(most, int(ef / share)))
            if share < 1:
                how.sel = selector
            _, rows = self._graph.search(queries, k, params=how)
        else:
            rows = np.full((len(queries), k), -1, dtype=np.int64)
            for i, out in enumerate(exclude):
                row = self._row[np.asarray(out, dtype=np.int64)]
                byte, kept = row >> 3, bits[row >> 3]
                np.bitwise_and.at(bits, byte, ~(1 << (row & 7)).astype(np.uint8))
                # The excluded ones are among the nearest: the walk has to go past them.
                how = faiss.SearchParametersHNSW(efSearch=min(most, int((ef + len(out)) / share)), sel=selector)
                rows[i] = self._graph.search(queries[i : i + 1], k, params=how)[1]
                bits[byte] = kept
        return np.append(self._item, np.int32(-1))[rows]

    def _bits(self, may: NDArray[np.bool_]) -> NDArray[np.uint8]:
        """One bit for each row of the graph: whether it is an item's, and the item may be found."""
        return np.packbits(np.append(may, False)[self._item], bitorder="little")

    def _scored(self, queries: Vectors, items: NDArray[np.int32]) -> Found:
        """The items with their scores, best first, equal ones in their order."""
        values = np.full(items.shape, -np.inf, dtype=np.float32)
        together = max(1, _GATHERED // max(1, items.shape[1] * queries.shape[1]))
        for start in range(0, len(queries), together):
            part = slice(start, start + together)
            values[part] = np.matmul(self.vectors[items[part]], queries[part, :, None])[:, :, 0]
        values[items < 0] = -np.inf
        order = np.lexsort((items, -values), axis=1)
        return np.take_along_axis(items, order, axis=1), np.take_along_axis(values, order, axis=1)

    def recall(self, queries: Vectors, k: int) -> float:
        """The share of the exact k best that ``search`` finds, over all queries; saved with the index."""
        items, _ = self.search(queries, k)
        best, _ = self.exact.search(queries, k)
        found = sum(int(np.isin(b[b >= 0], i).sum()) for i, b in zip(items, best, strict=True))
        recall = found / max(1, int((best >= 0).sum()))
        self._measured = {"recall": recall, "k": k, "queries": len(queries)}
        return recall

    @property
    def measured(self) -> dict[str, Any] | None:
        """What ``recall`` last measured (recall, k, queries), or None if that was never or before a change."""
        return self._measured

    # -- changing ------------------------------------------------------------------------------

    def add(self, vectors: Vectors) -> int:
        """As ``ExactIndex.add`` says; the graph grows by the new items."""
        first = self.exact.add(vectors)
        self._append(self.vectors[first:], np.arange(first, self.n_items))
        return first

    def replace(self, items: Items, vectors: Vectors) -> None:
        """As ``ExactIndex.replace`` says; the items get new rows in the graph."""
        items = self.exact.checked_items(items)
        self.exact.replace(items, vectors)
        self._item[self._row[items]] = -1
        self._append(self.vectors[items], items)

    def delete(self, items: Items) -> None:
        """As ``ExactIndex.delete`` says."""
        items = self.exact.checked_items(items)
        self.exact.delete(items)
        self._item[self._row[items]] = -1
        self._measured = None

    def _append(self, vectors: Vectors, items: NDArray[np.int64]) -> None:
        """Rows of the graph for these items, after the others."""
        if not self._ours:
            faiss = _faiss()
            self._graph, self._ours = faiss.deserialize_index(faiss.serialize_index(self._graph)), True
        for start in range(0, len(vectors), _ROWS):
            scaled = vectors[start : start + _ROWS] * np.float32(self._scale)
            # A later vector may be larger than all of the first; past the largest half it only leads a little astray.
            self._graph.add(np.clip(scaled, -_HALF, _HALF))
        self._row = np.append(self._row, np.zeros(self.n_items - len(self._row), dtype=np.int64))
        self._row[items] = len(self._item) + np.arange(len(items))
        self._item = np.append(self._item, items.astype(np.int32))
        self._measured = None

    # -- saving --------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """As ``Index.save`` says, with the graph, its configuration and the recall if it was measured."""
        faiss = _faiss()
        facts = {
            "config": self.config.model_dump(mode="json"),
            "scale": self._scale,
            "measured": self._measured,
        }
        with index_written(Path(folder), "hnsw", self.model, facts) as stage:
            self.exact.write(stage)
            save_arrays(stage, item=self._item, row=self._row)
            # Through Python's own file, which says when the disk is full.
            with (stage / "graph.faiss").open("wb") as handle:
                faiss.write_index(self._graph, faiss.PyCallbackIOWriter(handle.write))

    @classmethod
    def load(cls, folder: Path, *, model: str, mmap: bool = True) -> Self:
        """As ``Index.load`` says. A mapped graph is read into memory when it first grows."""
        faiss = _faiss()
        folder = Path(folder)
        manifest = read_index(folder, "hnsw", model)
        index = cls.__new__(cls)
        try:
            index.config = HNSWConfig.model_validate(manifest["config"])
            index._scale, index._measured = manifest["scale"], manifest["measured"]
        except (KeyError, ValidationError) as error:
            raise StorageError(
                f"its manifest cannot be read: {error}", where=str(folder), remedy="make the index again"
            ) from error
        index.exact = ExactIndex.read(folder, model, mmap)
        index._graph = faiss.read_index(str(folder / "graph.faiss"), faiss.IO_FLAG_MMAP_IFC if mmap else 0)
        index._ours = not mmap
        index._item = load_array(folder / "item.npy")
        index._row = load_array(folder / "row.npy")
        return index


def _faiss() -> Any:
    """The module, or ConfigError that says how to install it."""
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise ConfigError(
            "the index HNSW needs faiss, which is not installed",
            where="index",
            remedy="pip install 'penchant[faiss]'",
        ) from error
    return faiss
