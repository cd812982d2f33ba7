"""A whole task: every baseline, our encoder's variants and the full model on the same targets, with several seeds.

Each finished system is stored at once and not made again, unless the task, the data, the version or the model
changed; an encoder, ours or SASRec, serves every task that differs only in whom it asks for what. Every system has
the same budget for tuning on validation, ours too (of configurations where training takes minutes, else of seconds);
it is spent with the first seed, and the other seeds train what it chose.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from penchant import __version__
from penchant.adapter_card import described
from penchant.data.provenance import LeakCheck
from penchant.environment import environment
from penchant.errors import ConfigError
from penchant.evaluation.baselines import (
    DEAR,
    NAMES,
    FittedSystem,
    Grids,
    Name,
    fit_baselines,
    popularities_that_flatter,
    trial_rows,
)
from penchant.evaluation.baselines.sasrec import SASRec
from penchant.evaluation.encoders import (
    IDS,
    SASREC,
    VARIANTS,
    Trained,
    encoder_grid,
    fit_variant,
    load_encoder,
    ranking,
)
from penchant.evaluation.evaluate import tabulate
from penchant.evaluation.kept_scores import KeptScores
from penchant.evaluation.leaks import check_model
from penchant.evaluation.over_seeds import over_seeds
from penchant.evaluation.prepared import Prepared
from penchant.evaluation.protocol import Protocol
from penchant.evaluation.report import Report
from penchant.evaluation.rows import Table
from penchant.evaluation.spread import spread
from penchant.evaluation.store import Finished, Store, TrainedStore, key_of, made_of, origin, seconds_of
from penchant.evaluation.systems import System
from penchant.evaluation.tasks import Task
from penchant.interest.config import EncoderConfig
from penchant.recommend import Recommender, Stages, silent

if TYPE_CHECKING:
    from penchant.engine import Engine

# FULL is the LLM behind the variant with both, text and IDs.
# What is made where a task doesn't say.
_OURS = ("encoder: text", "encoder: ids + text")
BOTH = "encoder: ids + text"
FULL = "full"
# What ours is always set against, the best baseline or not: what text adds to IDs, and what training adds to text.
_PLAIN = (
    *("SASRec (cross entropy)", "neighbours by nearness", IDS),
    *("newest titles (BM25)", "newest items (LLM vectors)"),
)
# The group of a row that shows what a known mistake is worth.
MISTAKE = "a known mistake, made on purpose to show its size"
# The same whatever the seed: made once.
_DETERMINISTIC = {"popularity", "recent", "bm25", "nearest", "item_knn", "neighbours", "ease"}
_NEED_VECTORS = {"nearest", *VARIANTS, FULL}
# Encoders, which take most of the time: what was trained is kept apart from its ranking.
_TRAINED = {SASREC, *VARIANTS}
# The untuned LLM is the full model's own first row, unless it has an adapter.
SYSTEMS: tuple[str, ...] = (*(name for name in NAMES if name != "llm"), *VARIANTS, FULL)


@dataclass(eq=False)
class Comparison(Prepared):
    """One task being run into ``folder``. ``load`` brings the LLM, when it is first needed, and ``load_ranker`` one
    that ranks in its place, such as an adapter: the vectors stay the LLM's.

    ``systems`` are some of SYSTEMS; without them the task's baselines, our variants and the full model. ``stamp`` (the
    commit, say) goes into the result as it is, and into the record of each system made now: another run may have made
    the others. Without ``train`` what no earlier run has fitted is left out, and named. ``origins`` takes up, by system
    and seed, when and where each was made; ``ranks``, by the system's name in the tables and by seed, how each ranked
    the targets.
    """

    name: str
    task: Task
    folder: Path
    load: Callable[[], Engine]
    data_dir: Path | None = None
    systems: Sequence[str] = ()
    load_ranker: Callable[[], Engine] | None = None
    stages: Stages = silent
    say: Callable[[str], None] = lambda line: None
    stamp: Mapping[str, Any] = field(default_factory=dict)
    train: bool = True
    left_out: list[str] = field(default_factory=list)
    origins: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)
    ranks: dict[str, dict[int, NDArray[np.int64]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        baselines = self.task.baselines or [name for name in NAMES if name != "llm"]
        self.systems = self.systems or [*baselines, *(self.task.ours or _OURS), FULL]
        if FULL in self.systems and BOTH not in self.systems:
            self.systems = [*self.systems, BOTH]
        unknown = [name for name in self.systems if name not in SYSTEMS]
        if unknown:
            raise ConfigError(
                f"unknown system {unknown[0]!r}", where="benchmark", remedy=f"use some of {', '.join(SYSTEMS)}"
            )
        if self.task.fit.encoder.value_column is not None:
            raise ConfigError(
                f"the encoder learns {self.task.fit.encoder.value_column}s, and a task compares rankings",
                where=f"{self.name}, fit.encoder.loss",
                remedy="give a loss that learns what was taken (auto, softmax, sampled, or bce without a value)",
            )
        self.store = Store(self.folder / self.name)
        self.trained = TrainedStore(self.folder / "encoders")
        self.begun = time.perf_counter()

    @cached_property
    def ranker(self) -> Engine:
        """The LLM that ranks behind the encoder. What it scored for one seed, or before a run was cut off, is kept."""
        engine = self.engine if self.load_ranker is None else self.load_ranker()
        return cast("Engine", KeptScores(engine, self.folder / "llm-scores.sqlite"))

    def key(self, name: str, seed: int, **more: Any) -> str:
        """Of all that decides this system's result."""
        return self._key(self.task.hash, name, seed, candidates=self.asked.source, **more)

    def _key(self, task: str, name: str, seed: int, **more: Any) -> str:
        model = self.engine.fingerprint if name in _NEED_VECTORS else None
        text = self.templates.hash() if name in {*_NEED_VECTORS, "bm25"} else None
        parts = {"task": task, "data": self.split.dataset.content_hash, "version": __version__}
        if name in NAMES and name not in DEAR:
            more["grid"] = [config.model_dump(mode="json") for config in getattr(Grids(), name, ())]
        return key_of(**parts, system=name, seed=seed, model=model, templates=text, **more)

    # -- one system --------------------------------------------------------------------------------

    def finished(self, name: str, seed: int) -> Finished | None:
        """The system's result: stored, or made now and stored; None where the task's time is up."""
        first, wanted = self.task.seeds[0], seed
        seed = first if name in _DETERMINISTIC else seed
        tuned = None if seed == first else self.finished(name, first)
        if seed != first and tuned is None:
            return None
        chosen = None if tuned is None else tuned.record["fit"]["chosen"]["config"]
        key = self.key(name, seed, chosen=chosen)
        found = self.store.load(name, seed, key)
        if found is not None and (name != BOTH or self._has_weights(found.record)):
            self.say(f"{name}, seed {seed}: stored")
            self.origins[name, seed] = found.record.get("origin", {})
            self.ranks.setdefault(found.ranked.system, {})[wanted] = found.ranked.rank
            return found
        if not self._time_left(f"{name}, seed {seed}"):
            return None
        if not self.train and self.trained.load(self._key(self.task.training_hash, name, seed, chosen=chosen)) is None:
            self._leave_out(f"{name}, seed {seed}", "it is not made yet, and this run fitted nothing")
            return None
        begun = time.perf_counter()
        if name in _TRAINED:
            system, record = self._encoder(name, seed, chosen)
        else:
            fitted = self._fit(name, seed, chosen)
            system, record = fitted.system, {"fit": fitted.to_dict()}
        ranked = self.asked.protocol(self.task).rank(system, self.asked.targets, self.stages)
        record |= {"seed": seed, "origin": record.get("origin", {}) | origin(self.stamp, time.perf_counter() - begun)}
        self.origins[name, seed] = record["origin"]
        made = Finished(ranked, record)
        self.ranks.setdefault(ranked.system, {})[wanted] = ranked.rank
        self.store.save(name, seed, key, made)
        self.say(f"{name}, seed {seed}: {record['origin']['seconds']} s")
        return made

    def _encoder(self, name: str, seed: int, chosen: dict[str, Any] | None) -> tuple[System, dict[str, Any]]:
        """An encoder and how it was trained: now and then stored, or already, by this task or one that trains alike."""
        key = self._key(self.task.training_hash, name, seed, chosen=chosen)
        stored = self.trained.load(key)
        if stored is not None:
            self.say(f"{name}, seed {seed}: trained already")
            config = EncoderConfig.model_validate(stored["fit"]["chosen"]["config"])
            encoder = load_encoder(self, name, self.trained.weights(key), config)
            record = {"fit": stored["fit"], "trained": key, "weights": stored["weights"]}
            return ranking(self, name, encoder), record | {"origin": {"trained": stored["origin"]}}
        begun = time.perf_counter()
        fitted = self._fit(name, seed, chosen)
        if not isinstance(fitted.system, SASRec):
            raise TypeError(f"{name} is no encoder")
        fit = fitted.to_dict()
        made = {"fit": fit, "origin": origin(self.stamp, time.perf_counter() - begun)}
        weights = self.trained.save(key, fitted.system.encoder, made)
        return fitted.system, {"fit": fit, "trained": key, "weights": weights}

    def _has_weights(self, record: dict[str, Any]) -> bool:
        """Whether the weights that a stored ranking was made with are still there."""
        stored = self.trained.load(record.get("trained", ""))
        return stored is not None and stored["weights"] == record.get("weights")

    def _time_left(self, what: str) -> bool:
        if self.task.seconds is None or time.perf_counter() - self.begun < self.task.seconds:
            return True
        self._leave_out(what, f"the task's {self.task.seconds:g} s were spent")
        return False

    def _leave_out(self, what: str, why: str) -> None:
        self.left_out.append(f"{what} was left out: {why}")
        self.say(self.left_out[-1])

    def _fit(self, name: str, seed: int, chosen: dict[str, Any] | None) -> FittedSystem:
        """The system tuned within the budget, or trained anew as ``chosen`` with another seed."""
        task = self.task
        if name in VARIANTS:
            configs = encoder_grid(task, name) if chosen is None else [EncoderConfig.model_validate(chosen)]
            return fit_variant(self, name, seed, configs, self._sasrec(seed) if name == IDS else None)
        return fit_baselines(
            self.split,
            which=[_as_name(name)],
            texts=self.texts if name == "bm25" else None,
            vectors=self.vectors if name == "nearest" else None,
            seed=seed,
            budget=task.budget.of(),
            seen=task.seen,
            seen_last=task.seen_last,
            grids=self._grids(name, chosen),
            stages=self.stages,
        )[0]

    def _sasrec(self, seed: int) -> Trained | None:
        """SASRec's encoder, where this run has it already: with IDs alone ours has its settings and learns the same."""
        made = self.finished(SASREC, seed) if (SASREC, seed) in self.origins else None
        if made is None or not self._has_weights(made.record):
            return None
        chosen = made.record["fit"]["chosen"]
        config = EncoderConfig.model_validate(chosen["config"])
        return Trained(config, self.trained.weights(made.record["trained"]), chosen["fit_seconds"])

    def _grids(self, name: str, chosen: dict[str, Any] | None) -> Grids:
        grids = Grids(sasrec=encoder_grid(self.task, SASREC))
        if chosen is None:
            return grids
        kind = type(getattr(grids, name)[0])
        return replace(grids, **{name: [kind.model_validate(chosen)]})

    # -- one seed ----------------------------------------------------------------------------------

    def report(self, seed: int) -> dict[str, Any]:
        """The seed's whole table as a dict, the full model's LLM stage included; stored too."""
        made = {name: self.finished(name, seed) for name in self.systems if name != FULL}
        done = {name: one for name, one in made.items() if one is not None}
        if not done:
            raise ConfigError(
                f"the task's {self.task.seconds or 0:g} s were spent before any system of seed {seed}",
                where=self.name,
                remedy="run it again with more `seconds`, or fewer seeds: what is finished is kept",
            )
        protocol = self.asked.protocol(self.task)
        # Without users to ask there is no LLM stage to choose a weight for.
        full = BOTH in done and FULL in self.systems and self.task.llm_users > 0
        full = full and self._time_left(f"the full model, seed {seed}")
        kind = FULL if full else "table"
        parts = {name: one.record["fit"] for name, one in done.items()}
        ranker = {"ranker": self.ranker.fingerprint} if full and self.load_ranker is not None else {}
        key = self.key(kind, seed, parts=parts, protocol=protocol.to_dict(), left_out=self.left_out, **ranker)
        stored = self.store.record(kind, seed, key)
        if stored is not None:
            self.say(f"report, seed {seed}: stored")
            self.origins[kind, seed] = stored.get("origin", {})
            return stored["report"]
        begun = time.perf_counter()
        report = self._full(done, protocol, seed) if full else self._table(done, protocol, self.checked)
        report.settings["seed"] = seed
        found = report.to_dict()
        self.origins[kind, seed] = origin(self.stamp, time.perf_counter() - begun)
        self.store.save_record(kind, seed, key, {"report": found, "origin": self.origins[kind, seed]})
        return found

    def _table(
        self, done: dict[str, Finished], protocol: Protocol, checked: LeakCheck, model: Recommender | None = None
    ) -> Report:
        # Ours first, and of these the one that retrieves for the LLM.
        ours = {name: done[name] for name in reversed(VARIANTS) if name in done}
        theirs = {name: one for name, one in done.items() if name not in VARIANTS}
        ranked = [one.ranked for one in (*ours.values(), *theirs.values())]
        report = tabulate(
            self.split,
            self.asked.targets,
            protocol,
            ranked,
            [one.ranked.system for one in theirs.values()] if ours else [],
            model=model,
            vectors=self.vectors if model else None,
            fit_seconds={one.ranked.system: one.record["fit"]["chosen"]["fit_seconds"] for one in done.values()},
            pairs=[(one, other) for one in ours for other in _PLAIN if one != other],
            n_examples=0,  # rows of the data are no part of a result
            stages=self.stages,
        )
        for one in done.values():
            report.trials.extend(trial_rows(one.record["fit"]))
        if any(one.ranked.system == "popularity" for one in theirs.values()):
            table = Table(protocol.k, self.split.log.n_items, self.asked.targets.user, protocol.average, protocol.seed)
            for system in popularities_that_flatter(self.split):
                wrong = protocol.rank(system, self.asked.targets, self.stages)
                report.rows.append(table.row(MISTAKE, wrong.system, wrong.rank))
        tuned = self.task.budget.trials > 1
        report.notes.append(
            f"tuned on validation NDCG@10, each system {self.task.budget.of()}, ours too; those that are fitted at "
            "once may spend these seconds on their whole grid"
            if tuned
            else "each system with the task's settings, untuned (a budget of 1 configuration)"
        )
        if tuned and len(self.task.seeds) > 1:
            report.notes.append(f"tuned with seed {self.task.seeds[0]}; the other seeds train what it chose")
        report.notes.extend(checked.notes())
        report.notes.extend(self.left_out)
        return report

    def _full(self, done: dict[str, Finished], protocol: Protocol, seed: int) -> Report:
        """The LLM behind the encoder that was stored, its weight chosen on validation."""
        fit, record = self.task.fit, done[BOTH].record
        config = EncoderConfig.model_validate(record["fit"]["chosen"]["config"])
        encoder = load_encoder(self, BOTH, self.trained.weights(record["trained"]), config)
        columns, _, words = self.events
        with self._timed(f"full model, seed {seed}"):
            model = Recommender(
                split=self.split,
                config=fit.model_copy(update={"seed": seed, "encoder": config, "layer": self.layer}),
                templates=self.templates,
                texts=self.texts,
                vectors=self.raw_vectors,
                encoder=encoder,
                engine_source=self.engine.source,
                fingerprint=self.engine.fingerprint,
                columns=columns,
                words=words,
            ).with_ranker(self.ranker, stages=self.stages)
            targets = self.asked.targets
            checked = self.checked + check_model(model, targets, targets.take(protocol.sampled(targets)))
            report = self._table(done, protocol, checked, model)
        report.notes.append(
            f"the LLM's weight was chosen on {model.fusion.n_found:,} validation users whose target was retrieved, of "
            f"{model.fusion.n_users:,} drawn, besides the encoder's budget"
        )
        if self.task.seen == "keep" or self.task.seen_last is not None or self.asked.candidates is not None:
            report.notes.append(
                "the LLM's weight was chosen on retrieved candidates with all seen items masked, whatever the test has"
            )
        if self.load_ranker is not None:
            report.notes.append(f"the LLM that ranks is an adapter: {described(self.ranker.source)}")
        report.seconds.update({name: round(value, 2) for name, value in model.seconds.items()})
        return report

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.say(f"{what}: {time.perf_counter() - begun:.1f} s")

    # -- the whole ---------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """All seeds, how far they lie apart, and where each system comes from; ``seconds`` is the sum of theirs.

        DataError, before anything is fitted, where the leak check finds something in the split.
        """
        self.say(self.checked.notes()[0])
        runs = [self.report(seed) for seed in self.task.seeds]
        for report in runs:
            # As the task says it now: no part of what was measured, or stored.
            report["title"] = f"{self.name}: {self.task.about}"
            report["published"] = [one.model_dump(mode="json") for one in self.task.published]
        return {
            "task": self.name,
            "version": self.task.version,
            "about": self.task.about,
            "data": self.split.dataset.content_hash,
            "seeds": self.task.seeds,
            **self.stamp,
            "environment": environment(),
            "seconds": round(sum(map(seconds_of, self.origins.values())), 1),
            "systems": [{"name": name, "seed": seed, **made_of(where)} for (name, seed), where in self.origins.items()],
            "spread": spread(runs),
            "differences": over_seeds(self.split, self.asked, self.task, self.ranks, (BOTH, *VARIANTS)),
            "runs": runs,
        }


def _as_name(name: str) -> Name:
    found: list[Name] = [one for one in NAMES if one == name]
    return found[0]


__all__ = ["BOTH", "FULL", "SYSTEMS", "VARIANTS", "Comparison"]
