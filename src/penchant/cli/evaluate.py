"""``penchant evaluate``: an honest table for a run, on the test targets of its own split or of a task."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from penchant.cli.console import progress
from penchant.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import polars as pl

    from penchant.data.history import Targets
    from penchant.evaluation.baselines import FittedSystem
    from penchant.evaluation.protocol import Protocol
    from penchant.evaluation.report import Report
    from penchant.evaluation.tasks import Task
    from penchant.recommend import Recommender, Stages


def evaluate_command(
    run: Annotated[Path, typer.Argument(help="A folder made by `penchant fit`.")],
    task: Annotated[str | None, typer.Option(help="A task whose targets and candidates are used.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder of the task's data.")] = None,
    lists: Annotated[
        Path | None, typer.Option(help="Score this parquet file of recommendations (user_id, item_id, rank or score).")
    ] = None,
    k: Annotated[
        int | None, typer.Option("-k", "--k", help="Cut-off of the metrics; default: the task's, or 10.")
    ] = None,
    llm_users: Annotated[
        int | None,
        typer.Option(help="Seeded test users that go through the LLM stage, 0: none; default: the task's, or 500."),
    ] = None,
    llm_found_only: Annotated[
        bool | None,
        typer.Option(
            "--llm-found-only/--llm-all",
            help="Ask the LLM of retrieved targets only: the same accuracy for less; default: the task's, or all.",
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the sample and of the intervals; default: the task's first, or 0.")
    ] = None,
    average: Annotated[
        str | None,
        typer.Option(help="event: targets count alike; user: users do. Default: the task's, or event."),
    ] = None,
    seen: Annotated[
        str | None,
        typer.Option(help="mask: seen items are not recommended; keep: repeats count. Default: the task's, or mask."),
    ] = None,
    baselines: Annotated[
        str | None,
        typer.Option(help="Also fit and tune these, e.g. bm25,item_knn,ease, and test ours against the best of them."),
    ] = None,
    slice_by: Annotated[list[str] | None, typer.Option(help="An item column to slice by; may be repeated.")] = None,
    users: Annotated[Path | None, typer.Option(help="CSV of users to slice by: user_id and further columns.")] = None,
    price_per_hour: Annotated[
        float | None, typer.Option(help="Of this machine, in any currency: the costs then say what 1,000 users cost.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Also write the report, with machine and versions, here.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write it as one self-contained page (.html).")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write it as Markdown (.md).")] = None,
) -> None:
    """Print Recall, NDCG and MRR with 95% intervals for the model, its parts and plain baselines."""
    from penchant.engine.noise import quiet_libraries

    quiet_libraries()
    from penchant.recommend import Recommender

    _check_choices(average, seen, html, markdown)
    model = Recommender.load(run)
    if task is not None and (asked := _yes_no_task(task)) is not None:
        ranking: dict[str, object] = {
            "--lists": lists,
            "-k": k,
            "--llm-users": llm_users,
            "--llm-found-only": llm_found_only,
            "--average": average,
            "--seen": seen,
            "--slice-by": slice_by,
            "--users": users,
            "--baselines": baselines,
            "--price-per-hour": price_per_hour,
        }
        report = _evaluate_yes_no(model, asked, data_dir, seed or 0, [n for n, v in ranking.items() if v is not None])
        typer.echo(report.to_text())
        _write(report, json, html, markdown)
        return
    targets, protocol, published = _asked(model, task, data_dir)
    given: dict[str, Any] = {"k": k, "llm_users": llm_users, "llm_found_only": llm_found_only}
    given |= {"seed": seed, "average": average, "seen": seen}
    own, protocol = protocol, replace(protocol, **{name: v for name, v in given.items() if v is not None})
    if lists is not None:
        for name, value in (
            ("--llm-users", llm_users),
            ("--llm-found-only", llm_found_only),
            ("--baselines", baselines),
            ("--price-per-hour", price_per_hour),
        ):
            if value:
                raise ConfigError(
                    "a table of recommendations is set beside popularity alone",
                    where=f"evaluate, {name}",
                    remedy=f"give --lists or {name}, and not both",
                )
        from penchant.evaluation.evaluate_lists import evaluate_lists

        report = evaluate_lists(
            model.split, targets, lists, protocol, item_columns=slice_by or (), users=_read_users(users)
        )
    else:
        from penchant.evaluation.evaluate import evaluate

        with progress() as stages:
            fitted = _fit_baselines(model, baselines, protocol, stages)
            report = evaluate(
                model,
                targets,
                baselines=[one.system for one in fitted],
                **{part.name: getattr(protocol, part.name) for part in fields(protocol)},
                item_columns=slice_by or (),
                users=_read_users(users),
                price_per_hour=price_per_hour,
                stages=stages,
            )
        _add_tuning(report, fitted)
    _add_published(report, published, own, protocol, lists=lists is not None)
    typer.echo(report.to_text())
    _write(report, json, html, markdown)


def _check_choices(average: str | None, seen: str | None, html: Path | None, markdown: Path | None) -> None:
    """What is wrong with the options, before anything is loaded."""
    for name, value, known in (("average", average, ("event", "user")), ("seen", seen, ("mask", "keep"))):
        if value is not None and value not in known:
            raise ConfigError(f"unknown --{name} {value!r}", where="evaluate", remedy=f"use {' or '.join(known)}")
    for path, ending in ((html, ".html"), (markdown, ".md")):
        if path is not None and path.suffix.lower() != ending:
            raise ConfigError(f"the page's name does not end in {ending}", where=str(path), remedy=f"name it x{ending}")


def _asked(
    model: Recommender, name: str | None, data_dir: Path | None
) -> tuple[Targets, Protocol, list[dict[str, object]]]:
    """The run's own test targets, or the task's with its protocol: then the run must be of its data and split."""
    if name is None:
        from penchant.evaluation.protocol import Protocol

        return model.split.test, Protocol(), []
    from penchant.evaluation.tasks import asked_of, load_task, read_data, split_of

    task = load_task(name)
    dataset = read_data(task, data_dir)
    if dataset.content_hash != model.split.dataset.content_hash:
        raise ConfigError(
            f"the run is of other data (content hash {model.split.dataset.content_hash[:12]}) than the task "
            f"({dataset.content_hash[:12]})",
            where=f"task {name}",
            remedy="fit a run on the task's data, read and filtered as its YAML says",
        )
    spec = split_of(task, dataset).spec
    if spec != model.split.spec:
        raise ConfigError(
            f"the run's split {model.split.spec} is not the task's {spec}",
            where=f"task {name}",
            remedy="fit the run with the task's split",
        )
    asked = asked_of(task, model.split, data_dir)
    published = [one.model_dump(mode="json") for one in task.published]
    return asked.targets, asked.protocol(task), published


def _yes_no_task(name: str) -> Task | None:
    """The task, where it is one of single answers and not a ranking."""
    from penchant.evaluation.tasks import load_task

    task = load_task(name)
    return task if task.data.kind == "tallrec" else None


def _evaluate_yes_no(model: Recommender, task: Task, data_dir: Path | None, seed: int, given: list[str]) -> Report:
    """The answers of the run's own LLM and templates to the task's rows; its data and encoder take no part."""
    from penchant.evaluation.readers import YesNo, read_yes_no
    from penchant.evaluation.yes_no import LLM, TASTE, answer_margins, taste_margins, weighed_on, yes_no_report

    if given:
        raise ConfigError(
            "a yes/no task ranks nothing", where=f"evaluate, {given[0]}", remedy="leave the option out, or give no task"
        )
    if not isinstance(task.data, YesNo) or data_dir is None:
        raise ConfigError("the task reads files", where=task.about, remedy="give --data-dir")
    rows, train, valid = (read_yes_no(task.data, part, data_dir) for part in ("test", "train", "valid"))
    held = weighed_on(valid, seed)
    asked = [*rows, *held]
    tokens = model.config.prompt_tokens
    with progress() as stages:
        ask, weigh = stages("ask the LLM", len(asked)), stages("weigh likes against dislikes", 2 * len(asked))
        margins = {
            LLM: answer_margins(model.engine, model.templates, asked, prompt_tokens=tokens, progress=ask),
            TASTE: taste_margins(model.engine, model.templates, asked, prompt_tokens=tokens, progress=weigh),
        }
    n = len(rows)
    of_rows, of_held = ({name: own[part] for name, own in margins.items()} for part in (slice(n), slice(n, None)))
    report = yes_no_report(of_rows, rows, train, valid=(held, of_held) if held else None, seed=seed)
    report.settings.update(templates=model.templates.hash(), model=model.fingerprint, engine=model.engine_source)
    report.published.extend(one.model_dump(mode="json") for one in task.published)
    return report


def _fit_baselines(model: Recommender, names: str | None, protocol: Protocol, stages: Stages) -> Sequence[FittedSystem]:
    """The baselines named, fitted on the run's own split and vectors; none where none is named."""
    if not names:
        return []
    from penchant.evaluation.baselines import NAMES, Name, fit_baselines
    from penchant.interest.vectors import standardise

    known: dict[str, Name] = {name: name for name in NAMES if name != "llm"}  # the run's own LLM has its rows
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        raise ConfigError(
            f"unknown baseline {unknown[0]!r}" if unknown else "no baseline is named",
            where="evaluate, --baselines",
            remedy=f"use some of {', '.join(known)}; separated by commas",
        )
    n_items = model.log.n_items
    return fit_baselines(
        model.split,
        which=[known[name] for name in wanted],
        texts=model.texts[:n_items],
        vectors=standardise(model.vectors[:n_items]),
        seed=protocol.seed,
        seen=protocol.seen,
        seen_last=protocol.seen_last,
        stages=stages,
    )


