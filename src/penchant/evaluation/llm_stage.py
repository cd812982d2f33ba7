"""The LLM's own stage: it reorders candidates, and every way of using its likelihoods is ranked from one pass."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from penchant.data.history import Targets
from penchant.evaluation.ranking import Ranked, Seen, newest
from penchant.fusion import Fusion
from penchant.interest.behaviour import Behaviour
from penchant.interest.search import score_some
from penchant.recommend import Recommender, Stages
from penchant.serving import Items

LIKELIHOOD = "llm likelihood"
CALIBRATED = "llm likelihood - no-history likelihood"


@dataclass(frozen=True, eq=False)
class LLMStage:
    """What the LLM made of n targets, and what it took.

    ``ranked`` has the plain likelihood and the calibrated one (or the answer to another question that the model asks
    the LLM), and the model's own fusion last. ``choices``
    (n,) is how many candidates each target stands among, 0 where it is none of them. ``n_asked`` is of how many
    targets the LLM was asked, which took ``seconds`` and ``tokens`` (None where the engine does not count) of scoring
    the candidates; ``prior_seconds`` are of the no-history likelihoods, which are computed once for a catalogue.
    """

    ranked: list[Ranked]
    choices: NDArray[np.int64]
    n_asked: int
    seconds: float
    tokens: int | None
    prior_seconds: float

    @property
    def fused(self) -> Ranked:
        return self.ranked[-1]


def fused_name(fusion: Fusion) -> str:
    """As the tables show the whole model."""
    return f"llm+interest (weight {fusion.weight:g}, calibration {fusion.calibration:g})"


def run_llm_stage(
    model: Recommender,
    targets: Targets,
    encoder: Ranked,
    *,
    seen: Seen,
    seen_last: int | None,
    candidates: NDArray[np.integer] | None,
    found_only: bool = False,
    stages: Stages,
) -> LLMStage:
    """Let the LLM reorder the encoder's candidates (or those given) of targets with a history.

    ``encoder`` is the encoder's ranking of the same targets: behind the candidates its order goes on. With
    ``found_only`` the LLM is not asked of targets that are none of their candidates: no order of these changes such a
    target's rank. Their lists are then the encoder's.
    """
    histories = [targets.history(i) for i in range(len(targets))]
    behaviours = model.reading.before(targets.position)
    items, interest = _candidates(model, behaviours, seen, seen_last, candidates)
    choices = np.array(
        [len(row) if t in row else 0 for t, row in zip(targets.item, items, strict=True)], dtype=np.int64
    )
    asked = np.flatnonzero(choices > 0) if found_only else np.arange(len(items))
    engine = model.engine
    begun, counted = _spent(engine), _tokens(engine)
    said = model.ranker.scores(
        [histories[i] for i in asked], [items[i] for i in asked], stages("LLM on test users", len(asked))
    )
    seconds, after = _spent(engine) - begun, _tokens(engine)
    begun = _spent(engine)
    if len(asked):
        model.ranker.priors(np.unique(np.concatenate([items[i] for i in asked])), stages("LLM without history", 1))
    prior_seconds = _spent(engine) - begun
    alone = Fusion(1.0, 0.0)
    ways = {LIKELIHOOD: alone, CALIBRATED: Fusion(1.0, 1.0)}
    if model.config.question != "likelihood":  # there is nothing to take out of an answer
        ways = {f"llm {model.config.question}": alone}
    variants = ways | {fused_name(model.fusion): model.fusion}
    ranked = []
    for name, fusion in variants.items():
        scores: list[NDArray[np.floating]] = list(interest)
        for i, likelihood in zip(asked, said, strict=True):
            scores[i] = fusion.scores(interest[i], likelihood, model.ranker.prior[items[i]])
        rank, top = _reordered(items, scores, targets.item, encoder, model.log.n_items, behind=candidates is None)
        ranked.append(Ranked(name, rank, top, seconds))
    tokens = None if counted is None or after is None else after - counted
    return LLMStage(ranked, choices, len(asked), seconds, tokens, prior_seconds)


def _candidates(
    model: Recommender,
    histories: Sequence[Behaviour],
    seen: Seen,
    last: int | None,
    given: NDArray[np.integer] | None,
) -> tuple[list[Items], list[NDArray[np.float32]]]:
    """Each target's candidates without repeats, and the encoder's scores of them."""
    if given is None:
        masked = [newest(h.item, last) for h in histories]
        if seen == "keep":
            masked = [h.item[:0] for h in histories]
        # Items added since the fit are no part of what is evaluated.
        allowed = np.arange(len(model.texts)) < model.log.n_items
        found, scores = model.retrieve(histories, model.config.candidates, seen=masked, allowed=allowed)
        kept = [row >= 0 for row in found]
        rows = [row[k] for row, k in zip(found, kept, strict=True)]
        return rows, [s[k] for s, k in zip(scores, kept, strict=True)]
    items = [np.unique(row[row >= 0]).astype(np.int32) for row in given]
    return items, score_some(model.encoder, model.index.vectors, histories, items)


def _reordered(
    items: Sequence[Items],
    scores: Sequence[NDArray[np.floating]],
    target: NDArray[np.integer],
    encoder: Ranked,
    n_items: int,
    *,
    behind: bool,
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Ranks and top lists with the candidates in the order of their scores, and the encoder's own order after them."""
    rank = np.full(len(items), n_items + 1, dtype=np.int64)
    top = np.full_like(encoder.top, -1)
    width = top.shape[1]
    for i, (row, values) in enumerate(zip(items, scores, strict=True)):
        at = np.flatnonzero(row == target[i])
        if at.size:
            rank[i] = (values >= values[at[0]]).sum()
        elif behind:
            rank[i] = max(int(encoder.rank[i]), len(row) + 1)
        order = row[np.lexsort((row, -values))][:width]
        rest = encoder.top[i][~np.isin(encoder.top[i], row)] if behind else order[:0]
        best = np.concatenate([order, rest])[:width]
        top[i, : len(best)] = best
    return rank, top


def _spent(engine: object) -> float:
    """A clock in seconds, that counts what a KeptScores did not do again."""
    return time.perf_counter() + float(getattr(engine, "seconds_kept", 0.0))


def _tokens(engine: object) -> int | None:
    """Tokens that went through the model so far; None where the engine does not count them."""
    found = getattr(engine, "tokens_run", None)
    return found if isinstance(found, int) else None
