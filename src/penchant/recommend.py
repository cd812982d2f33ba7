"""The front door: fit on a split or a dataset, recommend for users or histories, save and load."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from penchant import metrics, schema
from penchant.adapter_card import check_templates
from penchant.catalog_trie import CatalogTrie
from penchant.data.dataset import Dataset
from penchant.data.history import EventLog, Targets
from penchant.data.split import Split, leave_last_out
from penchant.errors import ConfigError, ModelError
from penchant.filters import indices, item_mask
from penchant.interest.encoder import InterestEncoder
from penchant.interest.index import ExactIndex
from penchant.interest.train import train_encoder
from penchant.interest.vectors import default_layer, item_vectors, standardise
from penchant.lookup import find_title, find_user
from penchant.prompt import Templates
from penchant.rank import Fusion, Ranker, choose_fusion
from penchant.run_folder import FitConfig, Fitted, load_run, save_run

if TYPE_CHECKING:
    from penchant.engine import Engine

Method = Literal["rank", "retrieve", "generate"]
Items = NDArray[np.int32]
# A named stage of work begins: (name, its size in units or None) -> called with the units just done.
Stages = Callable[[str, int | None], Callable[[int], None]]

# Validation users the encoder's early stopping looks at; more would only cost time.
_STOPPING_USERS = 5_000


def silent(name: str, size: int | None) -> Callable[[int], None]:
    """Progress shown to nobody: the default of everything that takes ``stages``."""
    return lambda n: None


@dataclass(eq=False)
class Recommender(Fitted):
    """A fitted recommender. Make one with ``fit`` or ``load``."""

    def __post_init__(self) -> None:
        self.index = ExactIndex(self.encoder.item_matrix())
        self._engine: Engine | None = None
        self._ranker: Ranker | None = None
        self._trie: CatalogTrie | None = None

    # -- fitting -------------------------------------------------------------------------------

    @classmethod
    def fit(
        cls,
        data: Split | Dataset,
        engine: Engine,
        config: FitConfig | None = None,
        *,
        prompts: Path | str | None = None,
        stages: Stages = silent,
        on_epoch: Callable[[int, float, float], None] | None = None,
    ) -> Recommender:
        """Embed the items, train the encoder on train, choose the fusion on valid. Test is never looked at.

        A Dataset is for production: its users' last events are held out for validation and nothing for a
        test. ``prompts`` is a folder whose templates replace the shipped ones of the same name.
        """
        config = config or FitConfig()
        split = data if isinstance(data, Split) else leave_last_out(data, test=False)
        templates = Templates(prompts)
        check_templates((engine.source or {}).get("adapter"), templates)  # now, not when the encoder is trained
        seconds: dict[str, float] = {}

        @contextmanager
        def timed(name: str) -> Iterator[None]:
            begun = time.perf_counter()
            yield
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - begun

        items, log = split.dataset.items, split.log
        rendered = templates.item_texts(items.to_dict(as_series=False), log.item_ids)
        notes = []
        if rendered.truncated:
            notes.append(f"{rendered.truncated} item texts were cut to their first 200 characters")
        layer = default_layer(engine.n_layers) if config.layer is None else config.layer
        with timed("embed items"):
            vectors = item_vectors(
                engine,
                rendered.texts,
                layer=layer,
                pooling=config.pooling,
                template_hash=templates.hash("item"),
                progress=stages("embed items", len(rendered.texts)),
            )
        with timed("train encoder"):
            stopping = split.valid.sample(_STOPPING_USERS, config.seed)
            histories = [stopping.history(i) for i in range(len(stopping))]
            done = stages("train encoder", config.encoder.epochs)

            def validate(encoder: InterestEncoder) -> float:
                done(1)
                return encoder_ndcg(encoder, histories, stopping.item)

            encoder, training = train_encoder(
                training_sequences(split),
                log.n_items,
                standardise(vectors),
                config.encoder,
                validate,
                on_epoch=on_epoch,
            )
        model = cls(
            split=split,
            config=config.model_copy(update={"layer": layer}),
            templates=templates,
            texts=rendered.texts,
            vectors=vectors,
            encoder=encoder,
            engine_source=getattr(engine, "source", None),
            fingerprint=engine.fingerprint,
            seconds=seconds,
            training=training,
            warnings=notes,
        )
        model.use_engine(engine)
        with timed("choose the fusion"):
            model.fusion = model._choose_fusion(split.valid, stages)
        model.prior = model.ranker.prior
        return model

    def _choose_fusion(self, valid: Targets, stages: Stages) -> Fusion:
        sample = valid.sample(self.config.validation_users, self.config.seed)
        # A user without any event before the target has no prompt and no vector: popularity serves those.
        sample = sample.take(np.array([i for i in range(len(sample)) if len(sample.history(i))], dtype=np.int64))
        histories = [sample.history(i) for i in range(len(sample))]
        if not histories:
            return Fusion(0.0, 0.0)
        items, scores = self.retrieve(histories, self.config.candidates)
        kept = [row >= 0 for row in items]
        candidates = [row[k] for row, k in zip(items, kept, strict=True)]
        likelihood = self.ranker.scores(histories, candidates, stages("LLM on validation users", len(histories)))
        self.ranker.priors(np.unique(np.concatenate(candidates)), stages("LLM without history", 1))
        prior = [self.ranker.prior[c] for c in candidates]
        target = [
            int(np.flatnonzero(c == t)[0]) if t in c else -1 for c, t in zip(candidates, sample.item, strict=True)
        ]
        return choose_fusion([row[k] for row, k in zip(scores, kept, strict=True)], likelihood, prior, target)

    def with_ranker(self, engine: Engine, *, stages: Stages = silent) -> Recommender:
        """The same item vectors and encoder, with another engine (such as an adapter) that ranks and generates.

        How much it weighs is chosen on validation again; ``embedder`` keeps which model made the vectors.
        """
        model = replace(
            self,
            engine_source=engine.source,
            fingerprint=engine.fingerprint,
            embedder=self.embedder or {"fingerprint": self.fingerprint, "source": self.engine_source},
            fusion=Fusion(0.0, 0.0),
            prior=None,
            seconds=dict(self.seconds),
        )
        model.use_engine(engine)
        begun = time.perf_counter()
        model.fusion = model._choose_fusion(self.split.valid, stages)
        model.seconds["choose the fusion"] = time.perf_counter() - begun
        model.prior = model.ranker.prior
        return model

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

    # -- stages --------------------------------------------------------------------------------

    @property
    def log(self) -> EventLog:
        return self.split.log

    def retrieve(
        self,
        histories: Sequence[Items],
        k: int,
        *,
        allowed: NDArray[np.bool_] | None = None,
        seen: Sequence[Items] | None = None,
    ) -> tuple[Items, NDArray[np.float32]]:
        """The encoder's top k for each history (not empty): items and scores, (n, k), padded with -1 and -inf.

        k is no more than the catalogue has items. ``seen`` are the items to leave out, by default each history's own.
        """
        interest = self.encoder.encode(histories)
        k = min(k, self.log.n_items)
        return self.index.search(interest, k, exclude=histories if seen is None else seen, allowed=allowed)

    def rank(
        self, histories: Sequence[Items], candidates: Sequence[Items], interest: Sequence[NDArray[np.floating]]
    ) -> list[NDArray[np.float64]]:
        """Fused scores of each user's candidates, whose encoder scores are ``interest``; arrays of the same shapes."""
        if self.fusion.weight == 0:
            # Validation gave the LLM no say: then it is not asked.
            return [self.fusion.scores(e, e, np.zeros(len(e))) for e in interest]
        likelihood = self.ranker.scores(histories, candidates)
        if self.fusion.calibration:
            self.ranker.priors(np.unique(np.concatenate(candidates)))
        return [
            self.fusion.scores(e, lik, np.nan_to_num(self.ranker.prior[c]))
            for e, lik, c in zip(interest, likelihood, candidates, strict=True)
        ]

    # -- recommending --------------------------------------------------------------------------

    def recommend(
        self,
        users: Sequence[str] | None = None,
        k: int = 10,
        *,
        history: Sequence[str] | None = None,
        history_titles: Sequence[str] | None = None,
        method: Method = "rank",
        allow: Sequence[str] | None = None,
        deny: Sequence[str] | None = None,
        where: pl.Expr | None = None,
        include_seen: bool = False,
        calibration: float = 0.0,
        batch: int = 256,
    ) -> pl.DataFrame:
        """The k best items for known users, or for one history of item ids or titles, oldest first.

        Serves from every event the model was given. ``method``: "rank" (the LLM ranks retrieved
        candidates), "retrieve" (the encoder alone), "generate" (the LLM names items of the whole
        catalogue; ``calibration`` is then how much of an item's no-history likelihood is taken out, and
        costs one scoring of all items the first time). ``allow`` and ``deny`` are item ids, ``where`` a polars
        predicate on item columns.

        Columns: user_id (null for a history), item_id, title, score, rank from 1, stage. Scores compare
        within a user and a stage only. Fewer than k rows where the filters leave fewer.
        """
        if k < 1:
            raise ConfigError(f"k is {k}", where="recommend", remedy="ask for at least 1 item")
        if batch < 1:
            raise ConfigError(f"batch is {batch}", where="recommend", remedy="take at least 1 user at a time")
        if method not in ("rank", "retrieve", "generate"):
            raise ConfigError(f"unknown method {method!r}", remedy="use rank, retrieve or generate")
        names, histories = self._who(users, history, history_titles)
        allowed = item_mask(self.split.dataset.items, self.log.item_index, allow=allow, deny=deny, where=where)
        nobody = np.zeros(0, dtype=np.int32)
        rows: list[tuple[str | None, int, float, int, str]] = []
        for start in range(0, len(names), batch):
            part = histories[start : start + batch]
            seen = [nobody if include_seen else h for h in part]
            for name, answer in zip(
                names[start : start + batch], self._answer(part, seen, k, method, allowed, calibration), strict=True
            ):
                rows += [(name, item, score, rank, stage) for rank, (item, score, stage) in enumerate(answer, 1)]
        items = self.split.dataset.items
        at = [row[1] for row in rows]
        return pl.DataFrame(
            {
                schema.USER: pl.Series([r[0] for r in rows], dtype=pl.String),
                schema.ITEM: items[schema.ITEM][at],
                schema.TITLE: items[schema.TITLE][at],
                schema.SCORE: pl.Series([r[2] for r in rows], dtype=pl.Float64),
                schema.RANK: pl.Series([r[3] for r in rows], dtype=pl.Int32),
                schema.STAGE: pl.Series([r[4] for r in rows], dtype=pl.String),
            }
        )

    def _answer(
        self,
        histories: Sequence[Items],
        seen: Sequence[Items],
        k: int,
        method: Method,
        allowed: NDArray[np.bool_] | None,
        calibration: float,
    ) -> list[list[tuple[int, float, str]]]:
        """(item, score, stage) best first for each history; popularity where there is nothing to go on."""
        out: list[list[tuple[int, float, str]]] = [[] for _ in histories]
        warm = [i for i, h in enumerate(histories) if len(h)]
        for i in set(range(len(histories))).difference(warm):
            out[i] = self._popular(k, allowed)
        if not warm:
            return out
        known, masked = [histories[i] for i in warm], [seen[i] for i in warm]
        if method == "generate":
            for i, answer in zip(warm, self._generate(known, masked, k, allowed, calibration), strict=True):
                out[i] = answer
            return out
        n = max(k, self.config.candidates) if method == "rank" else k
        items, scores = self.retrieve(known, n, allowed=allowed, seen=masked)
        found = [(row[row >= 0], s[row >= 0]) for row, s in zip(items, scores, strict=True)]
        for i, (row, s) in zip(warm, found, strict=True):
            out[i] = [(int(a), float(b), schema.STAGE_INTEREST) for a, b in zip(row, s, strict=True)]
        if method == "rank" and self.fusion.weight > 0:
            some = [j for j, (row, _) in enumerate(found) if len(row)]
            if not some:
                return out
            top = self.config.candidates
            candidates = [found[j][0][:top] for j in some]
            fused = self.rank([known[j] for j in some], candidates, [found[j][1][:top] for j in some])
            stage = schema.STAGE_FUSED if self.fusion.weight < 1 else schema.STAGE_LLM
            for j, row, s in zip(some, candidates, fused, strict=True):
                order = np.lexsort((np.arange(len(row)), -s))
                head = [(int(row[o]), float(s[o]), stage) for o in order]
                out[warm[j]] = head + out[warm[j]][len(row) :]
        return [answer[:k] for answer in out]

    def _generate(
        self,
        histories: Sequence[Items],
        seen: Sequence[Items],
        k: int,
        allowed: NDArray[np.bool_] | None,
        calibration: float,
    ) -> list[list[tuple[int, float, str]]]:
        masks = []
        for row in seen:
            mask = np.ones(len(self.texts), dtype=bool) if allowed is None else allowed.copy()
            mask[row] = False
            masks.append(mask)
        prompts = [self.ranker.prompt(h).prompt for h in histories]
        bonus = -calibration * self.ranker.priors(np.arange(len(self.texts))) if calibration else None
        answers = self.engine.generate(prompts, self.trie, k, allowed=masks, bonus=bonus)
        return [[(g.item, g.score, schema.STAGE_GENERATED) for g in answer] for answer in answers]

    def _popular(self, k: int, allowed: NDArray[np.bool_] | None) -> list[tuple[int, float, str]]:
        counts = np.bincount(self.log.item, minlength=self.log.n_items).astype(np.float64)
        if allowed is not None:
            counts[~allowed] = -1
        order = np.lexsort((np.arange(len(counts)), -counts))[:k]
        return [(int(i), float(counts[i]), schema.STAGE_POPULARITY) for i in order if counts[i] >= 0]

    def _who(
        self, users: Sequence[str] | None, history: Sequence[str] | None, titles: Sequence[str] | None
    ) -> tuple[list[str | None], list[Items]]:
        given = [
            name
            for name, value in (("users", users), ("history", history), ("history_titles", titles))
            if value is not None
        ]
        if len(given) != 1:
            raise ConfigError(
                f"give one of users, history and history_titles (given: {', '.join(given) or 'none'})",
                where="recommend",
            )
        if users is not None:
            if isinstance(users, str):
                raise ConfigError("users is one text, not a list of user ids", remedy=f"pass [{users!r}]")
            return [str(u) for u in users], [self.log.item[self.log.all_of(self.user(u))] for u in users]
        if history is not None:
            return [None], [indices(history, self.log.item_index, "history")]
        if isinstance(titles, str):
            raise ConfigError("history_titles is one text, not a list of titles", remedy=f"pass [{titles!r}]")
        items = self.split.dataset.items
        return [None], [np.array([find_title(items, t) for t in titles or ()], dtype=np.int32)]

    def user(self, user_id: str) -> int:
        """Index of a user; DataError where the model was given no such user."""
        return find_user(self.log, str(user_id))

    # -- saving --------------------------------------------------------------------------------

    def save(self, folder: Path | str) -> None:
        """Write the run: everything but the LLM itself, which is named and identified by its hash."""
        save_run(self, Path(folder))

    @classmethod
    def load(cls, folder: Path | str, engine: Engine | None = None) -> Recommender:
        """Open a saved run. The LLM is loaded when it is first needed, or is ``engine``."""
        model = cls(**vars(load_run(Path(folder))))
        if engine is not None:
            model.use_engine(engine)
        return model


def training_sequences(split: Split) -> list[Items]:
    """Each user's training events as item indices, oldest first; users without any are left out."""
    log = split.log
    sequences = (log.item[log.all_of(u)][split.train[log.all_of(u)]] for u in range(log.n_users))
    return [s for s in sequences if len(s)]


def encoder_ndcg(encoder: InterestEncoder, histories: Sequence[Items], target: NDArray[np.integer]) -> float:
    """Mean NDCG@10 over all items, seen ones masked; users without a history count 0."""
    warm = [i for i, h in enumerate(histories) if len(h)]
    if not warm:
        return 0.0
    known = [histories[i] for i in warm]
    items, _ = ExactIndex(encoder.item_matrix()).search(encoder.encode(known), 10, exclude=known)
    rank = metrics.list_rank(items, target[warm])
    return float(metrics.ndcg(rank, 10).sum() / len(histories))
