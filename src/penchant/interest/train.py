"""Training the interest encoder: every event of a history but the first is a target."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from penchant.errors import ConfigError, DataError, ModelError
from penchant.interest.behaviour import Behaviour, History
from penchant.interest.config import EncoderConfig
from penchant.interest.encoder import InterestEncoder
from penchant.interest.losses import Objective, Targets, check_values, target_weights

# Events in a training step where the configuration does not say how many rows.
_BATCH_EVENTS = 2_048

Sliced = TypeVar("Sliced", Behaviour, NDArray[np.integer])
EpochDone = Callable[[int, float, float], None]  # epoch from 1, training loss, validation score


def windows(sequence: Sliced, length: int) -> list[Sliced]:
    """Cut a history so that each event but the first is a target exactly once.

    A window has at most ``length + 1`` events (``length`` inputs and their targets); each begins at the
    last event of the window before it. The cut is counted from the newest end.
    """
    out = []
    end = len(sequence)
    while end > 1:
        start = max(0, end - length - 1)
        out.append(sequence[start:end])
        end = start + 1
    return out


def batch_size(rows: Sequence[History], config: EncoderConfig) -> int:
    """Rows in a training step: few long histories or many short ones hold as many targets."""
    if config.batch_rows is not None or not rows:
        return config.batch_rows or 1
    return int(np.clip(_BATCH_EVENTS / np.mean([len(row) for row in rows]), 8, 512))


@dataclass(frozen=True, eq=False)
class Inputs:
    """What the encoder reads beside items: see InterestEncoder."""

    columns: Sequence[int] = ()
    words: NDArray[np.float32] | None = None
    n_words: int = 0


def train_encoder(
    sequences: Sequence[History],
    n_items: int,
    text: NDArray[np.float32] | None,
    config: EncoderConfig,
    validate: Callable[[InterestEncoder], float],
    *,
    inputs: Inputs | None = None,
    on_epoch: EpochDone | None = None,
    max_seconds: float = math.inf,
) -> tuple[InterestEncoder, list[dict[str, float]]]:
    """Train on users' training sequences (oldest first); keep the epoch for which ``validate`` is largest.

    ``text`` are standardised item vectors (n_items, d) or None. Returns the encoder and one record an epoch
    (loss a target, valid score, seconds). The same inputs, seed and thread count give the same encoder, unless
    ``max_seconds`` cuts training short.
    """
    if config.dim % config.heads:
        raise ConfigError(f"{config.heads} heads do not divide dim {config.dim}", remedy="change one of them")
    if not config.use_ids and (text is None or not config.use_text):
        raise ConfigError("an encoder with neither ids nor text sees nothing", remedy="set use_ids or use_text")
    known = [Behaviour.of(sequence) for sequence in sequences]
    data = _Rows.of(known, n_items, config)
    if not data.rows:
        raise DataError(
            "no user has two training events, so there is nothing to learn from",
            where="interest encoder",
            remedy="give longer histories",
        )
    values = [row.value[1:] for row in data.rows if row.value is not None]
    if config.value_column is not None:
        check_values(config, np.concatenate([*values, np.zeros(0, dtype=np.float32)]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        inputs = inputs or Inputs()
        model = InterestEncoder(
            config,
            n_items,
            text if config.use_text else None,
            columns=inputs.columns,
            words=inputs.words,
            n_words=inputs.n_words,
        )
        if model.project is not None:
            model.warm.copy_(torch.from_numpy(data.counts > 0))
        if config.loss == "mse":
            with torch.no_grad():
                model.relevance.level.fill_(float(np.nanmean(np.concatenate(values))))
        return _train(model, data, validate, on_epoch, max_seconds)


@dataclass(frozen=True, eq=False)
class _Rows:
    """Windows to train on, the weight of each one's user, of each item, and how often each item was taken."""

    rows: list[Behaviour]
    user_weight: NDArray[np.float32]
    item_weight: NDArray[np.float32]
    counts: NDArray[np.int64]

    @classmethod
    def of(cls, sequences: Sequence[Behaviour], n_items: int, config: EncoderConfig) -> _Rows:
        counts = np.zeros(n_items, dtype=np.int64)
        for sequence in sequences:
            counts += np.bincount(sequence.item, minlength=n_items)
        cut = [windows(sequence, config.max_length) for sequence in sequences]
        user, item = target_weights(config, [len(sequence) for sequence in sequences], counts)
        rows = [row for windows_ in cut for row in windows_]
        by_user = np.repeat(user, [len(windows_) for windows_ in cut])
        # The mean weight of a target is 1, so that the learning rate means the same with and without weights.
        whole = sum(float(w * item[row.item[1:]].sum()) for w, row in zip(by_user, rows, strict=True))
        mean = whole / max(1, sum(len(row) - 1 for row in rows))
        return cls(rows, by_user / np.float32(mean or 1.0), item, counts)


