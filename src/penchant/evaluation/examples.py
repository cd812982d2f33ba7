"""Real users to look at: what they had, what each system gave them, what came next, and what went wrong."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from penchant.data.history import Targets
from penchant.data.split import Split
from penchant.evaluation.ranking import Ranked, newest
from penchant.evaluation.report import Example
from penchant.schema import TITLE

# Newest events of a history that are shown, and places of a list.
_HISTORY, _PLACES = 20, 5


def examples(
    split: Split,
    targets: Targets,
    retrieval: Ranked,
    final: Ranked,
    others: Sequence[Ranked] = (),
    *,
    n: int = 10,
    seed: int = 0,
    masked: bool = True,
    seen_last: int | None = None,
    choices: NDArray[np.integer] | None = None,
    candidates: int = 0,
) -> list[Example]:
    """``n`` seeded targets with titles, ranks and one sentence on what was wrong, made of facts alone.

    ``final`` is the system whose answers are explained, ``retrieval`` the one that gave it its candidates (the same
    one where there is no second stage), ``others`` are shown beside them. ``choices`` and ``candidates`` are the
    LLM stage's: among how many candidates a target stood, of how many. ``masked``: no system could return an item of
    the history, or of its newest ``seen_last`` events.
    """
    rows = np.sort(np.random.default_rng(seed).permutation(len(targets))[:n])
    titles = split.dataset.items[TITLE].to_list()
    counts = split.train_counts
    shown = list({one.system: one for one in (final, retrieval, *others)}.values())
    out = []
    for row in rows.tolist():
        item, history = int(targets.item[row]), targets.history(row)
        why = _why(
            history=history,
            item=item,
            count=int(counts[item]),
            first=int(final.top[row, 0]),
            first_count=int(counts[final.top[row, 0]]),
            rank=int(final.rank[row]),
            retrieved=int(retrieval.rank[row]),
            inside=None if choices is None else bool(choices[row]),
            candidates=candidates,
            masked=masked and item in newest(history, seen_last),
        )
        out.append(
            Example(
                user=split.log.user_ids[targets.user[row]],
                history=[titles[i] for i in history[-_HISTORY:]],
                target=titles[item],
                target_rank={one.system: int(one.rank[row]) for one in shown},
                recommended={one.system: [titles[i] for i in one.top[row, :_PLACES] if i >= 0] for one in shown},
                why=why,
            )
        )
    return out


def _why(
    *,
    history: NDArray[np.integer],
    item: int,
    count: int,
    first: int,
    first_count: int,
    rank: int,
    retrieved: int,
    inside: bool | None,
    candidates: int,
    masked: bool,
) -> str:
    """One or two facts: what moved the target, or what kept it from standing first."""
    if masked:
        return "the target repeats an item of the history, which is masked, so nobody can find it"
    moved = ""
    if inside:
        if rank != retrieved:
            moved = f"the LLM moved the target from {retrieved} to {rank}"
        else:
            moved = f"the LLM left the target at {rank}"
    elif inside is False:
        moved = f"the target was retrieved at {retrieved}, outside the {candidates} candidates the LLM ranks"
    if rank == 1:
        return f"right{': ' + moved if moved else ''}"
    facts = [moved] if moved else [f"the target stands at {rank}"]
    if not len(history):
        facts.append("there is no history, so popularity answers")
    elif count == 0:
        facts.append("the target is cold: no training event has it")
    elif first >= 0:
        facts.append(f"the target has {count:,} training events, the first recommendation {first_count:,}")
    return "; ".join(facts)
