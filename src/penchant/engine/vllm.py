"""The vLLM engine: requests of token ids that share what they have in common in its prefix cache.

A request is a prompt with the path to a node of the candidates' trie. It names the node's children as
``logprob_token_ids``, and its ``prompt_logprobs`` tell the path; asking.py says which requests tell all edges.

``generate`` drives the searches of search.py from outside by such requests. Chosen over a logits processor, which
needs one class for each of vLLM's two model runners and can follow beams only, never a search with a proof; over a
regex of titles, which admits other tokenisations of them; and over vLLM's own beam search, which filters too late
(8 beams over 8 titles gave 3). A root of more than 128 children is asked for in parts, each of which runs the last
block of the prompt again. Log-probabilities of the whole vocabulary would be one request, sorted, sent and unpacked
for every token: 1.9 times faster for a root of 621 children on two cores (29 ms against 56), but a prompt has one such
root and a thousand smaller requests (eval/results/speed-vllm.json, rows children and generate).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from penchant.adapter_card import check_vectors, trained_part
from penchant.catalog_trie import CatalogTrie
from penchant.engine.adapters import check_request, kept_adapter
from penchant.engine.asking import Ask, Known
from penchant.engine.base import Continuation, Generation, Pooling, Progress
from penchant.engine.common import Limits, check_finite, check_pooling, check_search, encoded, paired, searches
from penchant.engine.folders import lasting, resolve_adapter
from penchant.engine.search import Search
from penchant.engine.vllm_options import VllmOptions
from penchant.engine.vllm_runner import Counts, Lora, Runner
from penchant.errors import ConfigError, PenchantWarning
from penchant.tokens import Prompt, TextCodec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Requests handed over at once: enough for any batch, and few enough to hold their answers.
_REQUESTS = 4096
# Prompts whose searches go on side by side.
_PROMPTS = 256
# Open nodes a user expands in one step of a best-first search: each costs what is left of its prompt's last block.
_WIDTH = 16


class VllmEngine:
    """A causal LM served by vLLM behind the engine protocol (see base.py for the verbs).

    Two runners, each in processes of its own with weights of its own: one scores and generates and starts at once,
    one embeds and starts when first needed; of ``embed`` there is one at a time, for one kind of pooling. ``options``
    are those of VllmOptions. ``counts`` says what was asked and how much of it was cached.

    An adapter given to ``load_engine`` is merged into the weights: every verb is right and as fast as without. To serve
    several on one base, load the base with ``max_lora_rank`` and call ``with_adapter``: LoRA requests. vLLM dies of
    prompt log-probabilities beside them, so such an engine asks for one token at a time and is slower to score.

    float32 equals the transformers engine within 1e-3 nats; in 16 bits another batch moves a title by tenths of a nat
    in either engine.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: PreTrainedTokenizerBase,
        *,
        dtype: str,
        device: str,
        options: VllmOptions,
        fingerprint: str,
        n_layers: int,
        hidden_size: int,
        vocabulary: int,
        source: dict[str, Any] | None = None,
    ) -> None:
        self.source = source
        self.codec = TextCodec(tokenizer)
        self.fingerprint = fingerprint
        self.counts = Counts()
        self._folder = folder
        self._dtype = dtype
        self._options = options
        self._n_layers = n_layers
        self._hidden_size = hidden_size
        self._lora: Lora | None = None
        self._deep = options.max_lora_rank == 0  # whether prompt log-probabilities are to be had
        self._runners = _Runners(folder, dtype, device, options, self.counts)
        self.context_length = self._runners.generating().max_model_len
        self._limits = Limits(self.context_length, vocabulary)
        if self._deep:
            self._self_test()

    @property
    def n_layers(self) -> int:
        return self._n_layers

    @property
    def tokens_run(self) -> int:
        """Tokens that went through the model so far: those asked, but for the cached."""
        return self.counts.tokens - self.counts.cached

    def close(self) -> None:
        """End the runners and free their memory; the next call starts them again."""
        self._runners.close()

    def with_adapter(self, adapter: str | Path) -> VllmEngine:
        """The same runners with an adapter (a folder or hub id in peft's format) on every request.

        ModelError where it is not one that vLLM can serve so: it is looked at before the engine could die of it. It is
        served as it is now, from a copy in the cache.
        """
        if self._lora is not None or (self.source or {}).get("adapter") is not None:
            raise ConfigError("there is an adapter already", where=str(adapter), remedy="ask the base's engine")
        if not self._options.max_lora_rank:
            raise ConfigError(
                "this engine takes no adapters", where=str(adapter), remedy="load it with options={'max_lora_rank': 16}"
            )
        folder = resolve_adapter(adapter)
        check_request(folder, self._folder, self._options.max_lora_rank)
        kept = kept_adapter(folder)
        engine = copy.copy(self)
        base, _, dtype = self.fingerprint.partition(":")
        engine.fingerprint = f"{base}+{kept.name}:{dtype}"
        engine.source = None if self.source is None else self.source | {"adapter": lasting(adapter, folder)}
        engine._lora = self._runners.lora(kept)
        return engine

    # -- score ---------------------------------------------------------------------------------

    def score(
        self,
        prompts: Sequence[Prompt | str],
        continuations: Sequence[Sequence[Continuation]],
        *,
        progress: Progress | None = None,
    ) -> list[NDArray[np.float64]]:
        """See Engine.score. One request a candidate, or less; a prompt is run once for all of its own."""
        work = paired(self.codec, prompts, continuations, self._limits)
        work.sort(key=lambda w: w[0])  # neighbours share the most
        out: list[NDArray[np.float64]] = [np.zeros(0)] * len(prompts)
        for part in _groups(work):
            behind = [Known(ids, trie) for ids, trie, _ in part]
            self._learn_all(behind)
            for known, (_, trie, i) in zip(behind, part, strict=True):
                out[i] = trie.path_sums(known.edges())[trie.item_node]
            if progress:
                progress(len(part))
        return out

    def _learn_all(self, behind: Sequence[Known]) -> None:
        """Ask until every edge of every trie is known."""
        if self._deep:
            self._ask([(known, ask) for known in behind for ask in known.everything()])
            self._ask([(known, ask) for known in behind for ask in known.rest(deep=True)])
        self._ask([(known, ask) for known in behind for ask in known.rest(deep=False)])

    def _ask(self, asks: Sequence[tuple[Known, Ask]]) -> None:
        for start in range(0, len(asks), _REQUESTS):
            part = asks[start : start + _REQUESTS]
            answers = self._runners.generating().ask([ask for _, ask in part], self._lora)
            for (known, ask), answer in zip(part, answers, strict=True):
                known.learn(ask, answer)

    # -- generate ------------------------------------------------------------------------------

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
        order = sorted(range(len(ids)), key=lambda i: ids[i])
        out: list[list[Generation]] = [[] for _ in ids]
        for start in range(0, len(order), _PROMPTS):
            members = order[start : start + _PROMPTS]
            masks = [None if allowed is None else allowed[i] for i in members]
            found = searches(trie, k, masks, bonus, beams, max_expansions)
            self._search([Known(ids[i], trie) for i in members], found)
            for i, search in zip(members, found, strict=True):
                out[i] = search.result()
            if progress:
                progress(len(members))
        return out

    def _search(self, behind: Sequence[Known], running: Sequence[Search]) -> None:
        """Step all searches until each has ended: what is known is fed at once, the rest of all is asked together."""
        while True:
            waiting = [
                (known, search, node)
                for known, search in zip(behind, running, strict=True)
                for node in _until_unknown(known, search)
            ]
            if not waiting:
                return
            missing = waiting
            while missing:
                self._ask([(known, ask) for known, _, node in missing for ask in known.next(node, deep=self._deep)])
                missing = [w for w in missing if not w[0].complete(w[2])]
            for known, search, node in waiting:
                search.feed(node, known.children(node))

    # -- embed ---------------------------------------------------------------------------------

    def embed(
        self,
        texts: Sequence[Prompt | str],
        *,
        pooling: Pooling = "mean",
        layer: int = -1,
        progress: Progress | None = None,
    ) -> NDArray[np.float32]:
        """See Engine.embed. ConfigError for a layer but the last: vLLM has no other."""
        check_pooling(pooling)
        if layer not in (-1, self.n_layers):
            raise ConfigError(
                f"layer {layer} asked for, and vLLM gives the last one only ({self.n_layers})",
                where="embed",
                remedy="fit with `layer: -1` (FitConfig(layer=-1)); serve a run that was fitted at another layer with "
                "a transformers engine beside this one: Recommender.load(run, engine, embedder=load_engine(model))",
            )
        check_vectors(trained_part(self.source), self.n_layers, pooling)
        ids = encoded(self.codec, texts, self._limits)
        order = sorted(range(len(ids)), key=lambda i: ids[i])
        out = np.empty((len(ids), self._hidden_size), dtype=np.float32)
        for start in range(0, len(order), _REQUESTS):
            members = order[start : start + _REQUESTS]
            out[members] = self._runners.pooling(pooling).embed([ids[i] for i in members], self._lora)
            if progress:
                progress(len(members))
        check_finite(out)
        return out

    # -- small parts ---------------------------------------------------------------------------

    def _self_test(self) -> None:
        """Do prompt log-probabilities behind cached blocks equal those of one token at a time, on this machine too?

        vLLM has two model runners and many attention kernels, of which this project's tests see one.
        """
        tokens = sorted(set(self.codec.encode_data("a b c d e f g 1 2 3 4 5")))
        prompt = (tokens * 100)[: min(100, self.context_length - len(tokens) - 1)]
        trie = CatalogTrie.build([tokens, tokens[:2] + tokens[:1], tokens[1:], tokens[:1]])
        plain = Known(prompt, trie)
        self._ask([(plain, ask) for ask in plain.rest(deep=False)])
        bound = 1e-3 if self._dtype == "float32" else 0.25 * int(trie.depth.max())
        worst = 0.0
        for _ in range(2):  # the second time blocks of the continuations are cached
            known = Known(prompt, trie)
            self._learn_all([known])
            apart = np.abs(trie.path_sums(known.edges()) - trie.path_sums(plain.edges())).max()
            worst = max(worst, float(apart))
        self.counts.clear()
        if not worst <= bound:
            self._deep = False
            warnings.warn(
                f"vLLM's prompt log-probabilities are off by {worst:.3g} nats here; scoring asks for one token at a "
                "time, which is right and slow",
                PenchantWarning,
                stacklevel=4,
            )


