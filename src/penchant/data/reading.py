"""From a file's columns to canonical rows that keep every rule."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from penchant.data import rules
from penchant.data.columns import INTERACTIONS_ONLY, choose, missing_problem
from penchant.data.findings import Findings
from penchant.data.lists import explode_lists
from penchant.data.options import ReadOptions
from penchant.data.tables import ROW, Table, TableOptions, open_table, table_of_frame
from penchant.data.times import parse_times
from penchant.errors import DataError
from penchant.schema import ITEM, OPTIONAL, RATING, TIME, TITLE, USER, VALUES

Source = str | Path | pl.DataFrame


@dataclass
class Rows:
    """The rows of one file under canonical names, with ``ROW``; what they are called and where they came from."""

    frame: pl.DataFrame
    where: str
    mapping: dict[str, str]
    found: list[str]
    read: int

    def column(self, name: str) -> str:
        """The file's own name of a canonical column."""
        return self.mapping.get(name, name)


def _opened(source: Source, options: TableOptions, where: str) -> AbstractContextManager[Table]:
    if isinstance(source, pl.DataFrame):
        return nullcontext(table_of_frame(source, where))
    return open_table(source, options)


def read_interactions(source: Source, options: ReadOptions, findings: Findings) -> Rows | None:
    """Read the events: USER, ITEM as String, TIME as Int64 microseconds, the optional and context columns, ROW.

    Rows stand in file order. Returns None only where the findings keep going and the columns or the kinds of ids
    leave nothing to look at.
    """
    with _opened(source, options.interactions_table, "interactions") as table:
        rated = [RATING] if options.positive_threshold is not None else []
        required = list(dict.fromkeys([USER, ITEM, *rated, *options.context]))
        optional = [name for name in (TIME, *OPTIONAL) if name not in required]
        chosen, missing = choose(table.columns, required, optional, options.map)
        if not missing and TIME not in chosen and not _holds_lists(table, chosen, options):
            missing.append(TIME)
        problem = missing_problem(missing, table.columns, options.map, table.where)
        if findings.judge("interactions have their columns", problem):
            return None
        rows = Rows(table.collect(chosen), table.where, chosen, table.columns, 0)
    rows.read = len(rows.frame)
    if not rows.read:
        raise DataError("there are no rows", where=rows.where, remedy="give at least one event")
    rows.frame = explode_lists(rows.frame, options.list_separator, options.context, rows.mapping, rows.where, findings)
    if _wrong_id_kinds(rows, (USER, ITEM), findings):
        return None
    _clean_ids(rows, (USER, ITEM), findings)
    _read_times(rows, options, findings)
    _read_ratings(rows, findings)
    numbers = (USER, ITEM, TIME, RATING, ROW)
    texts = [name for name in rows.frame.columns if name not in numbers]
    rows.frame = rows.frame.with_columns(as_text(name, rows.frame.schema[name], rows.where) for name in texts)
    first = [name for name in (USER, ITEM, TIME, *OPTIONAL) if name in rows.frame.columns]
    rows.frame = rows.frame.select(*first, *(name for name in texts if name not in first), ROW)
    return rows


def read_items(source: Source, options: ReadOptions, findings: Findings) -> Rows | None:
    """Read the items: ITEM and TITLE as String, every further column as text (lists joined with '|'), ROW.

    Returns None only where the findings keep going and the columns or the ids leave nothing to look at.
    """
    with _opened(source, options.items_table, "items") as table:
        mapped = tuple(name for name in options.map if name not in (*INTERACTIONS_ONLY, *options.context, ITEM, TITLE))
        chosen, missing = choose(table.columns, (ITEM, TITLE), mapped, options.map)
        problem = missing_problem(missing, table.columns, options.map, table.where)
        if findings.judge("items have their columns", problem):
            return None
        taken = set(chosen.values()) | set(chosen)
        chosen |= {name: name for name in table.columns if name not in taken}
        rows = Rows(table.collect(chosen), table.where, chosen, table.columns, 0)
    rows.read = len(rows.frame)
    if not rows.read:
        raise DataError("there are no rows", where=rows.where, remedy="give at least one item")
    if _wrong_id_kinds(rows, (ITEM,), findings):
        return None
    texts = [name for name in rows.frame.columns if name not in (ROW, ITEM)]
    rows.frame = rows.frame.with_columns(as_text(name, rows.frame.schema[name], rows.where) for name in texts)
    _clean_ids(rows, (ITEM,), findings)
    if findings.judge("item ids are unique", rules.duplicate_items(rows.frame, rows.column(ITEM), rows.where)):
        rows.frame = rows.frame.unique(ITEM, keep="first", maintain_order=True)
    return rows


