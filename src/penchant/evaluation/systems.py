"""What an evaluation asks of a system: scores over the catalogue for queries that do not hold the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from penchant.data.history import Targets


@dataclass(frozen=True, eq=False)
class Queries:
    """What a system may see of each target: who, what came before, and when. Never the answer.

    ``user`` (n,) indexes the log's ``user_ids``; ``history`` holds n arrays of item indices, oldest first, which
    may be empty; ``time`` (n,) is the moment of the target in microseconds.
    """

    user: NDArray[np.int32]
    history: list[NDArray[np.int32]]
    time: NDArray[np.int64]

    @classmethod
    def of(cls, targets: Targets) -> Queries:
        """The queries of targets, in their order; the histories are views of the log."""
        log, position = targets.log, targets.position
        user = log.user[position]
        starts = log.start[user]
        history = [log.item[a:b] for a, b in zip(starts.tolist(), position.tolist(), strict=True)]
        return cls(user, history, log.time[position])

    def __len__(self) -> int:
        return len(self.user)

    def take(self, rows: NDArray[np.integer] | slice | Sequence[int]) -> Queries:
        """The same, of some rows in the order given."""
        index = np.arange(len(self))[rows]
        return Queries(self.user[index], [self.history[i] for i in index.tolist()], self.time[index])


class System(Protocol):
    """Anything that scores the catalogue: a baseline, our encoder, the whole model."""

    @property
    def name(self) -> str:
        """As the tables show it."""
        ...

    def scores(self, queries: Queries) -> NDArray[np.float32]:
        """(n, n_items), higher is better; -inf: never. Not masked: the harness masks seen items. No NaN."""
        ...
