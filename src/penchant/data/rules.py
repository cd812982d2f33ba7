"""The rules that rows must keep: each looks at a frame and returns the problem, or None.

A frame holds canonical columns and ``ROW``. The problem names the first offending row, the number of
them, and up to ten ids.
"""

from __future__ import annotations

from datetime import UTC, datetime

import polars as pl

from penchant.data.findings import Problem, some_ids
from penchant.data.likeness import words_shared
from penchant.data.order import id_ranks, sort_interactions
from penchant.data.tables import ROW
from penchant.data.times import TimeUnit, fitting_unit
from penchant.schema import ITEM, RATING, TIME, TITLE, USER

# 20240131183000 or 202401311830: a day and a time of it, without the marks between.
_COMPACT = r"^(19|20)\d\d(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])([01]\d|2[0-3])[0-5]\d([0-5]\d)?$"


def place(where: str, row: int | None, column: str) -> str:
    """'ratings.csv, row 17, column 'userId''."""
    return f"{where}, column {column!r}" if row is None else f"{where}, row {row}, column {column!r}"


def count(number: int, singular: str, plural: str | None = None) -> str:
    """'1 row', '5 rows'."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def _others(number: int) -> str:
    return "" if number <= 1 else f" (and {count(number - 1, 'more row')})"


def id_kind(values: pl.Series, column: str, where: str) -> Problem | None:
    """Ids are texts or integers: 3.0 and 3 would be two users, and which one is meant nobody knows."""
    kind = values.dtype
    if kind.is_integer() or kind in (pl.String, pl.Categorical, pl.Enum, pl.Null):
        if kind != pl.String or values.is_empty() or not _all_like_floats(values):
            return None
        kind = pl.Float64()
    example = values.drop_nulls().head(1).to_list()
    shown = f", such as {example[0]!r}" if example else ""
    return Problem(
        f"the ids are of type {kind}{shown}; ids are integers or texts",
        place(where, None, column),
        "write the ids as integers or as texts in the file (pandas turns integers with gaps into floats: "
        "use dtype 'Int64' or str)",
        some_ids(values.drop_nulls().head(10)),
    )


def _all_like_floats(values: pl.Series) -> bool:
    like = r"^-?\d+\.0+$"
    first = values.drop_nulls().head(100)
    if first.is_empty() or not first.str.contains(like).all():
        return False
    return bool(values.drop_nulls().str.contains(like).all())


def null_ids(frame: pl.DataFrame, name: str, column: str, where: str) -> Problem | None:
    """Every row has an id that isn't empty."""
    bad = frame.filter(is_blank(name)).head(1)
    if bad.is_empty():
        return None
    number = int(frame.select(is_blank(name).sum()).item())
    return Problem(
        f"{name} is empty{_others(number)}",
        place(where, bad[ROW][0], column),
        "fill the id in, or remove the row",
    )


def is_blank(name: str) -> pl.Expr:
    """Null, empty or white space."""
    return pl.col(name).is_null() | (pl.col(name).str.strip_chars() == "")


def bad_times(
    raw: pl.Series, times: pl.Series, too_far: pl.Series, rows: pl.DataFrame, column: str, where: str
) -> Problem | None:
    """Every row has a time that can be read."""
    bad = times.is_null() & ~too_far
    if not bad.any():
        return None
    first = bad.arg_true()[0]
    value = raw[first]
    what = f"{value!r} is not a time"
    if value is None or (isinstance(value, str) and not value.strip()):
        what = "the time is missing"
    elif isinstance(value, pl.Series):
        what = "a list is not a time"
    return Problem(
        f"{what}{_others(int(bad.sum()))}",
        place(where, rows[ROW][first], column),
        "write a number of seconds (or --time-unit ms, us) since 1970, or a date such as 2024-01-31T18:30:00",
        some_ids(rows.filter(bad)[USER]),
    )


