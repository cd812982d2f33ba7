"""A prepared shard to the rows it makes: recommendations, scores of pairs, or vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from penchant import schema
from penchant.batch.options import BatchOptions
from penchant.batch.quarantine import Bad, Reason
from penchant.batch.rows import Prepared, batches
from penchant.errors import ConfigError, DataError, NotFiniteError
from penchant.filters import item_mask, parse_condition
from penchant.interest.behaviour import Behaviour
from penchant.interest.search import score_some
from penchant.recommend import Recommender
from penchant.rerank import Rules
from penchant.serving import Answer, Method, Told

ROW, INTEREST, LLM, FUSED, VECTOR, MODEL = "row", "interest", "llm", "fused", "vector", "model"
# What one input row makes: of each of the job's columns its values, all of one length. Items are their indices, and a
# number that is not there is NaN.
Lines = tuple[Sequence[Any] | NDArray[Any], ...]


@dataclass(eq=False)
class Answered:
    """A shard's results: ``frame`` in the order of the input, what was quarantined, and what it took.

    ``asked`` are the tokens of all prompts and candidates, had each candidate its own prompt; ``run`` those that went
    through the model, where the engine counts them.
    """

    shard: int
    n_rows: int
    frame: pl.DataFrame
    bad: list[Bad] = field(default_factory=list)
    cut: int = 0
    unknown: int = 0
    asked: int = 0
    run: int = 0


class Answerer:
    """Answers prepared shards with one model, for one job."""

    def __init__(self, model: Recommender, options: BatchOptions, model_hash: str) -> None:
        self._model = model
        self._options = options
        self._hash = model_hash
        self._asked = 0
        asks = options.asks_llm and (options.job == "score" or options.method == "generate" or model.fusion.weight > 0)
        # Loaded now: later it would be by whichever thread comes first, or by both.
        self._engine = model.engine if asks else None
        conditions = [parse_condition(text) for text in options.where]
        self._allowed = item_mask(
            model.items,
            model.item_index,
            allow=options.allow,
            deny=options.deny,
            where=pl.all_horizontal(conditions) if conditions else None,
        )
        self._rules = Rules.of(
            model.items, diversity=options.diversity, caps=options.caps, unique=options.unique_titles
        )
        self._names = model.items[schema.ITEM]
        jobs: dict[str, tuple[Callable[[Prepared, Sequence[int]], list[Lines | None]], list[str]]] = {
            "recommend": (
                self._recommend,
                [schema.ITEM, schema.RANK, schema.SCORE, schema.STAGE, INTEREST, LLM, FUSED],
            ),
            "score": (self._score, [schema.ITEM, schema.SCORE, INTEREST, LLM]),
            "embed-users": (self._embed_users, [INTEREST, VECTOR]),
            "embed-items": (self._embed_items, [schema.ITEM, VECTOR]),
        }
        self._ask, self._columns = jobs[options.job]
        if options.job == "score" and options.method == "rank" and model.config.question == "choose":
            raise ConfigError(
                "the run's LLM chooses among candidates, and a pair is one",
                where="pairs",
                remedy="score with method retrieve, or fit with question likelihood or yes_no",
            )

    def __call__(self, prepared: Prepared, progress: Callable[[int], None]) -> Answered:
        """``progress`` is called with the rows just answered. What is no fault of a row goes through."""
        before = getattr(self._engine, "tokens_run", 0)
        out = Answered(prepared.shard, prepared.n_rows, pl.DataFrame(), list(prepared.bad))
        out.cut, out.unknown = prepared.cut, prepared.unknown
        self._asked = 0
        lines: list[Lines | None] = [None for _ in prepared.rows]
        for places in batches(prepared, self._options.batch):
            for place, found in zip(places, self._one_by_one(prepared, places, out.bad), strict=True):
                lines[place] = found
            progress(len(places))
        out.asked, out.run = self._asked, getattr(self._engine, "tokens_run", 0) - before
        out.frame = self._frame(prepared, lines)
        return out

    def _one_by_one(self, prepared: Prepared, places: Sequence[int], bad: list[Bad]) -> list[Lines | None]:
        """The lines of each row, None where it has none; where a batch fails for some row, each row is asked alone."""
        try:
            found = self._ask(prepared, places)
        except (DataError, NotFiniteError) as error:
            if len(places) > 1:
                return [self._one_by_one(prepared, [place], bad)[0] for place in places]
            finite = not isinstance(error, NotFiniteError) and self._finite(prepared.histories[places[0]])
            reason: Reason = "refused" if finite else "not_a_number"
            bad.append(self._bad(prepared, places[0], reason, error.what))
            return [None]
        if self._options.job == "recommend":
            for place, lines in zip(places, found, strict=True):
                if lines is None:
                    bad.append(self._bad(prepared, place, "nothing_left"))
        return found

    def _bad(self, prepared: Prepared, place: int, reason: Reason, detail: str = "") -> Bad:
        item = prepared.items[place]
        name = None if item < 0 else self._names[item]
        return Bad(prepared.rows[place], prepared.users[place], name, reason, detail)

    # -- the jobs ------------------------------------------------------------------------------

    def _recommend(self, prepared: Prepared, places: Sequence[int]) -> list[Lines | None]:
        histories = [prepared.histories[place] for place in places]
        nobody = np.zeros(0, dtype=np.int32)
        seen = [nobody if self._options.include_seen else history.item for history in histories]
        out = self._of_index(histories, seen)
        rest = [i for i, found in enumerate(out) if found is None]
        asked = self._of_stages([histories[i] for i in rest], [seen[i] for i in rest])
        for i, (found, told) in zip(rest, asked, strict=True):
            out[i] = found
            if self._options.method == "rank":
                self._count(prepared.tokens[places[i]], told)
        return out

    def _of_index(self, histories: Sequence[Behaviour], seen: Sequence[NDArray[np.int32]]) -> list[Lines | None]:
        """Whole lists as the index gives them, a million of which should cost little beside the search; None where
        that isn't the list: the LLM is asked, or a rule takes something out, or there are too few, or no history.
        """
        model, options = self._model, self._options
        out: list[Lines | None] = [None] * len(histories)
        warm = [i for i, history in enumerate(histories) if len(history)]
        plain = options.method == "retrieve" and self._rules.keeps_order and options.k <= len(model.texts)
        if not plain or not warm:
            return out
        items, scores = model.retrieve(
            [histories[i] for i in warm],
            options.k,
            allowed=model.served(self._allowed),
            seen=[seen[i] for i in warm],
        )
        ranks, stages = np.arange(1, options.k + 1), [schema.STAGE_INTEREST] * options.k
        none = np.full(options.k, np.nan)
        whole = (items[:, -1] >= 0) & ~self._rules.repeats(items)
        for j in np.flatnonzero(whole).tolist():
            out[warm[j]] = (items[j], ranks, scores[j], stages, scores[j], none, none)
        return out

    def _of_stages(
        self, histories: Sequence[Behaviour], seen: Sequence[NDArray[np.int32]]
    ) -> list[tuple[Lines | None, list[int]]]:
        """Lists by all stages and rules, and the items that the LLM was asked about."""
        model, options = self._model, self._options
        told: dict[int, Told] = {}

        def ask(some: Sequence[int], size: int, method: Method) -> list[Answer]:
            heard: dict[int, Told] = {}
            mine, gone = [histories[i] for i in some], [seen[i] for i in some]
            answers = model.answer(mine, gone, size, method, self._allowed, options.calibration, heard)
            for place, i in enumerate(some):  # one alone is asked again where the rules took too many
                told[i] = told.get(i, {}) | heard.get(place, {})
            return answers

        if not histories:
            return []
        lists = model.fill(ask, len(histories), options.k, options.method, self._rules)
        return [(self._lines(chosen, told[i]), list(told[i])) for i, chosen in enumerate(lists)]

    def _lines(self, chosen: Answer, told: Told) -> Lines | None:
        rows = []
        for rank, (item, score, stage) in enumerate(chosen, 1):
            interest, llm = told.get(item, (None, np.nan))
            fused = score if item in told and stage != schema.STAGE_GENERATED else np.nan
            if stage == schema.STAGE_INTEREST:
                interest, llm, fused = score, np.nan, np.nan
            rows.append((item, rank, score, stage, np.nan if interest is None else interest, llm, fused))
        return tuple(zip(*rows, strict=True)) if rows else None

    def _score(self, prepared: Prepared, places: Sequence[int]) -> list[Lines | None]:
        """A pair's score is of the pair alone: the encoder's, or the LLM's with its share without history taken out."""
        model = self._model
        groups: list[list[int]] = []  # pairs of one user, whose history is asked about once
        for i, place in enumerate(places):
            user = prepared.users[place]
            same = user and groups and prepared.users[places[groups[-1][-1]]] == user
            same = same and np.array_equal(
                prepared.histories[place].item, prepared.histories[places[groups[-1][-1]]].item
            )
            if same:
                groups[-1].append(i)
            else:
                groups.append([i])
        histories = [prepared.histories[places[group[0]]] for group in groups]
        items = [np.array([prepared.items[places[i]] for i in group], dtype=np.int32) for group in groups]
        interest = score_some(model.encoder, model.index.vectors, histories, items)
        llm: list[NDArray[np.float64]] | None = None
        scores = [row.astype(np.float64) for row in interest]
        if self._options.method == "rank":
            llm = model.ranker.scores([history.item for history in histories], items)
            scores = llm
            if model.fusion.calibration:
                scores = [
                    said - model.fusion.calibration * model.ranker.priors(row)
                    for said, row in zip(llm, items, strict=True)
                ]
        out: list[Lines | None] = [None for _ in places]
        for g, group in enumerate(groups):
            if llm is not None:
                self._count(prepared.tokens[places[group[0]]], items[g])
            if not np.isfinite(scores[g]).all() or not np.isfinite(interest[g]).all():
                raise NotFiniteError("a score is not a number", where="score")
            for j, i in enumerate(group):
                said = np.nan if llm is None else llm[g][j]
                out[i] = ([items[g][j]], [scores[g][j]], [interest[g][j]], [said])
        return out

    def _embed_users(self, prepared: Prepared, places: Sequence[int]) -> list[Lines | None]:
        vectors = self._model.encoder.encode([prepared.histories[place] for place in places])
        if not np.isfinite(vectors).all():
            raise NotFiniteError("the vector is not finite", where="embed")
        several = vectors if vectors.ndim == 3 else vectors[:, None]
        return [(np.arange(len(row)), row) for row in several]

    def _embed_items(self, prepared: Prepared, places: Sequence[int]) -> list[Lines | None]:
        items = [prepared.items[place] for place in places]
        vectors = self._model.index.vectors[items]
        if not np.isfinite(vectors).all():
            raise NotFiniteError("the vector is not finite", where="embed")
        return [([item], row[None]) for item, row in zip(items, vectors, strict=True)]

    # -- small parts ---------------------------------------------------------------------------

    def _finite(self, history: Behaviour) -> bool:
        """Whether the encoder's own answer is a number: an index refuses what isn't as any other error."""
        return not len(history) or bool(np.isfinite(self._model.encoder.encode([history])).all())

    def _count(self, prompt: int, items: Sequence[int] | NDArray[np.integer]) -> None:
        """Tokens of one sequence an item, where a prompt was made."""
        if prompt:
            self._asked += prompt * len(items) + sum(map(len, self._model.ranker.tokens(items)))

    def _frame(self, prepared: Prepared, lines: Sequence[Lines | None]) -> pl.DataFrame:
        """All lines in the order of the input, as the job's columns."""
        there = [found for found in lines if found is not None]
        count = [0 if found is None else len(found[0]) for found in lines]
        columns: dict[str, pl.Series] = {ROW: pl.Series(np.repeat(np.array(prepared.rows, dtype=np.int64), count))}
        if self._options.job != "embed-items":
            row = np.repeat(np.arange(len(count)), count)
            columns[schema.USER] = pl.Series(prepared.users, dtype=pl.String).gather(row)
        for at, name in enumerate(self._columns):
            columns[name] = self._column(name, [found[at] for found in there])
        return pl.DataFrame(columns).with_columns(pl.lit(self._hash, dtype=pl.String).alias(MODEL))

    def _column(self, name: str, parts: Sequence[Sequence[Any] | NDArray[Any]]) -> pl.Series:
        if name == schema.STAGE:
            return pl.Series(list(chain.from_iterable(parts)), dtype=pl.String)
        if name == VECTOR:
            width = self._model.encoder.width
            flat = np.concatenate([np.zeros((0, width), dtype=np.float32), *parts])
            return pl.Series(flat, dtype=pl.Array(pl.Float32, width))
        whole = name in (schema.ITEM, schema.RANK) or self._options.job == "embed-users"  # an interest's number there
        kind = np.int32 if whole else np.float64
        column = pl.Series(np.concatenate([np.zeros(0, dtype=kind), *parts], dtype=kind))
        if name == schema.ITEM:
            return self._names.gather(column)
        return column if whole else column.fill_nan(None)
