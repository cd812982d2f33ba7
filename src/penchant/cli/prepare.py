"""penchant prepare: read interactions and items, check them, and save them as a dataset folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from penchant.data.check import check as check_files
from penchant.data.dataset import Dataset
from penchant.data.options import ReadOptions
from penchant.errors import ConfigError

_FAILED = 2


def prepare_command(
    interactions: Annotated[Path, typer.Argument(help="What users did: CSV, TSV, Parquet or JSONL (also .gz).")],
    items: Annotated[Path, typer.Argument(help="What there is: the items with their titles, in the same formats.")],
    out: Annotated[Path | None, typer.Option(help="The dataset folder to write.")] = None,
    map_: Annotated[
        list[str] | None,
        typer.Option("--map", help="name=column: which column of the files is user_id, item_id, timestamp, title ..."),
    ] = None,
    sep: Annotated[str | None, typer.Option(help="Separator of the interactions ('\\t' or tab for a tab).")] = None,
    items_sep: Annotated[str | None, typer.Option(help="Separator of the items.")] = None,
    encoding: Annotated[str, typer.Option(help="Encoding of the interactions, such as latin-1.")] = "utf-8",
    items_encoding: Annotated[str, typer.Option(help="Encoding of the items.")] = "utf-8",
    no_header: Annotated[
        bool, typer.Option("--no-header", help="No file has a header line: name the columns of both files.")
    ] = False,
    columns: Annotated[
        str | None, typer.Option(help="Column names of interactions without a header line: user_id,item_id,timestamp.")
    ] = None,
    items_columns: Annotated[
        str | None,
        typer.Option(help="Column names of items without a header line; the columns after them are ignored."),
    ] = None,
    quote: Annotated[
        bool, typer.Option("--quote/--no-quote", help="Whether double quotes enclose fields, or are plain text.")
    ] = True,
    null_value: Annotated[
        list[str] | None, typer.Option(help="A text that stands for a missing value, such as NA; may be repeated.")
    ] = None,
    context: Annotated[
        str | None, typer.Option(help="Further columns of the interactions to keep: place,hour.")
    ] = None,
    time_unit: Annotated[Literal["s", "ms", "us"], typer.Option(help="Unit of numeric times; dates need none.")] = "s",
    positive_threshold: Annotated[
        float | None, typer.Option(help="Keep only events whose rating is at least this.")
    ] = None,
    min_user_events: Annotated[int, typer.Option(min=0, help="Keep only users with at least this many events.")] = 0,
    min_item_events: Annotated[int, typer.Option(min=0, help="Keep only items with at least this many events.")] = 0,
    repeats: Annotated[
        Literal["keep", "first", "last"],
        typer.Option(help="Of a user's several events with one item keep all, the first or the last."),
    ] = "keep",
    unknown_items: Annotated[
        Literal["error", "drop"], typer.Option(help="What to do with events whose item isn't in the items.")
    ] = "error",
    items_without_title: Annotated[
        Literal["error", "drop"], typer.Option(help="What to do with items that have no title.")
    ] = "error",
    list_separator: Annotated[
        str | None, typer.Option(help="One row a user, with lists in its cells: what separates their values.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing: hold the files against every rule and print the verdicts.")
    ] = False,
) -> None:
    """Read interactions and items, check them, and save them as a dataset folder.

    The last line on stdout is the folder. With --check nothing is written, and the exit code is 2 if a rule fails.
    """
    if no_header and (columns is None or items_columns is None):
        raise ConfigError(
            "files without a header line need column names",
            where="option --no-header",
            remedy="give --columns and --items-columns (or those alone: each says its file has no header line)",
        )
    nulls = null_value or []
    mark = '"' if quote else None
    options = ReadOptions.of(
        map=_mapping(map_ or []),
        interactions_table=_table(sep, mark, encoding, columns, nulls),
        items_table=_table(items_sep, mark, items_encoding, items_columns, nulls),
        context=_names(context) or [],
        time_unit=time_unit,
        positive_threshold=positive_threshold,
        min_user_events=min_user_events,
        min_item_events=min_item_events,
        repeats=repeats,
        unknown_items=unknown_items,
        items_without_title=items_without_title,
        list_separator=list_separator,
    )
    if check:
        _check(interactions, items, options)
        return
    if out is None:
        raise ConfigError("no folder to write is given", where="option --out", remedy="give --out DIR, or --check")
    dataset = Dataset.read(interactions, items, options=options)
    dataset.save(out)
    _tell(dataset)
    typer.echo(str(out))


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",")]


def _table(sep: str | None, quote: str | None, encoding: str, columns: str | None, nulls: list[str]) -> dict[str, Any]:
    return {
        "separator": sep,
        "quote": quote,
        "encoding": encoding,
        "columns": _names(columns),
        "null_values": nulls,
    }


def _mapping(pairs: list[str]) -> dict[str, str]:
    mapping: dict[str, str] = {}
    for pair in pairs:
        name, equals, column = pair.partition("=")
        if not equals or not name or not column:
            raise ConfigError(
                f"{pair!r} is not name=column", where="option --map", remedy="such as --map user_id=userId"
            )
        if name in mapping:
            raise ConfigError(f"{name!r} is mapped twice", where="option --map", remedy="map each name once")
        mapping[name] = column
    return mapping


def _check(interactions: Path, items: Path, options: ReadOptions) -> None:
    rules = check_files(interactions, items, options)
    for rule in rules:
        typer.echo(f"{rule.verdict}  {rule.name}" + (f": {rule.detail}" if rule.detail else ""))
        if rule.ids:
            typer.echo(f"      ids: {', '.join(rule.ids)}")
    failed = sum(rule.verdict == "FAIL" for rule in rules)
    warned = sum(rule.verdict == "WARN" for rule in rules)
    typer.echo(f"{len(rules)} rules: {failed} failed, {warned} warned")
    if failed:
        raise typer.Exit(_FAILED)


def _tell(dataset: Dataset) -> None:
    rows = dataset.report["rows"]
    typer.echo(f"read      {rows['interactions']:,} rows of interactions, {rows['items']:,} of items")
    for reason, number in dataset.report["dropped"].items():
        typer.echo(f"dropped   {number:,} {reason.replace('_', ' ')}")
    first, last = dataset.time_range
    typer.echo(
        f"kept      {len(dataset.interactions):,} interactions, {dataset.n_users:,} users, {dataset.n_items:,} items"
    )
    typer.echo(f"from      {first} to {last}")
    typer.echo(f"content   {dataset.content_hash}")
