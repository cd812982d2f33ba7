"""Finding the items that fit an interest best, whatever R is and however many interests a user has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from penchant.errors import ConfigError
from penchant.interest.encoder import InterestEncoder
from penchant.interest.hnsw import HNSWIndex
from penchant.interest.index import ExactIndex
from penchant.interest.top import top_k

IndexKind = Literal["exact", "hnsw"]

# Scores held at once: 8M float32 are 32 MB.
_BLOCK = 8_000_000


class ScoredIndex(ExactIndex):
    """Items searched by an R that is no dot product: every pair is scored, in blocks of queries."""

    def __init__(self, encoder: InterestEncoder, vectors: NDArray[np.float32]) -> None:
        super().__init__(vectors)
        self._encoder = encoder

    def search(
        self,
        queries: NDArray[np.float32],
        k: int,
        *,
        exclude: Sequence[NDArray[np.integer]] | None = None,
        allowed: NDArray[np.bool_] | None = None,
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """As ExactIndex, for queries (n, dim) or (n, K, dim)."""
        items = np.full((len(queries), k), -1, dtype=np.int32)
        values = np.full((len(queries), k), -np.inf, dtype=np.float32)
        block = max(1, _BLOCK // max(1, len(self.vectors)))
        for start in range(0, len(queries), block):
            scores = self._encoder.scores(queries[start : start + block], self.vectors)
            scores[:, ~self.eligible(allowed)] = -np.inf
            if exclude is not None:
                for row, out in enumerate(exclude[start : start + block]):
                    scores[row, out] = -np.inf
            items[start : start + block], values[start : start + block] = top_k(scores, k)
        return items, values


def index_of(encoder: InterestEncoder, kind: IndexKind = "exact") -> ExactIndex | HNSWIndex:
    """The encoder's items, searched exactly or through a graph; ConfigError for a graph where R is no dot product."""
    matrix, mlp = encoder.item_matrix(), encoder.config.relevance == "mlp"
    if kind == "hnsw":
        if mlp:
            raise ConfigError(
                "a graph finds dot products, and relevance mlp is none",
                where="index hnsw",
                remedy="use relevance dot or cosine, or the exact index",
            )
        return HNSWIndex(matrix)
    return ScoredIndex(encoder, matrix) if mlp else ExactIndex(matrix)


def search(
    index: ExactIndex | HNSWIndex,
    interest: NDArray[np.float32],
    k: int,
    *,
    exclude: Sequence[NDArray[np.integer]] | None = None,
    allowed: NDArray[np.bool_] | None = None,
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """The k best items of each interest (n, dim), or of each user's K interests (n, K, dim), the best of which counts.

    Items and scores, both (n, k), best first, padded with -1 and -inf.
    """
    if interest.ndim == 2 or isinstance(index, ScoredIndex):
        return index.search(interest, k, exclude=exclude, allowed=allowed)
    # What is among the k best by the largest of K scores is among the k best by one of them.
    n, several, dim = interest.shape
    repeated = None if exclude is None else [row for row in exclude for _ in range(several)]
    found, scores = index.search(interest.reshape(n * several, dim), k, exclude=repeated, allowed=allowed)
    items = np.full((n, k), -1, dtype=np.int32)
    values = np.full((n, k), -np.inf, dtype=np.float32)
    for i in range(n):
        rows = slice(i * several, (i + 1) * several)
        item, score = found[rows].ravel(), scores[rows].ravel()
        order = np.lexsort((item, -score))
        order = order[item[order] >= 0]
        _, first = np.unique(item[order], return_index=True)  # an item's best score stands first
        best = order[np.sort(first)][:k]
        items[i, : len(best)], values[i, : len(best)] = item[best], score[best]
    return items, values
