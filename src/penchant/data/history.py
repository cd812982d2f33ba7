"""What a user had done as of a moment: decided here and nowhere else.

Events lie in one flat order, by user and within a user by (time, item). A moment is a position in that
order: the history of the event at ``position`` is every earlier event of the same user. Nothing that
renders a prompt or builds a training row looks at events in any other way.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import polars as pl
from numpy.typing import NDArray

from penchant.data.dataset import Dataset
from penchant.errors import DataError
from penchant.schema import ITEM, TIME, USER


@dataclass(frozen=True, eq=False)
class EventLog:
    """All events as flat arrays.

    ``user_ids`` and ``item_ids`` name the indices; ``start`` (n_users + 1,) delimits a user's events in
    ``item`` (n_events,) and ``time`` (n_events,), microseconds. Event j is row j of ``Dataset.interactions``.
    """

    user_ids: list[str]
    item_ids: list[str]
    start: NDArray[np.int64]
    item: NDArray[np.int32]
    time: NDArray[np.int64]

    @classmethod
    def from_dataset(cls, dataset: Dataset) -> EventLog:
        """Index a dataset; its interactions are already in the order above."""
        events = dataset.interactions
        item_ids = dataset.items[ITEM].to_list()
        runs = events[USER].rle().struct.unnest()
        user_ids = runs["value"].to_list()
        if len(set(user_ids)) != len(user_ids):
            raise DataError("interactions are not grouped by user", where="dataset", remedy="make it with Dataset.read")
        item = events[ITEM].replace_strict(item_ids, np.arange(len(item_ids)), return_dtype=pl.Int32)
        return cls(
            user_ids=user_ids,
            item_ids=item_ids,
            start=np.concatenate([[0], np.cumsum(runs["len"].to_numpy())]).astype(np.int64),
            item=item.to_numpy(),
            time=events[TIME].to_numpy(),
        )

    @property
    def n_users(self) -> int:
        return len(self.user_ids)

    @property
    def n_items(self) -> int:
        return len(self.item_ids)

    @cached_property
    def user(self) -> NDArray[np.int32]:
        """User index of every event (n_events,)."""
        return np.repeat(np.arange(self.n_users, dtype=np.int32), np.diff(self.start))

    @cached_property
    def user_index(self) -> dict[str, int]:
        return {user: i for i, user in enumerate(self.user_ids)}

    @cached_property
    def item_index(self) -> dict[str, int]:
        return {item: i for i, item in enumerate(self.item_ids)}

    def before(self, position: int) -> slice:
        """The events that were past when the event at ``position`` happened, oldest first."""
        return slice(int(self.start[self.user[position]]), int(position))

    def all_of(self, user: int) -> slice:
        """Every event of a user: what a recommendation made now may use."""
        return slice(int(self.start[user]), int(self.start[user + 1]))


@dataclass(frozen=True, eq=False)
class Targets:
    """Events to be predicted, each with its own as-of history. ``position`` (n,) indexes the log's events."""

    log: EventLog
    position: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.position)

    @property
    def user(self) -> NDArray[np.int32]:
        return self.log.user[self.position]

    @property
    def item(self) -> NDArray[np.int32]:
        return self.log.item[self.position]

    def history(self, i: int) -> NDArray[np.int32]:
        """Items of the i-th target's user before it, oldest first."""
        return self.log.item[self.log.before(int(self.position[i]))]

    def take(self, rows: NDArray[np.integer]) -> Targets:
        """Some of these targets, by row."""
        return Targets(self.log, self.position[rows])

    def sample(self, n: int, seed: int) -> Targets:
        """``n`` of these targets drawn without replacement, in their own order; all when there are no more."""
        if n >= len(self):
            return self
        return self.take(np.sort(np.random.default_rng(seed).choice(len(self), size=n, replace=False)))
