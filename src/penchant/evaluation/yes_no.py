"""A yes/no task: would this user like this item? The LLM is asked in two ways, and judged by AUC and log loss.

It answers yes or no to the question; and its likelihood of the title behind the liked titles is set against that behind
the disliked ones, which needs no answer of it: naive Bayes, with a language model as the likelihood of each class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from penchant.rank import Ranker, label_logprobs, yes_no_labels

if TYPE_CHECKING:
    from penchant.engine import Engine, Progress

LLM = "llm yes_no"
TASTE = "llm likelihood, likes minus dislikes"
SHARES = "shares of likes of user and item"
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
    logp = label_logprobs(engine, prompts, yes_no_labels(templates), progress=progress)
    return logp[:, 0] - logp[:, 1]


def taste_margins(
    engine: Engine,
    templates: Templates,
    rows: Sequence[YesNoRow],
    *,
    prompt_tokens: int,
    progress: Progress | None = None,
) -> NDArray[np.float64]:
    """log p(title | what was liked) - log p(title | what was disliked) of each row, in nats, (n,).

    Both are the likelihoods that rank items (the template next_item), each behind a history of its own: two short
    forwards a row. Of a side without titles the likelihood without a history stands in.
    """
    at: dict[str, int] = {}
    for row in rows:
        for title in (*row.liked, *row.disliked, row.target):
            at.setdefault(title, len(at))
    longest = max((len(part) for row in rows for part in (row.liked, row.disliked)), default=0)
    ranker = Ranker(engine, templates, list(at), max_history=longest, prompt_tokens=prompt_tokens)

    def said(liked: bool) -> NDArray[np.float64]:
        histories = [np.array([at[title] for title in _of(row, liked)], dtype=np.int32) for row in rows]
        targets = [np.array([at[row.target]], dtype=np.int32) for row in rows]
        return np.array([one[0] for one in ranker.likelihoods(histories, targets, progress)])

    return said(True) - said(False)


def weighed_on(valid: Sequence[YesNoRow], seed: int) -> list[YesNoRow]:
    """The validation rows that LLM and shares are weighed on: a seeded sample, since files stand in order of users."""
    drawn = np.random.default_rng(seed).permutation(len(valid))[:_WEIGHED_ON]
    return [valid[i] for i in np.sort(drawn)]


def _of(row: YesNoRow, liked: bool) -> tuple[str, ...]:
    return row.liked if liked else row.disliked


def yes_no_report(
    margins: Mapping[str, NDArray[np.float64]],
    rows: Sequence[YesNoRow],
    train: Sequence[YesNoRow],
    *,
    valid: tuple[Sequence[YesNoRow], Mapping[str, NDArray[np.float64]]] | None = None,
    seed: int = 0,
) -> Report:
    """What the LLM says of the test rows, in each of the ways of ``margins`` (LLM, TASTE), beside what needs no LLM.

    That is: always saying how many of the training rows are liked; how much of their history the user liked; and
    the shares of likes of user and item together, weighted on the training rows. With validation rows and the LLM's
    margins of them (``valid``), also each of its ways and these shares together, weighted there. The LLM's probability
    of yes is among the two labels, or the two classes of titles. DataError where there is nothing to judge.
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
    systems = {name: (own, expit(own)) for name, own in margins.items()}
    held, said = ([], {}) if valid is None else valid
    for name in said:
        fused = Logistic.fit(np.column_stack([both.odds(shares.features(held)), said[name]]), _labels(held))
        odds = fused.odds(np.column_stack([asked, margins[name]]))
        systems[f"{name} and {SHARES}"] = odds, expit(odds)
    systems[SHARES] = asked, expit(asked)
    systems["share of likes in the user's history"] = (own := own_share(rows)), own
    systems["the share of yes in training"] = (flat := np.full(len(rows), _labels(train).mean())), flat
    made = [
        Row(group, name, answer_metrics(score, probability, label, user, seed))
        for name, (score, probability) in systems.items()
    ]
    drawn = "rows" if user is None else "users"
    notes = [
        "AUC, log loss (nats) and accuracy of single answers, not of a ranking",
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
