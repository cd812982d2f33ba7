"""What has happened since the fit: new events of users, new items; served at once, kept in a journal.

The run itself stays as it was fitted. Everything here is an addition that ``replay`` makes again from its records.
"""

from __future__ import annotations

import base64
import math
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from penchant.data.reading import as_text
from penchant.data.times import YEAR_2200
from penchant.errors import ConfigError, DataError
from penchant.files import is_text
from penchant.schema import ITEM, TIME, TITLE, USER, VALUES

Event = Mapping[str, Any]

# Seconds and milliseconds of our day, read as microseconds, lie in the first month of 1970.
_FIRST_MONTH = 31 * 86_400 * 1_000_000


class LiveEvents:
    """Events that came after the fit, by user id, in the columns of the interactions, whose median time is given."""

    def __init__(self, columns: Mapping[str, pl.DataType], middle: int) -> None:
        self._middle = middle
        self._schema = {name: dtype for name, dtype in columns.items() if name != USER}
        self._events: dict[str, list[dict[str, Any]]] = {}

    def __contains__(self, user: str) -> bool:
        return user in self._events

    @property
    def users(self) -> list[str]:
        return list(self._events)

    def checked(
        self, events: Sequence[Event] | pl.DataFrame, known: Mapping[str, int], user: str
    ) -> list[dict[str, Any]]:
        """A user's events as records, or a DataError that names the first that can't be used.

        Each needs an item_id that is ``known``; timestamp (datetime, or integer microseconds; a naive datetime is UTC)
        is now where it is missing, and no number that can only be of another unit; every other column must be one of
        the interactions'.
        """
        if isinstance(events, pl.DataFrame):
            events = events.to_dicts()
        if isinstance(events, Mapping) or not isinstance(events, Sequence):
            raise ConfigError(
                "events are no list", where="update", remedy='give [{"item_id": ...}, ...] or a DataFrame'
            )
        out = []
        now = time.time_ns() // 1000
        for place, event in enumerate(events):
            where = f"update, event {place + 1}"
            if not isinstance(event, Mapping) or event.get(ITEM) is None:
                raise DataError(f"has no {ITEM}", where=where, remedy='give {"item_id": ..., "timestamp": ...}')
            if str(event[ITEM]) not in known:
                raise DataError(f"unknown item {str(event[ITEM])!r}", where=where, remedy="add it first with add_items")
            if event.get(USER) is not None and str(event[USER]) != user:
                raise DataError(
                    f"is of user {str(event[USER])!r}", where=where, remedy=f"give events of user {user!r} alone"
                )
            unknown = [name for name in event if name not in self._schema and name != USER]
            if unknown:
                there = ", ".join(self._schema)
                raise DataError(f"unknown column {unknown[0]!r}", where=where, remedy=f"the interactions have {there}")
            row = {name: value for name, value in event.items() if name != USER and value is not None}
            row[ITEM] = str(event[ITEM])
            row[TIME] = _micros(event.get(TIME), now + place, self._middle, where)
            row = {name: value for name, value in self._frame([row], where).to_dicts()[0].items() if value is not None}
            odd = [name for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
            if odd:
                raise DataError(f"{odd[0]} is {row[odd[0]]}", where=where, remedy="leave out what is not known")
            out.append(row)
        return out

    def add(self, user: str, events: Sequence[dict[str, Any]]) -> None:
        """Events that were checked."""
        self._events.setdefault(user, []).extend(events)

    def of(self, user: str, base: pl.DataFrame) -> pl.DataFrame:
        """All of a user's events, those of the fit (``base``, in order) and these, oldest first."""
        if user not in self._events:
            return base
        new = self._frame(self._events[user], user).with_columns(pl.lit(user).alias(USER)).select(base.columns)
        return pl.concat([base, new]).sort(TIME, maintain_order=True)

    def _frame(self, rows: Sequence[dict[str, Any]], where: str) -> pl.DataFrame:
        try:
            return pl.DataFrame(rows, schema=dict(self._schema), strict=True)
        except (pl.exceptions.PolarsError, TypeError, ValueError) as error:
            raise DataError(
                f"does not fit the interactions' columns: {str(error).splitlines()[0]}",
                where=where,
                remedy=", ".join(f"{name}: {dtype}" for name, dtype in self._schema.items()),
            ) from error


def _micros(given: Any, otherwise: int, middle: int, where: str) -> int:
    if given is None:
        return otherwise
    if isinstance(given, datetime):
        aware = given if given.tzinfo else given.replace(tzinfo=UTC)
        return round(aware.timestamp() * 1_000_000)
    if isinstance(given, int | np.integer) and not isinstance(given, bool):
        given = int(given)
        if given >= YEAR_2200:
            raise DataError(
                f"timestamp {given} read in microseconds lies after the year 2200",
                where=where,
                remedy="give a datetime, or divide nanoseconds by 1,000",
            )
        if 0 < given < _FIRST_MONTH <= middle:
            raise DataError(
                f"timestamp {given} read in microseconds lies in January 1970, long before what was fitted",
                where=where,
                remedy="give a datetime, or multiply seconds by 1,000,000 and milliseconds by 1,000",
            )
        return given
    raise DataError(
        f"{given!r} is no time", where=where, remedy="give a datetime, or integer microseconds since 1970 UTC"
    )


def checked_items(
    items: Sequence[Mapping[str, Any]] | pl.DataFrame, base: pl.DataFrame, known: Mapping[str, int]
) -> pl.DataFrame:
    """New items as rows of the catalogue, missing columns null; DataError that names the first that can't be used."""
    if isinstance(items, pl.DataFrame):
        items = items.select(as_text(name, kind, "add_items") for name, kind in items.schema.items())
    rows = items.to_dicts() if isinstance(items, pl.DataFrame) else items
    if isinstance(rows, Mapping) or not isinstance(rows, Sequence):
        raise ConfigError("items are no list", where="add_items", remedy='give [{"item_id": ...}, ...] or a DataFrame')
    seen: set[str] = set()
    out = []
    for place, item in enumerate(rows):
        where = f"add_items, item {place + 1}"
        name = _told(item.get(ITEM)) if isinstance(item, Mapping) else None
        if name is None:
            raise DataError(f"has no {ITEM}", where=where, remedy='give {"item_id": ..., "title": ...}')
        if name in known or name in seen:
            raise DataError(f"item {name!r} is in the catalogue already", where=where, remedy="give it another id")
        seen.add(name)
        if _told(item.get(TITLE)) is None:
            raise DataError(f"item {name!r} has no {TITLE}", where=where, remedy="give its title")
        unknown = [column for column in item if column not in base.columns]
        if unknown:
            there = ", ".join(base.columns)
            raise DataError(f"unknown column {unknown[0]!r}", where=where, remedy=f"the items have {there}")
        row = {column: _told(item.get(column)) for column in base.columns}
        odd = [column for column, text in row.items() if text is not None and not is_text(text)]
        if odd:
            raise DataError(f"{odd[0]} holds half a surrogate pair, which is no character", where=where)
        out.append(row)
    return pl.DataFrame(out, schema=base.schema)


def _told(value: Any) -> str | None:
    """A value as the catalogue's tables have it; None where there is nothing, as for pandas' NaN."""
    text = _text(value)
    return text if text is not None and text.strip() else None


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, list | tuple):
        return VALUES.join(text for one in value if (text := _text(one)) is not None)
    frame = pl.DataFrame({"value": [value]})
    return frame.select(as_text("value", frame.schema["value"], "add_items")).item()


def packed(vectors: NDArray[np.float32]) -> dict[str, Any]:
    """Vectors (n, d) as JSON can hold them, exactly."""
    return {"shape": list(vectors.shape), "float32": base64.b64encode(vectors.astype("<f4").tobytes()).decode()}


def unpacked(record: Mapping[str, Any]) -> NDArray[np.float32]:
    """What ``packed`` made."""
    flat = np.frombuffer(base64.b64decode(record["float32"]), dtype="<f4")
    return flat.reshape(record["shape"]).astype(np.float32)
