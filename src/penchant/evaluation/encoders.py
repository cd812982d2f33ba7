"""The encoders of a comparison, our variants and the baseline SASRec: grids, training, and how they are read back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from penchant.evaluation.baselines import FittedSystem, Validation
from penchant.evaluation.baselines.sasrec import SASRec
from penchant.evaluation.baselines.tune import Trial, grid, tune
from penchant.evaluation.prepared import Prepared
from penchant.evaluation.systems import System
from penchant.evaluation.tasks import Task
from penchant.interest.beside import fit_beside
from penchant.interest.config import EncoderConfig
from penchant.interest.encoder import InterestEncoder
from penchant.interest.fit import inputs_of, training_behaviours
from penchant.interest.train import train_encoder

# Our encoder's variants: name -> (text vectors, ID embeddings). With IDs alone and nothing beside it is the baseline
# sasrec, with the same settings and grid.
IDS, SASREC = "encoder: ids", "sasrec"
VARIANTS = {"encoder: text": (True, False), IDS: (False, True), "encoder: ids + text": (True, True)}
# Settings of our encoder that the baseline SASRec does not take over.
_NOT_SASREC = (
    *("kind", "inputs", "interests", "relevance", "id_dropout"),
    *("loss", "hard_negatives", "user_weight", "item_weight", "match", "cold_price"),
)
# What is fitted beside a trained encoder, and leaves what it learns alone.
_BESIDE = {"match", "cold_price", "neighbours"}


@dataclass(frozen=True)
class Trained:
    """An encoder that another system trained: its settings, where its weights are, and the seconds it took."""

    config: EncoderConfig
    weights: Path
    seconds: float

    def serves(self, config: EncoderConfig) -> bool:
        """Whether training with these settings would end in the same weights."""
        return self.config.model_dump(exclude=_BESIDE) == config.model_dump(exclude=_BESIDE)

    def encoder(self, config: EncoderConfig, n_items: int) -> InterestEncoder:
        """The same weights with room for what these settings have beside them."""
        return InterestEncoder.load(self.weights, self.config, n_items, None).with_beside(config)


def encoder_grid(task: Task, name: str) -> list[EncoderConfig]:
    """What an encoder is tuned over, SASRec too: the task's learning rate and dropout first.

    Of the task's encoder SASRec has the sizes, and none of what SASRec is not.
    """
    text, ids = VARIANTS.get(name, (False, True))
    changes: dict[str, Any] = {"use_text": text, "use_ids": ids}
    if not text:
        changes |= {"match": 0, "cold_price": 0.0}
    if not ids:
        changes |= {"neighbours": 0}  # they know items by nothing but their IDs
    if name == SASREC:
        plain = EncoderConfig()
        changes |= {setting: getattr(plain, setting) for setting in _NOT_SASREC} | {"neighbours": 0}
    own = task.fit.encoder.model_copy(update=changes)
    return grid(own, dropout=(0.5, 0.3), learning_rate=(5e-3, 2e-3))


def fit_variant(
    made: Prepared, name: str, seed: int, configs: list[EncoderConfig], trained: Trained | None = None
) -> FittedSystem:
    """One of VARIANTS, tuned over ``configs`` within the task's budget; SASRec may have ``trained`` one."""
    task = made.task
    valid = Validation.of(made.split, seed=seed, seen=task.seen, seen_last=task.seen_last)
    columns, reading, words = made.events
    sequences = training_behaviours(made.split, reading)
    asked = reading.before(valid.targets.position)

    def fit(config: EncoderConfig, left: float) -> System:
        if trained is not None and trained.serves(config):
            encoder = trained.encoder(config, made.split.log.n_items)
        else:
            encoder, _ = train_encoder(
                sequences,
                made.split.log.n_items,
                made.vectors if config.use_text else None,
                config,
                lambda e: valid.ndcg(ranking(made, name, e)),
                inputs=inputs_of(columns, words),
                max_seconds=left,
            )
        fit_beside(encoder, sequences, asked, valid.targets.item, seen=valid.masked())
        return ranking(made, name, encoder)

    configs = [config.model_copy(update={"seed": seed}) for config in configs]
    budget = task.budget.of()
    done = made.stages(f"tune {name}", min(budget.trials, len(configs)))
    fitted = tune(name, configs, fit, valid, budget, seed=seed, done=done)
    return fitted if trained is None else _with_its_seconds(fitted, trained)


def _with_its_seconds(fitted: FittedSystem, trained: Trained) -> FittedSystem:
    """What a system costs is not less because another paid for it."""

    def whole(trial: Trial) -> Trial:
        paid = trained.seconds if trained.serves(EncoderConfig.model_validate(trial.config)) else 0.0
        return replace(trial, fit_seconds=trial.fit_seconds + paid)

    return replace(fitted, chosen=whole(fitted.chosen), trials=[whole(trial) for trial in fitted.trials])


def load_encoder(made: Prepared, name: str, path: Path, config: EncoderConfig) -> InterestEncoder:
    """A trained encoder read back into the task it was trained for; StorageError where it doesn't fit."""
    n_items, vectors = made.split.log.n_items, made.vectors if config.use_text else None
    if name == SASREC:
        return InterestEncoder.load(path, config, n_items, vectors)
    columns, _, words = made.events
    return InterestEncoder.load(
        path,
        config,
        n_items,
        vectors,
        columns=columns.sizes,
        words=None if words is None else words.vectors,
        n_words=len(columns.words),
    )


def ranking(made: Prepared, name: str, encoder: InterestEncoder) -> SASRec:
    """The encoder as a system of a table."""
    counts = made.split.train_counts.astype(np.float32)
    if name == SASREC:
        return SASRec(encoder, encoder.item_matrix(), counts)
    return SASRec(encoder, encoder.item_matrix(), counts, name, made.events[1])
