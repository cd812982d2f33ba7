"""The transformers engine: a prompt is run once, everything scored behind it hangs there as a tree.

The keys and values of all prompt tokens but the last are cached. What follows is a tree whose root is
the prompt's last token: candidates that begin alike share those tokens. Position ids come from depth
in the tree and an additive mask lets each node see the prompt and its own ancestors, so one forward
gives what a full forward of every candidate would. ``score`` runs whole trees in pieces, ``generate``
grows a tree node by node in the order of a best-first search.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache

from penchant.catalog_trie import CatalogTrie
from penchant.engine.base import Continuation, Generation, Pooling, Progress
from penchant.engine.search import BestFirst
from penchant.errors import ConfigError, DataError, ModelError
from penchant.tokens import Prompt, TextCodec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Nodes of one user's tree in one forward: attention is quadratic in it, and past this it dominates.
_PIECE = 512
# Rows of logits held at once: 256 rows of a 150,000-token vocabulary are 150 MB in float32.
_LOGIT_ROWS = 256
# Open nodes a user expands in one forward of `generate`: more means fewer forwards, and more nodes in vain.
_WIDTH = 16


@dataclass(frozen=True, slots=True)
class _Branch:
    """One row of a tree forward: ids, tree depths, and which cached and new columns each node sees."""

    tokens: NDArray[np.int64]  # (n,)
    depth: NDArray[np.int64]  # (n,); the root, the prompt's last token, has depth 0
    sees: NDArray[np.bool_]  # (n, cached + n)


class TransformersEngine:
    """A Hugging Face causal LM behind the engine protocol (see base.py for the verbs).

    ``max_batch_tokens`` bounds the tokens of one forward, padding included, and with it the memory.
    ``source`` are the arguments that load this engine again.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        fingerprint: str,
        max_batch_tokens: int = 4096,
        source: dict[str, str | None] | None = None,
    ) -> None:
        self.source = source
        self.codec = TextCodec(tokenizer)
        self.fingerprint = fingerprint
        self.max_batch_tokens = max_batch_tokens
        self._model = model.eval()
        self._base: Any = model.base_model
        self._lm_head: Any = model.get_output_embeddings()
        config = model.config.get_text_config()
        self.context_length = int(getattr(config, "max_position_embeddings", None) or 2**31)
        window = getattr(config, "sliding_window", None)
        if window and getattr(config, "use_sliding_window", True):
            # An additive mask of ours replaces the model's own: past its window they would differ.
            self.context_length = min(self.context_length, int(window))
        self._n_layers = int(config.num_hidden_layers)
        self._headless = False  # True: run the whole model, its output is logits already
        self._packed = True  # False: the plain way, one full sequence a candidate
        self._self_test()

    @property
    def n_layers(self) -> int:
        return self._n_layers

    @property
    def device(self) -> torch.device:
        return self._model.device

    # -- forwards ------------------------------------------------------------------------------

    def _hidden(self, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if self._headless:
            return self._model(input_ids=ids, **kwargs).logits
        return self._base(input_ids=ids, **kwargs).last_hidden_state

    def _logprobs(self, hidden: torch.Tensor, row: torch.Tensor, token: torch.Tensor) -> NDArray[np.float64]:
        """log p of ``token[j]`` (m,) at hidden state ``row[j]`` of ``hidden`` (n, d); ``row`` ascending."""
        out = torch.empty(len(row), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), _LOGIT_ROWS):
            rows = hidden[start : start + _LOGIT_ROWS]
            logits = (rows if self._headless else self._lm_head(rows)).float()
            a, b = torch.searchsorted(row, torch.tensor([start, start + len(rows)], device=row.device)).tolist()
            local = row[a:b] - start
            out[a:b] = logits[local, token[a:b]] - torch.logsumexp(logits, dim=-1)[local]
        return out.double().cpu().numpy()

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[DynamicCache, NDArray[np.int64]]:
        """Cache all but the last token of each prompt (right-padded); also their lengths without it."""
        length = np.array([len(p) - 1 for p in prompts])
        # Without the config every layer keeps all it is given: a sliding layer would forget, and can't be cropped.
        cache = DynamicCache()
        if length.max() > 0:
            ids = torch.zeros((len(prompts), int(length.max())), dtype=torch.long)
            for i, prompt in enumerate(prompts):
                ids[i, : length[i]] = torch.tensor(prompt[:-1], dtype=torch.long)
            # Causal attention alone is right here: padding stands after every real token.
            self._base(input_ids=ids.to(self.device), past_key_values=cache, use_cache=True)
        return cache, length

    def _run_branches(
        self, branches: Sequence[_Branch], cache: DynamicCache, length: NDArray[np.int64]
    ) -> tuple[torch.Tensor, int]:
        """One forward of a branch for every cached row; returns hidden states (rows, width, d) and the width."""
        width = max(len(b.tokens) for b in branches)
        cached = cache.get_seq_length()
        ids = np.zeros((len(branches), width), dtype=np.int64)
        position = np.zeros((len(branches), width), dtype=np.int64)
        sees = np.zeros((len(branches), width, cached + width), dtype=bool)
        # A padding node sees itself: a row that sees nothing is NaN.
        sees[:, np.arange(width), cached + np.arange(width)] = True
        for i, branch in enumerate(branches):
            n = len(branch.tokens)
            ids[i, :n] = branch.tokens
            position[i, :n] = length[i] + branch.depth
            sees[i, :n, : cached + n] = branch.sees
        dtype = self._model.dtype
        mask = torch.full((1,), torch.finfo(dtype).min, dtype=dtype).expand(sees.shape)
        mask = torch.where(torch.from_numpy(sees), torch.zeros((), dtype=dtype), mask).unsqueeze(1)
        hidden = self._hidden(
            torch.from_numpy(ids).to(self.device),
            attention_mask=mask.to(self.device),
            position_ids=torch.from_numpy(position).to(self.device),
            past_key_values=cache,
            use_cache=True,
        )
        return hidden, width

    # -- score ---------------------------------------------------------------------------------

    @torch.inference_mode()
    def score(
        self,
        prompts: Sequence[Prompt | str],
        continuations: Sequence[Sequence[Continuation]],
        *,
        progress: Progress | None = None,
    ) -> list[NDArray[np.float64]]:
        """See Engine.score. Cost: each prompt once, and each distinct beginning among its continuations once."""
        if len(prompts) != len(continuations):
            raise ConfigError(
                f"{len(prompts)} prompts but {len(continuations)} lists of continuations",
                remedy="give one list a prompt",
            )
        ids = [self._encode(p) for p in prompts]
        tries: list[CatalogTrie | None] = []
        built: dict[int, CatalogTrie] = {}  # many users scored against one list build its trie once
        for candidates in continuations:
            if len(candidates) and id(candidates) not in built:
                built[id(candidates)] = CatalogTrie.build([self._tokens(c) for c in candidates])
            tries.append(built[id(candidates)] if len(candidates) else None)
        out: list[NDArray[np.float64]] = [np.zeros(0)] * len(prompts)
        work = [(ids[i], trie, i) for i, trie in enumerate(tries) if trie is not None]
        for prompt, trie, _ in work:
            self._check_length(len(prompt) + int(trie.depth.max()))
        if not self._packed:
            for prompt, trie, i in work:
                out[i] = self._score_plain(prompt, [trie.sequence(j) for j in range(trie.n_items)])
                if progress:
                    progress(1)
            return out
        work.sort(key=lambda w: (len(w[0]), w[1].n_nodes))
        sizes = [max(len(prompt), min(trie.n_nodes, _PIECE)) for prompt, trie, _ in work]
        for group in self._batches(sizes):
            part = [work[j] for j in group]
            for (_, trie, i), edge in zip(part, self._score_group(part), strict=True):
                for d in range(1, int(trie.depth.max()) + 1):
                    at = np.flatnonzero(trie.depth == d)
                    edge[at] += edge[trie.parent[at]]
                out[i] = edge[trie.item_node]
            if progress:
                progress(len(part))
        return out

    def _score_group(self, part: Sequence[tuple[list[int], CatalogTrie, int]]) -> list[NDArray[np.float64]]:
        """log p of each trie node given its parent's path: one array (n_nodes,) for each (prompt, trie)."""
        edges = [np.zeros(trie.n_nodes) for _, trie, _ in part]
        cache, length = self._prefill([prompt for prompt, _, _ in part])
        pieces = [list(_pieces(trie)) for _, trie, _ in part]
        for step in range(max(len(p) for p in pieces)):
            branches, fresh = [], []
            for (prompt, trie, _), piece, n in zip(part, pieces, length, strict=True):
                nodes, new = piece[step] if step < len(piece) else (np.zeros(1, dtype=np.int64), 1)
                branches.append(_branch(prompt[-1], trie, nodes, int(n), cache.get_seq_length()))
                fresh.append((nodes[new:], new))
            hidden, width = self._run_branches(branches, cache, length)
            row: list[NDArray[np.int64]] = []
            token: list[NDArray[np.int32]] = []
            keep: list[NDArray[np.int64]] = []
            where: list[NDArray[np.int32]] = []
            for i, ((_, trie, _), (nodes, new)) in enumerate(zip(part, fresh, strict=True)):
                position, child = trie.children_of(nodes)
                row.append(position + sum(len(k) for k in keep))
                token.append(trie.token[child])
                keep.append(i * width + new + np.arange(len(nodes)))
                where.append(child)
            got = self._logprobs(
                hidden.flatten(0, 1)[self._tensor(np.concatenate(keep))],
                self._tensor(np.concatenate(row)),
                self._tensor(np.concatenate(token)),
            )
            for edge, child, values in zip(
                edges, where, np.split(got, np.cumsum([len(c) for c in where])[:-1]), strict=True
            ):
                edge[child] = values
            cache.crop(-width)
        return edges

    def _score_plain(self, prompt: Sequence[int], sequences: Sequence[Sequence[int]]) -> NDArray[np.float64]:
        """The reference: every continuation behind the whole prompt, a full forward for each."""
        out = np.zeros(len(sequences))
        for j, sequence in enumerate(sequences):
            ids = torch.tensor([[*prompt, *sequence]], device=self.device)
            logits = self._model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
            picked = torch.log_softmax(logits, dim=-1)[torch.arange(len(sequence)), ids[0, len(prompt) :]]
            out[j] = float(picked.double().sum())
        return out

    # -- generate ------------------------------------------------------------------------------

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Prompt | str],
        trie: CatalogTrie,
        k: int,
        *,
        allowed: Sequence[NDArray[np.bool_] | None] | None = None,
        max_expansions: int = 20_000,
        progress: Progress | None = None,
    ) -> list[list[Generation]]:
        """See Engine.generate. Every item returned is one of the trie's, each at most once."""
        if k < 1:
            raise ConfigError(f"k is {k}", remedy="ask for at least 1 item")
        ids = [self._encode(p) for p in prompts]
        for prompt in ids:
            self._check_length(len(prompt) + int(trie.depth.max()))
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        out: list[list[Generation]] = [[] for _ in ids]
        for group in self._batches([max(len(ids[i]), 8 * _WIDTH) for i in order]):
            members = [order[j] for j in group]
            searches = [BestFirst(trie, k, None if allowed is None else allowed[i], max_expansions) for i in members]
            self._search_group([ids[i] for i in members], trie, searches)
            for i, search in zip(members, searches, strict=True):
                out[i] = search.result()
            if progress:
                progress(len(members))
        return out

    def _search_group(self, prompts: Sequence[list[int]], trie: CatalogTrie, searches: Sequence[BestFirst]) -> None:
        if not self._packed:
            return self._search_plain(prompts, trie, searches)
        cache, length = self._prefill(prompts)
        prompt_width = cache.get_seq_length()
        # Cache columns of each expanded node's path, itself included.
        paths: list[dict[int, list[int]]] = [{} for _ in prompts]
        while True:
            taken = [search.take(_WIDTH) for search in searches]
            if not any(taken):
                return None
            cached = cache.get_seq_length()
            branches = []
            for prompt, nodes, path, n in zip(prompts, taken, paths, length, strict=True):
                sees = np.zeros((len(nodes), cached + len(nodes)), dtype=bool)
                sees[:, : min(n, prompt_width)] = True
                for j, (node, _) in enumerate(nodes):
                    path[node] = [*path.get(int(trie.parent[node]), ()), cached + j]
                    sees[j, path[node]] = True
                at = np.array([node for node, _ in nodes], dtype=np.int64)
                branches.append(_Branch(_tokens_at(trie, at, prompt[-1]), trie.depth[at].astype(np.int64), sees))
            hidden, width = self._run_branches(branches, cache, length)
            rows = [i * width + j for i, nodes in enumerate(taken) for j in range(len(nodes))]
            everything = np.array([node for nodes in taken for node, _ in nodes], dtype=np.int64)
            position, child = trie.children_of(everything)
            got = self._logprobs(
                hidden.flatten(0, 1)[self._tensor(np.array(rows))],
                self._tensor(position),
                self._tensor(trie.token[child]),
            )
            counts = np.bincount(position, minlength=len(everything))
            chunks = iter(np.split(got, np.cumsum(counts)[:-1]))
            for search, nodes in zip(searches, taken, strict=True):
                for node, logprob in nodes:
                    search.feed(node, logprob, next(chunks))

    def _search_plain(self, prompts: Sequence[list[int]], trie: CatalogTrie, searches: Sequence[BestFirst]) -> None:
        """The same search by full forwards, for models whose attention takes no mask of ours."""
        for prompt, search in zip(prompts, searches, strict=True):
            while taken := search.take(1):
                ((node, logprob),) = taken
                path, up = [], node
                while up > 0:
                    path.append(int(trie.token[up]))
                    up = int(trie.parent[up])
                ids = torch.tensor([[*prompt, *path[::-1]]], device=self.device)
                logits = self._model(input_ids=ids, use_cache=False).logits[0, -1].float()
                logp = torch.log_softmax(logits, dim=-1).double().cpu().numpy()
                search.feed(node, logprob, logp[trie.token[trie.children(node)]])

    # -- embed ---------------------------------------------------------------------------------

    @torch.inference_mode()
    def embed(
        self,
        texts: Sequence[Prompt | str],
        *,
        pooling: Pooling = "mean",
        layer: int = -1,
        progress: Progress | None = None,
    ) -> NDArray[np.float32]:
        """See Engine.embed."""
        if pooling not in ("mean", "last"):
            raise ConfigError(f"unknown pooling {pooling!r}", remedy="use 'mean' or 'last'")
        if not -self.n_layers - 1 <= layer <= self.n_layers:
            raise ConfigError(
                f"layer {layer} of a model with {self.n_layers}", remedy=f"use 0 to {self.n_layers}, or -1 for the last"
            )
        ids = [self._encode(t) for t in texts]
        for text in ids:
            self._check_length(len(text))
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        out: NDArray[np.float32] | None = None
        for group in self._batches([len(ids[i]) for i in order]):
            members = [order[j] for j in group]
            width = max(len(ids[i]) for i in members)
            batch = torch.zeros((len(members), width), dtype=torch.long)
            real = torch.zeros((len(members), width), dtype=torch.long)
            for row, i in enumerate(members):
                batch[row, : len(ids[i])] = torch.tensor(ids[i])
                real[row, : len(ids[i])] = 1
            real = real.to(self.device)
            states = (
                self._base(
                    input_ids=batch.to(self.device), attention_mask=real, use_cache=False, output_hidden_states=True
                )
                .hidden_states[layer]
                .float()
            )
            if pooling == "mean":
                vectors = (states * real.unsqueeze(-1)).sum(1) / real.sum(1, keepdim=True)
            else:
                vectors = states[torch.arange(len(members), device=self.device), real.sum(1) - 1]
            if out is None:
                out = np.empty((len(ids), vectors.shape[-1]), dtype=np.float32)
            out[members] = vectors.cpu().numpy()
            if progress:
                progress(len(members))
        if out is None:
            out = np.empty((0, int(self._model.config.get_text_config().hidden_size)), dtype=np.float32)
        if not np.isfinite(out).all():
            bad = int(np.flatnonzero(~np.isfinite(out).all(axis=1))[0])
            raise ModelError(
                f"the vector of text {bad} is not finite", where="embed", remedy="load the model with dtype='float32'"
            )
        return out

    # -- small parts ---------------------------------------------------------------------------

    def _encode(self, prompt: Prompt | str) -> list[int]:
        ids = self.codec.encode(prompt)
        if not ids:
            raise DataError("an empty prompt has no token to go on from", remedy="give it some text")
        return ids

    def _tokens(self, continuation: Continuation) -> Sequence[int]:
        return self.codec.encode_data(continuation) if isinstance(continuation, str) else continuation

    def _tensor(self, array: NDArray[np.integer]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)).to(self.device)

    def _check_length(self, n: int) -> None:
        if n > self.context_length:
            raise DataError(
                f"{n} tokens, {n - self.context_length} over the model's context of {self.context_length}",
                where="prompt",
                remedy="keep less history (max_history, prompt_tokens)",
            )

    def _batches(self, sizes: Sequence[int]) -> Iterator[list[int]]:
        """Consecutive indices whose count times largest size stays within max_batch_tokens."""
        group: list[int] = []
        largest = 0
        for j, size in enumerate(sizes):
            if group and (len(group) + 1) * max(largest, size) > self.max_batch_tokens:
                yield group
                group, largest = [], 0
            group.append(j)
            largest = max(largest, size)
        if group:
            yield group

    @torch.inference_mode()
    def _self_test(self) -> None:
        """Does this model give the same numbers behind a cache and an additive mask as in a plain forward?

        Eager attention fed a bool mask was silently wrong by 20 nats, so this is measured at every load.
        """
        prompt = self._encode("a b c d")
        other = sorted({t % int(self._lm_head.weight.shape[0]) for t in (5, 17, 29, 60)})
        sequences = [other, other[:2] + other[:1], other[1:], other[:1]]
        ids = torch.tensor([[*prompt, *other]], device=self.device)
        whole = self._model(input_ids=ids, use_cache=False).logits.float()
        parts = self._lm_head(self._base(input_ids=ids, use_cache=False).last_hidden_state).float()
        # A head that scales or caps its logits is more than one matrix.
        self._headless = not torch.allclose(whole, parts, atol=1e-2, rtol=1e-2)
        trie = CatalogTrie.build(sequences)
        # bfloat16 moves by a tenth of a nat a token with the layout alone; a wrong mask moves by several.
        bound = 1e-3 if self._model.dtype == torch.float32 else 0.25 * max(len(s) for s in sequences)
        try:
            packed = [self._score_group([(p, trie, 0)])[0] for p in (prompt, prompt[:1])]
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            self._refuse_packing(f"{type(error).__name__}: {error}")
            return
        for p, edge in zip((prompt, prompt[:1]), packed, strict=True):
            for d in range(1, int(trie.depth.max()) + 1):
                at = np.flatnonzero(trie.depth == d)
                edge[at] += edge[trie.parent[at]]
            worst = float(np.abs(edge[trie.item_node] - self._score_plain(p, sequences)).max())
            if not worst <= bound:
                self._refuse_packing(f"scores differ by {worst:.3g} nats from plain forwards")
                return

    def _refuse_packing(self, why: str) -> None:
        self._packed = False
        warnings.warn(
            f"{type(self._model).__name__} gives other scores behind a shared prompt ({why}); "
            "scoring runs one full sequence a candidate, which is right and slow",
            stacklevel=4,
        )