def _train(
    model: InterestEncoder,
    data: _Rows,
    validate: Callable[[InterestEncoder], float],
    on_epoch: EpochDone | None,
    max_seconds: float,
) -> tuple[InterestEncoder, list[dict[str, float]]]:
    config, rows = model.config, data.rows
    rng = np.random.default_rng(config.seed)
    objective = Objective(model, data.counts)
    by_user, by_item = torch.from_numpy(data.user_weight), torch.from_numpy(data.item_weight)
    optimiser = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    size = batch_size(rows, config)
    steps = math.ceil(len(rows) / size)
    total, warm = steps * config.epochs, max(1, steps // 2)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda s: min(1.0, (s + 1) / warm) * (0.5 + 0.5 * math.cos(math.pi * min(1.0, s / total)))
    )
    log: list[dict[str, float]] = []
    best, best_epoch, kept = -math.inf, 0, {}
    begun = time.perf_counter()
    for epoch in range(1, config.epochs + 1):
        model.train()
        summed, seen = 0.0, 0
        for chosen in _batches(rows, size, rng):
            inputs = model.batch([rows[i][:-1] for i in chosen])
            after = model.batch([rows[i][1:] for i in chosen], value=config.value_column is not None)
            items = model.items()
            states = model(inputs, items)
            # Real positions only: padding would cost as much as they do.
            real = inputs.real
            target = after.item[real]
            weight = by_user[chosen].repeat_interleave(inputs.length) * by_item[target]
            value = None if after.value is None else after.value[real]
            loss = objective.loss(items, Targets(states[real], target, weight, value))
            if not torch.isfinite(loss):
                raise ModelError(
                    f"the loss is {float(loss.detach())} in epoch {epoch}",
                    where="interest encoder",
                    remedy="lower learning_rate, and check the item vectors",
                )
            optimiser.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimiser.step()
            schedule.step()
            summed, seen = summed + float(loss.detach()) * len(target), seen + len(target)
        score = validate(model)
        if not math.isfinite(score):
            raise ModelError(
                f"the validation score is {score} in epoch {epoch}",
                where="interest encoder",
                remedy="check the validation targets and the item vectors",
            )
        seconds = time.perf_counter() - begun
        log.append({"epoch": epoch, "loss": summed / seen, "valid": score, "seconds": round(seconds, 2)})
        if on_epoch:
            on_epoch(epoch, summed / seen, score)
        if score > best or score == best == 0:  # while validation finds nothing, the newest: it has learnt most
            best, best_epoch = score, epoch
            kept = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
        if epoch - best_epoch >= config.waits or seconds > max_seconds:
            break
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.copy_(kept[name])
    return model.eval(), log


def _batches(rows: Sequence[Behaviour], size: int, rng: np.random.Generator) -> list[list[int]]:
    """Shuffled batches of rows of like length: little padding, and lengths in random order."""
    order = rng.permutation(len(rows))
    # Sort within large chunks only, so that the make-up of batches changes from epoch to epoch.
    chunk = size * 32
    batches = []
    for start in range(0, len(order), chunk):
        part = sorted(order[start : start + chunk].tolist(), key=lambda i: len(rows[i]))
        batches += [part[b : b + size] for b in range(0, len(part), size)]
    return [batches[i] for i in rng.permutation(len(batches))]
