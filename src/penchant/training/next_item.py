"""Rows of dense next-item training: a history rendered once holds a target at every title.

The one-target-per-prompt rows of BIGRec (Bao et al. 2023) and TALLRec are here too, for comparison.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from penchant.errors import DataError
from penchant.training.config import NextItemConfig
from penchant.training.corpus import Corpus, Positions
from penchant.training.rows import Row, RowBuilder


def next_item_rows(corpus: Corpus, config: NextItemConfig) -> Iterator[Row]:
    """All training rows of a split: with mode dense every training event is a target exactly once."""
    weights = target_weights(corpus, config.popularity_power)
    for positions in corpus.train_positions:
        if config.mode == "dense":
            for a, b in _windows(corpus, positions, config.window, config.pack_tokens):
                yield dense_row(corpus, positions[a:b], weights)
        else:
            for i in range(len(positions)):
                yield single_row(corpus, positions[: i + 1], config, weights)


def valid_rows(corpus: Corpus, config: NextItemConfig, n: int) -> list[Row]:
    """One row a validation target, of up to ``n`` seeded users: its history as the prompt, the target supervised."""
    targets = corpus.split.valid.sample(n, config.seed)
    log = corpus.split.log
    even = np.ones(log.n_items, dtype=np.float32)
    return [
        _single(corpus, np.arange(log.before(int(p)).start, p + 1), config, even, held_out=True)
        for p in targets.position
    ]


def dense_row(corpus: Corpus, positions: Positions, weights: NDArray[np.float32]) -> Row:
    """The events at ``positions`` of one user as one row; each is a target, given those before it in the row."""
    corpus.require_past(positions[:-1], positions)
    items = corpus.split.log.item[positions]
    sequences = [corpus.item_tokens[int(i)] for i in items]
    builder = RowBuilder(
        [*corpus.opening, *(t for s in sequences for t in s)], user=int(corpus.split.log.user[positions[0]])
    )
    at = len(corpus.opening)
    for item, sequence in zip(items, sequences, strict=True):
        builder.supervise(at, len(sequence), weight=float(weights[item]))
        at += len(sequence)
    return builder.build(positions[:-1], positions)


def single_row(corpus: Corpus, positions: Positions, config: NextItemConfig, weights: NDArray[np.float32]) -> Row:
    """The last of ``positions`` as the one target, behind a prompt of the newest events before it."""
    return _single(corpus, positions, config, weights, held_out=False)


def _single(
    corpus: Corpus, positions: Positions, config: NextItemConfig, weights: NDArray[np.float32], *, held_out: bool
) -> Row:
    log = corpus.split.log
    prompt, kept = corpus.render(
        "next_item", positions[:-1], max_history=config.max_history, budget=config.prompt_tokens
    )
    target = positions[-1:]
    if not held_out:
        corpus.require_past(kept, target)
    item = int(log.item[target[0]])
    sequence = corpus.item_tokens[item]
    builder = RowBuilder([*prompt, *sequence], user=int(log.user[target[0]]))
    builder.supervise(len(prompt), len(sequence), weight=float(weights[item]))
    return builder.build(kept, target)


def target_weights(corpus: Corpus, power: float) -> NDArray[np.float32]:
    """A weight an item, (training count) ** -power, scaled so that the mean over training events is 1."""
    counts = corpus.split.train_counts.astype(np.float64)
    weights = np.where(counts > 0, np.maximum(counts, 1.0) ** -power, 1.0)
    return np.asarray(weights / (weights * counts).sum() * counts.sum(), dtype=np.float32)


def _windows(corpus: Corpus, positions: Positions, window: int, pack_tokens: int) -> Iterator[tuple[int, int]]:
    """Cut a history into rows of at most ``window`` items and ``pack_tokens`` tokens; each event in exactly one."""
    items = corpus.split.log.item[positions]
    length = [len(corpus.item_tokens[int(i)]) for i in items]
    start, used = 0, len(corpus.opening)
    for i, n in enumerate(length):
        if len(corpus.opening) + n > pack_tokens:
            raise DataError(
                f"the title of item {corpus.split.log.item_ids[int(items[i])]} has {n} tokens, and a pack holds "
                f"{pack_tokens - len(corpus.opening)}: the target would be cut off",
                where="training",
                remedy="raise pack_tokens, or shorten the item template",
            )
        if i - start == window or used + n > pack_tokens:
            yield start, i
            start, used = i, len(corpus.opening)
        used += n
    if start < len(length):
        yield start, len(length)
