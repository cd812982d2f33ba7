"""How often an item stands in the training events: the floor that every recommender must clear."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from penchant.data.split import Split
from penchant.evaluation.baselines.events import TrainingEvents
from penchant.evaluation.systems import Queries


class PopularityConfig(BaseModel):
    """Nothing to choose."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True, eq=False)
class Popularity:
    """Every user gets the same scores, ``counts`` (n_items,); an empty history too."""

    counts: NDArray[np.float32]
    name: str = "popularity"

    def scores(self, queries: Queries) -> NDArray[np.float32]:
        return np.repeat(self.counts[None], len(queries), axis=0)


def fit_popularity(events: TrainingEvents) -> Popularity:
    """Counts from training only."""
    return Popularity(events.counts)


def popularity_that_flatters(split: Split) -> Popularity:
    """WRONG on purpose: counts of all events, the validation and the test targets among them.

    Some published tables count so (PopRec in S3-Rec's). It is here to show by how much that flatters, and is
    no baseline: ``fit_baselines`` never makes it.
    """
    counts = np.bincount(split.log.item, minlength=split.log.n_items).astype(np.float32)
    return Popularity(counts, "popularity, test items counted too (wrong)")
