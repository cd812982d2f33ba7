"""A fitted model at work: its engine and its stages."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from penchant import schema
from penchant.adapter_card import check_templates, trained_part
from penchant.catalog_trie import CatalogTrie
from penchant.data.history import EventLog
from penchant.errors import ConfigError, DataError, ModelError, PenchantWarning
from penchant.fusion import zscore
from penchant.interest.behaviour import Behaviour, History
from penchant.interest.hnsw import HNSWIndex
from penchant.interest.search import index_of, score_all, search
from penchant.interest.top import top_k
from penchant.interest.vectors import Scaling, default_layer
from penchant.interest.words import reading_of
from penchant.rank import Ranker
from penchant.run_folder import Fitted

if TYPE_CHECKING:
    from penchant.engine import Engine, Generation

Method = Literal["rank", "retrieve", "generate"]
Items = NDArray[np.int32]
# One item of an answer: its index, its score, the stage that the score is from.
Answer = list[tuple[int, float, str]]
# What was said of items the LLM was asked about: the encoder's score (None of items it named itself), and the LLM's
# (nats).
Told = dict[int, tuple[float | None, float]]


@dataclass(eq=False)
class Served(Fitted):
    """A fitted model that answers. ``items`` and ``item_index`` are the catalogue as served, added items included."""

    def __post_init__(self) -> None:
        # Back to what was fitted: another object may have been made from the same parts, and be served with other
        # additions.
        n_items = self.split.log.n_items
        self.encoder = self.encoder.fork(n_items, 0 if self.words is None else len(self.words.vectors))
        self.texts, self.vectors = self.texts[:n_items], self.vectors[:n_items]
        self.prior = None if self.prior is None else self.prior[:n_items]
        # A graph that was loaded is taken over; it may grow, so it is nobody else's.
        self.index = self.graph or index_of(self.encoder, self.config.index)
        self.graph = None
        self.scaling = Scaling.fit(self.vectors, self.config.scale)
        self.items = self.split.dataset.items
        self.item_index = dict(self.split.log.item_index)
        self.reading, texts = reading_of(self.split, self.columns)
        self.word_rows = {text: row for row, text in enumerate(texts)}
        self.removed = np.zeros(n_items, dtype=bool)  # of all items served
        self._engine: Engine | None = None
        self._other: Engine | None = None  # that embeds in its place
        self._ranker: Ranker | None = None
        self._trie: CatalogTrie | None = None

    # -- the engine ----------------------------------------------------------------------------

    def use_engine(self, engine: Engine) -> None:
        """Serve with this engine; ModelError unless it is the model (and adapter) the run was fitted with."""
        if engine.fingerprint != self.fingerprint:
            raise ModelError(
                f"the run was fitted with the model {self.fingerprint}, and this engine is {engine.fingerprint}",
                where="engine",
                remedy="load the same model, adapter and dtype, or fit again",
            )
        check_templates(trained_part(engine.source), self.templates)
        self._engine = engine
        self._ranker = None

    @property
    def engine(self) -> Engine:
        """The LLM, loaded when first needed."""
        if self._engine is None:
            if self.engine_source is None:
                raise ModelError(
                    "this run does not say how to load its model",
                    where="engine",
                    remedy="call use_engine(engine) first",
                )
            from penchant.engine.loading import load_engine

            self.use_engine(load_engine(**self.engine_source))
        if self._engine is None:
            raise ModelError("no engine", where="engine", remedy="call use_engine(engine)")
        return self._engine

    @property
    def ranker(self) -> Ranker:
        if self._ranker is None:
            self._ranker = Ranker(
                self.engine,
                self.templates,
                self.texts,
                max_history=self.config.max_history,
                prompt_tokens=min(self.config.prompt_tokens, self.engine.context_length),
                prior=self.prior,
                question=self.config.question,
            )
        return self._ranker

    @property
    def trie(self) -> CatalogTrie:
        """The catalogue's titles as a trie over the engine's tokens."""
        if self._trie is None:
            self._trie = CatalogTrie.build(self.ranker.tokens(range(len(self.texts))))
        return self._trie

    def use_embedder(self, engine: Engine) -> None:
        """Embed new items and texts with this engine, beside one that ranks but can't embed as the item vectors were
        made (vLLM has no layer but the last); ModelError unless it is the model that made them.
        """
        made = self.fingerprint if self.embedder is None else self.embedder["fingerprint"]
        if engine.fingerprint != made:
            raise ModelError(
                f"the item vectors are the model {made}'s, and this engine is {engine.fingerprint}",
                where="embedder",
                remedy="load the same model, adapter and dtype",
            )
        self._other = engine

    def _embedder(self) -> Engine:
        """The engine that embeds as the item vectors were made, loaded when first needed; ModelError where the run does
        not say how.
        """
        if self._other is not None:
            return self._other
        if self.embedder is None or self.embedder["fingerprint"] == self.engine.fingerprint:
            return self.engine
        if self.embedder["source"] is None:
            raise ModelError(
                "the item vectors are another model's than the one that ranks",
                where="engine",
                remedy="give that model's engine too: Recommender.load(run, engine, embedder=...) or use_embedder(...)",
            )
        from penchant.engine.loading import load_engine

        engine = load_engine(**self.embedder["source"])
        self.use_embedder(engine)
        return engine

    def _embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Texts as the item vectors were made, (n, d) unscaled; not kept, for they are somebody's words."""
        engine = self._embedder()
        layer = default_layer(engine.n_layers) if self.config.layer is None else self.config.layer
        return engine.embed(list(texts), pooling=self.config.pooling, layer=layer)

    # -- stages --------------------------------------------------------------------------------

    @property
    def log(self) -> EventLog:
        return self.split.log

    def retrieve(
        self,
        histories: Sequence[History],
        k: int,
        *,
        allowed: NDArray[np.bool_] | None = None,
        seen: Sequence[Items] | None = None,
    ) -> tuple[Items, NDArray[np.float32]]:
        """The encoder's top k for each history (not empty): items and scores, (n, k), padded with -1 and -inf.

        k is no more than the catalogue has items. ``seen`` are the items to leave out, by default each history's own.
        """
        masked = [Behaviour.of(history).item for history in histories] if seen is None else seen
        k = min(k, len(self.texts))
        interest = self.encoder.encode(histories)
        bonus = self.encoder.bonus(histories, interest)
        return search(self.index, interest, k, exclude=masked, allowed=allowed, bonus=bonus)

    def rank(
        self,
        histories: Sequence[Items],
        candidates: Sequence[Items],
        interest: Sequence[NDArray[np.floating]],
        said: list[NDArray[np.float64]] | None = None,
    ) -> list[NDArray[np.float64]]:
        """Fused scores of each user's candidates, whose encoder scores are ``interest``; arrays of the same shapes.

        ``said`` takes up what the LLM, where it is asked, said of them.
        """
        if self.fusion.weight == 0:
            # Validation gave the LLM no say: then it is not asked.
            return [self.fusion.scores(e, e, np.zeros(len(e))) for e in interest]
        likelihood = self.ranker.scores(histories, candidates)
        if said is not None:
            said.extend(likelihood)
        if self.fusion.calibration:
            self.ranker.priors(np.unique(np.concatenate(candidates)))
        return [
            self.fusion.scores(e, lik, np.nan_to_num(self.ranker.prior[c]))
            for e, lik, c in zip(interest, likelihood, candidates, strict=True)
        ]

    def answer(
        self,
        histories: Sequence[Behaviour],
        seen: Sequence[Items],
        k: int,
        method: Method,
        allowed: NDArray[np.bool_] | None,
        calibration: float = 0.0,
        told: dict[int, Told] | None = None,
    ) -> list[Answer]:
        """The k best of each history, best first, never a removed item; popularity where there is nothing to go on.

        ``told`` takes up, by the history's place, what the stages said of the items that the LLM was asked about.
        """
        allowed = self.served(allowed)
        out: list[Answer] = [[] for _ in histories]
        warm = [i for i, h in enumerate(histories) if len(h)]
        popular = self._popular(k, allowed) if len(warm) < len(histories) else []
        for i in set(range(len(histories))).difference(warm):
            out[i] = list(popular)
        if not warm:
            return out
        known, masked = [histories[i] for i in warm], [seen[i] for i in warm]
        if method == "generate":
            for i, found in zip(warm, self._generate(known, masked, k, allowed, calibration), strict=True):
                out[i] = [(one.item, one.score, schema.STAGE_GENERATED) for one in found]
                if told is not None:
                    told[i] = {one.item: (None, one.logprob) for one in found}
            return out
        n = max(k, self.config.candidates) if method == "rank" else k
        items, scores = self.retrieve(known, n, allowed=allowed, seen=masked)
        kept = [(row[row >= 0], s[row >= 0]) for row, s in zip(items, scores, strict=True)]
        for i, (row, s) in zip(warm, kept, strict=True):
            out[i] = [(int(a), float(b), schema.STAGE_INTEREST) for a, b in zip(row, s, strict=True)]
        if method == "rank" and self.fusion.weight > 0:
            some = [j for j, (row, _) in enumerate(kept) if len(row)]
            if not some:
                return out
            top = self.config.candidates
            candidates = [kept[j][0][:top] for j in some]
            interest = [kept[j][1][:top] for j in some]
            said: list[NDArray[np.float64]] = []
            fused = self.rank([known[j].item for j in some], candidates, interest, said)
            if told is not None:
                for j, row, e, s in zip(some, candidates, interest, said, strict=True):
                    told[warm[j]] = dict(zip(row.tolist(), zip(e.tolist(), s.tolist(), strict=True), strict=True))
            stage = schema.STAGE_FUSED if self.fusion.weight < 1 else schema.STAGE_LLM
            for j, row, s in zip(some, candidates, fused, strict=True):
                order = np.lexsort((np.arange(len(row)), -s))
                head = [(int(row[o]), float(s[o]), stage) for o in order]
                out[warm[j]] = head + out[warm[j]][len(row) :]
        return [answer[:k] for answer in out]

    def nearness(self, text: str) -> NDArray[np.float64]:
        """How near each item's text is to what a user says they want, (n_items,), standardised over the catalogue."""
        if not text.strip():
            raise DataError("the text is empty", where="text", remedy="say what is wanted, or leave it out")
        if self.config.fields:
            raise ConfigError(
                "the item vectors are of several fields, and a wish is one text",
                where="text",
                remedy="fit without fields, so that items and wishes are embedded alike",
            )
        wish = self.scaling.apply(self._embed([text.strip()]))[0]
        items = self.scaling.apply(self.vectors)
        norms = np.linalg.norm(items, axis=1) * np.linalg.norm(wish)
        return zscore(items @ wish / np.maximum(norms, 1e-12))

    def answer_wish(
        self,
        near: NDArray[np.float64],
        history: Behaviour,
        seen: Items,
        k: int,
        allowed: NDArray[np.bool_] | None,
        weight: float,
    ) -> Answer:
        """The k best for a wish: ``weight`` on ``nearness``, the rest on the encoder's score, or where there is no
        history on popularity, standardised over the catalogue too.
        """
        allowed = self.served(allowed)
        if len(history):
            base = zscore(score_all(self.encoder, self.index.vectors, [history])[0])
        else:
            base = zscore(np.log1p(self._popularity()))
        scores = ((1 - weight) * base + weight * near)[None]
        if allowed is not None:
            scores[0, ~allowed] = -np.inf
        scores[0, seen] = -np.inf
        found, values = top_k(scores, min(k, len(near)))
        return [(int(i), float(v), schema.STAGE_WISH) for i, v in zip(found[0], values[0], strict=True) if i >= 0]

    def _generate(
        self,
        histories: Sequence[Behaviour],
        seen: Sequence[Items],
        k: int,
        allowed: NDArray[np.bool_] | None,
        calibration: float,
    ) -> list[list[Generation]]:
        masks = []
        for row in seen:
            mask = np.ones(len(self.texts), dtype=bool) if allowed is None else allowed.copy()
            mask[row] = False
            masks.append(mask)
        prompts = [self.ranker.prompt(h.item).prompt for h in histories]
        bonus = -calibration * self.ranker.title_priors(np.arange(len(self.texts))) if calibration else None
        found = self.engine.generate(prompts, self.trie, k, allowed=masks, bonus=bonus)
        gaps = [row[0].gap if row else np.inf for row, mask in zip(found, masks, strict=True) if mask.any()]
        gaps = [gap for gap in gaps if gap > 0]
        if gaps:
            warnings.warn(
                f"{len(gaps)} of {len(found)} generated lists are the best that was found before the search gave up: "
                f"an item that is not listed may be up to {max(gaps):.2f} nats better",
                PenchantWarning,
                stacklevel=2,
            )
        return found

    def _popularity(self) -> NDArray[np.float64]:
        """Events of each item in the log of the fit, (n_items,)."""
        return np.bincount(self.log.item, minlength=len(self.texts)).astype(np.float64)

    def _popular(self, k: int, allowed: NDArray[np.bool_] | None) -> Answer:
        counts = self._popularity()
        if allowed is not None:
            counts[~allowed] = -1
        order = np.lexsort((np.arange(len(counts)), -counts))[:k]
        return [(int(i), float(counts[i]), schema.STAGE_POPULARITY) for i in order if counts[i] >= 0]

    def index_recall(self, n: int = 500, k: int = 100) -> float | None:
        """The share of the exact k best that the index finds for up to n validation histories; None if it is exact.

        Kept with the index when the run is saved.
        """
        if not isinstance(self.index, HNSWIndex):
            return None
        sample = self.split.valid.sample(n, self.config.seed)
        known = [history for history in self.reading.before(sample.position) if len(history)]
        if not known:
            return None
        queries = self.encoder.encode(known).reshape(-1, self.encoder.width)
        return self.index.recall(queries, min(k, len(self.texts)))

    def served(self, allowed: NDArray[np.bool_] | None) -> NDArray[np.bool_] | None:
        """The filter without removed items."""
        if not self.removed.any():
            return allowed
        return ~self.removed if allowed is None else allowed & ~self.removed
