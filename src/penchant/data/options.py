"""Everything that decides how two files become a dataset, in one model."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from penchant.data.tables import TableOptions
from penchant.data.times import TimeUnit
from penchant.errors import ConfigError


class ReadOptions(BaseModel):
    """How interactions and items are read, checked and filtered."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    map: dict[str, str] = Field(
        default_factory=dict,
        description="canonical column name -> the file's column, such as {'user_id': 'userId'}; "
        "applies to both files where the column is present",
    )
    interactions_table: TableOptions = Field(
        default_factory=TableOptions, description="the layout of the interactions file"
    )
    items_table: TableOptions = Field(default_factory=TableOptions, description="the layout of the items file")
    context: list[str] = Field(
        default_factory=list, description="further columns of the interactions to keep, as text (place, hour ...)"
    )
    time_unit: TimeUnit = Field(
        default="s", description="the unit of numeric times: s, ms or us since 1970-01-01 UTC; dates need none"
    )
    positive_threshold: float | None = Field(
        default=None, description="keep only the events whose rating is at least this; those without a rating go"
    )
    min_user_events: int = Field(
        default=0, ge=0, description="keep only users with at least this many events (with min_item_events: a k-core)"
    )
    min_item_events: int = Field(
        default=0,
        ge=0,
        description="keep only items with at least this many events, in the catalogue too; repeated until stable",
    )
    repeats: Literal["keep", "first", "last"] = Field(
        default="keep", description="of a user's several events with one item keep all, the first or the last"
    )
    unknown_items: Literal["error", "drop"] = Field(
        default="error", description="what to do with events whose item isn't in the items"
    )
    items_without_title: Literal["error", "drop"] = Field(
        default="error", description="what to do with items that have no title; drop takes their events along"
    )
    list_separator: str | None = Field(
        default=None,
        min_length=1,
        description="what separates the values of a cell where a row holds a user's whole list (a;b;c)",
    )

    @classmethod
    def of(cls, options: ReadOptions | None = None, **changes: Any) -> ReadOptions:
        """``options`` with ``changes`` to its fields; a bad one is a ConfigError that names the field."""
        fields = {} if options is None else {name: getattr(options, name) for name in options.model_fields_set}
        try:
            return cls(**{**fields, **changes})
        except ValidationError as error:
            first = error.errors()[0]
            unknown = first["type"] == "extra_forbidden"
            raise ConfigError(
                "there is no such option" if unknown else first["msg"].removeprefix("Value error, "),
                where=f"option {'.'.join(str(part) for part in first['loc'])}",
                remedy=f"the options are {', '.join(cls.model_fields)}" if unknown else "give a value of that kind",
            ) from error
