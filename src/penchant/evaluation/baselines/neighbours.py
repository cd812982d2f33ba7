"""Neighbours by nearness alone: what the encoder's ``neighbours`` are worth without the encoder."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from scipy import sparse

from penchant.evaluation.baselines.events import TrainingEvents, popular_behind, popular_where_empty
from penchant.evaluation.systems import Queries
from penchant.interest.neighbours import newest, similar_items


class NeighboursConfig(BaseModel):
    """What is tuned."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int = Field(default=100, ge=1, description="most similar items kept for each item")


@dataclass(frozen=True, eq=False)
class NearItems:
    """score = s(u, c) of penchant.interest.neighbours; what has none stands behind in order of popularity."""

    similar: sparse.csr_array
    counts: NDArray[np.float32]
    name: str = "neighbours by nearness"

    def scores(self, queries: Queries) -> NDArray[np.float32]:
        out = np.ascontiguousarray((newest(queries.history, len(self.counts)) @ self.similar).toarray(), np.float32)
        return popular_where_empty(popular_behind(out, self.counts), queries, self.counts)


def fit_neighbours(events: TrainingEvents, config: NeighboursConfig) -> NearItems:
    """Similarities from the training sequences."""
    return NearItems(similar_items(events.sequences(), events.n_items, config.size), events.counts)
