"""Finding the items that fit an interest best, whatever R is and however many interests a user has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from penchant.errors import ConfigError
from penchant.interest.behaviour import History
from penchant.interest.encoder import InterestEncoder
from penchant.interest.hnsw import HNSWIndex
from penchant.interest.index import ExactIndex
from penchant.interest.top import Found, nothing, top_k

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
    bonus: sparse.csr_array | None = None,
) -> Found:
    """The k best items of each interest (n, dim), or of each user's K interests (n, K, dim), the best of which counts.

    ``bonus`` (n, n_items) is added to the scores: see ``InterestEncoder.bonus``. Items and scores, both (n, k), best
    first, padded with -1 and -inf.
    """
    found = _search(index, interest, k, exclude, allowed)
    return found if bonus is None else _with_bonus(index, interest, k, exclude, allowed, bonus, found)


def score_all(
    encoder: InterestEncoder, vectors: NDArray[np.float32], histories: Sequence[History]
) -> NDArray[np.float32]:
    """Every item's score for each history (none of them empty), (n, m), for the first m rows of ``item_matrix``."""
    interest = encoder.encode(histories)
    scores, bonus = encoder.scores(interest, vectors), encoder.bonus(histories, interest)
    return scores if bonus is None else scores + bonus[:, : len(vectors)].toarray()


def score_some(
    encoder: InterestEncoder,
    vectors: NDArray[np.float32],
    histories: Sequence[History],
    items: Sequence[NDArray[np.integer]],
) -> list[NDArray[np.float32]]:
    """The scores of each history's own ``items``, whose vectors are rows of ``item_matrix``."""
    interest = encoder.encode(histories)
    bonus = encoder.bonus(histories, interest)
    found = []
    for i, row in enumerate(items):
        scores = encoder.scores(interest[i : i + 1], vectors[row])[0]
        found.append(scores if bonus is None else scores + bonus[[i]].toarray()[0, row])
    return found


def _with_bonus(
    index: ExactIndex | HNSWIndex,
    interest: NDArray[np.float32],
    k: int,
    exclude: Sequence[NDArray[np.integer]] | None,
    allowed: NDArray[np.bool_] | None,
    bonus: sparse.csr_array,
    found: Found,
) -> Found:
    """An item among the k best with a bonus, which none loses by, has one or is among the k best without."""
    may = (index if isinstance(index, ExactIndex) else index.exact).eligible(allowed)
    items, values = nothing(len(interest), k)
    for i in range(len(interest)):
        part = slice(bonus.indptr[i], bonus.indptr[i + 1])
        near, more = bonus.indices[part], bonus.data[part]
        kept = may[near]
        if exclude is not None:
            kept &= ~np.isin(near, exclude[i])
        near, more = near[kept], more[kept]
        own = index.vectors[near] @ interest[i].T
        scored = (own if own.ndim == 1 else own.max(axis=1)) + more
        others = (found[0][i] >= 0) & ~np.isin(found[0][i], near)
        item, score = np.concatenate([found[0][i][others], near]), np.concatenate([found[1][i][others], scored])
        best = np.lexsort((item, -score))[:k]
        items[i, : len(best)], values[i, : len(best)] = item[best], score[best]
    return items, values


def _search(
    index: ExactIndex | HNSWIndex,
    interest: NDArray[np.float32],
    k: int,
    exclude: Sequence[NDArray[np.integer]] | None,
    allowed: NDArray[np.bool_] | None,
) -> Found:
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