def far_times(
    raw: pl.Series, too_far: pl.Series, unit: TimeUnit, rows: pl.DataFrame, column: str, where: str
) -> Problem | None:
    """No numeric time lies past the year 2200: it is in a finer unit than said."""
    if not too_far.any():
        return None
    first = too_far.arg_true()[0]
    fitting = fitting_unit(float(raw[first]))
    remedy = (
        f"--time-unit {fitting}" if fitting is not None else "divide nanoseconds by 1000 and read with --time-unit us"
    )
    if raw.filter(too_far).cast(pl.String).str.strip_chars().str.contains(_COMPACT).all():
        remedy = "write times as 2024-01-31T18:30:00: these look like dates without their marks"
    return Problem(
        f"{raw[first]} read in {unit} lies after the year 2200{_others(int(too_far.sum()))}",
        place(where, rows[ROW][first], column),
        remedy,
        some_ids(rows.filter(too_far)[USER]),
    )


def compact_dates(times: pl.Series, unit: TimeUnit, rows: pl.DataFrame, column: str, where: str) -> Problem | None:
    """Not every time is a number like 20240131: in seconds that would be a day in August 1970."""
    seconds = times // 1_000_000
    least, most = seconds.min(), seconds.max()
    if unit != "s" or not isinstance(least, int) or not isinstance(most, int) or least < 19000101 or most > 20991231:
        return None
    month, day = seconds // 100 % 100, seconds % 100
    if not (month.is_between(1, 12) & day.is_between(1, 31)).all():
        return None
    return Problem(
        f"{seconds.drop_nulls()[0]} and all other times look like dates, and would be read as seconds",
        place(where, rows[ROW][0], column),
        "write dates as 2024-01-31",
        some_ids(rows[USER]),
    )


def bad_ratings(raw: pl.Series, ratings: pl.Series, rows: pl.DataFrame, column: str, where: str) -> Problem | None:
    """A rating that is given is a finite number."""
    given = raw.is_not_null()
    if raw.dtype == pl.String:
        given = given & ~raw.str.strip_chars().str.to_lowercase().is_in(["", "nan"])
    elif raw.dtype.is_float():
        given = given & raw.is_not_nan()
    bad = given & (ratings.is_null() | ratings.is_infinite())
    if not bad.any():
        return None
    first = bad.arg_true()[0]
    return Problem(
        f"{raw[first]!r} is not a rating{_others(int(bad.sum()))}",
        place(where, rows[ROW][first], column),
        f"write ratings as numbers, or map another column (--map {RATING}=<column>)",
        some_ids(rows.filter(bad)[USER]),
    )


def duplicate_items(items: pl.DataFrame, column: str, where: str) -> Problem | None:
    """Every item has one row."""
    bad = items.filter(pl.col(ITEM).is_duplicated())
    if bad.is_empty():
        return None
    first = bad[ITEM][0]
    rows = bad.filter(pl.col(ITEM) == first)[ROW].head(2).to_list()
    ids = bad[ITEM].unique(maintain_order=True)
    more = "" if len(ids) == 1 else f" (and {count(len(ids) - 1, 'more id')})"
    return Problem(
        f"item {first!r} is there twice, in rows {rows[0]} and {rows[1]}{more}",
        place(where, rows[1], column),
        "keep one row an item",
        some_ids(ids),
    )


def untitled_items(items: pl.DataFrame, column: str, where: str) -> Problem | None:
    """Every item has a title: it is what the language model reads."""
    bad = items.filter(is_blank(TITLE))
    if bad.is_empty():
        return None
    return Problem(
        f"item {bad[ITEM][0]!r} has no title{_others(len(bad))}",
        place(where, bad[ROW][0], column),
        f"give it a title, map another column (--map {TITLE}=<column>), or --items-without-title drop",
        some_ids(bad[ITEM]),
    )


def unknown_items(unknown: pl.DataFrame, column: str, where: str) -> Problem | None:
    """Every event's item is in the items; ``unknown`` holds the events of which that isn't so."""
    if unknown.is_empty():
        return None
    ids = unknown[ITEM].unique(maintain_order=True)
    more = ", ..." if len(ids) > 5 else ""
    return Problem(
        f"{count(len(ids), 'unknown item')} in {count(len(unknown), 'event')}, not among the items: "
        f"{', '.join(ids.head(5).to_list())}{more}",
        place(where, unknown[ROW][0], column),
        "add them to the items, or --unknown-items drop",
        some_ids(ids),
    )


