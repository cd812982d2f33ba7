"""Candidates to scores by the LLM.

What the LLM is asked is one of three questions: how likely each title is next (likelihood), which of the
lettered candidates comes next (choose), or whether the user will like each one (yes_no).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from string import ascii_lowercase, ascii_uppercase
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from penchant.adapter_card import check_likes, trained_part
from penchant.errors import ConfigError, NotFiniteError
from penchant.prompt import Rendered, Templates

if TYPE_CHECKING:
    from penchant.engine import Engine, Progress
    from penchant.tokens import Prompt, TextCodec

Question = Literal["likelihood", "choose", "yes_no"]
# More tokens than any item has: MAX_DATA_CHARS characters are at most four times as many bytes.
_ROOM = 1024
# Prompts kept as rendered, so that they can be made ahead of the engine, beside it.
_PROMPTS = 4096


_LETTERS = ascii_uppercase + ascii_lowercase
MOST_LETTERS = len(_LETTERS)


def letters(n: int) -> list[str]:
    """The labels of n candidates: A to Z, then a to z."""
    if n > MOST_LETTERS:
        raise ConfigError(f"{n} candidates", where="choose", remedy=f"take at most {MOST_LETTERS}")
    return list(_LETTERS[:n])


def label_tokens(codec: TextCodec, labels: Sequence[str]) -> list[int]:
    """The one token of each label; ConfigError where a label has several, or two labels share theirs."""
    tokens = [codec.encode_template(label) for label in labels]
    for label, ids in zip(labels, tokens, strict=True):
        if len(ids) != 1:
            raise ConfigError(
                f"the label {label!r} has {len(ids)} tokens in this model's vocabulary, and must be one",
                where="labels",
                remedy="use other labels, such as Yes and No or single letters",
            )
    found = [ids[0] for ids in tokens]
    if len(set(found)) != len(found):
        raise ConfigError("two labels are the same token", where="labels", remedy="use labels that differ")
    return found


def yes_no_labels(templates: Templates) -> list[str]:
    """The answers yes and no, in this order; ConfigError unless the template has two labels."""
    labels = templates.headers["yes_no"].labels
    if len(labels) != 2:
        raise ConfigError("must have two labels, yes first", where="template yes_no", remedy="set `labels: [Yes, No]`")
    return labels


def label_logprobs(
    engine: Engine,
    prompts: Sequence[Prompt],
    labels: Sequence[str],
    *,
    prior: Prompt | None = None,
    progress: Progress | None = None,
) -> NDArray[np.float64]:
    """log p of each label as the next token of each prompt, in nats: (n_prompts, n_labels), one forward a prompt.

    With ``prior``, a prompt without history, its own log p of each label is taken out (Zhao et al. 2021,
    "Calibrate Before Use"). A label that isn't exactly one token is a ConfigError.
    """
    tokens = [(token,) for token in label_tokens(engine.codec, labels)]
    asked = [*prompts] if prior is None else [*prompts, prior]
    got = engine.score(asked, [tokens] * len(asked), progress=progress)
    rows = np.array(got[: len(prompts)], dtype=np.float64).reshape(len(prompts), len(labels))
    return rows if prior is None else rows - got[-1]


class Ranker:
    """The LLM's likelihoods of items, for one engine, catalogue and set of templates."""

    def __init__(
        self,
        engine: Engine,
        templates: Templates,
        texts: Sequence[str],
        *,
        max_history: int,
        prompt_tokens: int,
        prior: NDArray[np.float64] | None = None,
        question: Question = "likelihood",
    ) -> None:
        if question == "yes_no":
            check_likes(trained_part(engine.source))
            yes_no_labels(templates)
        self._engine = engine
        self._templates = templates
        self._texts = texts
        self._max_history = max_history
        self._prompt_tokens = prompt_tokens
        self._terminator = templates.headers["next_item"].terminator
        self.question: Question = question
        self._item_tokens: dict[int, tuple[int, ...]] = {}
        self._prompts = lru_cache(maxsize=_PROMPTS)(self._prompt_of)
        # log p(item | no history) in nats, NaN where not yet needed.
        self.prior = np.full(len(texts), np.nan) if prior is None else prior

    def tokens(self, items: Sequence[int] | NDArray[np.integer]) -> list[tuple[int, ...]]:
        """The items' canonical token sequences, terminator included."""
        missing = sorted({int(i) for i in items} - self._item_tokens.keys())
        if missing:
            encoded = self._engine.codec.encode_items([self._texts[i] for i in missing], self._terminator)
            self._item_tokens.update(zip(missing, encoded, strict=True))
        return [self._item_tokens[int(i)] for i in items]

    @cached_property
    def _like(self) -> NDArray[np.int64]:
        """The first item that has the same text, of each item."""
        first: dict[str, int] = {}
        return np.array([first.setdefault(text, i) for i, text in enumerate(self._texts)], dtype=np.int64)

    @cached_property
    def _budget(self) -> int:
        """Tokens a prompt may have: as many as asked for, less where the context must hold the longest item too."""
        context = self._engine.context_length
        if self._prompt_tokens + _ROOM <= context:
            return self._prompt_tokens
        return min(self._prompt_tokens, context - max(map(len, self.tokens(range(len(self._texts))))))

    def prompt(self, history: NDArray[np.integer]) -> Rendered:
        """The next-item prompt of a history (item indices, oldest first), cut to its newest events."""
        recent = self._recent(history)
        rendered = self._prompts(tuple(recent.tolist()))
        return Rendered(rendered.prompt, rendered.n_tokens, rendered.dropped + len(history) - len(recent))

    def question_of(self, history: NDArray[np.integer]) -> Prompt:
        """The prompt of this ranker's question with no candidate in it: all that the LLM is told of a user."""
        if self.question == "likelihood":
            return self.prompt(history).prompt
        nothing: dict[str, Any] = {"candidates": []} if self.question == "choose" else {"item": {"text": ""}}
        return self.render(self.question, history, **nothing).prompt

    def lettered(
        self, history: NDArray[np.integer], candidates: NDArray[np.integer]
    ) -> tuple[Rendered, NDArray[np.integer]]:
        """The prompt that asks for a candidate's letter, and the places of the candidates as they stand in it.

        Their order is random, and a function of the candidates alone, so that the retriever's own order doesn't show.
        """
        order = np.argsort(candidates)[np.random.default_rng(np.sort(candidates).tolist()).permutation(len(candidates))]
        listed = [
            {"label": label, "text": self._texts[int(candidates[i])]}
            for label, i in zip(letters(len(candidates)), order, strict=True)
        ]
        return self.render("choose", history, candidates=listed), order

    def about(self, history: NDArray[np.integer], item: int) -> Rendered:
        """The prompt that asks whether a user will like an item."""
        return self.render("yes_no", history, item={"text": self._texts[item]})

    def _prompt_of(self, recent: tuple[int, ...]) -> Rendered:
        return self.render("next_item", np.array(recent, dtype=np.int32))

    def _recent(self, history: NDArray[np.integer]) -> NDArray[np.integer]:
        return history[-self._max_history :] if self._max_history else history[:0]

    def render(self, name: str, history: NDArray[np.integer], **more: Any) -> Rendered:
        """A template of a history (item indices, oldest first), cut to its newest events; ``more`` is what else it
        names.
        """
        recent = self._recent(history)
        rendered = self._templates.render(
            name,
            {"history": [{"text": self._texts[int(i)]} for i in recent], **more},
            count=lambda prompt: len(self._engine.codec.encode(prompt)),
            # Behind the others comes a label of one token.
            budget=self._budget if name == "next_item" else min(self._prompt_tokens, self._engine.context_length - 1),
        )
        return Rendered(rendered.prompt, rendered.n_tokens, rendered.dropped + len(history) - len(recent))

    def scores(
        self,
        histories: Sequence[NDArray[np.integer]],
        candidates: Sequence[NDArray[np.integer]],
        progress: Progress | None = None,
    ) -> list[NDArray[np.float64]]:
        """What the LLM answers to this ranker's question of each user's candidates, in nats: one array a user."""
        ask = {"likelihood": self.likelihoods, "choose": self.letters, "yes_no": self.answers}[self.question]
        return ask(histories, candidates, progress)

    def letters(
        self,
        histories: Sequence[NDArray[np.integer]],
        candidates: Sequence[NDArray[np.integer]],
        progress: Progress | None = None,
    ) -> list[NDArray[np.float64]]:
        """log p of each candidate's letter among the letters: one forward a user, its candidates in random order."""
        asked = [self.lettered(history, row) for history, row in zip(histories, candidates, strict=True)]
        prompts, orders = [rendered.prompt for rendered, _ in asked], [order for _, order in asked]
        most = max(map(len, candidates), default=0)
        if not most:
            return [np.zeros(0) for _ in candidates]
        logp = label_logprobs(self._engine, prompts, letters(most), progress=progress)
        out = []
        for user, (row, order) in enumerate(zip(logp, orders, strict=True)):
            scores = np.empty(len(order))
            scores[order] = row[: len(order)] - np.logaddexp.reduce(row[: len(order)])
            _check_finite(scores, f"row {user}")
            out.append(scores)
        return out

    def answers(
        self,
        histories: Sequence[NDArray[np.integer]],
        candidates: Sequence[NDArray[np.integer]],
        progress: Progress | None = None,
    ) -> list[NDArray[np.float64]]:
        """log p(yes) - log p(no) of each candidate: their common beginning run once."""
        labels = yes_no_labels(self._templates)
        out = []
        for user, (history, row) in enumerate(zip(histories, candidates, strict=True)):
            prompts = [self.about(history, int(i)).prompt for i in row]
            logp = label_logprobs(self._engine, prompts, labels) if prompts else np.zeros((0, 2))
            scores = logp[:, 0] - logp[:, 1]
            _check_finite(scores, f"row {user}")
            out.append(scores)
            if progress:
                progress(1)
        return out

    def likelihoods(
        self,
        histories: Sequence[NDArray[np.integer]],
        candidates: Sequence[NDArray[np.integer]],
        progress: Progress | None = None,
    ) -> list[NDArray[np.float64]]:
        """log p(item, terminator | history) in nats for each user's candidates: one array a user."""
        prompts = [self.prompt(h).prompt for h in histories]
        out = self._engine.score(prompts, [self.tokens(c) for c in candidates], progress=progress)
        for user, scores in enumerate(out):
            _check_finite(scores, f"row {user}")
        return out

    def priors(self, items: NDArray[np.integer], progress: Progress | None = None) -> NDArray[np.float64]:
        """log p(item, terminator | no history) in nats, (n,); each text is computed once, so that items of one title
        are exactly level, whichever engine was asked about which of them.

        Zeros where the question isn't one of likelihood: there is nothing to take out.
        """
        if self.question != "likelihood":
            self.prior[items] = 0.0
            return self.prior[items]
        return self._fill(self.prior, items, progress)

    def title_priors(self, items: NDArray[np.integer]) -> NDArray[np.float64]:
        """The same whatever the question is: titles that are generated are always asked for by likelihood."""
        return self.priors(items) if self.question == "likelihood" else self._fill(self._title_prior, items)

    @property
    def title_prior(self) -> NDArray[np.float64]:
        """What ``title_priors`` knows by now, NaN where it was not asked, (n_items,)."""
        return self.prior if self.question == "likelihood" else self._title_prior

    @title_prior.setter
    def title_prior(self, known: NDArray[np.float64]) -> None:
        if self.question == "likelihood":
            self.prior = known
        else:
            self._title_prior = known

    @cached_property
    def _title_prior(self) -> NDArray[np.float64]:
        return np.full(len(self._texts), np.nan)

    def _fill(
        self, known: NDArray[np.float64], items: NDArray[np.integer], progress: Progress | None = None
    ) -> NDArray[np.float64]:
        like = self._like[items]
        missing = np.unique(like[np.isnan(known[like])])
        if missing.size:
            empty = self.prompt(np.zeros(0, dtype=np.int32)).prompt
            found = self._engine.score([empty], [self.tokens(missing)], progress=progress)[0]
            _check_finite(found, "an empty history")
            known[missing] = found
        known[items] = known[like]
        return known[items]


def _check_finite(scores: NDArray[np.float64], what: str) -> None:
    if not np.isfinite(scores).all():
        raise NotFiniteError(
            f"the model gave a likelihood that is not a number for {what}",
            where="ranking",
            remedy="load it with dtype='float32'",
        )
