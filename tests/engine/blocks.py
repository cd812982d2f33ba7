"""An engine of cached blocks without a model, which answers requests as vLLM does."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from penchant.engine.asking import MOST_CHILDREN, Answer, Ask, Known


def logprob(before: Sequence[int], token: int) -> float:
    digest = hashlib.blake2b(repr((list(before), token)).encode(), digest_size=4).digest()
    return -0.1 - 5 * int.from_bytes(digest, "little") / 2**32


class Blocks:
    """As vLLM answers: whole blocks of tokens are cached for a salt, at least one token is run, and the
    log-probability of a token is told only where the token before it was run."""

    def __init__(self, block: int) -> None:
        self.block = block
        self.cached: set[tuple[str | None, tuple[int, ...]]] = set()
        self.run = 0
        self.asks: list[Ask] = []

    def answer(self, ask: Ask) -> Answer:
        assert 1 <= len(ask.tokens) <= MOST_CHILDREN
        known = 0
        while known + self.block < len(ask.ids) and (ask.salt, tuple(ask.ids[: known + self.block])) in self.cached:
            known += self.block
        for end in range(self.block, len(ask.ids) + 1, self.block):
            self.cached.add((ask.salt, tuple(ask.ids[:end])))
        self.run += len(ask.ids) - known
        self.asks.append(ask)
        n = max(0, min(ask.path, len(ask.ids) - 1 - known))
        at = range(len(ask.ids) - n, len(ask.ids))
        return Answer([logprob(ask.ids, t) for t in ask.tokens], [logprob(ask.ids[:j], ask.ids[j]) for j in at])

    def teach(self, known: Known, asks: Sequence[Ask]) -> None:
        for ask in asks:
            known.learn(ask, self.answer(ask))
