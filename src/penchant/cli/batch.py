"""``penchant batch``: every user's recommendations, scores of pairs, or vectors; stopped and gone on with at will."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from typing import Annotated, Any

import typer

from penchant.cli.console import err
from penchant.cli.recommend import read_caps, read_ids
from penchant.errors import ConfigError


def batch_command(
    context: typer.Context,
    run: Annotated[Path | None, typer.Argument(help="A folder made by `penchant fit`.")] = None,
    users: Annotated[
        str | None, typer.Option(help="Parquet (file, folder, glob, URL) with user_id, or history (list of item ids).")
    ] = None,
    pairs: Annotated[str | None, typer.Option(help="Parquet with user_id and item_id to score.")] = None,
    items: Annotated[str | None, typer.Option(help="With --embed items: Parquet with item_id; else all items.")] = None,
    embed: Annotated[str | None, typer.Option(help="users or items: vectors instead of recommendations.")] = None,
    every_user: Annotated[
        bool, typer.Option("--every-user", help="Instead of --users: all that the run knows.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Folder of the job; the same again goes on where it was.")] = None,
    k: Annotated[int, typer.Option("-k", "--k", help="Items to recommend.")] = 10,
    method: Annotated[str, typer.Option(help="rank, retrieve or generate.")] = "rank",
    allow: Annotated[str | None, typer.Option(help="Only these item ids, separated by commas.")] = None,
    deny: Annotated[str | None, typer.Option(help="Not these item ids, separated by commas.")] = None,
    where: Annotated[
        list[str] | None, typer.Option(help="COLUMN=VALUE, != ~ (contains) !~ < <= > >=; may be given again.")
    ] = None,
    include_seen: Annotated[bool, typer.Option("--include-seen", help="Items of the history may come again.")] = False,
    diversity: Annotated[float, typer.Option(help="Variety for relevance, 0 to 1.")] = 0.0,
    cap: Annotated[list[str] | None, typer.Option(help="COLUMN=N: at most N items of one value.")] = None,
    same_titles: Annotated[bool, typer.Option("--same-titles", help="Items of one title may stand together.")] = False,
    calibration: Annotated[float, typer.Option(help="With generate: share of the no-history likelihood out.")] = 0.0,
    shard_rows: Annotated[
        int | None, typer.Option(help="Rows of a shard: 8,192 with retrieve or --embed, else 256.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Rows answered together.")] = 256,
    backend: Annotated[
        str | None, typer.Option(help="transformers or vllm: what runs the LLM; else what the run was fitted with.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of the model on the CPU.")] = None,
    shard: Annotated[str | None, typer.Option(help="i/n, i from 1: every n-th shard, for array jobs.")] = None,
    runner: Annotated[str, typer.Option(help="local, or ray (pip install 'penchant[ray]').")] = "local",
    workers: Annotated[int, typer.Option(help="With ray: actors.")] = 2,
    worker_gpus: Annotated[float, typer.Option(help="With ray: GPUs of each actor.")] = 0.0,
    max_bad_share: Annotated[float, typer.Option(help="More quarantined rows than this share are an error.")] = 0.01,
    status: Annotated[Path | None, typer.Option(help="Only say how far the job in this folder is.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it would be and cost.")] = False,
) -> None:
    """Answer every row of a Parquet input. Prints a JSON summary, then the folder of the results (parts/*.parquet).

    Killed at any moment, the same command goes on where it was; SIGTERM lets the shard in hand be finished and exits 0.
    """
    stop = threading.Event()
    # From here on: the libraries alone take seconds to load.
    before = signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    context.call_on_close(lambda: signal.signal(signal.SIGTERM, before))
    if status is not None:
        from penchant.batch.progress import status as read_status

        typer.echo(_described(read_status(status)))
        return
    rows = _rows(users, pairs, items, embed, every_user)
    if run is None:
        raise ConfigError("no run", where="batch", remedy="give a folder made by `penchant fit`")
    from penchant.engine.noise import quiet_libraries

    quiet_libraries()
    from penchant.batch import BatchOptions
    from penchant.batch import dry_run as try_out
    from penchant.batch import run as work

    options = BatchOptions.of(
        None,
        job="score" if pairs is not None else f"embed-{embed}" if embed is not None else "recommend",
        k=k,
        method=method,
        allow=read_ids(allow),
        deny=read_ids(deny),
        where=where or (),
        include_seen=include_seen,
        diversity=diversity,
        caps=read_caps(cap or []),
        unique_titles=not same_titles,
        calibration=calibration,
        shard_rows=shard_rows,
        batch=batch,
        backend=backend,
    )
    if dry_run:
        _none_given(context, "--dry-run", "shard", "runner", "workers", "worker_gpus")
        typer.echo(json.dumps(try_out(run, rows, options, n_threads=threads)))
        return
    if out is None:
        raise ConfigError("no folder to write to", where="batch", remedy="give --out FOLDER, or --dry-run")
    if runner == "local":
        _none_given(context, "the local runner", "workers", "worker_gpus")
    summary = work(
        run,
        out,
        rows,
        options,
        part=shard,
        runner=runner,  # type: ignore[arg-type]
        workers=workers,
        worker_gpus=worker_gpus,
        max_bad_share=max_bad_share,
        n_threads=threads,
        stop=stop,
        tell=lambda numbers: err.print(_line(numbers)),
    )
    typer.echo(json.dumps(summary))
    if summary["state"] != "complete":
        err.print(f"{summary['state']}: {summary['shards_left']:,} of {summary['shards']:,} shards are left")
    typer.echo(str(out / "latest" if summary["state"] == "complete" else summary["run"]))


def _rows(users: str | None, pairs: str | None, items: str | None, embed: str | None, every_user: bool) -> str | None:
    """The input, None for all that the run knows; ConfigError unless one job is asked for, with an input."""
    if embed not in (None, "users", "items"):
        raise ConfigError(f"cannot embed {embed!r}", where="--embed", remedy="give users or items")
    if embed == "items":
        wrong = users is not None or pairs is not None or every_user
    else:
        wrong = [users is not None, pairs is not None, every_user].count(True) != 1 or items is not None
    if wrong or (pairs is not None and embed is not None):
        raise ConfigError(
            "give one of --users, --pairs, --every-user, or --embed items (with --items or all of them)",
            where="batch",
            remedy="such as --users users.parquet --out recs",
        )
    if embed == "items":
        return items
    return users if users is not None else pairs


def _none_given(context: typer.Context, beside: str, *names: str) -> None:
    """ConfigError where one of these options was given: it would be ignored."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = "--" + name.replace("_", "-")
            raise ConfigError(f"{option} means nothing beside {beside}", where=option, remedy="leave one of them out")


def _line(numbers: dict[str, Any]) -> str:
    """One line of progress."""
    if numbers["state"] == "setting up":
        return (
            f"set-up: {numbers['items_done']:,} of {numbers['items']:,} items scored without history, "
            f"{numbers['seconds_left']:,.0f} s left"
        )
    left, cached = numbers["seconds_left"], numbers["cached_share"]
    parts = [
        f"shard {numbers['shards_done']:,} of {numbers['shards']:,}",
        f"{numbers['users_done']:,} of {numbers['users']:,} rows",
        f"{numbers['users_per_s']:,.1f} users/s",
        f"{numbers['items_per_s']:,.1f} items/s",
        f"{numbers['tokens_per_s']:,.0f} tokens/s",
        *([] if cached is None else [f"{cached:.0%} of tokens cached"]),
        *([] if left is None else [f"{left:,.0f} s left"]),
    ]
    return ", ".join(parts)


def _described(found: dict[str, Any]) -> str:
    """The state of a job, in lines: the job, what is in quarantine, and each process."""
    sums = found["totals"]
    lines = [
        f"{found['run']}: {found['state']}; {found['shards_done']:,} of {found['shards']:,} shards, "
        f"{found['rows_done']:,} of {found['rows']:,} rows, {sums['results']:,} results",
        f"published: {found['published'] or 'nothing yet'}",
    ]
    if sums["reasons"]:
        lines.append("quarantine: " + ", ".join(f"{reason} {n:,}" for reason, n in sums["reasons"].items()))
    told = [f"process {n['pid']} on {n['host']}, {n['updated']}: {_line(n)}" for n in found["processes"]]
    return "\n".join([*lines, *told])
