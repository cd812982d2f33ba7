"""What engines do alike before and after the model runs: prompts and candidates as tokens, checks, searches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from penchant.catalog_trie import CatalogTrie
from penchant.engine.base import Continuation, Pooling
from penchant.engine.search import Beams, BestFirst, Search
from penchant.errors import ConfigError, DataError, NotFiniteError
from penchant.tokens import Prompt, TextCodec

# A prompt's tokens, its continuations as a trie, and its place in the call.
Work = tuple[list[int], CatalogTrie, int]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a model takes: tokens at a time, and token ids below ``vocabulary``."""

    context: int
    vocabulary: int


def encoded(codec: TextCodec, prompts: Sequence[Prompt | str], limits: Limits, behind: int = 0) -> list[list[int]]:
    """Token ids of each prompt; DataError for an empty one, one with a token that the model has not, or where
    ``behind`` more tokens would pass its context.
    """
    out = [codec.encode(prompt) for prompt in prompts]
    for ids in out:
        if not ids:
            raise DataError("an empty prompt has no token to go on from", remedy="give it some text")
        _check_tokens(np.array(ids), limits, "prompt")
        _check_length(len(ids) + behind, limits.context)
    return out


def paired(
    codec: TextCodec,
    prompts: Sequence[Prompt | str],
    continuations: Sequence[Sequence[Continuation]],
    limits: Limits,
) -> list[Work]:
    """Each prompt that has continuations, with their trie; ConfigError or DataError where they can't be scored."""
    if len(prompts) != len(continuations):
        raise ConfigError(
            f"{len(prompts)} prompts but {len(continuations)} lists of continuations", remedy="give one list a prompt"
        )
    # Many users scored against one list build its trie once; the list is kept, or another could have its id.
    built: dict[int, tuple[Sequence[Continuation], CatalogTrie]] = {}
    work: list[Work] = []
    for i, (prompt, candidates) in enumerate(zip(prompts, continuations, strict=True)):
        if len(candidates):
            if id(candidates) not in built:
                trie = CatalogTrie.build([codec.encode_data(c) if isinstance(c, str) else c for c in candidates])
                _check_tokens(trie.token[1:], limits, "continuations")
                built[id(candidates)] = candidates, trie
            _, trie = built[id(candidates)]
            (ids,) = encoded(codec, [prompt], limits, int(trie.depth.max()))
            work.append((ids, trie, i))
    return work


def _check_tokens(ids: NDArray[np.integer], limits: Limits, where: str) -> None:
    wrong = ids[(ids < 0) | (ids >= limits.vocabulary)]
    if wrong.size:
        raise DataError(
            f"{int(wrong[0])} is none of the model's {limits.vocabulary:,} token ids",
            where=where,
            remedy="make tokens with the model's own tokenizer (engine.codec)",
        )


def _check_length(n: int, context: int) -> None:
    if n > context:
        raise DataError(
            f"{n} tokens, {n - context} over the model's context of {context}",
            where="prompt",
            remedy="shorten the text (an item's that is embedded; of a prompt the history: max_history, "
            "prompt_tokens), or raise max_model_len where it was lowered",
        )


def check_search(
    trie: CatalogTrie,
    limits: Limits,
    n: int,
    k: int,
    allowed: Sequence[NDArray[np.bool_] | None] | None,
    bonus: NDArray[np.floating] | None,
    beams: int | None,
) -> None:
    """ConfigError for a search over n prompts that asks for nothing, or whose masks or bonus are not the trie's;
    DataError for a bonus that is not finite, or a trie of tokens that the model has not.
    """
    if k < 1:
        raise ConfigError(f"k is {k}", remedy="ask for at least 1 item")
    if beams is not None and beams < 1:
        raise ConfigError(f"beams is {beams}", remedy="use at least 1, or None for the exact search")
    masks = [None] * n if allowed is None else allowed
    if len(masks) != n:
        raise ConfigError(f"{len(masks)} masks for {n} prompts", where="allowed", remedy="give one (or None) a prompt")
    for mask in masks:
        if mask is not None and (np.shape(mask) != (trie.n_items,) or np.asarray(mask).dtype != bool):
            raise ConfigError(
                f"a mask is {np.asarray(mask).dtype} of shape {np.shape(mask)}",
                where="allowed",
                remedy=f"give one bool for each of the trie's {trie.n_items:,} items",
            )
    if bonus is not None and np.shape(bonus) != (trie.n_items,):
        raise ConfigError(
            f"has shape {np.shape(bonus)}",
            where="bonus",
            remedy=f"give one number for each of the trie's {trie.n_items:,} items",
        )
    if bonus is not None and not np.isfinite(bonus).all():
        raise DataError("is not finite", where="bonus", remedy="leave items out with allowed instead")
    _check_tokens(trie.token[1:], limits, "trie")


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