class _Runners:
    """The engine processes of one model, each started when first needed; all views of an engine share them."""

    def __init__(self, folder: Path, dtype: str, device: str, options: VllmOptions, counts: Counts) -> None:
        self._given = (folder, dtype, device, options, counts)
        self._generating: Runner | None = None
        self._pooling: Runner | None = None
        self._pooled: Pooling | None = None
        self._loras: dict[Path, Lora] = {}

    def generating(self) -> Runner:
        if self._generating is None or self._generating.closed:
            self._generating = Runner(*self._given, None)
        return self._generating

    def pooling(self, pooling: Pooling) -> Runner:
        if self._pooling is None or self._pooling.closed or self._pooled != pooling:
            if self._pooling is not None:
                self._pooling.close()
            self._pooling, self._pooled = Runner(*self._given, pooling), pooling
        return self._pooling

    def lora(self, folder: Path) -> Lora:
        """The request's name of an adapter that ``kept_adapter`` gave: its folder never changes."""
        if folder not in self._loras:
            number = len(self._loras) + 1
            self._loras[folder] = Lora(f"{number}-{folder.name}", number, folder)
        return self._loras[folder]

    def close(self) -> None:
        for runner in (self._generating, self._pooling):
            if runner is not None:
                runner.close()


def _groups(work: Sequence[tuple[list[int], CatalogTrie, int]]) -> Iterator[list[tuple[list[int], CatalogTrie, int]]]:
    """Consecutive prompts of about _REQUESTS candidates together."""
    group: list[tuple[list[int], CatalogTrie, int]] = []
    n = 0
    for entry in work:
        group.append(entry)
        n += entry[1].n_items
        if n >= _REQUESTS:
            yield group
            group, n = [], 0
    if group:
        yield group


def _until_unknown(known: Known, search: Search) -> list[int]:
    """Feed a search what is known; the nodes that it wants and nobody has asked for yet, none at its end."""
    while nodes := search.take(_WIDTH):
        unknown = [node for node in nodes if not known.complete(node)]
        for node in nodes:
            if node not in unknown:
                search.feed(node, known.children(node))
        if unknown:
            return unknown
    return []
