"""Rows of preference training: a history's items, and behind some of them the retrieved items that weren't taken.

S-DPO (Chen et al. 2024) spends a whole prompt on each target and again on each rival. Here the history
is run once and the rivals hang behind it as branches. With `beside`, what the retriever thinks of each is part of the
row, and the model is trained on what is left to say.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

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
            groups = {int(p): _group(corpus, pool, at[int(p)], int(p), config, rng) for p in part if int(p) in at}
            yield from _fitting(corpus, part, groups, config.pack_tokens)


def valid_rows(corpus: Corpus, config: PreferenceConfig, retriever: Retriever, n: int) -> list[Row]:
    """One row a validation target of up to ``n`` seeded users, with its best retrieved rivals."""
    targets = corpus.split.valid.sample(n, config.seed)
    log = corpus.split.log
    pool = retriever.for_targets(targets, max(config.candidates, config.negatives + 1))
    rows = []
    for i, p in enumerate(targets.position.tolist()):
        history = _newest(corpus, np.arange(log.before(p).start, p)[-config.max_history :], config.prompt_tokens)
        group = _group(corpus, pool, i, p, config, None)
        if len(history) and len(group) > 1:
            rows.append(preference_row(corpus, np.append(history, p), {p: group}, held_out=True))
    return rows


def _newest(corpus: Corpus, history: Positions, tokens: int) -> Positions:
    """The newest events whose titles fit into so many tokens behind the opening, as they would into a prompt."""
    lengths = [len(corpus.item_tokens[int(item)]) for item in corpus.split.log.item[history]]
    taken = len(corpus.opening) + np.cumsum(lengths[::-1])
    return history[len(history) - int((taken <= tokens).sum()) :]


def _fitting(corpus: Corpus, part: Positions, groups: Mapping[int, Group], tokens: int) -> Iterator[Row]:
    """The part as one row, or halved, and halved again, until each row fits into a pack."""
    if not any(len(groups.get(p, ())) > 1 for p in part.tolist()):
        return
    row = preference_row(corpus, part, groups)
    if len(row) <= tokens or len(part) == 1:  # one target that does not fit is an error, of the packing
        yield row
        return
    middle = len(part) // 2
    for half in (part[:middle], part[middle:]):
        yield from _fitting(corpus, half, groups, tokens)


# An item, and what the retriever thinks of it in nats. In a group the item that was taken comes first.
Group = Sequence[tuple[int, float]]


def preference_row(corpus: Corpus, positions: Positions, groups: Mapping[int, Group], *, held_out: bool = False) -> Row:
    """The events at ``positions`` as a trunk; the rivals of ``groups`` hang where their event's own title begins."""
    if not held_out:
        corpus.require_past(positions[:-1], positions)
    has_rivals = {p for p in positions.tolist() if len(groups.get(p, ())) > 1}
    # What stands behind the last target is trained on by nobody.
    positions = positions[: 1 + max(i for i, p in enumerate(positions.tolist()) if p in has_rivals)]
    log = corpus.split.log
    sequences = [corpus.item_tokens[int(i)] for i in log.item[positions]]
    builder = RowBuilder([*corpus.opening, *(t for s in sequences for t in s)], user=int(log.user[positions[0]]))
    at = len(corpus.opening)
    for p, sequence in zip(positions.tolist(), sequences, strict=True):
        if p in has_rivals:
            (_, lead), *rivals = groups[p]
            group = builder.supervise(at, len(sequence), lead=lead)
            for item, lead in rivals:
                builder.branch(at, corpus.item_tokens[item], group, lead=lead)
        at += len(sequence)
    targets = np.array([p for p in positions.tolist() if p in has_rivals], dtype=np.int64)
    return builder.build(positions[:-1], targets)


def _group(
    corpus: Corpus,
    pool: Candidates,
    row: int,
    position: int,
    config: PreferenceConfig,
    rng: np.random.Generator | None,
) -> Group:
    """The item taken and its rivals, drawn by ``rng`` or the best; alone where it must be found and wasn't."""
    own = int(corpus.split.log.item[position])
    items = pool.items[row]
    scores = pool.scores[row] if config.beside else np.zeros(len(items))
    found = np.flatnonzero(items == own)
    if config.beside and not found.size:
        return [(own, 0.0)]
    # Two items of one title are one sequence: no preference can be learnt between them.
    title = corpus.item_tokens[own]
    rivals = [i for i, c in enumerate(items.tolist()) if c >= 0 and corpus.item_tokens[c] != title]
    if rng is not None:
        rivals = [rivals[i] for i in np.sort(rng.permutation(len(rivals))[: config.negatives])]
    taken = float(scores[found[0]]) if found.size else 0.0
    return [(own, taken), *((int(items[i]), float(scores[i])) for i in rivals[: config.negatives])]
