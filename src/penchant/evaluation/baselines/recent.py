"""Popularity of late: training events before the query's moment, each worth half as much every half-life."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from penchant.evaluation.baselines.events import TrainingEvents
from penchant.evaluation.systems import Queries

_DAY = 86_400_000_000  # microseconds


class RecentConfig(BaseModel):
    """What is tuned."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    half_life_days: float | None = Field(
        default=30.0, gt=0, description="days until an event weighs half; None: for ever"
    )


@dataclass(frozen=True, eq=False)
class RecentPopularity:
    """score(item, t) = sum over its training events before t of 2^(-(t - time) / half-life).

    As of the query's moment: an event of another user that is later, or at the same microsecond, does not count,
    so under leave-last-out this baseline sees no later time although its training events hold it. History is not
    looked at; an empty one gets the same. ``item`` and ``time`` (n,) are the training events, earliest first.
    """

    n_items: int
    item: NDArray[np.int32]
    time: NDArray[np.int64]
    half_life_days: float | None
    name: str = "recent popularity"

    def scores(self, queries: Queries) -> NDArray[np.float32]:
        out = np.zeros((len(queries), self.n_items), dtype=np.float32)
        weight = np.zeros(self.n_items)
        counted, now = 0, 0
        # One sweep through time: what was counted decays, what happened since is added.
        for row in np.argsort(queries.time, kind="stable"):
            then, now = now, int(queries.time[row])
            until = int(np.searchsorted(self.time, now, side="left"))
            if counted:
                weight *= self._decay(np.array(now - then))
            new = slice(counted, until)
            weight += np.bincount(self.item[new], self._decay(now - self.time[new]), minlength=self.n_items)
            counted = max(counted, until)
            out[row] = weight
        return out

    def _decay(self, age: NDArray[np.int64]) -> NDArray[np.float64]:
        """What an event of that age (microseconds) weighs."""
        if self.half_life_days is None:
            return np.ones(age.shape)
        return np.exp2(-age / (self.half_life_days * _DAY))


def fit_recent(events: TrainingEvents, config: RecentConfig) -> RecentPopularity:
    """Sort the training events by time."""
    order = np.argsort(events.time, kind="stable")
    return RecentPopularity(events.n_items, events.item[order], events.time[order], config.half_life_days)
