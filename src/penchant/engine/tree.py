"""Forwards of token trees behind cached prompts: what scoring and generation are made of.

The keys and values of all prompt tokens but the last are cached. What follows is a tree whose root is
the prompt's last token. Position ids come from depth in the tree and an additive mask lets each node
see its prompt and its own ancestors, so one forward gives what a full forward of every path would.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache

from penchant.catalog_trie import CatalogTrie

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Rows of logits held at once: 256 rows of a 150,000-token vocabulary are 77 MB in bfloat16.
LOGIT_ROWS = 256
CACHED_ROWS = 16
# A common beginning shorter than this is not worth a forward of its own.
SHARED_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Branch:
    """One row of a tree forward: ids, tree depths, and which cached and new columns each node sees."""

    tokens: NDArray[np.int64]  # (n,)
    depth: NDArray[np.int64]  # (n,); the root, the prompt's last token, has depth 0
    sees: NDArray[np.bool_]  # (n, cached + n)


class PromptCache:
    """Keys and values of some prompts without their last tokens, right-padded; ``length`` (n,) counts them."""

    def __init__(self, cache: DynamicCache, length: NDArray[np.int64]) -> None:
        self.cache = cache
        self.length = length

    @property
    def width(self) -> int:
        """Cached columns: the longest prompt, and whatever tree nodes were added behind."""
        return int(self.cache.get_seq_length())


class TreeRunner:
    """Runs a Hugging Face causal LM over prompts and trees; ``tokens_run`` counts what went through it.

    ``headless`` models have a head that is more than one matrix (it scales or caps): they run whole.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.base: Any = model.base_model
        self.head: Any = model.get_output_embeddings()
        self.headless = False
        self.tokens_run = 0
        # transformers 5.24 calls `cache` what was `past_key_values`.
        named = inspect.signature(self.base.forward).parameters
        self._cache_name = "cache" if "cache" in named else "past_key_values"

    @property
    def device(self) -> torch.device:
        return self.model.device

    def hidden(self, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Last hidden states (or, headless, logits) of a forward."""
        self.tokens_run += ids.numel()
        if self.headless:
            return self.model(input_ids=ids, **kwargs).logits
        return self.base(input_ids=ids, **kwargs).last_hidden_state

    def _cached(self, cache: DynamicCache) -> dict[str, Any]:
        """The arguments that give a forward its cache, by the name this model's forward has for it."""
        return {self._cache_name: cache, "use_cache": True}

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of some rows of hidden states, in the model's own format."""
        return hidden if self.headless else self.head(hidden)

    def logprobs(self, hidden: torch.Tensor, row: torch.Tensor, token: torch.Tensor) -> NDArray[np.float64]:
        """log p of ``token[j]`` (m,) at hidden state ``row[j]`` of ``hidden`` (n, d); ``row`` ascending.

        The logits of a few rows at a time: never a matrix of all positions by the vocabulary.
        """
        out = torch.empty(len(row), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), LOGIT_ROWS):
            logits = self.logits(hidden[start : start + LOGIT_ROWS])
            a, b = torch.searchsorted(row, torch.tensor([start, start + len(logits)], device=row.device)).tolist()
            local = row[a:b] - start
            # In float32 a few rows at a time: the whole block would leave the processor's cache at every pass.
            total = torch.cat([torch.logsumexp(part.float(), dim=-1) for part in torch.split(logits, CACHED_ROWS)])
            out[a:b] = logits[local, token[a:b]].float() - total[local]
        return out.double().cpu().numpy()

    def prefill(self, prompts: Sequence[Sequence[int]]) -> PromptCache:
        """Cache all but the last token of each prompt; a beginning that all of them share is run once."""
        rows = [prompt[:-1] for prompt in prompts]
        length = np.array([len(row) for row in rows])
        cache, shared = self._share(rows, int(length.min()))
        if length.max() > shared:
            self._causal(rows, shared, cache)
        return PromptCache(cache, length)

    def last_hidden(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Hidden states at each prompt's last token, (n, d); a beginning that all of them share is run once."""
        cache, shared = self._share(prompts, min(len(p) for p in prompts) - 1)
        states = self._causal(prompts, shared, cache)
        at = torch.tensor([len(p) - 1 - shared for p in prompts], device=self.device)
        return states[torch.arange(len(prompts), device=self.device), at]

    def _share(self, rows: Sequence[Sequence[int]], limit: int) -> tuple[DynamicCache, int]:
        """A cache for these rows that holds the beginning they share, and its length (0: not worth it)."""
        cache = DynamicCache()  # without the config every layer keeps all it is given; a sliding one would forget
        shared = _shared_beginning(rows, limit)
        if shared:
            self._causal([rows[0][:shared]], 0, cache)
            cache.batch_repeat_interleave(len(rows))
        return cache, shared

    def _causal(self, rows: Sequence[Sequence[int]], start: int, cache: DynamicCache) -> torch.Tensor:
        """Run each row from ``start`` on, behind what the cache holds; right padding is never seen by what is real."""
        ids = torch.zeros((len(rows), max(len(r) for r in rows) - start), dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row) - start] = torch.tensor(list(row[start:]), dtype=torch.long)
        self.tokens_run += ids.numel()
        if self.headless:
            # The head is run for nothing, but its scale or cap is the model's own business.
            out = self.model(input_ids=ids.to(self.device), **self._cached(cache))
            return out.logits
        return self.base(input_ids=ids.to(self.device), **self._cached(cache)).last_hidden_state

    def run(self, branches: Sequence[Branch], prompts: PromptCache) -> tuple[torch.Tensor, int]:
        """One forward of a branch for every cached prompt: hidden states (rows, width, d), and the width."""
        width = max(len(b.tokens) for b in branches)
        cached = prompts.width
        ids = np.zeros((len(branches), width), dtype=np.int64)
        position = np.zeros((len(branches), width), dtype=np.int64)
        sees = np.zeros((len(branches), width, cached + width), dtype=bool)
        # A padding node sees itself: a row that sees nothing is NaN.
        sees[:, np.arange(width), cached + np.arange(width)] = True
        for i, branch in enumerate(branches):
            n = len(branch.tokens)
            ids[i, :n] = branch.tokens
            position[i, :n] = prompts.length[i] + branch.depth
            sees[i, :n, : cached + n] = branch.sees
        # Additive, never bool: eager attention reads a bool mask as numbers and is silently wrong.
        mask = torch.zeros(sees.shape, dtype=self.model.dtype)
        mask.masked_fill_(torch.from_numpy(~sees), torch.finfo(self.model.dtype).min)
        hidden = self.hidden(
            torch.from_numpy(ids).to(self.device),
            attention_mask=mask.unsqueeze(1).to(self.device),
            position_ids=torch.from_numpy(position).to(self.device),
            **self._cached(prompts.cache),
        )
        return hidden, width

    def tensor(self, array: NDArray[np.integer]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)).to(self.device)

    @torch.inference_mode()
    def plain(self, prompt: Sequence[int], sequence: Sequence[int]) -> NDArray[np.float64]:
        """The reference: log p of each token of one sequence behind the whole prompt, by one full forward."""
        ids = torch.tensor([[*prompt, *sequence]], device=self.device)
        self.tokens_run += ids.numel()
        logits = self.model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        picked = torch.log_softmax(logits, dim=-1)[torch.arange(len(sequence)), ids[0, len(prompt) :]]
        return picked.double().cpu().numpy()


