"""What engines do alike before and after the model runs: prompts and candidates as tokens, checks, searches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from penchant.catalog_trie import CatalogTrie
from penchant.engine.base import Continuation, Pooling
from penchant.engine.search import Beams, BestFirst, Search
from penchant.errors import ConfigError, DataError, NotFiniteError
from penchant.tokens import Prompt, TextCodec

# A prompt's tokens, its continuations as a trie, and its place in the call.
Work = tuple[list[int], CatalogTrie, int]


def encoded(codec: TextCodec, prompts: Sequence[Prompt | str], context: int, behind: int = 0) -> list[list[int]]:
    """Token ids of each prompt; DataError for an empty one, or where ``behind`` more tokens would pass ``context``."""
    out = [codec.encode(prompt) for prompt in prompts]
    for ids in out:
        if not ids:
            raise DataError("an empty prompt has no token to go on from", remedy="give it some text")
        _check_length(len(ids) + behind, context)
    return out


def paired(
    codec: TextCodec,
    prompts: Sequence[Prompt | str],
    continuations: Sequence[Sequence[Continuation]],
    context: int,
) -> list[Work]:
    """Each prompt that has continuations, with their trie; ConfigError or DataError where they can't be scored."""
    if len(prompts) != len(continuations):
        raise ConfigError(
            f"{len(prompts)} prompts but {len(continuations)} lists of continuations", remedy="give one list a prompt"
        )
    built: dict[int, CatalogTrie] = {}  # many users scored against one list build its trie once
    work: list[Work] = []
    for i, (prompt, candidates) in enumerate(zip(prompts, continuations, strict=True)):
        if len(candidates):
            if id(candidates) not in built:
                built[id(candidates)] = CatalogTrie.build(
                    [codec.encode_data(c) if isinstance(c, str) else c for c in candidates]
                )
            trie = built[id(candidates)]
            (ids,) = encoded(codec, [prompt], context, int(trie.depth.max()))
            work.append((ids, trie, i))
    return work


def _check_length(n: int, context: int) -> None:
    if n > context:
        raise DataError(
            f"{n} tokens, {n - context} over the model's context of {context}",
            where="prompt",
            remedy="keep less history (max_history, prompt_tokens), or raise max_model_len where it was lowered",
        )


def check_search(k: int, beams: int | None) -> None:
    """ConfigError for a search that asks for nothing."""
    if k < 1:
        raise ConfigError(f"k is {k}", remedy="ask for at least 1 item")
    if beams is not None and beams < 1:
        raise ConfigError(f"beams is {beams}", remedy="use at least 1, or None for the exact search")


def searches(
    trie: CatalogTrie,
    k: int,
    masks: Sequence[NDArray[np.bool_] | None],
    bonus: NDArray[np.floating] | None,
    beams: int | None,
    max_expansions: int,
) -> list[Search]:
    """One search a mask: exact, or of that many beams."""
    return [
        BestFirst(trie, k, mask, bonus, max_expansions) if beams is None else Beams(trie, k, beams, mask, bonus)
        for mask in masks
    ]


def check_pooling(pooling: Pooling) -> None:
    """ConfigError for a pooling that there is not."""
    if pooling not in ("mean", "last"):
        raise ConfigError(f"unknown pooling {pooling!r}", remedy="use 'mean' or 'last'")


def check_finite(vectors: NDArray[np.float32]) -> None:
    """NotFiniteError naming the first text whose vector (n, d) is not finite."""
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if bad.size:
        raise NotFiniteError(
            f"the vector of text {int(bad[0])} is not finite",
            where="embed",
            remedy="load the model with dtype='float32'",
        )
