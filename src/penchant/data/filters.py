"""Which events and items stay: known items, positive ratings, repeats, the k-core. Each tells what it dropped."""

from __future__ import annotations

import polars as pl

from penchant.data import rules
from penchant.data.findings import Findings
from penchant.data.options import ReadOptions
from penchant.data.reading import Rows
from penchant.schema import ITEM, RATING, TIME, TITLE, USER

Dropped = dict[str, int]


def with_titles(items: Rows, events: Rows | None, options: ReadOptions, findings: Findings) -> Dropped:
    """Keep the items that have a title; where those without are dropped, their events go along."""
    problem = rules.untitled_items(items.frame, items.column(TITLE), items.where)
    if problem is None:
        findings.judge("items have titles", None)
        return {}
    untitled = items.frame.filter(rules.is_blank(TITLE)).select(ITEM)
    if options.items_without_title == "drop":
        findings.judge("items have titles", None, fine=f"{rules.count(len(untitled), 'item')} without a title dropped")
    else:
        findings.judge("items have titles", problem)
    items.frame = items.frame.filter(~rules.is_blank(TITLE))
    dropped = {"items_without_title": len(untitled)}
    if events is not None:
        before = len(events.frame)
        events.frame = events.frame.join(untitled, on=ITEM, how="anti", maintain_order="left")
        dropped["events_of_items_without_title"] = before - len(events.frame)
    return dropped


def with_known_items(events: Rows, items: Rows, options: ReadOptions, findings: Findings) -> Dropped:
    """Keep the events whose item is in the items."""
    known = events.frame[ITEM].is_in(items.frame[ITEM].implode())
    unknown = pl.DataFrame(schema=events.frame.schema) if known.all() else events.frame.filter(~known)
    problem = rules.unknown_items(unknown, events.column(ITEM), events.where)
    if options.unknown_items == "drop" and problem is not None:
        findings.judge("events are of known items", None, fine=f"{problem.what}; dropped")
    else:
        findings.judge("events are of known items", problem)
    if unknown.is_empty():
        return {}
    events.frame = events.frame.filter(known)
    return {"events_of_unknown_items": len(unknown)}


def positive(events: pl.DataFrame, threshold: float | None) -> tuple[pl.DataFrame, Dropped]:
    """Keep the events rated at least ``threshold``; an event without a rating isn't known to be positive."""
    if threshold is None:
        return events, {}
    missing = events[RATING].null_count()
    kept = events.filter(pl.col(RATING) >= threshold)
    return kept, {"events_without_rating": missing, "events_below_threshold": len(events) - missing - len(kept)}


def without_repeats(events: pl.DataFrame, repeats: str) -> tuple[pl.DataFrame, Dropped]:
    """Keep all of a user's events with one item, or the first or the last in time (in file order where equal)."""
    if repeats == "keep":
        return events, {}
    # Sort by time alone: the sort is stable, so events of one moment stay in file order.
    order = events[TIME].arg_sort() if events[TIME].is_sorted() else _stable(events[TIME])
    keys = events.select(USER, ITEM)[order].with_columns(order.alias("__place__"))
    kept = keys.unique([USER, ITEM], keep="first" if repeats == "first" else "last", maintain_order=True)
    frame = events[kept["__place__"].sort()]
    return frame, {"repeated_events": len(events) - len(frame)}


def _stable(times: pl.Series) -> pl.Series:
    return times.to_frame("t").select(pl.arg_sort_by("t", maintain_order=True)).to_series()


def k_core(events: pl.DataFrame, min_user: int, min_item: int) -> tuple[pl.DataFrame, Dropped]:
    """Drop users and items with too few events, again and again until none is left that has too few."""
    before = len(events)
    while True:
        count = len(events)
        for column, least in ((USER, min_user), (ITEM, min_item)):
            if least > 1:
                events = events.filter(pl.len().over(column) >= least)
        if len(events) == count:
            return events, ({"events_outside_the_core": before - count} if before != count else {})


def kept_items(items: pl.DataFrame, events: pl.DataFrame, min_item: int) -> tuple[pl.DataFrame, Dropped]:
    """With a least number of events an item that lacks them leaves the catalogue too; else unsold items stay."""
    if min_item < 1:
        return items, {}
    kept = items.filter(pl.col(ITEM).is_in(events[ITEM].unique().implode()))
    return kept, {"items_with_too_few_events": len(items) - len(kept)}
