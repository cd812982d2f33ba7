"""Fit and evaluate the tasks of eval/tasks, and keep what was found as JSON.

    python eval/benchmark.py ml-100k --out eval/results/ml-100k.json
    python eval/benchmark.py mars-elearning --data-dir data/mars-elearning --out eval/results/mars-elearning.json

A task names its data (to be fetched, or files under --data-dir), its split, the settings of the fit, and seeds.
The JSON holds, for each seed, the table with its intervals, the settings, and the machine and versions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

import penchant as pt
from penchant.data.options import ReadOptions
from penchant.errors import ConfigError
from penchant.fetch import fetch
from penchant.files import write_json
from penchant.resources import shipped


class Files(BaseModel):
    model_config = ConfigDict(extra="forbid")

    interactions: str = Field(description="file under --data-dir")
    items: str = Field(description="file under --data-dir")
    read: ReadOptions = Field(default_factory=ReadOptions, description="how to read them, as `penchant prepare` would")


class SplitTask(BaseModel):
    model_config = ConfigDict(extra="forbid")

    kind: str = Field(description="leave-last-out or global-time")
    options: dict[str, Any] = Field(default_factory=dict, description="arguments of that split")


class Task(BaseModel):
    model_config = ConfigDict(extra="forbid")

    version: int = Field(description="raised at each change of meaning")
    fetch: str | None = Field(default=None, description="a dataset `penchant fetch` knows")
    files: Files | None = Field(default=None, description="or files of the user's own")
    split: SplitTask
    fit: pt.FitConfig = Field(default_factory=pt.FitConfig)
    k: int = 10
    llm_users: int = 500
    seeds: list[int] = Field(default_factory=lambda: [0])


def load_task(name: str) -> Task:
    """The shipped task of that name, or a YAML file's."""
    path = Path(name) if name.endswith(".yaml") else shipped("tasks") / f"{name}.yaml"
    try:
        return Task.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, ValidationError) as error:
        raise ConfigError(f"is no task: {error}", where=str(path), remedy="see eval/tasks for examples") from error


def main(
    task_name: Annotated[str, typer.Argument(metavar="TASK", help="A name of eval/tasks, or a YAML file.")],
    out: Annotated[Path, typer.Option(help="The JSON file to write.")],
    model: Annotated[str, typer.Option(help="A known name, a model's folder, or a hub id.")] = "smollm2-135m",
    adapter: Annotated[str | None, typer.Option(help="A peft adapter.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder of the task's files.")] = None,
) -> None:
    """Run one task with each of its seeds."""
    task = load_task(task_name)
    if task.fetch is not None:
        folder = fetch(task.fetch)
        dataset = pt.Dataset.read(folder / "interactions.csv", folder / "items.csv")
    elif task.files is not None and data_dir is not None:
        dataset = pt.Dataset.read(
            data_dir / task.files.interactions, data_dir / task.files.items, options=task.files.read
        )
    else:
        raise ConfigError("the task reads files", where=task_name, remedy="give --data-dir FOLDER")
    cut = {"leave-last-out": pt.leave_last_out, "global-time": pt.global_time}[task.split.kind]
    split = cut(dataset, **task.split.options)
    engine = pt.load_engine(model, adapter)
    runs = []
    for seed in task.seeds:
        encoder = task.fit.encoder.model_copy(update={"seed": seed})
        fitted = pt.Recommender.fit(split, engine, task.fit.model_copy(update={"seed": seed, "encoder": encoder}))
        report = pt.evaluate(fitted, k=task.k, llm_users=task.llm_users, seed=seed)
        print(report.to_text())
        runs.append({**report.to_dict(), "fit_seconds": fitted.seconds, "training": fitted.training})
    write_json(out, {"task": task_name, "version": task.version, "runs": runs})
    print(out)


if __name__ == "__main__":
    typer.run(main)
