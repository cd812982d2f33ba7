"""A yes/no task: would this user like this item? The LLM is asked once a row, and judged by AUC and log loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from penchant.errors import DataError
from penchant.evaluation.pointwise import answer_metrics
from penchant.evaluation.readers import YesNoRow
from penchant.evaluation.report import Report, Row
from penchant.prompt import Templates
from penchant.rank import label_logprobs

if TYPE_CHECKING:
    from penchant.engine import Engine, Progress


def answer_margins(
    engine: Engine,
    templates: Templates,
    rows: Sequence[YesNoRow],
    *,
    prompt_tokens: int,
    progress: Progress | None = None,
) -> NDArray[np.float64]:
    """log p(yes) - log p(no) of each row, in nats, (n,): one forward a row.

    A history of likes and dislikes has no order: what was liked stands first, as TALLRec has it.
    """
    budget = min(prompt_tokens, engine.context_length)
    prompts = []
    for row in rows:
        history = [{"text": title, "liked": liked} for liked in (True, False) for title in _of(row, liked)]
        rendered = templates.render(
            "yes_no",
            {"history": history, "item": {"text": row.target}},
            count=lambda prompt: len(engine.codec.encode(prompt)),
            budget=budget,
        )
        prompts.append(rendered.prompt)
    logp = label_logprobs(engine, prompts, templates.headers["yes_no"].labels, progress=progress)
    return logp[:, 0] - logp[:, 1]


def _of(row: YesNoRow, liked: bool) -> tuple[str, ...]:
    return row.liked if liked else row.disliked


def yes_no_report(
    margins: NDArray[np.float64], rows: Sequence[YesNoRow], train: Sequence[YesNoRow], *, seed: int = 0
) -> Report:
    """The LLM's answers to the test rows beside always saying how many of the training rows are liked.

    The probability of yes is among the two labels. DataError where there is nothing to judge.
    """
    if not rows or not train:
        raise DataError("there are no rows", where="yes/no task", remedy="check the task's files")
    label = np.array([row.label for row in rows])
    known = [row.user for row in rows if row.user is not None]
    user = np.unique(known, return_inverse=True)[1] if len(known) == len(rows) else None
    share = np.full(len(rows), np.mean([row.label for row in train]))
    group = f"all {len(rows):,} test rows, each a yes or no"
    systems = {"llm yes_no": (margins, 1 / (1 + np.exp(-margins))), "the share of yes in training": (share, share)}
    made = [
        Row(group, name, answer_metrics(score, probability, label, user, seed))
        for name, (score, probability) in systems.items()
    ]
    drawn = "rows" if user is None else "users"
    notes = [
        "AUC, log loss (nats) and accuracy of single answers, not of a ranking; one forward a row",
        f"mean [95% bootstrap interval, whole {drawn} drawn again]",
    ]
    if user is not None:
        notes.append("GAUC: AUC within each user who has both answers, weighted by rows")
    return Report(made, notes, {"seed": seed, "rows": len(rows), "yes": int(label.sum())})
