"""SASRec with full-softmax cross entropy: our interest encoder with IDs alone (see penchant.interest.train)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from penchant.evaluation.baselines.events import TrainingEvents
from penchant.evaluation.systems import Queries, System
from penchant.interest.encoder import EncoderConfig, InterestEncoder
from penchant.interest.train import train_encoder


@dataclass(frozen=True, eq=False)
class SASRec:
    """score = interest vector . item vector. Popularity from training for an empty history.

    A cold item has a vector too: the softmax pushes it down with everything a user did not take next.
    """

    encoder: InterestEncoder
    items: NDArray[np.float32]
    counts: NDArray[np.float32]
    name: str = "SASRec (cross entropy)"

    def scores(self, queries: Queries) -> NDArray[np.float32]:
        out = np.repeat(self.counts[None], len(queries), axis=0)
        warm = [i for i, h in enumerate(queries.history) if len(h)]
        if warm:
            out[warm] = self.encoder.encode([queries.history[i] for i in warm]) @ self.items.T
        return out


def fit_sasrec(
    events: TrainingEvents, config: EncoderConfig, validate: Callable[[System], float], max_seconds: float
) -> SASRec:
    """Train on the training sequences, keeping the epoch that ``validate`` likes best."""

    def system(encoder: InterestEncoder) -> SASRec:
        return SASRec(encoder, encoder.item_matrix(), events.counts)

    encoder, _ = train_encoder(
        events.sequences(),
        events.n_items,
        None,
        config,
        lambda encoder: validate(system(encoder)),
        max_seconds=max_seconds,
    )
    return system(encoder)
