"""Whom the LLM's weight is chosen on: validation users whose target retrieval found. Only their lists can tell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from penchant.data.history import Targets

if TYPE_CHECKING:
    from penchant.recommend import Recommender

# Users that are drawn at most for each that the LLM is asked about: retrieval costs next to nothing, the LLM does not.
_DRAWN = 10


@dataclass(frozen=True, eq=False)
class Weighed:
    """Validation targets with a history, in the order of a seeded draw, and what the encoder retrieves for each.

    ``place`` (n,) is where the target stands among its ``candidates``, -1 where it is none of them.
    """

    targets: Targets
    candidates: list[NDArray[np.int32]]
    interest: list[NDArray[np.float32]]
    place: NDArray[np.int64]

    @property
    def found(self) -> NDArray[np.int64]:
        """Rows whose target was retrieved: the LLM is asked about these."""
        return np.flatnonzero(self.place >= 0)


def weighed_on(model: Recommender) -> Weighed:
    """Draw validation targets until as many were found as the configuration wants, at most ten times as many."""
    wanted, valid = model.config.validation_users, model.split.valid
    # A user without any event before the target has no prompt and no vector: popularity serves those.
    valid = valid.take(np.flatnonzero(valid.position > valid.log.start[valid.user]))
    drawn = valid.take(np.random.default_rng(model.config.seed).permutation(len(valid))[: _DRAWN * wanted])
    if not len(drawn):
        return Weighed(drawn, [], [], np.zeros(0, dtype=np.int64))
    items, scores = model.retrieve(model.reading.before(drawn.position), model.config.candidates)
    hit = items == drawn.item[:, None]
    place = np.where(hit.any(axis=1), hit.argmax(axis=1), -1)
    enough = np.flatnonzero(np.cumsum(place >= 0) >= wanted)
    n = int(enough[0]) + 1 if len(enough) else len(drawn)
    kept = [row >= 0 for row in items[:n]]
    candidates = [row[k] for row, k in zip(items, kept, strict=False)]
    interest = [row[k] for row, k in zip(scores, kept, strict=False)]
    return Weighed(drawn.take(np.arange(n)), candidates, interest, place[:n])
