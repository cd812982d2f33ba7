"""An engine without a model, for the tests of its callers: scores and vectors are functions of the text."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from penchant.catalog_trie import CatalogTrie
from penchant.engine import Generation, Pooling, Progress
from penchant.engine.base import Continuation
from penchant.tokens import Prompt, TextCodec
from tests.tiny import tokenizer


class FakeEngine:
    """log p of a token is a fixed function of all tokens before it; no probability mass is conserved."""

    def __init__(self, context_length: int = 512) -> None:
        self.codec = TextCodec(tokenizer("byte"))
        self.fingerprint = "fake"
        self.context_length = context_length
        self.source = None
        self.n_layers = 3
        self.scored = 0  # continuations scored so far: tests of what is asked look here

    @staticmethod
    def _token_logprob(before: Sequence[int], token: int) -> float:
        digest = hashlib.blake2b(repr((list(before), token)).encode(), digest_size=4).digest()
        return -0.1 - 5 * int.from_bytes(digest, "little") / 2**32

    def _logprob(self, prompt: Sequence[int], tokens: Sequence[int]) -> float:
        path = list(prompt)
        total = 0.0
        for token in tokens:
            total += self._token_logprob(path, token)
            path.append(token)
        return total

    def score(
        self,
        prompts: Sequence[Prompt | str],
        continuations: Sequence[Sequence[Continuation]],
        *,
        progress: Progress | None = None,
    ) -> list[NDArray[np.float64]]:
        out = []
        for prompt, candidates in zip(prompts, continuations, strict=True):
            ids = self.codec.encode(prompt)
            tokens = [self.codec.encode_data(c) if isinstance(c, str) else c for c in candidates]
            self.scored += len(tokens)
            out.append(np.array([self._logprob(ids, t) for t in tokens], dtype=np.float64))
        return out

    def generate(
        self,
        prompts: Sequence[Prompt | str],
        trie: CatalogTrie,
        k: int,
        *,
        allowed: Sequence[NDArray[np.bool_] | None] | None = None,
        bonus: NDArray[np.floating] | None = None,
        beams: int | None = None,
        max_expansions: int = 20_000,
        progress: Progress | None = None,
    ) -> list[list[Generation]]:
        out = []
        for row, scores in enumerate(
            self.score(prompts, [[trie.sequence(i) for i in range(trie.n_items)]] * len(prompts))
        ):
            mask = None if allowed is None else allowed[row]
            ranked = scores if bonus is None else scores + bonus
            order = np.lexsort((np.arange(len(ranked)), -ranked))
            kept = [i for i in order if trie.alive[i] and (mask is None or mask[i])][:k]
            out.append([Generation(int(i), float(scores[i]), float(ranked[i]), 0.0, ()) for i in kept])
        return out

    def embed(
        self,
        texts: Sequence[Prompt | str],
        *,
        pooling: Pooling = "mean",
        layer: int = -1,
        progress: Progress | None = None,
    ) -> NDArray[np.float32]:
        out = np.zeros((len(texts), 12), dtype=np.float32)
        for row, text in enumerate(texts):
            ids = self.codec.encode(text)
            if pooling == "last":
                ids = ids[-1:]
            for token in ids:
                out[row] += np.random.default_rng([token, layer % 5]).standard_normal(12).astype(np.float32)
            out[row] /= len(ids)
        return out
