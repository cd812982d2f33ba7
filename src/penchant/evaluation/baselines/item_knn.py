"""Item-based nearest neighbours: items that the same users had (Sarwar et al. 2001; Deshpande and Karypis 2004)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from scipy import sparse

from penchant.evaluation.baselines.events import (
    TrainingEvents,
    fading,
    newest,
    popular_behind,
    popular_where_empty,
)
from penchant.evaluation.systems import Queries

# Similarities held dense at once, in values: 16M float32 are 64 MB.
_BLOCK = 16_000_000


class ItemKNNConfig(BaseModel):
    """What is tuned."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    neighbours: int = Field(default=200, ge=1, description="most similar items kept for each item")
    shrinkage: float = Field(default=10.0, ge=0, description="added to the cosine's denominator: rare pairs count less")
    last: int | None = Field(default=None, ge=1, description="newest items of the history that count; None: all")
    decay: float = Field(default=1.0, gt=0, le=1, description="weight of an event against that of the next newer one")


@dataclass(frozen=True, eq=False)
class ItemKNN:
    """score(item) = sum of the similarities from each item of the history to it, of older ones less.

    ``similar`` (n_items, n_items) holds in row i the nearest neighbours of i. Items that no item of the history is
    near to, cold ones among them, stand behind all others in order of popularity from training; so does the whole
    catalogue for an empty history.
    """

    similar: sparse.csr_array
    counts: NDArray[np.float32]
    last: int | None
    decay: float = 1.0
    name: str = "ItemKNN"

    def scores(self, queries: Queries) -> NDArray[np.float32]:
        history = fading(newest(queries.history, self.last), len(self.counts), self.decay)
        out = np.ascontiguousarray((history @ self.similar).toarray(), dtype=np.float32)
        return popular_where_empty(popular_behind(out, self.counts), queries, self.counts)


def fit_item_knn(events: TrainingEvents, config: ItemKNNConfig) -> ItemKNN:
    """similarity(i, j) = users with both / (sqrt(users of i * users of j) + shrinkage), i and j apart."""
    matrix = events.matrix
    users = np.asarray(matrix.sum(axis=0), dtype=np.float32).ravel()
    columns = matrix.T.tocsr()
    blocks = []
    step = max(1, _BLOCK // max(1, events.n_items))
    for start in range(0, events.n_items, step):
        both = (columns[start : start + step] @ matrix).toarray()
        rows = np.arange(len(both))
        both[rows, start + rows] = 0
        both /= np.maximum(np.sqrt(np.outer(users[start : start + step], users)) + config.shrinkage, 1e-12)
        blocks.append(_nearest(both.astype(np.float32, copy=False), config.neighbours))
    return ItemKNN(sparse.vstack(blocks, format="csr"), events.counts, config.last, config.decay)


def _nearest(similarity: NDArray[np.float32], k: int) -> sparse.csr_array:
    """The k largest of each row, as a sparse matrix; equal ones in index order."""
    if k < similarity.shape[1]:
        # A stable sort costs more than a partition, and gives the same neighbours on every machine.
        far = np.argsort(-similarity, axis=1, kind="stable")[:, k:]
        np.put_along_axis(similarity, far, 0, axis=1)
    return sparse.csr_array(similarity)