def few_events(interactions: pl.DataFrame, where: str) -> Problem | None:
    """Users with fewer than three events can't give one each to training, validation and test."""
    counts = interactions.group_by(USER, maintain_order=True).len().filter(pl.col("len") < 3)
    if counts.is_empty():
        return None
    return Problem(
        f"{count(len(counts), 'user')} with fewer than 3 events",
        place(where, None, USER),
        "nothing, or --min-user-events 3: they cannot be tested",
        some_ids(counts[USER]),
    )


def duplicate_events(interactions: pl.DataFrame, where: str) -> Problem | None:
    """The same user, item and time twice is mostly one event written twice."""
    keys = interactions.select(USER, ITEM, TIME)
    number = len(keys) - keys.n_unique()
    if not number:
        return None
    bad = interactions.filter(keys.is_duplicated())
    return Problem(
        f"{count(number, 'event')} with the user, item and time of another",
        place(where, bad[ROW][0], TIME),
        "remove them if they are copies (--repeats first keeps a user's first event with an item)",
        some_ids(bad[USER]),
    )


def future_times(interactions: pl.DataFrame, where: str, now: datetime | None = None) -> Problem | None:
    """Events that have not happened yet are mostly a wrong unit or zone."""
    limit = int((now or datetime.now(UTC)).timestamp() * 1_000_000)
    bad = interactions.filter(pl.col(TIME) > limit)
    if bad.is_empty():
        return None
    return Problem(
        f"{count(len(bad), 'event')} in the future",
        place(where, bad[ROW][0], TIME),
        "check --time-unit and the source's clock",
        some_ids(bad[USER]),
    )


# Things shaped like the control tokens of chat models. Titles are data: they are tokenised as text, never as control.
_CONTROL = r"<\|[^|<>]{1,40}\|>|</?s>|\[/?INST\]|<</?SYS>>|<(bos|eos|pad|unk|start_of_turn|end_of_turn)>"


def long_titles(items: pl.DataFrame, where: str) -> Problem | None:
    """A title over 200 characters costs its tokens in every prompt it is in."""
    return _titles(items, pl.col(TITLE).str.len_chars() > 200, where, "over 200 characters", "shorten them")


def shared_titles(items: pl.DataFrame, where: str) -> Problem | None:
    """Items with one title are one and the same to the language model."""
    return _titles(
        items, pl.col(TITLE).is_duplicated(), where, "that another item has too", "tell them apart (year, brand ...)"
    )


def control_titles(items: pl.DataFrame, where: str) -> Problem | None:
    """Text like <|im_end|> is data to us; better to know that it is there."""
    return _titles(
        items,
        pl.col(TITLE).str.contains(_CONTROL),
        where,
        "holding text like a control token",
        "nothing: it is treated as data",
    )


def strange_titles(events: pl.DataFrame, items: pl.DataFrame, where: str) -> Problem | None:
    """Titles say something of what follows, unless they are another numbering's."""
    catalogue = items.unique(ITEM, keep="first", maintain_order=True)
    ordered = sort_interactions(events.filter(pl.col(ITEM).is_in(catalogue[ITEM].implode())), catalogue)
    item = id_ranks(ordered[ITEM], catalogue[ITEM])
    shared = words_shared(ordered[USER].rle_id().to_numpy(), item.to_numpy(), catalogue[TITLE].to_list())
    if shared is None or not shared.strange:
        return None
    return Problem(
        str(shared),
        place(where, None, TITLE),
        "check that the titles are of these item ids, not of another numbering; if they are, text will add little",
    )


def _titles(items: pl.DataFrame, wrong: pl.Expr, where: str, what: str, remedy: str) -> Problem | None:
    bad = items.filter(wrong)
    if bad.is_empty():
        return None
    return Problem(f"{count(len(bad), 'title')} {what}", place(where, bad[ROW][0], TITLE), remedy, some_ids(bad[ITEM]))
