"""Choosing a baseline's configuration on validation under a stated budget, every trial on record."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from penchant import metrics
from penchant.data.history import Targets
from penchant.data.split import Split
from penchant.errors import ConfigError
from penchant.evaluation.ranking import Seen, newest, rank_targets
from penchant.evaluation.systems import Queries, System

Config = TypeVar("Config", bound=BaseModel)

# What a fitted system reads only when it is asked.
ASKED = ("last", "decay")
# Validation targets a configuration is judged on; more would only cost time.
VALIDATION_TARGETS = 5_000


@dataclass(frozen=True, slots=True)
class Budget:
    """What one system may spend on tuning: so many configurations, and none begun after so many seconds.

    A training that runs epoch by epoch also ends with the first epoch after them, so a choice made near the limit
    depends on the machine; every trial that was made is on record.
    """

    trials: int = 8
    seconds: float = 600.0

    def __post_init__(self) -> None:
        if self.trials < 1 or not self.seconds > 0:
            raise ConfigError(
                f"a budget of {self.trials} trials and {self.seconds} seconds buys nothing",
                where="Budget",
                remedy="give at least one trial and some seconds",
            )

    def whole(self, configs: int) -> Budget:
        """With room for so many configurations in the same seconds; one trial, no tuning, stays one."""
        return self if self.trials == 1 else replace(self, trials=max(self.trials, configs))

    def __str__(self) -> str:
        return f"at most {self.trials} configurations, none begun after {self.seconds:g} s"


@dataclass(frozen=True, slots=True)
class Trial:
    """One configuration tried: its NDCG@10 on the validation sample.

    ``fit_seconds`` is what the fit took, also where an earlier trial had made it; ``seconds`` what this trial took.
    """

    config: dict[str, Any]
    valid_ndcg: float
    fit_seconds: float
    seconds: float


@dataclass(frozen=True, eq=False)
class FittedSystem:
    """A baseline fitted with the configuration that validation chose.

    ``offered`` is how many configurations its grid has, ``trials`` those the budget paid for, ``chosen`` the best.
    """

    name: str
    system: System
    chosen: Trial
    trials: list[Trial]
    offered: int
    budget: Budget
    targets: int

    def to_dict(self) -> dict[str, Any]:
        """For a report: what was tried, what was chosen, and under which budget."""
        return {
            "name": self.name,
            "system": self.system.name,
            "chosen": asdict(self.chosen),
            "trials": [asdict(trial) for trial in self.trials],
            "offered": self.offered,
            "budget": asdict(self.budget),
            "validation_targets": self.targets,
        }


def trial_rows(fit: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a report shows of a system's tuning, from its ``FittedSystem.to_dict``."""
    return [
        {
            "system": fit["system"],
            "config": trial["config"],
            "valid_ndcg@10": trial["valid_ndcg"],
            "seconds": trial["seconds"],
        }
        for trial in fit["trials"]
    ]


@dataclass(frozen=True, eq=False)
class Validation:
    """What configurations are judged by: a seeded sample of the validation targets, full ranking, NDCG@10."""

    targets: Targets
    seen: Seen = "mask"
    seen_last: int | None = None

    @classmethod
    def of(
        cls, split: Split, *, n: int = VALIDATION_TARGETS, seed: int, seen: Seen = "mask", seen_last: int | None = None
    ) -> Validation:
        return cls(split.valid.sample(n, seed), seen, seen_last)

    def __len__(self) -> int:
        return len(self.targets)

    def sample(self, n: int, seed: int) -> Validation:
        """The same on fewer targets, for a system that is dear to ask."""
        return Validation(self.targets.sample(n, seed), self.seen, self.seen_last)

    def masked(self) -> list[NDArray[np.int32]]:
        """The items that may not come, of each target."""
        history = Queries.of(self.targets).history
        if self.seen == "keep":
            return [items[:0] for items in history]
        return [newest(items, self.seen_last) for items in history]

    def ndcg(self, system: System) -> float:
        """Mean NDCG@10 of the whole catalogue's ranking."""
        ranked = rank_targets(system, self.targets, k=10, seen=self.seen, seen_last=self.seen_last)
        # n_items + 1 says that a target was not found: no hit, however small the catalogue.
        return float(metrics.ndcg(ranked.rank, min(10, self.targets.log.n_items)).mean())


def grid(default: Config, **values: Sequence[Any]) -> list[Config]:
    """Every combination of the fields' values, the default's own first; the rest as in ``default``."""
    made = [default]
    for row in itertools.product(*values.values()):
        config = type(default).model_validate(default.model_dump() | dict(zip(values, row, strict=True)))
        if config not in made:
            made.append(config)
    return made


def within(configs: Sequence[Config], trials: int, seed: int) -> list[Config]:
    """As many configurations as the budget allows: all in their order, or the first and a seeded draw of the rest."""
    if len(configs) <= trials:
        return list(configs)
    drawn = np.random.default_rng(seed).choice(len(configs) - 1, size=trials - 1, replace=False) + 1
    return [configs[i] for i in (0, *sorted(drawn.tolist()))]


def tune(
    name: str,
    configs: Sequence[Config],
    fit: Callable[[Config, float], System],
    valid: Validation,
    budget: Budget,
    *,
    serve: Callable[[Any, Config], System] | None = None,
    seed: int = 0,
    done: Callable[[int], None] = lambda n: None,
) -> FittedSystem:
    """Fit each configuration, keep the one with the best validation NDCG@10, the first among equals.

    ``fit`` is given a configuration and the seconds left. Where a system reads its configuration's ``ASKED`` only
    when it is asked, ``serve`` gives it another, and it is not fitted again for that; such a trial counts against
    the budget like any other. Nothing is refitted with the validation events after.
    """
    trials: list[Trial] = []
    best: tuple[System, Trial] | None = None
    made: tuple[Config, System, float] | None = None  # the latest fit
    begun = time.perf_counter()
    for config in within(configs, budget.trials, seed):
        started = time.perf_counter()
        left = budget.seconds - (started - begun)
        if best is not None and left <= 0:
            break
        if serve is not None and made is not None and _alike(made[0], config):
            made = config, serve(made[1], config), made[2]
        else:
            made = None  # two systems at once are enough: the best, and the one being fitted
            system = fit(config, left)
            made = config, system, time.perf_counter() - started
            del system
        score = valid.ndcg(made[1])
        trial = Trial(config.model_dump(mode="json"), score, made[2], time.perf_counter() - started)
        trials.append(trial)
        if best is None or score > best[1].valid_ndcg:
            best = made[1], trial
        done(1)
    if best is None:
        raise ConfigError("there is no configuration to try", where=f"baseline {name}")
    return FittedSystem(name, best[0], best[1], trials, len(configs), budget, len(valid))


def _alike(one: BaseModel, other: BaseModel) -> bool:
    """Whether two configurations differ in nothing but what is read when they are asked."""
    return one.model_dump(exclude=set(ASKED)) == other.model_dump(exclude=set(ASKED))
