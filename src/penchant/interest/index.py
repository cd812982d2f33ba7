"""Exact top-N retrieval by dot product, with filters and seen items masked inside the search."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from penchant.errors import DataError

# Scores held at once, in values: 16M float32 are 64 MB.
_BLOCK = 16_000_000


def top_k(scores: NDArray[np.floating], k: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """The k largest of each row (n, m), best first, equal scores in index order; -inf is never returned.

    Rows with fewer than k finite scores are padded with item -1 and score -inf.
    """
    n, m = scores.shape
    k_here = min(k, m)
    items = np.full((n, k), -1, dtype=np.int32)
    values = np.full((n, k), -np.inf, dtype=np.float32)
    if k_here == 0:
        return items, values
    for i, row in enumerate(scores):
        bar = np.partition(row, m - k_here)[m - k_here]
        at = np.flatnonzero(row >= bar) if bar > -np.inf else np.flatnonzero(row > -np.inf)
        at = at[np.lexsort((at, -row[at]))][:k_here]
        items[i, : len(at)] = at
        values[i, : len(at)] = row[at]
    return items, values


class ExactIndex:
    """Item vectors (n_items, d) searched exactly, in blocks of queries so that memory stays bounded."""

    def __init__(self, vectors: NDArray[np.float32]) -> None:
        bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if bad.size:
            raise DataError(f"the vector of item {int(bad[0])} is not finite", where="index", remedy="embed it again")
        self.vectors = np.ascontiguousarray(vectors, dtype=np.float32)

    def search(
        self,
        queries: NDArray[np.float32],
        k: int,
        *,
        exclude: Sequence[NDArray[np.integer]] | None = None,
        allowed: NDArray[np.bool_] | None = None,
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """The k best items of each query (n, d): items and scores, both (n, k), best first.

        ``exclude`` holds items to leave out for each query (the seen ones); ``allowed`` (n_items,) is a
        filter for all of them. Where fewer than k are left the row is padded with -1 and -inf.
        """
        items = np.full((len(queries), k), -1, dtype=np.int32)
        values = np.full((len(queries), k), -np.inf, dtype=np.float32)
        block = max(1, _BLOCK // max(1, len(self.vectors)))
        for start in range(0, len(queries), block):
            scores = queries[start : start + block] @ self.vectors.T
            if allowed is not None:
                scores[:, ~allowed] = -np.inf
            if exclude is not None:
                for row, out in enumerate(exclude[start : start + block]):
                    scores[row, out] = -np.inf
            items[start : start + block], values[start : start + block] = top_k(scores, k)
        return items, values
