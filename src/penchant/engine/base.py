"""What every engine offers: three verbs over strings and token ids. An engine knows nothing of users."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from penchant.catalog_trie import CatalogTrie
from penchant.tokens import Prompt, TextCodec

Pooling = Literal["mean", "last"]
Progress = Callable[[int], None]  # called with the number of prompts or texts just finished
Continuation = str | Sequence[int]  # text (tokenised as data) or token ids


@dataclass(frozen=True, slots=True)
class Generation:
    """One generated item.

    ``item`` is its index in the trie, ``logprob`` the summed log-probability of its whole sequence in nats,
    ``score`` what it was ranked by (the same, plus the item's bonus), ``gap`` how much better, in nats, an
    item not listed could still be (0: proved that none is; infinite for beams), ``token_logprobs`` the parts
    of ``logprob``, one a token.
    """

    item: int
    logprob: float
    score: float
    gap: float
    token_logprobs: tuple[float, ...]

    @property
    def exact(self) -> bool:
        """Whether the list this belongs to is the proved top k (a float32 promise)."""
        return self.gap == 0


@runtime_checkable
class Engine(Protocol):
    """A causal language model that scores, generates and embeds.

    ``fingerprint`` identifies weights, adapter and number format; ``context_length`` is in tokens;
    ``source`` holds the arguments of ``load_engine`` that make it again, or None.
    """

    codec: TextCodec
    fingerprint: str
    context_length: int
    source: dict[str, str | None] | None

    @property
    def n_layers(self) -> int:
        """Number of transformer layers; ``embed`` takes layers 0 to n_layers and negatives from the end."""
        ...

    def score(
        self,
        prompts: Sequence[Prompt | str],
        continuations: Sequence[Sequence[Continuation]],
        *,
        progress: Progress | None = None,
    ) -> list[NDArray[np.float64]]:
        """Summed log-probability in nats of exactly the tokens of each continuation, given its prompt.

        Returns one array a prompt, of shape (number of its continuations,). A prompt with its longest
        continuation over the context is a DataError that says by how much.
        """
        ...

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
        """The k best items of the trie for each prompt, best first, equal scores in trie order.

        ``allowed`` holds, for each prompt, a mask of shape (n_items,) or None: fewer than k are returned where
        fewer are allowed. ``bonus`` (n_items,) is added to each item's log-probability (calibration). Exact by
        default; after ``max_expansions`` nodes a prompt gets the best found so far and the gap that remains.
        ``beams`` asks for a constrained beam search of that width instead.
        """
        ...

    def embed(
        self,
        texts: Sequence[Prompt | str],
        *,
        pooling: Pooling = "mean",
        layer: int = -1,
        progress: Progress | None = None,
    ) -> NDArray[np.float32]:
        """Hidden states of ``layer`` (0: embeddings, n_layers or -1: last) pooled over tokens: (n, d) float32."""
        ...
