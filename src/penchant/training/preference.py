"""Rows of preference training: a history's items, and behind some of them the retrieved items that weren't taken.

S-DPO (Chen et al. 2024) spends a whole prompt on each target and again on each rival. Here the history
is run once and the rivals hang behind it as branches.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from penchant.training.candidates import Candidates, Retriever
from penchant.training.config import PreferenceConfig
from penchant.training.corpus import Corpus, Positions
from penchant.training.rows import Row, RowBuilder


def preference_targets(corpus: Corpus, config: PreferenceConfig) -> Positions:
    """Training events that get rivals: every ``every``-th of each history, counted from its newest, never its first."""
    chosen = [positions[1:][::-1][:: config.every][::-1] for positions in corpus.train_positions if len(positions) > 1]
    return np.concatenate(chosen) if chosen else np.zeros(0, dtype=np.int64)


def preference_rows(corpus: Corpus, config: PreferenceConfig, retriever: Retriever) -> Iterator[Row]:
    """Rows of all training users; rivals come from a retriever that hasn't seen the user."""
    targets = preference_targets(corpus, config)
    rng = np.random.default_rng(config.seed)
    pool = retriever.for_training(targets, max(config.candidates, config.negatives + 1), config.folds)
    at = dict(zip(targets.tolist(), range(len(targets)), strict=True))
    for positions in corpus.train_positions:
        for start in range(0, len(positions), config.window):
            part = positions[start : start + config.window]
            rivals = {int(p): _rivals(corpus, pool, at, int(p), config.negatives, rng) for p in part if int(p) in at}
            if any(rivals.values()):
                yield preference_row(corpus, part, rivals)


def valid_rows(corpus: Corpus, config: PreferenceConfig, retriever: Retriever, n: int) -> list[Row]:
    """One row a validation target of up to ``n`` seeded users, with its best retrieved rivals."""
    targets = corpus.split.valid.sample(n, config.seed)
    log = corpus.split.log
    pool = retriever.for_targets(targets, max(config.candidates, config.negatives + 1))
    rows = []
    for i, p in enumerate(targets.position):
        history = np.arange(log.before(int(p)).start, p)[-config.max_history :]
        rivals = [int(c) for c in pool.items[i] if c >= 0 and c != log.item[p]][: config.negatives]
        if len(history) and rivals:
            rows.append(preference_row(corpus, np.append(history, p), {int(p): rivals}, held_out=True))
    return rows


def preference_row(
    corpus: Corpus, positions: Positions, rivals: dict[int, list[int]], *, held_out: bool = False
) -> Row:
    """The events at ``positions`` as a trunk; ``rivals`` names items that hang where an event's own title begins."""
    if not held_out:
        corpus.require_past(positions[:-1], positions)
    # What stands behind the last target is trained on by nobody.
    positions = positions[: 1 + max(i for i, p in enumerate(positions.tolist()) if rivals.get(p))]
    log = corpus.split.log
    sequences = [corpus.item_tokens[int(i)] for i in log.item[positions]]
    builder = RowBuilder([*corpus.opening, *(t for s in sequences for t in s)], user=int(log.user[positions[0]]))
    at = len(corpus.opening)
    for p, sequence in zip(positions.tolist(), sequences, strict=True):
        if rivals.get(p):
            group = builder.supervise(at, len(sequence))
            for item in rivals[p]:
                builder.branch(at, corpus.item_tokens[item], group)
        at += len(sequence)
    targets = np.array([p for p in positions.tolist() if rivals.get(p)], dtype=np.int64)
    return builder.build(positions[:-1], targets)


def _rivals(
    corpus: Corpus, pool: Candidates, at: dict[int, int], position: int, n: int, rng: np.random.Generator
) -> list[int]:
    own = int(corpus.split.log.item[position])
    # Two items of one title are one sequence: no preference can be learnt between them.
    title = corpus.item_tokens[own]
    found = [int(c) for c in pool.items[at[position]] if c >= 0 and corpus.item_tokens[int(c)] != title]
    return [found[i] for i in np.sort(rng.permutation(len(found))[:n])]
