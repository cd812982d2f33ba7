"""The form with one row a user and whole lists in its cells, turned into one row an event."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import polars as pl

from penchant.data.findings import Findings, Problem
from penchant.data.rules import place
from penchant.data.tables import ROW
from penchant.schema import EVENT, ITEM, RATING, TIME

# Columns that may hold one value an item, besides context; free text may hold the separator as text.
_SPLIT = (ITEM, TIME, RATING, EVENT)


def list_columns(frame: pl.DataFrame, separator: str | None, context: Sequence[str] = ()) -> list[str]:
    """The columns that hold lists: list-typed ones, and with a separator the texts in which it occurs.

    With a separator these are ids, times, ratings, event types and ``context``. A text column without any separator in
    it is one value for the whole row; ITEM never is.
    """
    found = [name for name, kind in frame.schema.items() if isinstance(kind, pl.List)]
    if separator is not None:
        for name in (*_SPLIT, *context):
            is_text = name in frame.columns and frame.schema[name] == pl.String
            if is_text and (name == ITEM or frame[name].str.contains(separator, literal=True).any()):
                found.append(name)
    return found


def explode_lists(
    frame: pl.DataFrame,
    separator: str | None,
    context: Sequence[str],
    mapping: Mapping[str, str],
    where: str,
    findings: Findings,
) -> pl.DataFrame:
    """One row an item of each list; the other columns repeat, or hold lists of the same length.

    Rows stay in order. Empty lists give no row. A list of another length than the row's items is a problem.
    """
    arrays = [name for name, kind in frame.schema.items() if isinstance(kind, pl.Array)]
    frame = frame.with_columns(pl.col(arrays).arr.to_list()) if arrays else frame
    lists = list_columns(frame, separator, context)
    if ITEM not in lists:
        return frame
    split = [
        pl.col(name).str.split(separator or "").list.eval(pl.element().str.strip_chars())
        for name in lists
        if frame.schema[name] == pl.String
    ]
    frame = frame.with_columns(split)
    for name in lists:
        if name == ITEM:
            continue
        uneven = frame.filter(pl.col(name).list.len().fill_null(0) != pl.col(ITEM).list.len().fill_null(0))
        problem = None if uneven.is_empty() else _uneven(uneven, name, mapping, where)
        if findings.judge(f"{name} lists are as long as the item lists", problem):
            frame = frame.join(uneven.select(ROW), on=ROW, how="anti", maintain_order="left")
    return frame.filter((pl.col(ITEM).list.len() > 0) | pl.col(ITEM).is_null()).explode(lists)


def _uneven(uneven: pl.DataFrame, name: str, mapping: Mapping[str, str], where: str) -> Problem:
    items, others = (uneven[column].list.len().fill_null(0)[0] for column in (ITEM, name))
    return Problem(
        f"{items} values of {mapping.get(ITEM, ITEM)!r} and {others} of {mapping.get(name, name)!r}",
        place(where, uneven[ROW][0], mapping.get(name, name)),
        "give one value an item, or one value for the whole row in every row",
    )
