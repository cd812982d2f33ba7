"""A fitted model at work: its engine, its stages, and what it has learnt of users and items since it was fitted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from penchant import schema
from penchant.adapter_card import check_templates
from penchant.catalog_trie import CatalogTrie
from penchant.data.history import EventLog
from penchant.errors import ConfigError, DataError, ModelError
from penchant.filters import indices
from penchant.interest.behaviour import Behaviour, History
from penchant.interest.hnsw import HNSWIndex
from penchant.interest.search import index_of, search
from penchant.interest.top import top_k
from penchant.interest.vectors import Scaling, embed_items, item_vectors
from penchant.interest.words import reading_of
from penchant.journal import Journal
from penchant.live import Event, LiveEvents, checked_items, packed, unpacked
from penchant.lookup import find_user
from penchant.rank import Ranker, zscore
from penchant.run_folder import JOURNAL, Fitted

if TYPE_CHECKING:
    from penchant.engine import Engine

Method = Literal["rank", "retrieve", "generate"]
Items = NDArray[np.int32]
# One item of an answer: its index, its score, the stage that the score is from.
Answer = list[tuple[int, float, str]]
# What was said of items the LLM was asked about: the encoder's score, and the LLM's (nats).
Told = dict[int, tuple[float, float]]


@dataclass(eq=False)
class Served(Fitted):
    """A fitted model that answers. ``items`` and ``item_index`` are the catalogue as served, added items included."""

    def __post_init__(self) -> None:
        # Back to what was fitted: another object may have been made from the same parts, and be served with other
        # additions. Those of this one are replayed below.
        n_items = self.split.log.n_items
        self.encoder = self.encoder.fork(n_items, 0 if self.words is None else len(self.words.vectors))
        self.texts, self.vectors = self.texts[:n_items], self.vectors[:n_items]
        self.prior = None if self.prior is None else self.prior[:n_items]
        additions, self.live = self.live, []
        # A graph that was loaded is taken over; it may grow, so it is nobody else's.
        self.index = self.graph or index_of(self.encoder, self.config.index)
        self.graph = None
        self.scaling = Scaling.fit(self.vectors, self.config.scale)
        self.items = self.split.dataset.items
        self.item_index = dict(self.split.log.item_index)
        self.reading, texts = reading_of(self.split, self.columns)
        self.word_rows = {text: row for row, text in enumerate(texts)}
        self.removed = np.zeros(n_items, dtype=bool)  # of all items served
        self._events = LiveEvents(dict(self.split.dataset.interactions.schema))
        self._behaviours: dict[str, Behaviour] = {}  # of users with events since the fit
        self._journal: Journal | None = None
        self._engine: Engine | None = None
        self._ranker: Ranker | None = None
        self._trie: CatalogTrie | None = None
        for record in additions:
            self._replay(record)

    # -- the engine ----------------------------------------------------------------------------

    def use_engine(self, engine: Engine) -> None:
        """Serve with this engine; ModelError unless it is the model (and adapter) the run was fitted with."""
        if engine.fingerprint != self.fingerprint:
            raise ModelError(
                f"the run was fitted with the model {self.fingerprint}, and this engine is {engine.fingerprint}",
                where="engine",
                remedy="load the same model, adapter and dtype, or fit again",
            )
        check_templates((engine.source or {}).get("adapter"), self.templates)
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

    def _embedder(self) -> Engine:
        """The engine that made the item vectors; ModelError where another one ranks."""
        if self.embedder is not None and self.embedder["fingerprint"] != self.engine.fingerprint:
            raise ModelError(
                "the item vectors are another model's than the one that ranks",
                where="engine",
                remedy="do this with the run that was fitted with that model, and call with_ranker again",
            )
        return self.engine

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
        return search(self.index, self.encoder.encode(histories), k, exclude=masked, allowed=allowed)

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
        allowed = self._served(allowed)
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
                out[i] = found
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

    def answer_wish(
        self, text: str, history: Behaviour, seen: Items, k: int, allowed: NDArray[np.bool_] | None, weight: float
    ) -> Answer:
        """The k best for what a user says they want: ``weight`` on how near an item's text is to the words, the rest on
        the encoder's score, or where there is no history on popularity; each standardised over the catalogue.
        """
        if not text.strip():
            raise DataError("the text is empty", where="text", remedy="say what is wanted, or leave it out")
        if self.config.fields:
            raise ConfigError(
                "the item vectors are of several fields, and a wish is one text",
                where="text",
                remedy="fit without fields, so that items and wishes are embedded alike",
            )
        allowed = self._served(allowed)
        engine, config = self._embedder(), self.config
        layer = config.layer if config.layer is not None else -1
        wish = self.scaling.apply(engine.embed([text.strip()], pooling=config.pooling, layer=layer))[0]
        items = self.scaling.apply(self.vectors)
        norms = np.linalg.norm(items, axis=1) * np.linalg.norm(wish)
        near = zscore(items @ wish / np.maximum(norms, 1e-12))
        if len(history):
            base = zscore(self.encoder.scores(self.encoder.encode([history]), self.index.vectors)[0])
        else:
            base = zscore(np.log1p(self._popularity()))
        scores = ((1 - weight) * base + weight * near)[None]
        if allowed is not None:
            scores[0, ~allowed] = -np.inf
        scores[0, seen] = -np.inf
        found, values = top_k(scores, min(k, len(items)))
        return [(int(i), float(v), schema.STAGE_WISH) for i, v in zip(found[0], values[0], strict=True) if i >= 0]

    def _generate(
        self,
        histories: Sequence[Behaviour],
        seen: Sequence[Items],
        k: int,
        allowed: NDArray[np.bool_] | None,
        calibration: float,
    ) -> list[Answer]:
        masks = []
        for row in seen:
            mask = np.ones(len(self.texts), dtype=bool) if allowed is None else allowed.copy()
            mask[row] = False
            masks.append(mask)
        prompts = [self.ranker.prompt(h.item).prompt for h in histories]
        bonus = -calibration * self.ranker.priors(np.arange(len(self.texts))) if calibration else None
        answers = self.engine.generate(prompts, self.trie, k, allowed=masks, bonus=bonus)
        return [[(g.item, g.score, schema.STAGE_GENERATED) for g in answer] for answer in answers]

    def _popularity(self) -> NDArray[np.float64]:
        """Events of each item that the model was given, (n_items,)."""
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
        queries = self.encoder.encode(known).reshape(-1, self.config.encoder.dim)
        return self.index.recall(queries, min(k, len(self.texts)))

    # -- since the fit -------------------------------------------------------------------------

    def knows(self, user_id: str) -> bool:
        """Whether the model was given this user's events, at the fit or since."""
        return user_id in self._behaviours or user_id in self.log.user_index

    def behaviour(self, user_id: str) -> Behaviour:
        """Everything a user did up to now, oldest first; DataError where the model was given no such user."""
        if user_id in self._behaviours:
            return self._behaviours[user_id]
        return self.reading.of(self.log.all_of(find_user(self.log, user_id)))

    def update(self, user_id: str, events: Sequence[Event] | pl.DataFrame) -> None:
        """Take in new events of a user, known or new: the next answer counts them.

        ``events``: dicts (or a DataFrame) with item_id and, where known, timestamp (datetime or integer microseconds
        UTC; default: now), event_type, rating and whatever other columns the interactions have. They are placed by
        their time. No LLM is asked, unless the encoder reads words and an event has some. Nothing is retrained. In a
        run that was saved or loaded they are on disk when this returns. DataError names the first event that can't be
        used, and then none is taken.
        """
        user_id = str(user_id)
        taken = self._events.checked(events, self.item_index)
        if not taken:
            return
        texts = [event[name] for event in taken for name in self.columns.words if event.get(name)]
        new = [text for text in dict.fromkeys(texts) if text.strip() and text not in self.word_rows]
        record: dict[str, Any] = {"user": user_id, "events": taken}
        if new and self.words is not None:
            layer = self.config.layer if self.config.layer is not None else -1
            raw = item_vectors(self._embedder(), new, layer=layer, pooling=self.config.pooling)
            record["words"] = {"texts": new, "vectors": packed(self.words.scaling.apply(raw))}
        self._keep(record)

    def add_items(self, items: Sequence[Mapping[str, Any]] | pl.DataFrame) -> None:
        """Embed new items and serve them at once, from their text alone: dicts (or a DataFrame) with item_id, title and
        whatever other columns the items have.

        Asks the LLM for their vectors. In a run that was saved or loaded they are on disk when this returns. DataError
        names the first item that can't be used, and then none is taken; ConfigError where the encoder reads no text.
        """
        rows = checked_items(items, self.split.dataset.items, self.item_index)
        if not len(rows):
            return
        if self.encoder.project is None:
            raise ConfigError(
                "the encoder reads IDs alone, so an item it was not trained on has no vector",
                where="add_items",
                remedy="fit with use_text",
            )
        texts = self.templates.item_texts(rows.to_dict(as_series=False), rows[schema.ITEM].to_list()).texts
        vectors = embed_items(self._embedder(), rows, texts, self.config, self.templates.hash("item"))
        self._keep({"items": rows.to_dicts(), "texts": texts, "vectors": packed(np.nan_to_num(vectors))})

    def remove_items(self, item_ids: Sequence[str]) -> None:
        """Never recommend these items again, from now on; histories that hold them are read as before.

        In a run that was saved or loaded that is on disk when this returns. DataError where one is unknown.
        """
        indices(item_ids, self.item_index, "remove_items")
        if len(item_ids):
            self._keep({"removed": [str(name) for name in item_ids]})

    def _served(self, allowed: NDArray[np.bool_] | None) -> NDArray[np.bool_] | None:
        """The filter without removed items."""
        if not self.removed.any():
            return allowed
        return ~self.removed if allowed is None else allowed & ~self.removed

    def attach(self, folder: Path) -> None:
        """From now on updates are written to this run's journal, which holds all there were up to now."""
        if self._journal is not None:
            self._journal.close()
        self._journal = Journal(folder / JOURNAL)

    def _keep(self, record: dict[str, Any]) -> None:
        """First on disk, then in memory: what was answered once is answered again after a crash."""
        if self._journal is not None:
            self._journal.append(record)
        self._replay(record)

    def _replay(self, record: dict[str, Any]) -> None:
        self.live.append(record)
        if "items" in record:
            self._add_items(record)
            return
        if "removed" in record:
            self.removed[[self.item_index[name] for name in record["removed"]]] = True
            return
        user = record["user"]
        if "words" in record:
            first = self.encoder.add_words(unpacked(record["words"]["vectors"]))
            self.word_rows |= {text: first + i for i, text in enumerate(record["words"]["texts"])}
        self._events.add(user, record["events"])
        base = self.split.dataset.interactions
        at = self.log.user_index.get(user)
        part = slice(0, 0) if at is None else self.log.all_of(at)
        events = self._events.of(user, base[part])
        words = None
        if self.columns.words:
            rows = [[self.word_rows.get(text or "", -1) for text in column] for column in self.columns.texts(events)]
            words = np.array(rows, dtype=np.int32).T
        item = np.array([self.item_index[i] for i in events[schema.ITEM]], dtype=np.int32)
        self._behaviours[user] = Behaviour(item, self.columns.codes(events), words)

    def _add_items(self, record: Mapping[str, Any]) -> None:
        rows = pl.DataFrame(record["items"], schema=self.items.schema)
        vectors = unpacked(record["vectors"])
        first = self.encoder.add_items(self.scaling.apply(vectors))
        self.items = pl.concat([self.items, rows])
        self.item_index |= {name: first + i for i, name in enumerate(rows[schema.ITEM])}
        self.texts = [*self.texts, *record["texts"]]
        self.vectors = np.concatenate([self.vectors, vectors])
        self.removed = np.concatenate([self.removed, np.zeros(len(rows), dtype=bool)])
        if self.prior is not None:
            self.prior = np.concatenate([self.prior, np.full(len(rows), np.nan)])
        self.index.add(self.encoder.item_matrix()[first:])
        self._trie = self._ranker = None
