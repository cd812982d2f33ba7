"""Tuning: the best on validation within the budget, all on record, and never a look at the test."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel, ConfigDict
from tests.evaluation.planted import split_of, two_tastes
from tests.fake_engine import FakeEngine

from penchant.data.history import Targets
from penchant.data.split import Split
from penchant.errors import ConfigError
from penchant.evaluation.baselines import Baselines, Budget, FittedSystem, Grids, Name, Validation, fit_baselines
from penchant.evaluation.baselines import fit as module
from penchant.evaluation.baselines import tune as tune_module
from penchant.evaluation.baselines.bm25 import BM25Config
from penchant.evaluation.baselines.ease import EASEConfig
from penchant.evaluation.baselines.factors import ALSConfig, BPRConfig
from penchant.evaluation.baselines.item_knn import ItemKNNConfig
from penchant.evaluation.baselines.mult_vae import MultVAESystemConfig
from penchant.evaluation.baselines.nearest import NearestConfig
from penchant.evaluation.baselines.tune import grid, tune, within
from penchant.evaluation.systems import Queries
from penchant.interest.config import EncoderConfig

QUICK: list[Name] = ["popularity", "recent", "bm25", "nearest", "item_knn", "ease", "als"]


@pytest.fixture(scope="module")
def split() -> Split:
    return two_tastes()


class Knob(BaseModel):
    model_config = ConfigDict(frozen=True)
    hit: int = 0
    last: int | None = None


@dataclass(frozen=True)
class Planted:
    """Finds every target whose place in the validation is below ``hit``."""

    split: Split
    hit: int
    last: int | None = None
    name: str = "planted"

    def scores(self, queries: Queries) -> np.ndarray:
        out = np.zeros((len(queries), self.split.log.n_items), dtype=np.float32)
        valid = self.split.valid
        for i, user in enumerate(queries.user):
            at = int(np.flatnonzero(valid.user == user)[0])
            out[i, valid.item[at]] = 1.0 if at < self.hit else -1.0
        return out


# -- the tuner ---------------------------------------------------------------------------------


def test_the_best_on_validation_is_chosen_and_every_trial_recorded(split: Split) -> None:
    configs = [Knob(hit=h) for h in (10, 40, 25, 40)]
    told: list[int] = []
    found = tune(
        "x", configs, lambda c, left: Planted(split, c.hit), Validation.of(split, seed=0), Budget(), done=told.append
    )
    assert found.chosen.config["hit"] == 40
    assert found.chosen is found.trials[1]  # the first among equals
    assert isinstance(found.system, Planted)
    assert found.system.hit == 40
    ndcg = [trial.valid_ndcg for trial in found.trials]
    assert ndcg == pytest.approx([h / len(split.valid) for h in (10, 40, 25, 40)])
    assert told == [1] * 4
    record = json.loads(json.dumps(found.to_dict()))
    assert record["budget"] == {"trials": 8, "seconds": 600.0}
    assert (record["offered"], record["validation_targets"], len(record["trials"])) == (4, len(split.valid), 4)


def test_no_trial_begins_after_the_seconds_but_the_first(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(tune_module.time, "perf_counter", lambda: clock[0])
    left: list[float] = []

    def slow(config: Knob, seconds_left: float) -> Planted:
        left.append(seconds_left)
        clock[0] += 40.0
        return Planted(split, config.hit)

    configs = [Knob(hit=h) for h in range(5)]
    valid = Validation.of(split, seed=0)
    found = tune("x", configs, slow, valid, Budget(seconds=100.0))
    assert left == [100.0, 60.0, 20.0]
    assert [t.fit_seconds for t in found.trials] == [40.0] * 3
    assert (len(found.trials), found.offered) == (3, 5)
    assert len(tune("x", configs, slow, valid, Budget(seconds=1.0)).trials) == 1


def test_a_fit_serves_all_configurations_that_differ_in_last_alone(split: Split) -> None:
    fitted: list[int] = []

    def fit(config: Knob, left: float) -> Planted:
        fitted.append(config.hit)
        return Planted(split, config.hit, config.last)

    def serve(system: Any, config: Knob) -> Planted:
        return Planted(split, system.hit, config.last)

    configs = [Knob(hit=h, last=last) for h in (3, 9) for last in (None, 5, 2)]
    valid = Validation.of(split, seed=0)
    found = tune("x", configs, fit, valid, Budget(), serve=serve)
    assert fitted == [3, 9]
    assert len(found.trials) == 6
    assert len({t.fit_seconds for t in found.trials[:3]}) == 1  # what the fit took is said with each
    fitted.clear()
    tune("x", configs, fit, valid, Budget())
    assert fitted == [3, 3, 3, 9, 9, 9]


def test_grids_begin_with_the_default_and_keep_its_other_fields() -> None:
    made = grid(Knob(hit=7, last=4), hit=(1, 7), last=(None, 4))
    assert made == [Knob(hit=7, last=4), Knob(hit=1, last=None), Knob(hit=1, last=4), Knob(hit=7, last=None)]


def test_too_large_a_grid_is_drawn_from_with_the_seed_the_first_always_kept() -> None:
    configs = [Knob(hit=h) for h in range(20)]
    drawn = [c.hit for c in within(configs, 6, 1)]
    assert (len(set(drawn)), drawn[0], drawn) == (6, 0, sorted(drawn))
    assert drawn == [c.hit for c in within(configs, 6, 1)]
    assert any(drawn != [c.hit for c in within(configs, 6, s)] for s in range(2, 6))
    assert within(configs, 20, 0) == configs
    assert within(configs, 1, 0) == configs[:1]


@pytest.mark.parametrize("budget", [{"trials": 0}, {"seconds": 0.0}, {"seconds": float("nan")}])
def test_a_budget_that_buys_nothing_is_refused(budget: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="buys nothing"):
        Budget(**budget)


def test_validation_masks_what_was_seen_unless_told_otherwise() -> None:
    split = split_of([[0, 1, 0, 2], [1, 2, 0, 1]], 12)  # user 0's validation item 0 repeats; user 1's, item 0, does not

    @dataclass(frozen=True)
    class LikesZero:
        name: str = "zero"

        def scores(self, queries: Queries) -> np.ndarray:
            return np.tile(-np.arange(12, dtype=np.float32), (len(queries), 1))

    assert Validation.of(split, seed=0).ndcg(LikesZero()) == pytest.approx(0.5)
    assert Validation.of(split, seed=0, seen="keep").ndcg(LikesZero()) == pytest.approx(1.0)
    assert Validation.of(split, seed=0, seen_last=1).ndcg(LikesZero()) == pytest.approx(1.0)
    assert len(Validation.of(split, n=1, seed=0)) == 1


# -- all of them -------------------------------------------------------------------------------


def texts(split: Split) -> list[str]:
    return split.dataset.items["title"].to_list()


def vectors(split: Split) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(split.log.n_items, 4)).astype(np.float32)


class Poisoned(Split):
    """Its test may not be looked at."""

    def __getattribute__(self, name: str) -> Any:
        if name == "test":
            raise RuntimeError("the test was looked at")
        return super().__getattribute__(name)


def test_the_test_is_never_looked_at(split: Split) -> None:
    """Neither the part of the split, nor its events: with others in their place every trial and score is the same."""
    held = split.test.position
    log = split.log
    item = log.item.copy()
    item[held] = (item[held] + 7) % log.n_items
    other_log = type(log)(log.user_ids, log.item_ids, log.start, item, log.time)
    poisoned = Poisoned(
        split.dataset, other_log, split.train, Targets(other_log, split.valid.position), Targets(other_log, held)
    )
    with pytest.raises(RuntimeError):
        _ = poisoned.test
    asked = Queries.of(split.valid)
    pair = [fit_baselines(s, which=QUICK, texts=texts(split), vectors=vectors(split)) for s in (split, poisoned)]
    for clean, other in zip(*pair, strict=True):
        assert clean.name == other.name
        assert [(t.config, t.valid_ndcg) for t in clean.trials] == [(t.config, t.valid_ndcg) for t in other.trials]
        np.testing.assert_array_equal(clean.system.scores(asked), other.system.scores(asked))


def test_one_call_gives_them_all(split: Split) -> None:
    small = EncoderConfig(use_text=False, dim=8, blocks=1, max_length=9, epochs=2)
    grids = Grids(
        sasrec=grid(small, dropout=(0.3, 0.1)),
        mult_vae=grid(MultVAESystemConfig(hidden=8, latent=4, epochs=2), beta=(0.2, 0.1)),
        bpr=grid(BPRConfig(factors=4, iterations=5), factors=(4, 8)),
    )
    begun: list[tuple[str, int | None]] = []
    done: list[int] = []

    def stages(name: str, size: int | None) -> Any:
        begun.append((name, size))
        return done.append

    engine = FakeEngine()
    made = fit_baselines(
        split,
        texts=texts(split),
        vectors=vectors(split),
        engine=engine,
        budget=Budget(trials=2),
        llm_targets=5,
        seed=7,
        grids=grids,
        stages=stages,
    )
    assert made.notes == ()
    assert [f.name for f in made] == list(module.NAMES)
    assert len({f.system.name for f in made}) == len(module.NAMES)
    assert [f.targets for f in made] == [len(split.valid)] * (len(made) - 1) + [5]
    asked = Queries.of(split.test).take(range(3))
    for fitted in made:
        # Two of what is dear; of the cheap the whole grid, in the same seconds.
        assert len(fitted.trials) == (min(2, fitted.offered) if fitted.name in module.DEAR else fitted.offered)
        assert fitted.chosen.valid_ndcg == max(t.valid_ndcg for t in fitted.trials)
        scores = fitted.system.scores(asked)
        assert scores.shape == (3, split.log.n_items)
        assert not np.isnan(scores).any()
        assert fitted.chosen.config.get("seed", 7) == 7
    retriever = max(made[:-1], key=lambda f: f.chosen.valid_ndcg)
    assert retriever.system.name in made[-1].system.name
    assert [name for name, _ in begun] == [f"tune {name}" for name in module.NAMES]
    assert sum(done) == sum(len(f.trials) for f in made)


def test_what_cannot_be_made_is_noted_and_an_error_only_when_asked_for(
    split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "implicit", None)
    monkeypatch.setattr(module, "NAMES", ("popularity", "bm25", "nearest", "als", "llm"))
    made = fit_baselines(split, texts=texts(split))
    assert [f.name for f in made] == ["popularity", "bm25"]
    assert [note.split(" was left out: ")[0].split()[-1] for note in made.notes] == ["nearest", "als", "llm"]
    assert "vectors" in made.notes[0]
    assert "implicit, which is not installed" in made.notes[1]
    assert "engine" in made.notes[2]
    with pytest.raises(ConfigError, match=r"pip install 'penchant\[eval\]'"):
        fit_baselines(split, which=["popularity", "als"])
    with pytest.raises(ConfigError, match="needs vectors"):
        fit_baselines(split, which=["nearest"])


def test_names_are_checked(split: Split) -> None:
    with pytest.raises(ConfigError, match="unknown baseline 'poplarity'"):
        fit_baselines(split, which=["poplarity"])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="no baseline is named"):
        fit_baselines(split, which=[])
    with pytest.raises(ConfigError, match="give a retriever"):
        fit_baselines(split, which=["llm"], texts=texts(split), engine=FakeEngine())


def test_the_order_is_that_of_the_names_whatever_was_asked(split: Split) -> None:
    made = fit_baselines(split, which=["ease", "popularity"], budget=Budget(trials=1))
    assert [f.name for f in made] == ["popularity", "ease"]
    assert made[1].name == "ease"
    assert len(made) == 2


def test_no_tuning_is_none_of_the_cheap_either(split: Split) -> None:
    for fitted in fit_baselines(split, which=["item_knn", "ease"], budget=Budget(trials=1)):
        assert len(fitted.trials) == 1 < fitted.offered


def test_no_grid_of_a_dear_one_outgrows_the_default_budget_or_says_one_thing_twice() -> None:
    for name, configs in vars(Grids()).items():
        assert 2 <= len(configs) <= (Budget().trials if name in module.DEAR else 30), name
        assert len({c.model_dump_json() for c in configs}) == len(configs)


@pytest.mark.parametrize("name", ["item_knn", "ease"])
def test_a_fit_asked_with_another_decay_is_as_one_fitted_so(split: Split, name: Name) -> None:
    kind: Any = {"item_knn": ItemKNNConfig, "ease": EASEConfig}[name]

    def fitted(*decays: float) -> FittedSystem:
        return fit_baselines(split, which=[name], grids=Grids(**{name: [kind(decay=decay) for decay in decays]}))[0]

    both, one, two = fitted(1.0, 0.3), fitted(1.0), fitted(0.3)
    assert [t.valid_ndcg for t in both.trials] == [one.chosen.valid_ndcg, two.chosen.valid_ndcg]
    assert one.chosen.valid_ndcg != two.chosen.valid_ndcg
    assert both.trials[0].fit_seconds == both.trials[1].fit_seconds, "it was fitted once"


def test_a_fit_asked_with_another_last_is_as_one_fitted_so(split: Split) -> None:
    every: list[Name] = ["bm25", "nearest", "item_knn", "ease", "als"]
    kinds = {
        "bm25": BM25Config,
        "nearest": NearestConfig,
        "item_knn": ItemKNNConfig,
        "ease": EASEConfig,
        "als": partial(ALSConfig, factors=8, regularization=1.0),
    }

    words = [f"a{i % 5} b{i % 3} c{i % 7}" for i in range(split.log.n_items)]

    def fitted(*lasts: int) -> Baselines:
        grids = Grids(**{name: [kind(last=last) for last in lasts] for name, kind in kinds.items()})
        return fit_baselines(split, which=every, texts=words, vectors=vectors(split), grids=grids)

    for both, one, two in zip(fitted(1, 6), fitted(1), fitted(6), strict=True):
        assert [t.valid_ndcg for t in both.trials] == [one.chosen.valid_ndcg, two.chosen.valid_ndcg]
        assert one.chosen.valid_ndcg != two.chosen.valid_ndcg, both.name