def _holds_lists(table: Table, chosen: dict[str, str], options: ReadOptions) -> bool:
    if options.list_separator is not None:
        return True
    return isinstance(table.rows.collect_schema()[chosen[ITEM]], pl.List | pl.Array)


def _wrong_id_kinds(rows: Rows, names: tuple[str, ...], findings: Findings) -> bool:
    wrong = False
    for name in names:
        problem = rules.id_kind(rows.frame[name], rows.column(name), rows.where)
        wrong |= findings.judge(f"{_file(rows)}{name} holds integers or texts", problem)
    return wrong


def _file(rows: Rows) -> str:
    return "items' " if USER not in rows.mapping else "interactions' "


def _clean_ids(rows: Rows, names: tuple[str, ...], findings: Findings) -> None:
    for name in names:
        rows.frame = rows.frame.with_columns(pl.col(name).cast(pl.String))
        problem = rules.null_ids(rows.frame, name, rows.column(name), rows.where)
        if findings.judge(f"{_file(rows)}{name} is never empty", problem):
            rows.frame = rows.frame.filter(~rules.is_blank(name))


def _read_times(rows: Rows, options: ReadOptions, findings: Findings) -> None:
    if TIME not in rows.frame.columns:
        # A list without times: its order is the only time there is, counted on over a user's rows.
        position = pl.int_range(pl.len(), dtype=pl.Int64).over(USER)
        rows.frame = rows.frame.with_columns(position.alias(TIME))
        return
    raw = rows.frame[TIME]
    times, too_far = parse_times(raw, options.time_unit)
    column, where = rows.column(TIME), rows.where
    broken = findings.judge("times can be read", rules.bad_times(raw, times, too_far, rows.frame, column, where))
    far = rules.far_times(raw, too_far, options.time_unit, rows.frame, column, where)
    broken |= findings.judge("times fit their unit", far)
    compact = rules.compact_dates(times, options.time_unit, rows.frame, column, where)
    findings.judge("times are no dates written as numbers", compact)
    rows.frame = rows.frame.with_columns(times.alias(TIME))
    if broken:
        rows.frame = rows.frame.filter(pl.col(TIME).is_not_null())


def _read_ratings(rows: Rows, findings: Findings) -> None:
    if RATING not in rows.frame.columns:
        return
    raw = rows.frame[RATING]
    ratings = parse_ratings(raw)
    problem = rules.bad_ratings(raw, ratings, rows.frame, rows.column(RATING), rows.where)
    findings.judge("ratings are numbers", problem)
    rows.frame = rows.frame.with_columns(ratings.alias(RATING))


def parse_ratings(raw: pl.Series) -> pl.Series:
    """Float64; null where there is none (empty or NaN) and where it isn't a number."""
    if raw.dtype == pl.String:
        raw = raw.str.strip_chars()
    elif not (raw.dtype.is_numeric() or raw.dtype == pl.Null):
        return pl.Series(raw.name, [None], dtype=pl.Float64).new_from_index(0, len(raw))
    return raw.cast(pl.Float64, strict=False).fill_nan(None)


def as_text(name: str, kind: pl.DataType, where: str) -> pl.Expr:
    """A column as String: lists joined with '|', structures as JSON, an empty text is a missing one.

    Raises DataError for a column of bytes or objects.
    """
    if kind in (pl.Binary, pl.Object):
        raise DataError(
            f"the column holds {kind} values, which are no text",
            where=rules.place(where, None, name),
            remedy="leave the column out of the file",
        )
    text = _text(pl.col(name), kind)
    return pl.when(text != "").then(text).alias(name)


def _text(value: pl.Expr, kind: pl.DataType) -> pl.Expr:
    if isinstance(kind, pl.List | pl.Array):
        inner = kind.inner if isinstance(kind.inner, pl.DataType) else kind.inner()
        values = value.arr.to_list() if isinstance(kind, pl.Array) else value
        return values.list.eval(_text(pl.element(), inner)).list.join(VALUES, ignore_nulls=True)
    if isinstance(kind, pl.Struct):
        return value.struct.json_encode()
    return value.cast(pl.String)
