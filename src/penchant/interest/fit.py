"""Training the encoder on a split: which histories, which inputs, and what it is stopped by."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from penchant import metrics
from penchant.data.history import Targets
from penchant.data.split import Split
from penchant.interest.behaviour import Behaviour, History
from penchant.interest.config import EncoderConfig
from penchant.interest.encoder import InterestEncoder
from penchant.interest.inputs import Columns, Reading
from penchant.interest.match import Chosen, Trials
from penchant.interest.search import index_of, search
from penchant.interest.train import EpochDone, Inputs, train_encoder
from penchant.interest.words import Words

Items = NDArray[np.int32]
# Validation users the encoder's early stopping looks at; more would only cost time.
_STOPPING_USERS = 5_000
# Scores held at once while the text match is chosen: 4M float32 are 16 MB.
_HELD = 4_000_000


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
    fit_match(encoder, histories, stopping.item)
    return encoder, told


def fit_match(
    encoder: InterestEncoder,
    histories: Sequence[History],
    target: NDArray[np.integer],
    *,
    seen: Sequence[NDArray[np.integer]] | None = None,
) -> Chosen | None:
    """Choose on validation how much the text match of a trained encoder counts; None where it has none.

    ``seen`` are the items that may not come, by default each history's own; targets without a history count 0.
    """
    trials = match_trials(encoder, histories, target, seen)
    if trials is None or encoder.match is None:
        return None
    chosen = trials.best(len(histories), encoder.config.cold_price)
    encoder.match.weight.fill_(chosen.weight)
    encoder.match.shift.fill_(chosen.shift)
    return chosen


@torch.inference_mode()
def match_trials(
    encoder: InterestEncoder,
    histories: Sequence[History],
    target: NDArray[np.integer],
    seen: Sequence[NDArray[np.integer]] | None = None,
) -> Trials | None:
    """Let the match learn what it standardises by, and try every weight and shift; None where there is none to try."""
    match, text = encoder.match, encoder.text
    rows = [i for i in range(len(histories)) if len(histories[i])]
    if match is None or text is None or not rows:
        return None
    match.weight.zero_()
    encoder.eval()
    items, warm = torch.from_numpy(encoder.item_matrix()), encoder.warm.cpu()
    match.learn(text, items[warm].to(text))
    texts = match.texts(text)
    trials = Trials(~warm.numpy())
    block = max(1, _HELD // len(items))
    for start in range(0, len(rows), block):
        part = rows[start : start + block]
        known = [Behaviour.of(histories[i]) for i in part]
        interest = encoder.encode(known)
        scaled, mean = match.standardised(torch.from_numpy(interest).to(text))
        own = encoder.relevance.pairs(torch.cat([scaled, -mean], dim=-1), F.pad(items.to(text), (0, 1), value=1.0))
        plain = encoder.scores(interest, items.numpy())
        for row, (i, history) in enumerate(zip(part, known, strict=True)):
            plain[row, history.item if seen is None else seen[i]] = -np.inf
        likeness = match.newest([history.item for history in known], texts) @ texts.T
        trials.add(plain, own.cpu().numpy(), likeness.cpu().numpy(), target[part])
    return trials


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
    items, _ = search(index_of(encoder), encoder.encode(known), 10, exclude=seen)
    rank = metrics.list_rank(items, target[warm])
    return float(metrics.ndcg(rank, 10).sum() / len(histories))
