"""``penchant fit``: a prepared dataset and a model in, a run out."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from penchant.cli.console import err, progress
from penchant.errors import ConfigError

if TYPE_CHECKING:
    from penchant.data.dataset import Dataset
    from penchant.data.split import Split
    from penchant.run_folder import FitConfig


class SplitKind(StrEnum):
    """How test and validation events are held out."""

    leave_last_out = "leave-last-out"
    global_time = "global-time"
    none = "none"


def fit_command(
    data: Annotated[Path, typer.Argument(help="A folder made by `penchant prepare`.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the run; not needed with --dry-run.")] = None,
    model: Annotated[str, typer.Option(help="A known name, a model's folder, or a hub id.")] = "smollm2-135m",
    adapter: Annotated[str | None, typer.Option(help="A peft adapter: folder or hub id.")] = None,
    ranker: Annotated[
        str | None, typer.Option(help="A peft adapter that ranks and generates; the vectors are made without it.")
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(help="bfloat16, float16 or float32; auto: bfloat16 where the device computes it, else float32."),
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    split: Annotated[
        SplitKind, typer.Option(help="none: everything is learnt from, bar a validation event a user.")
    ] = SplitKind.leave_last_out,
    valid_from: Annotated[datetime | None, typer.Option(help="global-time: start of validation (UTC).")] = None,
    test_from: Annotated[datetime | None, typer.Option(help="global-time: start of the test (UTC).")] = None,
    targets: Annotated[str, typer.Option(help="global-time: all, first or last event of a user in a window.")] = "all",
    config: Annotated[
        Path | None,
        typer.Option(help="YAML file of settings, or a shipped one's name (fit-quick); options go over it."),
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="Folder of templates that replace the shipped ones.")] = None,
    question: Annotated[
        str | None, typer.Option(help="What the LLM is asked of the candidates: likelihood, choose or yes_no.")
    ] = None,
    candidates: Annotated[int | None, typer.Option(help="Retrieved items the LLM ranks.")] = None,
    max_history: Annotated[int | None, typer.Option(help="Newest events in a prompt.")] = None,
    prompt_tokens: Annotated[int | None, typer.Option(help="Token budget of a prompt.")] = None,
    validation_users: Annotated[int | None, typer.Option(help="Users that the LLM's weight is chosen on.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Most epochs of the encoder.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights, batches and samples.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it would cost.")] = False,
) -> None:
    """Embed the items, train the interest encoder, choose how much the LLM weighs. Prints the run's folder last."""
    if out is None and not dry_run:
        raise ConfigError("no folder to write to", where="fit", remedy="give --out RUN, or --dry-run")
    from penchant.data.dataset import Dataset
    from penchant.run_folder import check_target

    if out is not None:
        check_target(out)  # now, not when the work is done
    chosen = _config(
        config,
        {
            "question": question,
            "candidates": candidates,
            "max_history": max_history,
            "prompt_tokens": prompt_tokens,
            "validation_users": validation_users,
            "seed": seed,
        },
        {"epochs": epochs, "seed": seed},
    )
    dataset = Dataset.load(data)
    cut = _split(dataset, split, valid_from, test_from, targets)
    typer.echo(f"{dataset}")
    typer.echo(cut.summary())

    from penchant.engine.noise import quiet_libraries

    quiet_libraries()
    from penchant.engine.folders import resolve_model
    from penchant.engine.loading import describe_model, load_engine
    from penchant.interest.fit import stopping_metric
    from penchant.prompt import Templates
    from penchant.recommend import Recommender

    templates = Templates(prompts)  # a broken template should cost no model loading
    engine = load_engine(model, adapter, dtype=dtype, device=device)  # type: ignore[call-overload]
    if dry_run:
        from penchant.estimate import estimate_fit

        estimate = estimate_fit(cut, engine, chosen, templates, sizes=describe_model(resolve_model(model)))
        for cost in estimate.costs:
            typer.echo(f"{cost.stage:<40} {cost.size:>14,} {cost.unit:<8} {cost.seconds:>8.0f} s")
        typer.echo(f"{'in all':<40} {'':>14} {'':<8} {estimate.seconds:>8.0f} s")
        for name, mib in estimate.memory_mib.items():
            typer.echo(f"memory: {name:<40} {mib:>10,.0f} MiB")
        return
    ranks = None if ranker is None else load_engine(model, ranker, dtype=dtype, device=device)  # type: ignore[call-overload]
    with progress() as stages:
        fitted = Recommender.fit(cut, engine, chosen, ranker=ranks, prompts=prompts, stages=stages)
    for warning in fitted.warnings:
        err.print(f"warning: {warning}")
    last = max(fitted.training, key=lambda epoch: epoch["valid"])
    typer.echo(
        f"encoder: {len(fitted.training)} epochs, best {int(last['epoch'])}, "
        f"validation {stopping_metric(chosen.encoder)} {last['valid']:.4f}"
    )
    if (near := fitted.encoder.neighbours) is not None:
        typer.echo(f"neighbours: weight {float(near.weight):g}")
    if (match := fitted.encoder.match) is not None:
        weight, shift = float(match.weight), float(match.shift)
        told = f"weight {weight:g}, and {shift:g} in the place of cold items' R" if weight else "validation wants none"
        typer.echo(f"text match: {told}")
    recall = fitted.index_recall()
    if recall is not None:
        typer.echo(f"index: hnsw, recall@100 of exact search {recall:.3f} on validation histories")
    fusion = fitted.fusion
    typer.echo(
        f"fusion: LLM weight {fusion.weight:g}, calibration {fusion.calibration:g}, chosen on {fusion.n_found} "
        f"validation users whose target was retrieved; NDCG@10 on the {fusion.n_users} drawn "
        f"{fusion.valid_ndcg or 0:.4f}, encoder alone {fusion.interest_ndcg or 0:.4f}"
    )
    typer.echo("seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in fitted.seconds.items()))
    if out is not None:
        fitted.save(out)
        typer.echo(str(out))


def _split(
    dataset: Dataset, kind: SplitKind, valid_from: datetime | None, test_from: datetime | None, targets: str
) -> Split:
    from penchant.data.split import global_time, leave_last_out

    if kind is SplitKind.global_time:
        return global_time(dataset, valid_from=valid_from, test_from=test_from, targets=targets)  # type: ignore[arg-type]
    if valid_from or test_from or targets != "all":
        raise ConfigError("--valid-from, --test-from and --targets need --split global-time", where="fit")
    return leave_last_out(dataset, test=kind is SplitKind.leave_last_out)


def _config(path: Path | None, options: dict[str, Any], encoder: dict[str, Any]) -> FitConfig:
    """The settings: the YAML file's, with the options that were given over them."""
    import yaml
    from pydantic import ValidationError

    from penchant.resources import config_file, config_names
    from penchant.run_folder import FitConfig

    values: dict[str, Any] = {}
    if path is not None:
        path = config_file(path)
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: not UTF-8, or a date like 2020-99-99
            raise ConfigError(
                f"cannot be read as YAML: {error}",
                where=str(path),
                remedy=f"give a file, or the name of one of: {config_names(fit=True)}",
            ) from error
    if not isinstance(values, dict):
        raise ConfigError("holds no mapping of settings", where=str(path), remedy="write e.g. `candidates: 20`")
    values |= {name: value for name, value in options.items() if value is not None}
    inner = {name: value for name, value in encoder.items() if value is not None}
    if inner and isinstance(values.get("encoder") or {}, dict):
        values["encoder"] = {**(values.get("encoder") or {}), **inner}
    try:
        return FitConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise ConfigError(
            f"{name}: {first['msg']} (given: {first['input']!r})",
            where=str(path) if path else "fit",
            remedy=f"the settings are: {', '.join(FitConfig.model_fields)}",
        ) from error
