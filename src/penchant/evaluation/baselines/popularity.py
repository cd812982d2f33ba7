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


def popularities_that_flatter(split: Split) -> list[Popularity]:
    """WRONG on purpose: items of equal counts in the order of their index, which a target may happen to lead; and
    counts of all events, the validation and the test targets among them.

    Some published tables count so (PopRec in S3-Rec's). They are here to show by how much that flatters, and are no
    baselines: ``fit_baselines`` never makes them.
    """
    n_items = split.log.n_items
    place = np.empty(n_items, dtype=np.float32)
    place[np.lexsort((np.arange(n_items), -split.train_counts))] = -np.arange(n_items)
    every = np.bincount(split.log.item, minlength=n_items).astype(np.float32)
    return [
        Popularity(place, "popularity, equal counts in item order (wrong)"),
        Popularity(every, "popularity, test items counted too (wrong)"),
    ]
