"""The transformers engine: a prompt is run once, and everything scored behind it hangs there as a tree.

``score`` runs whole trees of candidates in pieces, ``generate`` grows a tree node by node as a search
asks for it, ``embed`` pools hidden states. The forwards themselves are in tree.py, the searches in search.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from penchant.adapter_card import check_vectors, trained_part
from penchant.catalog_trie import CatalogTrie
from penchant.engine.base import Continuation, Generation, Pooling, Progress
from penchant.engine.blocks import States, context_of
from penchant.engine.common import Limits, Work, check_finite, check_pooling, check_search, encoded, paired, searches
from penchant.engine.search import Search
from penchant.engine.tree import Branch, TreeRunner, branch_of, tokens_at
from penchant.errors import ConfigError, PenchantWarning
from penchant.tokens import Prompt, TextCodec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Nodes of one user's tree in one forward. All of a piece's nodes are held against each other in attention, though each
# sees its few ancestors only: small pieces of many users waste least (eval/speed/scoring.py measures it).
_PIECE = 128
# Open nodes a user expands in one forward of a best-first search: more means fewer forwards, and more nodes in vain.
_WIDTH = 64


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
        self._tree = TreeRunner(model.eval())
        config = model.config.get_text_config()
        self.context_length = context_of(config)
        self._limits = Limits(self.context_length, int(self._tree.head.weight.shape[0]))
        self._hidden_size = int(config.hidden_size)
        self._n_layers = int(config.num_hidden_layers)
        self._states = States(self._tree.base, self._n_layers)
        self._packed = True  # False: the plain way, one full sequence a candidate
        self._self_test()

    @property
    def n_layers(self) -> int:
        return self._n_layers

    @property
    def device(self) -> torch.device:
        return self._tree.device

    @property
    def tokens_run(self) -> int:
        """Tokens that went through the model so far, padding included: what speed is measured against."""
        return self._tree.tokens_run

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
        work = paired(self.codec, prompts, continuations, self._limits)
        work.sort(key=lambda w: (len(w[0]), w[1].n_nodes))
        out: list[NDArray[np.float64]] = [np.zeros(0)] * len(prompts)
        for group in self._batches([_width(ids, trie) for ids, trie, _ in work]):
            part = [work[j] for j in group]
            for (_, _, i), scores in zip(part, self._score_group(part), strict=True):
                out[i] = scores
            if progress:
                progress(len(part))
        return out

    def _score_group(self, part: Sequence[Work]) -> list[NDArray[np.float64]]:
        """Scores of each (prompt, trie): one array (n_items,) each."""
        if not self._packed:
            return [
                np.array([self._tree.plain(ids, trie.sequence(j)).sum() for j in range(trie.n_items)])
                for ids, trie, _ in part
            ]
        if all(int(trie.depth.max()) == 1 for _, trie, _ in part):
            edges = self._next_token_edges(part)
        else:
            edges = self._tree_edges(part)
        return [trie.path_sums(edge)[trie.item_node] for (_, trie, _), edge in zip(part, edges, strict=True)]

    def _next_token_edges(self, part: Sequence[Work]) -> list[NDArray[np.float64]]:
        """Continuations of one token (labels): the prompts alone are run."""
        states = self._tree.last_hidden([ids for ids, _, _ in part])
        children = [trie.child for _, trie, _ in part]  # of the root: there are no others
        row = np.repeat(np.arange(len(part)), [len(c) for c in children])
        tokens = np.concatenate([trie.token[c] for (_, trie, _), c in zip(part, children, strict=True)])
        got = self._tree.logprobs(states, self._tree.tensor(row), self._tree.tensor(tokens))
        edges = [np.zeros(trie.n_nodes) for _, trie, _ in part]
        for edge, child, values in zip(edges, children, _split(got, children), strict=True):
            edge[child] = values
        return edges

    def _tree_edges(self, part: Sequence[Work]) -> list[NDArray[np.float64]]:
        """log p of each trie node given its parent's path: one array (n_nodes,) for each (prompt, trie)."""
        edges = [np.zeros(trie.n_nodes) for _, trie, _ in part]
        prompts = self._tree.prefill([ids for ids, _, _ in part])
        size = self._piece(part)
        pieces = [list(_pieces(trie, size)) for _, trie, _ in part]
        for step in range(max(len(p) for p in pieces)):
            branches: list[Branch] = []
            fresh: list[tuple[NDArray[np.int64], int]] = []
            for (ids, trie, _), piece, n in zip(part, pieces, prompts.length, strict=True):
                nodes, repeated = piece[step] if step < len(piece) else (np.zeros(1, dtype=np.int64), 1)
                branches.append(branch_of(trie, nodes, ids[-1], int(n), prompts.width))
                fresh.append((nodes[repeated:], repeated))
            hidden, width = self._tree.run(branches, prompts)
            row: list[NDArray[np.int64]] = []
            token: list[NDArray[np.int32]] = []
            keep: list[NDArray[np.int64]] = []
            where: list[NDArray[np.int32]] = []
            rows = 0
            for i, ((_, trie, _), (nodes, repeated)) in enumerate(zip(part, fresh, strict=True)):
                position, child = trie.children_of(nodes)
                row.append(position + rows)
                token.append(trie.token[child])
                keep.append(i * width + repeated + np.arange(len(nodes)))
                where.append(child)
                rows += len(nodes)
            got = self._tree.logprobs(
                hidden.flatten(0, 1)[self._tree.tensor(np.concatenate(keep))],
                self._tree.tensor(np.concatenate(row)),
                self._tree.tensor(np.concatenate(token)),
            )
            for edge, child, values in zip(edges, where, _split(got, where), strict=True):
                edge[child] = values
            prompts.cache.crop(-width)
        return edges

    def _piece(self, part: Sequence[Work]) -> int:
        """Nodes a piece: larger ones where few users leave room, and never a forward past max_batch_tokens."""
        room = self.max_batch_tokens // len(part) - max(int(trie.depth.max()) for _, trie, _ in part)
        return max(16, min(2 * _PIECE if len(part) <= 4 else _PIECE, room))

    # -- generate ------------------------------------------------------------------------------

    @torch.inference_mode()
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
        """See Engine.generate. Every item returned is one of the trie's, each at most once."""
        check_search(trie, self._limits, len(prompts), k, allowed, bonus, beams)
        ids = encoded(self.codec, prompts, self._limits, int(trie.depth.max()))
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        out: list[list[Generation]] = [[] for _ in ids]
        for group in self._batches([max(len(ids[i]), 8 * (beams or _WIDTH)) for i in order]):
            members = [order[j] for j in group]
            masks = [None if allowed is None else allowed[i] for i in members]
            found = searches(trie, k, masks, bonus, beams, max_expansions)
            self._search_group([ids[i] for i in members], trie, found)
            for i, search in zip(members, found, strict=True):
                out[i] = search.result()
            if progress:
                progress(len(members))
        return out

    def _search_group(self, prompts: Sequence[list[int]], trie: CatalogTrie, running: Sequence[Search]) -> None:
        if not self._packed:
            self._search_plain(prompts, trie, running)
            return
        cached = self._tree.prefill(prompts)
        prompt_width = cached.width
        # Cache columns of each expanded node's path, itself included.
        paths: list[dict[int, list[int]]] = [{} for _ in prompts]
        while True:
            taken = [search.take(_WIDTH) for search in running]
            if not any(taken):
                return
            start = cached.width
            branches = []
            for prompt, nodes, path, n in zip(prompts, taken, paths, cached.length, strict=True):
                sees = np.zeros((len(nodes), start + len(nodes)), dtype=bool)
                sees[:, : min(n, prompt_width)] = True
                for j, node in enumerate(nodes):
                    path[node] = [*path.get(int(trie.parent[node]), ()), start + j]
                    sees[j, path[node]] = True
                at = np.array(nodes, dtype=np.int64)
                branches.append(Branch(tokens_at(trie, at, prompt[-1]), trie.depth[at].astype(np.int64), sees))
            hidden, width = self._tree.run(branches, cached)
            rows = [i * width + j for i, nodes in enumerate(taken) for j in range(len(nodes))]
            everything = np.array([node for nodes in taken for node in nodes], dtype=np.int64)
            position, child = trie.children_of(everything)
            got = self._tree.logprobs(
                hidden.flatten(0, 1)[self._tree.tensor(np.array(rows))],
                self._tree.tensor(position),
                self._tree.tensor(trie.token[child]),
            )
            counts = np.bincount(position, minlength=len(everything))
            chunks = iter(np.split(got, np.cumsum(counts)[:-1]))
            for search, nodes in zip(running, taken, strict=True):
                for node in nodes:
                    search.feed(node, next(chunks))

    def _search_plain(self, prompts: Sequence[list[int]], trie: CatalogTrie, running: Sequence[Search]) -> None:
        """The same search by full forwards, for models whose attention takes no mask of ours."""
        for prompt, search in zip(prompts, running, strict=True):
            while nodes := search.take(_WIDTH):
                for node in nodes:
                    states = self._tree.last_hidden([[*prompt, *trie.path(node)]])
                    children = trie.token[trie.children(node)]
                    row = self._tree.tensor(np.zeros(len(children), dtype=np.int64))
                    search.feed(node, self._tree.logprobs(states, row, self._tree.tensor(children)))

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
        """See Engine.embed. ConfigError also where the adapter was trained to embed at another layer or pooling."""
        check_pooling(pooling)
        if not -self.n_layers - 1 <= layer <= self.n_layers:
            raise ConfigError(
                f"layer {layer} of a model with {self.n_layers}", remedy=f"use 0 to {self.n_layers}, or -1 for the last"
            )
        layer %= self.n_layers + 1
        check_vectors(trained_part(self.source), layer, pooling)
        ids = encoded(self.codec, texts, self._limits)
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        out = np.empty((len(ids), self._hidden_size), dtype=np.float32)
        for group in self._batches([len(ids[i]) for i in order]):
            members = [order[j] for j in group]
            out[members] = self._embed_batch([ids[i] for i in members], pooling, layer)
            if progress:
                progress(len(members))
        check_finite(out)
        return out

    def _embed_batch(self, rows: Sequence[list[int]], pooling: Pooling, layer: int) -> NDArray[np.float32]:
        width = max(len(row) for row in rows)
        batch = torch.zeros((len(rows), width), dtype=torch.long)
        real = torch.zeros((len(rows), width), dtype=torch.long)
        for i, row in enumerate(rows):
            batch[i, : len(row)] = torch.tensor(row)
            real[i, : len(row)] = 1
        real = real.to(self.device)
        inputs = {"input_ids": batch.to(self.device), "attention_mask": real}
        states = self._states.at(layer, **inputs).float()
        if pooling == "mean":
            vectors = (states * real.unsqueeze(-1)).sum(1) / real.sum(1, keepdim=True)
        else:
            vectors = states[torch.arange(len(rows), device=self.device), real.sum(1) - 1]
        found: NDArray[np.float32] = vectors.cpu().numpy()
        return found

    # -- small parts ---------------------------------------------------------------------------

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
        tree = self._tree
        (prompt,) = encoded(self.codec, ["a b c d"], self._limits)
        other = sorted({t % int(tree.head.weight.shape[0]) for t in (5, 17, 29, 60)})
        sequences = [other, other[:2] + other[:1], other[1:], other[:1]]
        ids = torch.tensor([[*prompt, *other]], device=self.device)
        whole = tree.model(input_ids=ids, use_cache=False).logits.float()
        # A head that scales or caps its logits is more than one matrix.
        parts = tree.logits(tree.hidden(ids, use_cache=False)).float()
        tree.headless = not torch.allclose(whole, parts, atol=1e-2, rtol=1e-2)
        trie = CatalogTrie.build(sequences)
        # bfloat16 moves by a tenth of a nat a token with the layout alone; a wrong mask moves by several.
        bound = 1e-3 if tree.model.dtype == torch.float32 else 0.25 * max(len(s) for s in sequences)
        for start in (prompt, prompt[:1]):
            plain = np.array([tree.plain(start, s).sum() for s in sequences])
            try:
                worst = float(np.abs(self._score_group([(start, trie, 0)])[0] - plain).max())
            except (RuntimeError, ValueError, TypeError, AttributeError) as error:
                self._refuse_packing(f"{type(error).__name__}: {error}")
                return
            if not worst <= bound:
                self._refuse_packing(f"scores differ by {worst:.3g} nats from plain forwards")
                return
        tree.tokens_run = 0

    def _refuse_packing(self, why: str) -> None:
        self._packed = False
        warnings.warn(
            f"{type(self._tree.model).__name__} gives other scores behind a shared prompt ({why}); "
            "scoring runs one full sequence a candidate, which is right and slow",
            PenchantWarning,
            stacklevel=4,
        )


def _width(ids: Sequence[int], trie: CatalogTrie) -> int:
    return max(len(ids), min(trie.n_nodes, _PIECE + int(trie.depth.max())))


def _split(values: NDArray[np.float64], like: Sequence[NDArray[np.integer]]) -> list[NDArray[np.float64]]:
    return np.split(values, np.cumsum([len(part) for part in like])[:-1])


def _pieces(trie: CatalogTrie, size: int) -> Iterator[tuple[NDArray[np.int64], int]]:
    """Cut the inner nodes, depth first, into pieces of ``size``; each repeats the ancestors of its first.

    Yields (nodes ascending, number of repeated ancestors at the start). Leaves are never run: nothing
    is scored behind them.
    """
    inner = np.flatnonzero(trie.end > np.arange(trie.n_nodes) + 1)
    for start in range(0, len(inner), size):
        chunk = inner[start : start + size]
        above: list[int] = []
        node = int(trie.parent[chunk[0]])
        while node >= 0:
            above.append(node)
            node = int(trie.parent[node])
        yield np.array([*above[::-1], *chunk], dtype=np.int64), len(above)