def _add_tuning(report: Report, fitted: Sequence[FittedSystem]) -> None:
    """What was tried for each baseline, and within which budget."""
    from penchant.evaluation.baselines import Budget, trial_rows

    for one in fitted:
        report.trials.extend(trial_rows(one.to_dict()))
    if fitted:
        report.notes.append(
            f"baselines tuned on validation NDCG@10, each {Budget()} (those that are fitted at once: their whole grid "
            "in these seconds); ours as the run has it"
        )


def _add_published(
    report: Report, published: list[dict[str, object]], task: Protocol, ran: Protocol, *, lists: bool
) -> None:
    """Other people's numbers stand in the report only where it was made under the task's own protocol."""
    changed = [f"--{name}" for name in ("k", "seen", "average") if getattr(task, name) != getattr(ran, name)]
    changed += ["--lists"] if lists else []
    if published and changed:
        report.notes.append(f"published numbers are left out: with {', '.join(changed)} the protocol is not the task's")
    else:
        report.published.extend(published)


def _read_users(path: Path | None) -> pl.DataFrame | None:
    if path is None:
        return None
    import polars as pl
    from polars.exceptions import PolarsError

    try:
        return pl.read_csv(path, schema_overrides={"user_id": pl.String})
    except (PolarsError, OSError) as error:
        raise ConfigError(f"cannot be read as CSV ({error})", where=str(path), remedy="check --users") from error


def _write(report: Report, json: Path | None, html: Path | None, markdown: Path | None) -> None:
    found = report.to_dict()
    if json is not None:
        from penchant.files import write_json

        write_json(json, found)
        typer.echo(str(json))
    for path in (html, markdown):
        if path is not None:
            from penchant.evaluation.page import write_page

            write_page(found, path)
            typer.echo(str(path))
