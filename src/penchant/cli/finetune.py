"""``penchant finetune``: a recipe, settings and a prepared dataset in, an adapter out."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from penchant.cli.console import err
from penchant.errors import ConfigError


class RecipeName(StrEnum):
    """The recipes; finetune/ holds a program for each."""

    next_item = "next_item"
    yes_no = "yes_no"
    choose = "choose"
    preference = "preference"
    contrastive = "contrastive"


SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}


def finetune_command(
    context: typer.Context,
    recipe: Annotated[RecipeName, typer.Argument(help="What to train.")],
    data: Annotated[Path | None, typer.Option(help="A folder made by `penchant prepare`.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the adapter; not needed with --dry-run.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings, or a shipped one's name.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it would be and cost.")] = False,
    settings: Annotated[bool, typer.Option("--settings", help="List the recipe's settings, and stop.")] = False,
) -> None:
    """Fine-tune the model. Every setting is an option too: --learning-rate 1e-3 --lora.r 8. Prints --out last.

    Many processes: accelerate launch --num_processes 8 finetune/next_item.py with the same options; each needs a pack
    of a step (--packs-per-step). Without a checkout: accelerate launch ... --module penchant finetune next_item ...
    """
    run_recipe(recipe.value, data, out, config, context.args, resume=resume, dry_run=dry_run, settings=settings)


def run_recipe(
    name: str,
    data: Path | None,
    out: Path | None,
    config: Path | None,
    options: list[str],
    *,
    resume: bool = False,
    dry_run: bool = False,
    settings: bool = False,
) -> None:
    """What the verb and the programs of finetune/ share."""
    from penchant.engine.noise import quiet_libraries

    quiet_libraries()
    from penchant.training.config import CONFIGS
    from penchant.training.recipes import finetune
    from penchant.training.settings import describe, read_settings

    kind = CONFIGS[name]
    if settings:
        typer.echo(describe(kind))
        return
    chosen = read_settings(kind, config, options)
    if out is None and not dry_run:
        raise ConfigError("no folder to write to", where=name, remedy="give --out FOLDER, or --dry-run")
    from penchant.data.dataset import Dataset

    examples = getattr(chosen, "examples", None)
    if data is None and examples is None:
        raise ConfigError("no data", where=name, remedy="give --data FOLDER of `penchant prepare`")
    if data is not None and examples is not None:
        raise ConfigError(
            "a dataset and a file of examples are two sources of rows", where=name, remedy="give --data or --examples"
        )
    dataset = None if data is None else Dataset.load(data)
    if dry_run or out is None:
        from penchant.training.preview import preview

        typer.echo(preview(name, chosen, dataset, _begin))
        return
    outcome = finetune(name, chosen, dataset, out, resume=resume, on_record=_show, stages=_begin)
    from accelerate import PartialState

    if not PartialState().is_main_process:
        return  # one of many processes says how it ended
    typer.echo(
        f"{outcome.stopped}: {outcome.steps} of {outcome.total_steps} steps, {outcome.targets:,} targets, "
        f"{outcome.tokens:,} tokens, {outcome.seconds:.0f} s; best at step {outcome.best_step}"
    )
    for warning in outcome.warnings:
        err.print(f"warning: {warning}")
    typer.echo(str(out))


def _begin(stage: str, size: int | None) -> Callable[[int], None]:
    """A line for each thing that is made before the first step."""
    err.print(stage + (f" ({size:,})" if size else ""))
    return lambda n: None


def _show(record: dict[str, Any]) -> None:
    """A line for each validation, and for a step now and then."""
    if record["kind"] == "validation":
        numbers = {k: v for k, v in record.items() if "NDCG" in k or k == "AUC"}
        numbers = {"held-out loss": record["valid_loss"], **numbers}
        parts = [f"{k} none" if v is None else f"{k} {v:.4f}" for k, v in numbers.items()]
        err.print(f"step {record['step']:>6}  " + "  ".join(parts), highlight=False, soft_wrap=True)
    elif record["step"] % 10 == 0 or record["step"] <= 3:
        err.print(
            f"step {record['step']:>6} of {record['of']}  loss {record['loss']:.4f}  lr {record['learning_rate']:.2e}  "
            f"{record['examples/s']:.1f} examples/s  {record['tokens/s']:.0f} tokens/s  "
            f"{record['targets/s']:.1f} targets/s  {record['memory_mib']:,} MiB",
            highlight=False,
            soft_wrap=True,
        )
