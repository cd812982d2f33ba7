"""What is known of an event besides its item, as numbers the encoder reads: categories, ratings, time gaps, words.

Everything is looked up by columns that ``fit`` saw in the training events; a value it did not see is unknown (0).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from penchant.data.history import EventLog
from penchant.errors import ConfigError
from penchant.interest.behaviour import Behaviour
from penchant.interest.config import EncoderConfig
from penchant.schema import ITEM, QUERY, RATING, REVIEW, TIME, USER

GAP = "gap"
WORDS = (REVIEW, QUERY)
# Values of a column that have a code of their own, the most frequent; and borders of a column of many numbers.
_VALUES, _EDGES = 1_000, 16
# Time gaps double from code to code, from 1 second up; the last stands for 34 years and more.
_GAPS = 31


class Column(BaseModel):
    """One input: the codes of a category's ``values`` in order from 1, of a number between ``edges``, or of a gap."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    kind: Literal["category", "number", "gap", "words"]
    values: list[str] = Field(default_factory=list)
    edges: list[float] = Field(default_factory=list)

    @property
    def size(self) -> int:
        """Codes there are, 0 (unknown) included."""
        return {"category": len(self.values) + 1, "number": len(self.edges) + 2, "gap": _GAPS + 1, "words": 0}[
            self.kind
        ]

    def codes(self, events: pl.DataFrame) -> NDArray[np.int32]:
        """The code of each event (n,), 0 where the column is missing, null or of a value that is not known."""
        if self.name not in events.columns:
            return np.zeros(len(events), dtype=np.int32)
        column = events[self.name]
        if self.kind == "number":
            number = column.cast(pl.Float64, strict=False).to_numpy()
            found = np.searchsorted(self.edges, number, side="right") + 1
            return np.where(np.isnan(number), 0, found).astype(np.int32)
        known = column.cast(pl.String).replace_strict(
            self.values, np.arange(1, len(self.values) + 1), default=0, return_dtype=pl.Int32
        )
        return known.fill_null(0).to_numpy()


class Columns(BaseModel):
    """The encoder's inputs besides items, in the order of its configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    columns: list[Column] = Field(default_factory=list)
    value: str | None = Field(default=None, description="column whose value is learnt")

    @classmethod
    def fit(cls, events: pl.DataFrame, config: EncoderConfig) -> Columns:
        """Learn the values of each column from training events; ConfigError where a column is not there."""
        columns = [_column(events, name) for name in config.inputs]
        value = config.value_column
        if value is not None and value not in events.columns:
            raise _missing(value, events, "the loss's value")
        return cls(columns=columns, value=value)

    @property
    def coded(self) -> list[Column]:
        return [column for column in self.columns if column.kind != "words"]

    @property
    def words(self) -> list[str]:
        """Columns of the users' own words."""
        return [column.name for column in self.columns if column.kind == "words"]

    @property
    def sizes(self) -> list[int]:
        return [column.size for column in self.coded]

    def codes(self, events: pl.DataFrame) -> NDArray[np.int32] | None:
        """(n, c) of events in the order of users and time; None where nothing is coded."""
        if not self.coded:
            return None
        parts = [gap_codes(events) if column.kind == "gap" else column.codes(events) for column in self.coded]
        return np.stack(parts, axis=1)

    def values(self, events: pl.DataFrame) -> NDArray[np.float32] | None:
        """(n,) the values to learn, NaN where there is none; None where the loss learns none."""
        if self.value is None:
            return None
        column = events[self.value].cast(pl.Float64, strict=False)
        return column.fill_null(float("nan")).to_numpy().astype(np.float32)

    def texts(self, events: pl.DataFrame) -> list[list[str | None]]:
        """The words of each event in each of those columns, None where there are none."""
        out = []
        for name in self.words:
            column = events[name] if name in events.columns else pl.Series(name, [None] * len(events), dtype=pl.String)
            out.append([text if text is not None and text.strip() else None for text in column.to_list()])
        return out


def _missing(name: str, events: pl.DataFrame, what: str) -> ConfigError:
    there = [column for column in events.columns if column not in (USER, ITEM, TIME)]
    return ConfigError(
        f"{what} {name!r} is no column of the interactions",
        where="interest encoder",
        remedy=f"they have {', '.join(there) or 'no further column'}, and {GAP} is always there",
    )


def _column(events: pl.DataFrame, name: str) -> Column:
    if name == GAP:
        return Column(name=name, kind="gap")
    if name not in events.columns or name in (USER, ITEM, TIME):
        raise _missing(name, events, "the input")
    if name in WORDS:
        return Column(name=name, kind="words")
    known = events[name].drop_nulls()
    if name == RATING or known.dtype.is_numeric():
        distinct = known.unique().sort().to_numpy().astype(np.float64)
        middle = (distinct[1:] + distinct[:-1]) / 2
        if len(middle) > _EDGES:
            middle = np.unique(np.quantile(known.to_numpy(), np.arange(1, _EDGES + 1) / (_EDGES + 1)))
        return Column(name=name, kind="number", edges=middle.tolist())
    counts = known.cast(pl.String).alias("value").value_counts(name="n").sort(["n", "value"], descending=[True, False])
    return Column(name=name, kind="category", values=counts["value"].head(_VALUES).to_list())


def gap_codes(events: pl.DataFrame) -> NDArray[np.int32]:
    """How long after the same user's event before: 1 for under a second, one more a doubling; 0 for the first."""
    time = events[TIME].to_numpy()
    seconds = np.diff(time, prepend=time[:1]) / 1e6
    same = (events[USER] == events[USER].shift(1)).fill_null(False).to_numpy()
    code = 1 + np.minimum(np.floor(np.log2(1 + np.maximum(seconds, 0))), _GAPS - 1)
    return np.where(same, code, 0).astype(np.int32)


@dataclass(frozen=True, eq=False)
class Reading:
    """A log as the encoder reads it: an event's codes, rows of the words' table and value, one row an event."""

    log: EventLog
    codes: NDArray[np.int32] | None = None
    words: NDArray[np.int32] | None = None
    value: NDArray[np.float32] | None = None

    def of(self, part: slice) -> Behaviour:
        """Some events in a row, as a behaviour."""
        return Behaviour(self.log.item, self.codes, self.words, self.value)[part]

    def before(self, positions: Sequence[int] | NDArray[np.integer]) -> list[Behaviour]:
        """What was past at each position of the log."""
        return [self.of(self.log.before(int(position))) for position in positions]
