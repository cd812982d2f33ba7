"""Items whose vectors are nearest to the newest items' vectors: what the embeddings know without training."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from penchant.errors import DataError
from penchant.evaluation.baselines.events import multi_hot, newest, popular_where_empty
from penchant.evaluation.systems import Queries


class NearestConfig(BaseModel):
    """What is tuned."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    last: int | None = Field(default=1, ge=1, description="newest items whose mean is compared; None: all")


@dataclass(frozen=True, eq=False)
class Nearest:
    """score(item) = cosine of its vector and the mean of the newest items' unit vectors.

    ``vectors`` (n_items, d) are unit vectors. Popularity from training for an empty history; a cold item has a
    vector like any other.
    """

    vectors: NDArray[np.float32]
    counts: NDArray[np.float32]
    last: int | None
    name: str = "newest items (LLM vectors)"

    def scores(self, queries: Queries) -> NDArray[np.float32]:
        # Repeats count once. A sum and a mean rank alike, and so does a cosine that lacks the query's length.
        interest = multi_hot(newest(queries.history, self.last), len(self.vectors)) @ self.vectors
        length = np.linalg.norm(interest, axis=1, keepdims=True)
        return popular_where_empty((interest / np.maximum(length, 1e-12)) @ self.vectors.T, queries, self.counts)


def fit_nearest(vectors: NDArray[np.float32], counts: NDArray[np.float32], config: NearestConfig) -> Nearest:
    """Vectors (n_items, d), standardised over the catalogue by the caller, brought to unit length."""
    if vectors.ndim != 2 or len(vectors) != len(counts) or not np.isfinite(vectors).all():
        raise DataError(
            f"the item vectors have the shape {vectors.shape}, or hold a value that is not finite",
            where="baseline nearest",
            remedy=f"give one vector for each of the {len(counts)} items, in catalogue order",
        )
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return Nearest(np.asarray(unit, dtype=np.float32), counts, config.last)
