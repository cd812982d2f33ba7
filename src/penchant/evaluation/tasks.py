"""A task: which data, how it is split, what is ranked among what, the settings of the fit, and whose numbers compare.

The shipped ones are YAML files of eval/tasks, versioned: a change of meaning raises ``version``, and results of
another version are not mixed with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator

from penchant.data.dataset import Dataset
from penchant.data.history import Targets
from penchant.data.split import Split, global_time, leave_last_out
from penchant.errors import ConfigError, DataError
from penchant.evaluation.baselines import Budget, Name
from penchant.evaluation.protocol import Protocol
from penchant.evaluation.ranking import Seen
from penchant.evaluation.readers import Reader, folder_of, read_candidates
from penchant.evaluation.rows import Average
from penchant.files import sha256_file, sha256_text
from penchant.resources import shipped
from penchant.run_folder import FitConfig


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SplitTask(_Part):
    """How test and validation events are held out."""

    kind: Literal["leave-last-out", "global-time"]
    options: dict[str, Any] = Field(default_factory=dict, description="arguments of that split")

    @field_validator("options")
    @classmethod
    def _moments(cls, options: dict[str, Any]) -> dict[str, Any]:
        """YAML reads 2024-05-01 as a date, and what stands in quotes as a text."""
        given = {name: options[name] for name in ("valid_from", "test_from") if options.get(name) is not None}
        return options | {name: TypeAdapter(datetime).validate_python(value) for name, value in given.items()}


class Candidates(_Part):
    """Sampled candidates from a file, or only the users that are in it.

    LLMRank's protocol: with ``ground_truth`` the target is taken out of a line, the first n - 1 items are kept and
    the target put behind them; without, the first n are kept, and a target that is none of them is never found.
    """

    file: str = Field(description="`user <TAB> item item ...` a line")
    n: int | None = Field(
        default=None, ge=2, description="candidates a target; None: the whole catalogue, its users only"
    )
    ground_truth: bool = Field(default=True, description="the target is put among them")


class BudgetTask(_Part):
    """What each system may spend on tuning; those that are fitted at once may try their whole grid in the seconds."""

    trials: int = Field(default=8, ge=1)
    seconds: float = Field(default=600.0, gt=0)

    def of(self) -> Budget:
        return Budget(self.trials, self.seconds)


class Published(_Part):
    """Somebody else's numbers, with where they stand and how they were made."""

    system: str
    source: str
    protocol: str = Field(description="what of it is the same as here, and what is not")
    metrics: dict[str, float]


class Task(_Part):
    """One comparison."""

    version: int = Field(ge=1, description="raised at each change of meaning")
    about: str = Field(description="one line: the data and the protocol")
    data: Reader
    split: SplitTask | None = Field(default=None, description="None for a yes/no task")
    candidates: Candidates | None = None
    fit: FitConfig = Field(default_factory=FitConfig)
    k: int = Field(default=10, ge=1)
    seen: Seen = "mask"
    seen_last: int | None = Field(default=None, ge=0, description="mask only the newest so many events")
    average: Average = "event"
    llm_users: int = Field(default=500, ge=0, description="seeded targets of the LLM stage; 0: none")
    llm_found_only: bool = Field(default=False, description="ask the LLM of retrieved targets only: the same accuracy")
    seeds: list[int] = Field(default_factory=lambda: [0], min_length=1)
    baselines: list[Name] | None = Field(default=None, description="None: all that can be made")
    ours: list[Literal["encoder: text", "encoder: ids", "encoder: ids + text"]] | None = Field(
        default=None, min_length=1, description="our encoder's variants; None: text, and ids + text"
    )
    budget: BudgetTask = Field(default_factory=BudgetTask)
    seconds: float | None = Field(default=None, gt=0, description="no further system is begun after so many seconds")
    published: list[Published] = Field(default_factory=list)

    @field_validator("seeds")
    @classmethod
    def _differ(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) != len(seeds):
            raise ValueError("a seed is named twice: its spread would be smaller than it is")
        return seeds

    @property
    def hash(self) -> str:
        """Of all that decides a system's numbers: not the list of baselines, seeds, limits or published ones."""
        told = {"about", "baselines", "ours", "seeds", "seconds", "published", "llm_users", "llm_found_only"}
        kept = self.model_dump(mode="json", exclude=told)
        return sha256_text(yaml.safe_dump(kept, sort_keys=True))

    @property
    def training_hash(self) -> str:
        """Of all that decides what an encoder learns: not whom it is then asked for, nor among which candidates."""
        kept = self.model_dump(mode="json", include={"version", "data", "split", "fit", "seen", "seen_last", "budget"})
        return sha256_text(yaml.safe_dump(kept, sort_keys=True))


