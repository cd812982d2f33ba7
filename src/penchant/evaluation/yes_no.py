"""A yes/no task: would this user like this item? The LLM is asked once a row, and judged by AUC and log loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from penchant.errors import DataError
from penchant.evaluation.pointwise import answer_metrics
from penchant.evaluation.readers import YesNoRow
from penchant.evaluation.report import Report, Row
from penchant.evaluation.shares import Logistic, Shares, own_share
from penchant.prompt import Templates
from penchant.rank import label_logprobs

if TYPE_CHECKING:
    from penchant.engine import Engine, Progress

LLM = "llm yes_no"
# Validation rows that the LLM is asked, to be weighed against the shares of likes.
_WEIGHED_ON = 200


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


def weighed_on(valid: Sequence[YesNoRow], seed: int) -> list[YesNoRow]:
    """The validation rows that LLM and shares are weighed on: a seeded sample, since files stand in order of users."""
    drawn = np.random.default_rng(seed).permutation(len(valid))[:_WEIGHED_ON]
    return [valid[i] for i in np.sort(drawn)]


def _of(row: YesNoRow, liked: bool) -> tuple[str, ...]:
    return row.liked if liked else row.disliked


def yes_no_report(
    margins: NDArray[np.float64],
    rows: Sequence[YesNoRow],
    train: Sequence[YesNoRow],
    *,
    valid: tuple[Sequence[YesNoRow], NDArray[np.float64]] | None = None,
    seed: int = 0,
) -> Report:
    """The LLM's answers to the test rows beside what needs no LLM.

    That is: always saying how many of the training rows are liked; how much of their history the user liked; and
    the shares of likes of user and item together, weighted on the training rows. With validation rows and the LLM's
    margins of them (``valid``), also the LLM and these shares together, weighted there. The LLM's probability of yes
    is among the two labels. DataError where there is nothing to judge.
    """
    if not rows or not train:
        raise DataError("there are no rows", where="yes/no task", remedy="check the task's files")
    label = _labels(rows)
    known = [row.user for row in rows if row.user is not None]
    user = np.unique(known, return_inverse=True)[1] if len(known) == len(rows) else None
    group = f"all {len(rows):,} test rows, each a yes or no"
    shares = Shares.of(train)
    both = Logistic.fit(shares.features(train, own=True), _labels(train))
    asked = both.odds(shares.features(rows))
    systems = {LLM: (margins, expit(margins))}
    if valid is not None:
        held, said = valid
        fused = Logistic.fit(np.column_stack([both.odds(shares.features(held)), said]), _labels(held))
        odds = fused.odds(np.column_stack([asked, margins]))
        systems[f"{LLM} and shares of likes of user and item"] = odds, expit(odds)
    systems["shares of likes of user and item"] = asked, expit(asked)
    systems["share of likes in the user's history"] = (own := own_share(rows)), own
    systems["the share of yes in training"] = (flat := np.full(len(rows), _labels(train).mean())), flat
    made = [
        Row(group, name, answer_metrics(score, probability, label, user, seed))
        for name, (score, probability) in systems.items()
    ]
    drawn = "rows" if user is None else "users"
    notes = [
        "AUC, log loss (nats) and accuracy of single answers, not of a ranking; one forward a row",
        f"mean [95% bootstrap interval, whole {drawn} drawn again]",
        f"shares of likes are of what the {len(train):,} training rows say: histories and answers",
    ]
    if valid is not None:
        notes.append(f"LLM and shares are weighed on {len(valid[0]):,} validation rows")
    if user is not None:
        notes.append("GAUC: AUC within each user who has both answers, weighted by rows")
    return Report(made, notes, {"seed": seed, "rows": len(rows), "yes": int(label.sum())})


def _labels(rows: Sequence[YesNoRow]) -> NDArray[np.bool_]:
    return np.array([row.label for row in rows], dtype=np.bool_)
