"""Rows of choose: retrieved candidates behind letters, the answer one letter (LlamaRec, Yue et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from penchant.rank import letters
from penchant.training.candidates import Candidates, Retriever
from penchant.training.config import ChooseConfig
from penchant.training.corpus import Corpus, Positions
from penchant.training.rows import Row, RowBuilder


def newest_targets(corpus: Corpus, per_user: int) -> Positions:
    """The newest training events of each user that have a history."""
    chosen = [positions[1:][-per_user:] for positions in corpus.train_positions]
    return np.concatenate(chosen) if chosen else np.zeros(0, dtype=np.int64)


def choose_rows(corpus: Corpus, config: ChooseConfig, retriever: Retriever) -> Iterator[Row]:
    """One row a target that retrieval found (or was made to hold), its candidates in random order."""
    targets = newest_targets(corpus, config.targets_per_user)
    pool = retriever.for_training(targets, config.letters, config.folds)
    rng = np.random.default_rng(config.seed)
    for i, p in enumerate(targets):
        candidates = _with_target(corpus, pool, i, int(p), config.insert_missed)
        if candidates is not None:
            yield choose_row(corpus, config, int(p), rng.permutation(candidates))


def valid_rows(corpus: Corpus, config: ChooseConfig, retriever: Retriever, n: int) -> list[Row]:
    """One row a validation target among its candidates, of up to ``n`` seeded users."""
    targets = corpus.split.valid.sample(n, config.seed)
    pool = retriever.for_targets(targets, config.letters)
    rng = np.random.default_rng([config.seed, 1])
    rows = []
    for i, p in enumerate(targets.position):
        candidates = _with_target(corpus, pool, i, int(p), config.insert_missed)
        if candidates is not None:
            rows.append(choose_row(corpus, config, int(p), rng.permutation(candidates), held_out=True))
    return rows


def choose_row(
    corpus: Corpus, config: ChooseConfig, position: int, candidates: NDArray[np.integer], *, held_out: bool = False
) -> Row:
    """The prompt of one target's candidates in the order given, and the target's letter as the answer."""
    log = corpus.split.log
    prompt, kept = choose_prompt(corpus, config, np.arange(log.before(position).start, position), candidates)
    if not held_out:
        corpus.require_past(kept, np.array([position]))
    # Every row chooses among all letters, so that rows of few candidates batch with the others.
    tokens = corpus.labels(letters(config.letters))
    builder = RowBuilder(prompt, user=int(log.user[position]), choices=tokens)
    builder.answer(tokens[int(np.flatnonzero(candidates == log.item[position])[0])])
    return builder.build(kept, np.array([position], dtype=np.int64))


def choose_prompt(
    corpus: Corpus, config: ChooseConfig, history: Positions, candidates: Sequence[int] | NDArray[np.integer]
) -> tuple[list[int], Positions]:
    """The tokens of the prompt, and the events that fitted into it."""
    lettered = [
        {"label": label, "text": corpus.texts[int(c)]}
        for label, c in zip(letters(len(candidates)), candidates, strict=True)
    ]
    return corpus.render(
        "choose", history, max_history=config.max_history, budget=config.prompt_tokens, candidates=lettered
    )


def _with_target(corpus: Corpus, pool: Candidates, row: int, position: int, insert: bool) -> NDArray[np.int32] | None:
    """The candidates of a target, itself among them; None where retrieval missed it and it isn't to be inserted."""
    found = pool.items[row][pool.items[row] >= 0]
    target = corpus.split.log.item[position]
    # An item of the target's own text could be no wrong answer.
    found = found[[c == target or corpus.texts[c] != corpus.texts[target] for c in found.tolist()]]
    if len(found) < 2:
        return None
    if target in found:
        return found
    return np.append(found[:-1], target).astype(np.int32) if insert else None