def load_task(name: str) -> Task:
    """The shipped task of that name, or a YAML file's; ConfigError where it is none."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else shipped("tasks") / f"{name}.yaml"
    if not path.is_file():
        there = ", ".join(sorted(p.stem for p in shipped("tasks").glob("*.yaml")))
        raise ConfigError("no such task", where=str(name), remedy=f"use one of {there}, or a YAML file")
    try:
        return Task.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError, ValidationError) as error:
        raise ConfigError(f"is no task: {error}", where=str(path), remedy="see eval/tasks for examples") from error


def read_data(task: Task, data_dir: Path | None = None) -> Dataset:
    """The task's data set from its own files: under ``data_dir``, or fetched where it can be."""
    return task.data.read(folder_of(task.data, data_dir))


def split_of(task: Task, dataset: Dataset) -> Split:
    """The task's split; ConfigError where its options don't fit."""
    if task.split is None:
        raise ConfigError("the task has no split", where=task.about, remedy="run eval/tallrec.py")
    try:
        if task.split.kind == "global-time":
            return global_time(dataset, **task.split.options)
        return leave_last_out(dataset, **task.split.options)
    except TypeError as error:
        raise ConfigError(f"the split's options don't fit: {error}", where=task.about) from error


@dataclass(frozen=True, eq=False)
class Asked:
    """What is asked of every system: targets, and the candidates (n_targets, c) of each or None; ``source`` is the hash
    of the file that named them, where one did.
    """

    targets: Targets
    candidates: NDArray[np.int32] | None
    source: str | None = None

    def protocol(self, task: Task) -> Protocol:
        """How these targets are ranked and averaged: whatever the seed, the LLM is asked of the same ones."""
        return Protocol(
            k=task.k,
            llm_users=task.llm_users,
            llm_found_only=task.llm_found_only,
            seed=task.seeds[0],
            average=task.average,
            seen=task.seen,
            seen_last=task.seen_last,
            candidates=self.candidates,
        )


def asked_of(task: Task, split: Split, data_dir: Path | None = None) -> Asked:
    """The test targets of the task, of all users or of those in its candidate file, in the file's order."""
    if task.candidates is None:
        return Asked(split.test, None)
    folder = folder_of(task.data, data_dir)
    if folder is None:
        raise ConfigError("the task reads a file of candidates", where=task.about, remedy="give --data-dir")
    path = folder / task.candidates.file
    rows, log = read_candidates(path), split.log
    at = {int(user): row for row, user in enumerate(split.test.user)}
    if len(at) != len(split.test):
        raise ConfigError("candidates need one target a user", where=task.about, remedy="use leave-last-out")
    chosen, lists = [], []
    for number, (user, items) in enumerate(rows, 1):
        row = at.get(log.user_index.get(user, -1))
        unknown = [i for i in items if i not in log.item_index]
        if row is None or unknown:
            what = f"user {user!r} has no test target" if row is None else f"unknown item {unknown[0]!r}"
            raise DataError(what, where=f"{path}, row {number}", remedy="use the candidates of this data set")
        chosen.append(row)
        lists.append([log.item_index[i] for i in items])
    targets, source = split.test.take(np.array(chosen, dtype=np.int64)), sha256_file(path)
    if task.candidates.n is None:
        return Asked(targets, None, source)
    cut = _cut(lists, targets.item, task.candidates.n, task.candidates.ground_truth, path)
    return Asked(targets, cut, source)


def _cut(
    lists: list[list[int]], target: NDArray[np.integer], n: int, ground_truth: bool, path: Path
) -> NDArray[np.int32]:
    out = np.full((len(lists), n), -1, dtype=np.int32)
    for row, (items, answer) in enumerate(zip(lists, target.tolist(), strict=True)):
        kept = [*[i for i in items if i != answer][: n - 1], answer] if ground_truth else items[:n]
        if len(kept) < n:
            raise DataError(f"{len(kept)} candidates where {n} belong", where=f"{path}, row {row + 1}")
        out[row] = kept
    return out
