"""Run tasks of eval/tasks: baselines, our encoder's variants and the full model, and keep what was found as JSON.

    python eval/benchmark.py --suite quick --out eval/results
    python eval/benchmark.py ml-latest-small-5core beauty --data-dir data --out eval/results
    python eval/benchmark.py beauty --data-dir data --out eval/results --systems popularity,sasrec

A task names its data (fetched, or files in its folder under --data-dir), its split, the settings of the fit, the
budget for tuning, and seeds. OUT/TASK.json holds the table of each seed with its intervals, their spread, settings,
trials, machine, versions, data hash and commit, and the commit and seconds of each system, which an earlier run may
have made; OUT/TASK.md the first seed's table for people. Each finished system is kept in OUT/TASK/ and is not made
again, so a run that was cut off goes on where it was: the same command. Trained encoders are kept in OUT/encoders/ for
all tasks that differ in nothing but targets and candidates (games, games-6k and games-20), and what the LLM has scored
in OUT/llm-scores.sqlite. No row of the data is written.
"""

from __future__ import annotations

import sys
import time
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer

import penchant as pt
from penchant.cli.script import script
from penchant.engine.noise import quiet_libraries
from penchant.environment import commit_of
from penchant.errors import ConfigError
from penchant.evaluation.comparison import SYSTEMS, Comparison
from penchant.evaluation.page import write_page
from penchant.evaluation.tasks import load_task
from penchant.files import write_json


class Suite(StrEnum):
    """Tasks that are run together."""

    quick = "quick"
    full = "full"


SUITES = {
    Suite.quick: ["ml-100k-quick"],
    Suite.full: [
        "ml-100k",
        "ml-latest-small",
        "ml-latest-small-5core",
        "games",
        "games-6k",
        "games-20",
        "beauty",
        "sports",
        "toys",
        "mars-elearning",
        "mars-elearning-time",
    ],
}


def main(
    tasks: Annotated[
        list[str] | None, typer.Argument(metavar="TASK...", help="Names of eval/tasks, or YAML files.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("eval/results"),
    suite: Annotated[Suite | None, typer.Option(help="Tasks that belong together, besides those named.")] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder that holds the data sets' folders, or one of them.")
    ] = None,
    systems: Annotated[str | None, typer.Option(help=f"Some of: {', '.join(SYSTEMS)}; separated by commas.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Instead of the task's: whole numbers separated by commas.")] = None,
    model: Annotated[str, typer.Option(help="A known name, a model's folder, or a hub id.")] = "smollm2-135m",
    adapter: Annotated[str | None, typer.Option(help="A peft adapter, for vectors and ranking.")] = None,
    ranker: Annotated[str | None, typer.Option(help="A peft adapter that ranks; vectors are made without it.")] = None,
    fit: Annotated[
        bool, typer.Option(help="--no-fit: fit nothing; what no earlier run has fitted is left out, and named.")
    ] = True,
    dtype: Annotated[str, typer.Option(help="As `penchant fit`: auto, bfloat16, float16 or float32.")] = "auto",
) -> None:
    """Run each task with each of its seeds; go on where an earlier run of the same was cut off."""
    names = [*(SUITES[suite] if suite else []), *(tasks or [])]
    if not names:
        raise ConfigError("no task is named", where="benchmark", remedy="name one of eval/tasks, or give --suite quick")
    loaded = {name: load_task(name) for name in names}  # a broken task should cost no other one's time

    if seeds is not None:
        try:
            given = [int(part) for part in seeds.split(",")]
        except ValueError as error:
            raise ConfigError(f"cannot read {seeds!r}", where="--seeds", remedy="write e.g. 0,1,2") from error
        if len(set(given)) != len(given):
            raise ConfigError(f"a seed of {seeds!r} is named twice", where="--seeds", remedy="name each once")
        loaded = {name: task.model_copy(update={"seeds": given}) for name, task in loaded.items()}

    @cache
    def engine() -> Any:
        quiet_libraries()
        return pt.load_engine(model, adapter, dtype=dtype)  # type: ignore[arg-type]

    def ranks() -> Any:
        quiet_libraries()
        return pt.load_engine(model, ranker, dtype=dtype)  # type: ignore[arg-type]

    for name, task in loaded.items():
        begun = time.perf_counter()

        def say(line: str, begun: float = begun) -> None:
            print(f"[{time.perf_counter() - begun:7.1f} s] {line}", file=sys.stderr, flush=True)

        chosen = [part.strip() for part in systems.split(",")] if systems else []
        comparison = Comparison(
            Path(name).stem if name.endswith((".yaml", ".yml")) else name,
            task,
            out,
            engine,
            data_dir,
            chosen,
            None if ranker is None else ranks,
            say=say,
            stamp=commit_of(Path(__file__).resolve().parent),
            train=fit,
        )
        result = comparison.run()
        write_json(out / f"{comparison.name}.json", result)
        write_page(result["runs"][0], out / f"{comparison.name}.md")
        print(out / f"{comparison.name}.json")


if __name__ == "__main__":
    script(main)
