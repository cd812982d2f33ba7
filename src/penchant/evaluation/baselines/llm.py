"""The zero-shot LLM: the untuned model ranks a retriever's candidates, or the whole catalogue."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from scipy.stats import rankdata

from penchant.evaluation.ranking import Seen, newest
from penchant.evaluation.systems import Queries, System
from penchant.interest.top import top_k
from penchant.prompt import Templates
from penchant.rank import Ranker

if TYPE_CHECKING:
    from penchant.engine import Engine


class ZeroShotConfig(BaseModel):
    """How the LLM is asked; only the calibration is tuned."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    candidates: int | None = Field(default=20, ge=1, description="retrieved items it ranks; None: the whole catalogue")
    calibration: float = Field(default=1.0, description="how much of log p(title | no history) is taken out")
    max_history: int = Field(default=20, ge=1, description="newest events in a prompt")
    prompt_tokens: int = Field(default=768, ge=16, description="tokens of a prompt; the oldest events go first")


class Likelihoods:
    """A ranker that remembers what it was asked: trials that differ in the calibration alone cost one pass."""

    def __init__(self, ranker: Ranker) -> None:
        self._ranker = ranker
        self._known: dict[tuple[bytes, bytes], NDArray[np.float64]] = {}

    def __call__(
        self, histories: Sequence[NDArray[np.int32]], candidates: Sequence[NDArray[np.int32]]
    ) -> list[NDArray[np.float64]]:
        """log p(item | history) in nats of each history's candidates."""
        keys = [(h.tobytes(), c.tobytes()) for h, c in zip(histories, candidates, strict=True)]
        new = [i for i, key in enumerate(keys) if key not in self._known]
        if new:
            found = self._ranker.likelihoods([histories[i] for i in new], [candidates[i] for i in new])
            self._known.update((keys[i], row) for i, row in zip(new, found, strict=True))
        return [self._known[key] for key in keys]

    def priors(self, items: NDArray[np.int32]) -> NDArray[np.float64]:
        """log p(item | no history) in nats."""
        return self._ranker.priors(items)


@dataclass(frozen=True, eq=False)
class ZeroShotLLM:
    """The retriever's best unseen candidates in the LLM's order; behind them the retriever's own order goes on.

    The scores are places, so that the LLM's never meet the retriever's; equals stay equal, and what the retriever
    never recommends (-inf) stays so. Popularity from training for an empty history.
    """

    likelihoods: Likelihoods
    retriever: System | None
    config: ZeroShotConfig
    counts: NDArray[np.float32]
    seen: Seen = "mask"
    seen_last: int | None = None
    name: str = field(init=False)

    def __post_init__(self) -> None:
        what = "the whole catalogue" if self.retriever is None else f"{self.config.candidates} of {self.retriever.name}"
        object.__setattr__(self, "name", f"zero-shot LLM (ranks {what})")

    def scores(self, queries: Queries) -> NDArray[np.float32]:
        out = np.repeat(self.counts[None], len(queries), axis=0)
        warm = np.array([i for i, h in enumerate(queries.history) if len(h)], dtype=np.int64)
        if not warm.size:
            return out
        known = queries.take(warm)
        out[warm], candidates = self._retrieved(known)
        asked = [i for i, c in enumerate(candidates) if len(c)]
        found = self.likelihoods([known.history[i] for i in asked], [candidates[i] for i in asked])
        for i, likelihood in zip(asked, found, strict=True):
            items = candidates[i]
            score = likelihood - self.config.calibration * self.likelihoods.priors(items)
            out[warm[i], items] = rankdata(score, method="dense")
        return out

    def _retrieved(self, queries: Queries) -> tuple[NDArray[np.float32], list[NDArray[np.int32]]]:
        """The retriever's order as scores below 0, and each query's candidates."""
        everything = np.arange(len(self.counts), dtype=np.int32)
        if self.retriever is None or self.config.candidates is None:
            return np.zeros((len(queries), len(self.counts)), dtype=np.float32), [everything] * len(queries)
        retrieved = self.retriever.scores(queries)
        order = np.asarray(-rankdata(-retrieved, method="dense", axis=1), dtype=np.float32)
        order[np.isneginf(retrieved)] = -np.inf
        masked = order.copy()
        for i, history in enumerate(queries.history if self.seen == "mask" else []):
            masked[i, newest(history, self.seen_last)] = -np.inf
        items, _ = top_k(masked, self.config.candidates)
        return order, [row[row >= 0] for row in items]


def zero_shot_likelihoods(
    engine: Engine, templates: Templates, texts: Sequence[str]
) -> Callable[[ZeroShotConfig], Likelihoods]:
    """The LLM's likelihoods of the catalogue's ``texts``, asked with the next-item template as a config says.

    Configurations that ask alike share what was answered.
    """
    made: dict[tuple[int, int], Likelihoods] = {}

    def asked_as(config: ZeroShotConfig) -> Likelihoods:
        tokens = min(config.prompt_tokens, engine.context_length)
        key = config.max_history, tokens
        if key not in made:
            made[key] = Likelihoods(
                Ranker(engine, templates, texts, max_history=config.max_history, prompt_tokens=tokens)
            )
        return made[key]

    return asked_as
