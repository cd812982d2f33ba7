"""Rows that could not be answered, each with the reason: one Parquet file a shard that has any.

What is no error is not here but counted: a history longer than is read is cut to its newest events, and items the
catalogue doesn't have are left out of a history of which others are known.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import polars as pl

from penchant.schema import ITEM, USER

Reason = Literal[
    "not_text",  # an id or a history is not UTF-8
    "no_user",  # neither a user_id nor a history
    "unknown_user",  # no history, and the run has no such user
    "duplicate",  # the same user (for pairs: user and item; for items: item) stands in an earlier row
    "no_known_item",  # a history with items, none of which the catalogue has
    "empty_history",  # scores and vectors need an event; recommendations fall back to popularity
    "no_item",  # a pair or an item without an item_id
    "unknown_item",  # an item_id that the catalogue doesn't have
    "removed_item",  # an item asked for its vector, and removed from what is recommended
    "not_a_number",  # a score or vector of this row is NaN or infinite
    "refused",  # the engine refused this row alone, as for a prompt that doesn't fit
    "nothing_left",  # every item is seen or filtered out; counted, and no fault of the row
]
# What says nothing against the input.
FAULTLESS: frozenset[Reason] = frozenset({"nothing_left"})
_DETAIL = 200  # characters of a detail: a text from outside may be a megabyte


@dataclass(frozen=True, slots=True)
class Bad:
    """One row that could not be answered: its number in the input, its ids as they stood there, and why."""

    row: int
    user: str | None
    item: str | None
    reason: Reason
    detail: str = ""


def as_frame(bad: Sequence[Bad]) -> pl.DataFrame:
    """Columns row, user_id, item_id, reason, detail; in the order of rows."""
    ordered = sorted(bad, key=lambda b: b.row)
    return pl.DataFrame(
        {
            "row": pl.Series([b.row for b in ordered], dtype=pl.Int64),
            USER: pl.Series([b.user for b in ordered], dtype=pl.String),
            ITEM: pl.Series([b.item for b in ordered], dtype=pl.String),
            "reason": pl.Series([b.reason for b in ordered], dtype=pl.String),
            "detail": pl.Series([b.detail[:_DETAIL] for b in ordered], dtype=pl.String),
        }
    )


def reasons(bad: Sequence[Bad]) -> dict[str, int]:
    """How many rows there are of each reason."""
    return dict(sorted(Counter(b.reason for b in bad).items()))


def faults(counts: dict[str, int]) -> int:
    """Rows of ``reasons`` that count against the share the job allows."""
    return sum(number for reason, number in counts.items() if reason not in FAULTLESS)
