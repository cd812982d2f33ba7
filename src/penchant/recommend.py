"""The front door: fit on a split or a dataset, recommend for users or histories, save and load."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
from numpy.typing import NDArray

from penchant import schema
from penchant.adapter_card import check_likes, check_templates, trained_part
from penchant.data.dataset import Dataset
from penchant.data.split import Split, leave_last_out
from penchant.errors import ConfigError, DataError
from penchant.filters import indices, item_mask
from penchant.fusion import Fusion, choose_fusion
from penchant.interest.behaviour import Behaviour
from penchant.interest.fit import fit_encoder
from penchant.interest.hnsw import HNSWIndex
from penchant.interest.search import search
from penchant.interest.vectors import Scaling, default_layer, embed_items, item_vectors
from penchant.interest.words import read_events
from penchant.lookup import find_title, find_user
from penchant.prompt import Templates
from penchant.rank import yes_no_labels
from penchant.rerank import Rules
from penchant.run_folder import FitConfig, load_run, save_run
from penchant.serving import Answer, Items, Method
from penchant.updating import Updated
from penchant.weigh import weighed_on

if TYPE_CHECKING:
    from penchant.engine import Engine

# A named stage of work begins: (name, its size in units or None) -> called with the units just done.
Stages = Callable[[str, int | None], Callable[[int], None]]


def silent(name: str, size: int | None) -> Callable[[int], None]:
    """Progress shown to nobody: the default of everything that takes ``stages``."""
    return lambda n: None


@dataclass(eq=False)
class Recommender(Updated):
    """A fitted recommender. Make one with ``fit`` or ``load``."""

    # -- fitting -------------------------------------------------------------------------------

    @classmethod
    def fit(
        cls,
        data: Split | Dataset,
        engine: Engine,
        config: FitConfig | None = None,
        *,
        ranker: Engine | None = None,
        prompts: Path | str | None = None,
        stages: Stages = silent,
        on_epoch: Callable[[int, float, float], None] | None = None,
    ) -> Recommender:
        """Embed the items, train the encoder on train, choose the fusion on valid. Test is never looked at.

        A Dataset is for production: its users' last events are held out for validation and nothing for a
        test. ``ranker`` is another engine, such as an adapter on the same model, that ranks and generates;
        ``engine`` then makes the vectors alone. ``prompts`` is a folder whose templates replace the shipped ones
        of the same name.
        """
        config = config or FitConfig()
        split = data if isinstance(data, Split) else leave_last_out(data, test=False)
        templates = Templates(prompts)
        ranks = engine if ranker is None else ranker
        for one in (engine, ranks):
            check_templates(trained_part(one.source), templates)  # now, not when the encoder is trained
        if config.question == "yes_no":
            check_likes(trained_part(ranks.source))
            yes_no_labels(templates)
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
        config = config.model_copy(update={"layer": layer, "encoder": config.encoder.resolved()})
        with timed("embed items"):
            done = stages("embed items", len(items) * max(1, len(config.fields)))
            vectors = embed_items(engine, items, rendered.texts, config, templates.hash("item"), done)

        def embed_words(texts: Sequence[str]) -> NDArray[np.float32]:
            done = stages("embed the users' words", len(texts))
            return item_vectors(engine, texts, layer=layer, pooling=config.pooling, progress=done)

        with timed("embed the users' words"):
            columns, reading, words = read_events(split, config.encoder, embed_words)
        if words is None:
            del seconds["embed the users' words"]
        with timed("train encoder"):
            done = stages("train encoder", config.encoder.epochs)

            def told(epoch: int, loss: float, score: float) -> None:
                done(1)
                if on_epoch is not None:
                    on_epoch(epoch, loss, score)

            text = Scaling.fit(vectors, config.scale).apply(vectors) if config.encoder.use_text else None
            encoder, training = fit_encoder(
                split, text, config.encoder, columns, reading, words, seed=config.seed, on_epoch=told
            )
        model = cls(
            split=split,
            config=config,
            templates=templates,
            texts=rendered.texts,
            vectors=vectors,
            encoder=encoder,
            engine_source=ranks.source,
            fingerprint=ranks.fingerprint,
            embedder=None if ranker is None else {"fingerprint": engine.fingerprint, "source": engine.source},
            columns=columns,
            words=words,
            seconds=seconds,
            training=training,
            warnings=notes,
        )
        model.use_engine(ranks)
        if ranker is not None:
            model.use_embedder(engine)
        with timed("choose the fusion"):
            model.fusion = model._choose_fusion(stages)
        model.prior = model.ranker.prior
        return model

    def _choose_fusion(self, stages: Stages) -> Fusion:
        on = weighed_on(self)
        if not len(on.found):
            return Fusion(0.0, 0.0, 0.0, 0.0, len(on.place))
        histories = [on.targets.history(i) for i in on.found.tolist()]
        candidates = [on.candidates[i] for i in on.found.tolist()]
        said = self.ranker.scores(histories, candidates, stages("LLM on validation users", len(histories)))
        self.ranker.priors(np.unique(np.concatenate(candidates)), stages("LLM without history", 1))
        likelihood = [np.zeros(0) for _ in on.place]
        prior = list(likelihood)
        for i, row, scores in zip(on.found.tolist(), candidates, said, strict=True):
            likelihood[i], prior[i] = scores, self.ranker.prior[row]
        return choose_fusion(on.interest, likelihood, prior, on.place.tolist())

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
        if self._other is not None:
            model.use_embedder(self._other)
        begun = time.perf_counter()
        model.fusion = model._choose_fusion(stages)
        model.seconds["choose the fusion"] = time.perf_counter() - begun
        model.prior = model.ranker.prior
        return model

    # -- recommending --------------------------------------------------------------------------

    def recommend(
        self,
        users: Sequence[str] | None = None,
        k: int = 10,
        *,
        history: Sequence[str] | None = None,
        history_titles: Sequence[str] | None = None,
        text: str | None = None,
        text_weight: float = 0.5,
        method: Method = "rank",
        allow: Sequence[str] | None = None,
        deny: Sequence[str] | None = None,
        where: pl.Expr | None = None,
        include_seen: bool = False,
        calibration: float = 0.0,
        diversity: float = 0.0,
        caps: Mapping[str, int] | None = None,
        unique_titles: bool = True,
        batch: int = 256,
    ) -> pl.DataFrame:
        """The k best items for known users, for one history of item ids or titles, oldest first, or for a wish.

        Serves from every event the model was given. ``method``: "rank" (the LLM ranks retrieved
        candidates), "retrieve" (the encoder alone), "generate" (the LLM names items of the whole
        catalogue; ``calibration`` is then how much of an item's no-history likelihood is taken out, and
        costs one scoring of all items the first time). ``allow`` and ``deny`` are item ids, ``where`` a polars
        predicate on item columns.

        ``text`` is what a user says they want: items whose text is near to it, blended with the user's interest, or
        with popularity where there is no history; ``text_weight`` (0 to 1) is the words' share. An embedding hears what
        is named, not what is denied: use ``where`` for what must not come. The LLM is asked for the words' vector, and
        ``method`` plays no part.

        ``diversity`` (0 to 1) trades relevance for variety (maximal marginal relevance over the items' LLM vectors),
        ``caps`` says for item columns how many items of one value a list may hold, and a title comes once unless
        ``unique_titles`` is False. What they take out of a list is filled up from behind it.

        Columns: user_id (null for a history), item_id, title, score, rank from 1, stage. Scores compare
        within a user and a stage only. Fewer than k rows where the filters leave fewer.
        """
        if k < 1:
            raise ConfigError(f"k is {k}", where="recommend", remedy="ask for at least 1 item")
        if batch < 1:
            raise ConfigError(f"batch is {batch}", where="recommend", remedy="take at least 1 user at a time")
        if method not in ("rank", "retrieve", "generate"):
            raise ConfigError(f"unknown method {method!r}", remedy="use rank, retrieve or generate")
        if not 0 <= text_weight <= 1:
            raise ConfigError(f"text_weight is {text_weight}", where="recommend", remedy="give 0 to 1")
        names, histories = self._who(users, history, history_titles, wished=text is not None)
        allowed = item_mask(self.items, self.item_index, allow=allow, deny=deny, where=where)
        near = None if text is None else self.nearness(text)
        rules = Rules.of(self.items, diversity=diversity, caps=caps, unique=unique_titles)
        nobody = np.zeros(0, dtype=np.int32)
        rows: list[tuple[str | None, int, float, int, str]] = []
        for start in range(0, len(names), batch):
            part = histories[start : start + batch]
            seen = [nobody if include_seen else h.item for h in part]

            def ask(
                some: Sequence[int], n: int, how: Method, part: list[Behaviour] = part, seen: list[Items] = seen
            ) -> list[Answer]:
                mine, gone = [part[i] for i in some], [seen[i] for i in some]
                if near is None:
                    return self.answer(mine, gone, n, how, allowed, calibration)
                return [self.answer_wish(near, h, s, n, allowed, text_weight) for h, s in zip(mine, gone, strict=True)]

            found = self.fill(ask, len(part), k, method, rules)
            for name, chosen in zip(names[start : start + batch], found, strict=True):
                rows += [(name, item, score, rank, stage) for rank, (item, score, stage) in enumerate(chosen, 1)]
        at = [row[1] for row in rows]
        return pl.DataFrame(
            {
                schema.USER: pl.Series([r[0] for r in rows], dtype=pl.String),
                schema.ITEM: self.items[schema.ITEM][at],
                schema.TITLE: self.items[schema.TITLE][at],
                schema.SCORE: pl.Series([r[2] for r in rows], dtype=pl.Float64),
                schema.RANK: pl.Series([r[3] for r in rows], dtype=pl.Int32),
                schema.STAGE: pl.Series([r[4] for r in rows], dtype=pl.String),
            }
        )

    def fill(
        self,
        ask: Callable[[Sequence[int], int, Method], list[Answer]],
        n: int,
        k: int,
        method: Method,
        rules: Rules,
    ) -> list[Answer]:
        """Lists of k as the rules want them, for n histories: ``ask(places, size, method)`` gives answers of that size
        to those of them at ``places``.
        """
        # What rank scores anyway is there to choose from.
        pool = max(rules.pool(k), self.config.candidates if method == "rank" else 0)
        out = []
        for i, first in enumerate(ask(range(n), pool, method)):
            answer, asked = first, pool
            chosen = self._choose(answer, rules, k)
            while len(chosen) < k and len(answer) >= asked:  # the rules took too many, and there are more
                asked *= 2
                # Behind what the LLM ranked comes the encoder's order: the LLM need not be asked again.
                (more,) = ask([i], asked, "retrieve" if method == "rank" else method)
                known = {item for item, _, _ in answer}
                answer = answer + [one for one in more if one[0] not in known]
                chosen = self._choose(answer, rules, k)
            out.append(chosen)
        return out

    def _choose(self, answer: Answer, rules: Rules, k: int) -> Answer:
        """The k of an answer that the rules leave, in their order."""
        items = [item for item, _, _ in answer]
        vectors = self.scaling.apply(self.vectors[items]) if rules.diversity else None
        return [answer[place] for place in rules.choose(items, vectors, k)]

    def interests(
        self, user: str | None = None, n: int = 5, *, history: Sequence[str] | None = None
    ) -> tuple[NDArray[np.float32], pl.DataFrame]:
        """A user's interest vectors (K, width), and what they are about: the n items nearest to each.

        Columns of the frame: interest (from 0), item_id, title, score; items of the history are among them, for they
        say best what an interest is. Neighbours have no part in vectors.
        """
        _, (behaviour,) = self._who(None if user is None else [user], history, None)
        if not len(behaviour):
            raise DataError("the history is empty", where="interests", remedy="give a user, or a history, with events")
        vectors = self.encoder.encode([behaviour]).reshape(-1, self.encoder.width)
        items, scores = search(self.index, vectors, min(n, len(self.items)))
        flat = items.ravel().tolist()
        frame = pl.DataFrame(
            {
                "interest": np.repeat(np.arange(len(vectors), dtype=np.int32), items.shape[1]),
                schema.ITEM: self.items[schema.ITEM][flat],
                schema.TITLE: self.items[schema.TITLE][flat],
                schema.SCORE: scores.ravel().astype(np.float64),
            }
        )
        return vectors, frame

    def _who(
        self,
        users: Sequence[str] | None,
        history: Sequence[str] | None,
        titles: Sequence[str] | None,
        *,
        wished: bool = False,
    ) -> tuple[list[str | None], list[Behaviour]]:
        given = [
            name
            for name, value in (("users", users), ("history", history), ("history_titles", titles))
            if value is not None
        ]
        if not given and wished:
            return [None], [Behaviour(np.zeros(0, dtype=np.int32))]
        if len(given) != 1:
            raise ConfigError(
                f"give one of users, history and history_titles (given: {', '.join(given) or 'none'})",
                where="recommend",
                remedy="or text alone, for somebody of whom nothing is known" if not given else "drop the others",
            )
        if users is not None:
            if isinstance(users, str):
                raise ConfigError("users is one text, not a list of user ids", remedy=f"pass [{users!r}]")
            names: list[str | None] = [str(u) for u in users]
            return names, [self.behaviour(str(name)) for name in names]
        if history is not None:
            return [None], [Behaviour(indices(history, self.item_index, "history"))]
        if isinstance(titles, str):
            raise ConfigError("history_titles is one text, not a list of titles", remedy=f"pass [{titles!r}]")
        return [None], [Behaviour(np.array([find_title(self.items, t) for t in titles or ()], dtype=np.int32))]

    def user(self, user_id: str) -> int:
        """Index of a user in the log of the fit; DataError where there is no such user."""
        return find_user(self.log, str(user_id))

    # -- saving --------------------------------------------------------------------------------

    def save(self, folder: Path | str) -> None:
        """Write the run: everything but the LLM itself, which is named and identified by its hash."""
        graph = self.index if isinstance(self.index, HNSWIndex) else None
        self.run = save_run(self, Path(folder), graph)
        self.attach(Path(folder))

    @classmethod
    def load(cls, folder: Path | str, engine: Engine | None = None, embedder: Engine | None = None) -> Recommender:
        """Open a saved run. The LLM is loaded when it is first needed, or is ``engine``; see ``use_embedder``."""
        model = cls(**vars(load_run(Path(folder))))
        model.attach(Path(folder))
        if engine is not None:
            model.use_engine(engine)
        if embedder is not None:
            model.use_embedder(embedder)
        return model
