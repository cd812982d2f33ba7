"""The recipes as functions: data and settings in, an adapter in a folder out."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator

from penchant.data.dataset import Dataset
from penchant.data.split import Split, global_time, leave_last_out
from penchant.errors import ConfigError, NotFiniteLossError, StorageError
from penchant.files import read_json, write_json
from penchant.recommend import Stages, silent
from penchant.training.checkpoints import load_checkpoint
from penchant.training.config import TrainConfig
from penchant.training.journal import plot
from penchant.training.loop import Loop
from penchant.training.processes import make_accelerator
from penchant.training.publish import check_out, identity_of, publish
from penchant.training.recipe import Recipe
from penchant.training.task import Outcome


def cut(dataset: Dataset, config: TrainConfig) -> Split:
    """The split the settings ask for."""
    if config.split == "global-time":
        return global_time(dataset, valid_from=config.valid_from, test_from=config.test_from, targets=config.targets)
    if config.valid_from or config.test_from or config.targets != "all":
        raise ConfigError("valid_from, test_from and targets need split: global-time", where="training")
    return leave_last_out(dataset, test=config.split == "leave-last-out")


def finetune(
    name: str,
    config: TrainConfig,
    data: Dataset | Split | None,
    out: Path,
    *,
    resume: bool = False,
    on_record: Callable[[dict[str, Any]], None] | None = None,
    accelerator: Accelerator | None = None,
    stages: Stages = silent,
) -> Outcome:
    """Train and leave in ``out``: the adapter (plain peft), its card, settings, templates, log and curves.

    ``resume`` goes on from the newest checkpoint of a run that stopped. ConfigError where the settings,
    data or templates differ from that run's; StorageError where ``out`` holds something else.
    NotFiniteLossError where a loss is no number: where an earlier validation was one, its adapter is left all the same.
    An ``accelerator`` that is given is the caller's to end. ``on_record`` gets what goes into the log, ``stages`` is
    told what is made before it.
    """
    own = accelerator is None
    accelerator = accelerator or make_accelerator(config, out)
    if resume:
        config = _as_begun(config, out)
    split = cut(data, config) if isinstance(data, Dataset) else data
    recipe = Recipe(name, config, split, stages if accelerator.is_main_process else silent)
    config = recipe.config
    identity = identity_of(recipe)
    if accelerator.is_main_process:
        check_out(out, identity, resume)
    # The main process fills the caches of vectors, candidates and rows; the others then read them.
    with accelerator.main_process_first():
        task = recipe.task()
    loop = Loop(task, recipe.student, config, out, accelerator=accelerator, on_record=on_record)
    # Only now: a run whose settings or data were refused leaves nothing that would stand in the next one's way.
    if accelerator.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "run.json", identity)
        (out / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), "utf-8")
    if config.report_to:
        accelerator.init_trackers("penchant", config={"recipe": name, **_flat(config.model_dump(mode="json"))})
    try:
        outcome = loop.run(resume=resume)
        if accelerator.is_main_process:
            _publish_best(recipe, loop, out)
    except NotFiniteLossError as error:
        if loop.state["best"] is None:
            raise
        if accelerator.is_main_process:
            _publish_best(recipe, loop, out)
        accelerator.wait_for_everyone()  # a launcher ends the main process with the first that fails
        kept = f"{out} holds the best validation's (step {loop.state['best_step']})"
        raise NotFiniteLossError(error.what, where=error.where, remedy=f"{error.remedy}; {kept}") from error
    finally:
        if accelerator.is_main_process:
            _draw(loop, out, name)
    accelerator.wait_for_everyone()
    loop.close()
    if own:  # it finishes the trackers, and the processes' group with them: nothing can wait after that
        accelerator.end_training()
    return outcome


def _as_begun(config: TrainConfig, out: Path) -> TrainConfig:
    """The settings with what "auto" was where the run began, which may have been another machine."""
    if config.dtype != "auto" or not (out / "run.json").is_file():
        return config
    begun = (read_json(out / "run.json").get("config") or {}).get("dtype", config.dtype)
    return config.model_copy(update={"dtype": begun})


def _publish_best(recipe: Recipe, loop: Loop, out: Path) -> None:
    load_checkpoint(loop.best_checkpoint(), recipe.student, None)
    publish(recipe, loop.task.rows.dropped, loop.outcome(), out)


def _draw(loop: Loop, out: Path, name: str) -> None:
    """The curves, also of a run that ended in an error: there one wants them most."""
    ended, done = sys.exception() is not None, loop.outcome()
    try:
        plot(loop.records, out / "loss.png", f"{name}: {done.steps} steps, {done.targets:,} targets")
    except StorageError:
        if not ended:  # a full disk has been said already, with what to do
            raise


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """Nested settings as the trackers want them: one level of plain values."""
    out: dict[str, str | int | float | bool] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            out |= _flat(value, f"{prefix}{name}.")
        else:
            out[prefix + name] = value if isinstance(value, str | int | float | bool) else str(value)
    return out
