"""Training the interest encoder: every event is a target, full-softmax cross entropy over the catalogue.

The full softmax, not sampled negatives with BCE, is what makes SASRec strong (Klenitskiy and Vasilev
2023, "Turning Dross Into Gold Loss"; Petrov and Macdonald 2023).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from penchant.errors import ConfigError, DataError, ModelError
from penchant.interest.encoder import EncoderConfig, InterestEncoder, pad
from penchant.interest.softmax import full_softmax_loss

# Events in a training step where the configuration does not say how many rows.
_BATCH_EVENTS = 2_048

EpochDone = Callable[[int, float, float], None]  # epoch from 1, training loss in nats, validation NDCG@10


def windows(sequence: NDArray[np.integer], length: int) -> list[NDArray[np.integer]]:
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


def batch_size(rows: Sequence[NDArray[np.integer]], config: EncoderConfig) -> int:
    """Rows in a training step: few long histories or many short ones hold as many targets."""
    if config.batch_rows is not None or not rows:
        return config.batch_rows or 1
    return int(np.clip(_BATCH_EVENTS / np.mean([len(row) for row in rows]), 8, 512))


def train_encoder(
    sequences: Sequence[NDArray[np.integer]],
    n_items: int,
    text: NDArray[np.float32] | None,
    config: EncoderConfig,
    validate: Callable[[InterestEncoder], float],
    *,
    on_epoch: EpochDone | None = None,
    max_seconds: float = math.inf,
) -> tuple[InterestEncoder, list[dict[str, float]]]:
    """Train on users' training sequences (item indices, oldest first); keep the best epoch by ``validate``.

    ``text`` are standardised item vectors (n_items, d) or None. Returns the encoder and one record an epoch
    (loss in nats a target, valid score, seconds). The same inputs, seed and thread count give the same
    encoder, unless ``max_seconds`` cuts training short.
    """
    if config.dim % config.heads:
        raise ConfigError(f"{config.heads} heads do not divide dim {config.dim}", remedy="change one of them")
    if not config.use_ids and (text is None or not config.use_text):
        raise ConfigError("an encoder with neither ids nor text sees nothing", remedy="set use_ids or use_text")
    rows = [w for s in sequences for w in windows(s, config.max_length)]
    if not rows:
        raise DataError(
            "no user has two training events, so there is nothing to learn from",
            where="interest encoder",
            remedy="give longer histories",
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return _train(rows, n_items, text, config, validate, on_epoch, max_seconds)


def _train(
    rows: list[NDArray[np.integer]],
    n_items: int,
    text: NDArray[np.float32] | None,
    config: EncoderConfig,
    validate: Callable[[InterestEncoder], float],
    on_epoch: EpochDone | None,
    max_seconds: float,
) -> tuple[InterestEncoder, list[dict[str, float]]]:
    rng = np.random.default_rng(config.seed)
    dtype = getattr(torch, config.softmax_dtype)
    model = InterestEncoder(config, n_items, text if config.use_text else None)
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
        summed, targets = 0.0, 0
        for batch in _batches(rows, size, rng):
            ids, length = pad(batch)
            items = model.items()
            states = model(ids[:, :-1], items)
            # Real positions only: padding would cost as much as they do.
            real = torch.arange(ids.shape[1] - 1) < (length - 1)[:, None]
            loss = full_softmax_loss(states[real], items, ids[:, 1:][real], dtype=dtype)
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
            n = int(real.sum())
            summed, targets = summed + float(loss.detach()) * n, targets + n
        score = validate(model)
        if not math.isfinite(score):
            raise ModelError(
                f"the validation score is {score} in epoch {epoch}",
                where="interest encoder",
                remedy="check the validation targets and the item vectors",
            )
        seconds = time.perf_counter() - begun
        log.append({"epoch": epoch, "loss": summed / targets, "valid_ndcg@10": score, "seconds": round(seconds, 2)})
        if on_epoch:
            on_epoch(epoch, summed / targets, score)
        if score > best:
            best, best_epoch = score, epoch
            kept = {name: value.detach().clone() for name, value in model.state_dict().items()}
        if epoch - best_epoch >= config.patience or seconds > max_seconds:
            break
    model.load_state_dict(kept)
    return model.eval(), log


def _batches(rows: list[NDArray[np.integer]], size: int, rng: np.random.Generator) -> list[list[NDArray[np.integer]]]:
    """Shuffled batches of rows of like length: little padding, and lengths in random order."""
    order = rng.permutation(len(rows))
    # Sort within large chunks only, so that the make-up of batches changes from epoch to epoch.
    chunk = size * 32
    batches = []
    for start in range(0, len(order), chunk):
        part = sorted(order[start : start + chunk], key=lambda i: len(rows[i]))
        batches += [[rows[i] for i in part[b : b + size]] for b in range(0, len(part), size)]
    return [batches[i] for i in rng.permutation(len(batches))]
