"""Training the encoder on a split: which histories, which inputs, and what it is stopped by."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from penchant import metrics
from penchant.data.history import Targets
from penchant.data.split import Split
from penchant.interest.behaviour import Behaviour, History
from penchant.interest.beside import fit_beside
from penchant.interest.config import EncoderConfig
from penchant.interest.encoder import InterestEncoder
from penchant.interest.inputs import Columns, Reading
from penchant.interest.search import index_of, search
from penchant.interest.train import EpochDone, Inputs, train_encoder
from penchant.interest.words import Words

Items = NDArray[np.int32]
# Validation users the encoder's early stopping looks at; more would only cost time.
_STOPPING_USERS = 5_000


def fit_encoder(
    split: Split,
    text: NDArray[np.float32] | None,
    config: EncoderConfig,
    columns: Columns,
    reading: Reading,
    words: Words | None,
    *,
    seed: int = 0,
    on_epoch: EpochDone | None = None,
) -> tuple[InterestEncoder, list[dict[str, float]]]:
    """Train on the split's training events, stopped by its validation targets. ``text`` are scaled item vectors."""
    log = split.log
    stopping = split.valid.sample(_STOPPING_USERS, seed)
    histories = reading.before(stopping.position)
    judge = judge_of(config, histories, stopping, reading)
    sequences = training_behaviours(split, reading)
    encoder, told = train_encoder(
        sequences, log.n_items, text, config, judge, inputs=inputs_of(columns, words), on_epoch=on_epoch
    )
    fit_beside(encoder, sequences, histories, stopping.item)
    return encoder, told


def training_behaviours(split: Split, reading: Reading) -> list[Behaviour]:
    """Each user's training events as the encoder reads them, oldest first; users without any are left out."""
    log = split.log
    made = [reading.of(log.all_of(u))[: int(split.train[log.all_of(u)].sum())] for u in range(log.n_users)]
    return [behaviour for behaviour in made if len(behaviour)]


def inputs_of(columns: Columns, words: Words | None) -> Inputs:
    """What an encoder is built for."""
    return Inputs(columns.sizes, None if words is None else words.vectors, len(columns.words))


def judge_of(
    config: EncoderConfig, histories: Sequence[Behaviour], targets: Targets, reading: Reading
) -> Callable[[InterestEncoder], float]:
    """What training stops by: NDCG@10, or where values are learnt minus the RMSE, or minus the log loss."""
    if config.value_column is None or reading.value is None:
        return lambda encoder: encoder_ndcg(encoder, histories, targets.item)
    value = reading.value[targets.position]
    rows = [i for i in range(len(histories)) if len(histories[i]) and not np.isnan(value[i])]

    def judge(encoder: InterestEncoder) -> float:
        if not rows:
            return 0.0
        predicted = predict(encoder, [histories[i] for i in rows], targets.item[rows])
        if config.loss == "mse":
            return -float(np.sqrt(np.mean((predicted - value[rows]) ** 2)))
        return -float(np.mean(metrics.log_loss(predicted, value[rows])))

    return judge


def predict(encoder: InterestEncoder, histories: Sequence[History], item: NDArray[np.integer]) -> NDArray[np.float32]:
    """The value of each history's item (n,): a rating in the data's unit (mse), or a probability (bce)."""
    interest, vectors = encoder.encode(histories), encoder.item_matrix()[item]
    scores = np.concatenate([encoder.scores(interest[i : i + 1], vectors[i : i + 1])[0] for i in range(len(item))])
    return scores if encoder.config.loss == "mse" else np.asarray(1 / (1 + np.exp(-scores)), dtype=np.float32)


def stopping_metric(config: EncoderConfig) -> str:
    """The name of what the encoder's ``valid`` is."""
    if config.value_column is None:
        return "NDCG@10"
    return "minus RMSE" if config.loss == "mse" else "minus log loss"


def training_sequences(split: Split) -> list[Items]:
    """Each user's training events as item indices, oldest first; users without any are left out."""
    log = split.log
    sequences = (log.item[log.all_of(u)][split.train[log.all_of(u)]] for u in range(log.n_users))
    return [s for s in sequences if len(s)]


def encoder_ndcg(encoder: InterestEncoder, histories: Sequence[History], target: NDArray[np.integer]) -> float:
    """Mean NDCG@10 over all items, seen ones masked; users without a history count 0."""
    warm = [i for i, h in enumerate(histories) if len(h)]
    if not warm:
        return 0.0
    known = [histories[i] for i in warm]
    seen = [Behaviour.of(history).item for history in known]
    interest = encoder.encode(known)
    items, _ = search(index_of(encoder), interest, 10, exclude=seen, bonus=encoder.bonus(known, interest))
    rank = metrics.list_rank(items, target[warm])
    return float(metrics.ndcg(rank, 10).sum() / len(histories))