def _tokens_at(trie: CatalogTrie, nodes: NDArray[np.int64], root: int) -> NDArray[np.int64]:
    return np.where(nodes == 0, root, trie.token[nodes]).astype(np.int64)


def _branch(last: int, trie: CatalogTrie, nodes: NDArray[np.int64], length: int, cached: int) -> _Branch:
    """A piece of a trie behind a prompt: ``nodes`` ascending, with every ancestor among them."""
    sees = np.zeros((len(nodes), cached + len(nodes)), dtype=bool)
    sees[:, :length] = True
    # Depth-first numbering: a is an ancestor of b (or b) exactly when a <= b < end[a].
    sees[:, cached:] = (nodes <= nodes[:, None]) & (nodes[:, None] < trie.end[nodes])
    return _Branch(_tokens_at(trie, nodes, last), trie.depth[nodes].astype(np.int64), sees)


def _pieces(trie: CatalogTrie) -> Iterator[tuple[NDArray[np.int64], int]]:
    """Cut the inner nodes, depth first, into pieces of about _PIECE; each repeats the ancestors of its first.

    Yields (nodes ascending, number of repeated ancestors at the start). Leaves are never run: nothing
    is scored behind them.
    """
    inner = np.flatnonzero(trie.end > np.arange(trie.n_nodes) + 1)
    for start in range(0, len(inner), _PIECE):
        chunk = inner[start : start + _PIECE]
        above: list[int] = []
        node = int(trie.parent[chunk[0]])
        while node >= 0:
            above.append(node)
            node = int(trie.parent[node])
        yield np.array([*above[::-1], *chunk], dtype=np.int64), len(above)
