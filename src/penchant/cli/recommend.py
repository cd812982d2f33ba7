"""``penchant recommend``: the best items for a user, or for a history nobody has seen."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from penchant.cli.console import err
from penchant.errors import ConfigError


def recommend_command(
    run: Annotated[Path, typer.Argument(help="A folder made by `penchant fit`.")],
    user: Annotated[list[str] | None, typer.Option(help="A user id; may be given again.")] = None,
    history: Annotated[str | None, typer.Option(help="Item ids, oldest first, separated by commas.")] = None,
    history_title: Annotated[list[str] | None, typer.Option(help="A title, oldest first; may be given again.")] = None,
    text: Annotated[
        str | None, typer.Option(help="What is wanted, in words; alone, or with a user or a history.")
    ] = None,
    k: Annotated[int, typer.Option("-k", "--k", help="Items to recommend.")] = 10,
    method: Annotated[str, typer.Option(help="rank, retrieve or generate.")] = "rank",
    allow: Annotated[str | None, typer.Option(help="Only these item ids, separated by commas.")] = None,
    deny: Annotated[str | None, typer.Option(help="Not these item ids, separated by commas.")] = None,
    where: Annotated[
        list[str] | None, typer.Option(help="COLUMN=VALUE, != ~ (contains) !~ < <= > >=; may be given again.")
    ] = None,
    include_seen: Annotated[bool, typer.Option("--include-seen", help="Items of the history may come again.")] = False,
    diversity: Annotated[float, typer.Option(help="Variety for relevance, 0 to 1 (maximal marginal relevance).")] = 0.0,
    cap: Annotated[
        list[str] | None, typer.Option(help="COLUMN=N: at most N items of one value; may be given again.")
    ] = None,
    same_titles: Annotated[bool, typer.Option("--same-titles", help="Items of one title may stand together.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write a .parquet or .csv file instead of printing.")] = None,
) -> None:
    """Print rank, item, title, score and stage for each user; with --out the file's path is the last line."""
    if out is not None and out.suffix not in (".parquet", ".csv"):
        raise ConfigError(
            f"cannot write {out.suffix or 'a file without suffix'}", where=str(out), remedy="use .parquet or .csv"
        )
    if k < 1:
        raise ConfigError(f"k is {k}", where="-k", remedy="ask for at least 1 item")
    import polars as pl

    from penchant.filters import parse_condition

    caps = read_caps(cap or [])
    conditions = [parse_condition(text) for text in where or ()]
    predicate = pl.all_horizontal(conditions) if conditions else None
    from penchant.engine.noise import quiet_libraries

    quiet_libraries()
    from penchant.recommend import Recommender
    from penchant.tokens import clean

    answer = Recommender.load(run).recommend(
        user or None,
        k,
        history=read_ids(history),
        history_titles=history_title or None,
        method=method,  # type: ignore[arg-type]
        allow=read_ids(allow),
        deny=read_ids(deny),
        where=predicate,
        include_seen=include_seen,
        text=text,
        diversity=diversity,
        caps=caps,
        unique_titles=not same_titles,
    )
    if answer.is_empty():
        err.print("nothing is left to recommend: every item is seen, denied or filtered out")
    if out is not None:
        from penchant.files import staged_file

        with staged_file(out) as stage, stage.open("wb") as handle:
            if out.suffix == ".csv":
                answer.write_csv(handle)
            else:
                answer.write_parquet(handle)
        typer.echo(str(out))
        return
    for row in answer.iter_rows(named=True):
        name = "" if row["user_id"] is None else f"{row['user_id']}\t"
        title = clean(row["title"], None)  # a title may hold line breaks, or what a terminal would obey
        typer.echo(f"{name}{row['rank']}\t{row['item_id']}\t{title}\t{row['score']:.4f}\t{row['stage']}")


def read_caps(given: list[str]) -> dict[str, int]:
    """COLUMN=N as a mapping; ConfigError for what can't be read."""
    caps = {}
    for text in given:
        column, _, number = text.rpartition("=")
        if not column or not number.strip().isdigit():
            raise ConfigError(f"cannot read {text!r}", where="--cap", remedy="write e.g. genres=3")
        caps[column.strip()] = int(number)
    return caps


def read_ids(text: str | None) -> list[str] | None:
    """Ids separated by commas."""
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]