def branch_of(trie: CatalogTrie, nodes: NDArray[np.int64], last: int, length: int, cached: int) -> Branch:
    """A piece of a trie behind a prompt whose last token is ``last``: ``nodes`` ascending, with all their ancestors."""
    sees = np.zeros((len(nodes), cached + len(nodes)), dtype=bool)
    sees[:, :length] = True
    # Depth-first numbering: a is an ancestor of b (or b) exactly when a <= b < end[a].
    sees[:, cached:] = (nodes <= nodes[:, None]) & (nodes[:, None] < trie.end[nodes])
    return Branch(tokens_at(trie, nodes, last), trie.depth[nodes].astype(np.int64), sees)


def tokens_at(trie: CatalogTrie, nodes: NDArray[np.int64], root: int) -> NDArray[np.int64]:
    """Token ids of trie nodes, with the prompt's last token at the root."""
    return np.where(nodes == 0, root, trie.token[nodes]).astype(np.int64)


def _shared_beginning(prompts: Sequence[Sequence[int]], limit: int) -> int:
    if len(prompts) < 2:
        return 0
    first, last = min(map(list, prompts)), max(map(list, prompts))  # in sorted order these two share the least
    n = 0
    while n < limit and first[n] == last[n]:
        n += 1
    return n if n >= SHARED_TOKENS else 0
