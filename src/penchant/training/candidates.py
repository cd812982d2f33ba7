"""Retrieved candidates for training and validation: from an encoder that has never seen the target it retrieves for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from penchant.cached import cached_array
from penchant.data.history import Targets
from penchant.data.split import Split
from penchant.interest.beside import fit_beside
from penchant.interest.config import EncoderConfig
from penchant.interest.encoder import InterestEncoder
from penchant.interest.fit import encoder_ndcg, training_sequences
from penchant.interest.search import index_of, search
from penchant.interest.train import train_encoder
from penchant.interest.vectors import standardise
from penchant.recommend import Stages, silent

# Validation targets that an encoder's early stopping looks at.
_STOPPING = 2_000


@dataclass(frozen=True, eq=False)
class Candidates:
    """``items`` (n, k) best first, padded with -1, and the encoder's ``scores`` (n, k)."""

    items: NDArray[np.int32]
    scores: NDArray[np.float32]


class Retriever:
    """Trains encoders on parts of a split's users and retrieves for the others; answers are kept in the cache."""

    def __init__(
        self,
        split: Split,
        vectors: NDArray[np.float32],
        config: EncoderConfig,
        *,
        seed: int,
        key: Sequence[str],
        stages: Stages = silent,
    ) -> None:
        self._split, self._vectors, self._config, self._seed = split, vectors, config, seed
        own = (config.resolved().model_dump_json(), str(seed))
        self._key = (split.dataset.content_hash, repr(sorted(split.spec.items())), *own, *key)
        self._stages = stages
        self._of_all: InterestEncoder | None = None

    def for_targets(self, targets: Targets, k: int) -> Candidates:
        """For validation or test targets: one encoder trained on every user's training events."""
        return self._cached(targets, k, np.zeros(len(targets), dtype=np.int64), folds=1)

    def for_training(self, positions: NDArray[np.int64], k: int, folds: int) -> Candidates:
        """For training events: users are dealt into folds; a fold's encoder is trained on the other folds' users.

        So no encoder has seen the target, nor anything else of its user.
        """
        log = self._split.log
        fold = self._fold_of_user(folds)
        return self._cached(Targets(log, positions), k, fold[log.user[positions]], folds)

    def _fold_of_user(self, folds: int) -> NDArray[np.int64]:
        return np.random.default_rng([self._seed, folds]).permutation(self._split.log.n_users) % folds

    def _cached(self, targets: Targets, k: int, fold: NDArray[np.int64], folds: int) -> Candidates:
        k = min(k, self._split.log.n_items)
        key = (*self._key, str(k), str(folds), targets.position.tobytes().hex())

        def compute() -> NDArray[np.float64]:
            out = np.full((len(targets), k, 2), -np.inf)
            out[:, :, 0] = -1
            for f in range(folds):
                rows = np.flatnonzero((fold == f) & (targets.position > targets.log.start[targets.user]))
                if rows.size:
                    encoder = self._encoder(f, folds)
                    histories = [targets.history(int(i)) for i in rows]
                    interest = encoder.encode(histories)
                    bonus = encoder.bonus(histories, interest)
                    found = search(index_of(encoder), interest, k, exclude=histories, bonus=bonus)
                    out[rows, :, 0], out[rows, :, 1] = found
            return out

        found = cached_array("candidates", key, compute)
        return Candidates(found[:, :, 0].astype(np.int32), found[:, :, 1].astype(np.float32))

    def _encoder(self, fold: int, folds: int) -> InterestEncoder:
        """That of a fold. Validation rows, scores and tests ask the one trained on everybody: it is kept."""
        if folds > 1:
            return self._train(fold, folds)
        if self._of_all is None:
            self._of_all = self._train(fold, folds)
        return self._of_all

    def _train(self, fold: int, folds: int) -> InterestEncoder:
        split, log = self._split, self._split.log
        stopping = split.valid
        if folds == 1:
            sequences = training_sequences(split)
        else:
            away = self._fold_of_user(folds) != fold
            sequences = [log.item[log.all_of(int(u))][split.train[log.all_of(int(u))]] for u in np.flatnonzero(away)]
            sequences = [s for s in sequences if len(s)]
            # When to stop is learnt too: a validation history of these users holds the targets to retrieve for.
            stopping = stopping.take(np.flatnonzero(away[stopping.user]))
        stopping = stopping.sample(_STOPPING, self._seed)
        histories = [stopping.history(i) for i in range(len(stopping))]
        done = self._stages(f"train the encoder that retrieves, {fold + 1} of {folds}: epochs", self._config.epochs)
        encoder, _ = train_encoder(
            sequences,
            log.n_items,
            standardise(self._vectors),
            self._config,
            lambda model: encoder_ndcg(model, histories, stopping.item),
            on_epoch=lambda *_: done(1),
        )
        fit_beside(encoder, sequences, histories, stopping.item)
        return encoder
