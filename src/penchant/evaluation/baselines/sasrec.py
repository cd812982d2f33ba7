"""SASRec with full-softmax cross entropy: our interest encoder with IDs alone (see penchant.interest.train)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from penchant.evaluation.baselines.events import TrainingEvents
from penchant.evaluation.systems import Queries, System
from penchant.interest.behaviour import History
from penchant.interest.config import EncoderConfig
from penchant.interest.encoder import InterestEncoder
from penchant.interest.inputs import Reading
from penchant.interest.search import score_all
from penchant.interest.train import train_encoder


@dataclass(frozen=True, eq=False)
class SASRec:
    """score = R(interest, item). Popularity from training for an empty history.

    ``reading`` says what more the encoder knows of events; None: their items alone.

    A cold item has a vector too: the softmax pushes it down with everything a user did not take next.
    """

    encoder: InterestEncoder
    items: NDArray[np.float32]
    counts: NDArray[np.float32]
    name: str = "SASRec (cross entropy)"
    reading: Reading | None = None

    def scores(self, queries: Queries) -> NDArray[np.float32]:
        out = np.repeat(self.counts[None], len(queries), axis=0)
        warm = [i for i, h in enumerate(queries.history) if len(h)]
        if warm:
            out[warm] = score_all(self.encoder, self.items, [self._behaviour(queries, i) for i in warm])
        return out

    def _behaviour(self, queries: Queries, i: int) -> History:
        history = queries.history[i]
        if self.reading is None:
            return history
        start = int(self.reading.log.start[queries.user[i]])
        return self.reading.of(slice(start, start + len(history)))


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
