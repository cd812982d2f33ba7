"""Mult-VAE as a baseline; the model itself is penchant.interest.mult_vae."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from penchant.evaluation.baselines.events import TrainingEvents, newest, popular_where_empty
from penchant.evaluation.systems import Queries, System
from penchant.interest.mult_vae import MultVAE, MultVAEConfig, train_mult_vae


class MultVAESystemConfig(MultVAEConfig):
    """What is tuned: the model's own configuration, and what of a history it is shown."""

    last: int | None = Field(default=None, ge=1, description="newest items of the history that count; None: all")


@dataclass(frozen=True, eq=False)
class MultVAESystem:
    """score = logit of the item, decoded from the mean code of the newest history. Popularity for an empty history.

    A cold item has a logit too: training pushes it down with everything a user has not had.
    """

    model: MultVAE
    counts: NDArray[np.float32]
    last: int | None
    name: str = "Mult-VAE"

    def scores(self, queries: Queries) -> NDArray[np.float32]:
        scores = self.model.logits(newest(queries.history, self.last))
        return popular_where_empty(scores, queries, self.counts)


def fit_mult_vae(
    events: TrainingEvents, config: MultVAESystemConfig, validate: Callable[[System], float], max_seconds: float
) -> MultVAESystem:
    """Train on whole training histories, keeping the epoch that ``validate`` likes best."""
    model, _ = train_mult_vae(
        events.sequences(),
        events.n_items,
        config,
        lambda model: validate(MultVAESystem(model, events.counts, config.last)),
        max_seconds=max_seconds,
    )
    return MultVAESystem(model, events.counts, config.last)
