"""Which items may be recommended: ids allowed or denied, and predicates on item columns."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from penchant.errors import ConfigError, DataError
from penchant.schema import ITEM

_WHOLE = r"^\s*(-?(?:0|[1-9][0-9]*))\.0*\s*$"
_CONDITION = re.compile(r"\s*(?P<column>.+?)\s*(?P<operator>!=|>=|<=|==|!~|=|~|>|<)\s*(?P<value>.*?)\s*$", re.DOTALL)


def parse_condition(text: str) -> pl.Expr:
    """A predicate of the command line: COLUMN OPERATOR VALUE, with = (==) != ~ !~ (contains) > >= < <= (numbers).

    VALUE is compared as text or as a number; it is never a pattern or a program. = and != compare text, and take
    1955.0, as a table with a gap writes it, for 1955.
    """
    found = _CONDITION.match(text)
    if not found:
        raise ConfigError(
            f"cannot read the condition {text!r}", where="--where", remedy="write e.g. genres~Comedy or price<=20"
        )
    # pl.col would read * and ^...$ as patterns over all columns; here a column is its name.
    column = pl.selectors.by_name(found["column"]).as_expr()
    operator, value = found["operator"], found["value"]
    if operator in ("=", "==", "!="):
        equal = _equal(column.cast(pl.String), value)
        return ~equal if operator == "!=" else equal
    if operator in ("~", "!~"):
        contains = column.cast(pl.String).str.contains(value, literal=True)
        return contains if operator == "~" else ~contains
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if math.isnan(number):
        raise ConfigError(f"{value!r} is not a number", where=f"--where {text}", remedy="compare text with = or ~")
    # NaN would be greater than every number.
    bare = column.cast(pl.String).str.strip_chars()
    numeric = pl.coalesce(column.cast(pl.Float64, strict=False), bare.cast(pl.Float64, strict=False)).fill_nan(None)
    return {">": numeric > number, ">=": numeric >= number, "<": numeric < number, "<=": numeric <= number}[operator]


def _equal(text: pl.Expr, value: str) -> pl.Expr:
    return text.str.replace(_WHOLE, "${1}") == re.sub(_WHOLE, r"\1", value, flags=re.ASCII)


def item_mask(
    items: pl.DataFrame,
    item_index: dict[str, int],
    *,
    allow: Sequence[str] | None = None,
    deny: Sequence[str] | None = None,
    where: pl.Expr | None = None,
) -> NDArray[np.bool_] | None:
    """The mask (n_items,) of items that pass all filters given; None when there is none.

    An unknown id, or a predicate on a column the items lack, is an error; a null counts as not passing.
    """
    if allow is None and deny is None and where is None:
        return None
    mask = np.ones(items.height, dtype=bool)
    if allow is not None:
        mask[:] = False
        mask[indices(allow, item_index, "allow")] = True
    if deny is not None:
        mask[indices(deny, item_index, "deny")] = False
    if where is not None:
        if not isinstance(where, pl.Expr):
            raise ConfigError(
                f"{where!r} is no predicate", where="where", remedy='give one of polars: pl.col("genres") == "Comedy"'
            )
        try:
            passed = items.select(where.alias("passed").cast(pl.Boolean)).to_series()
        except pl.exceptions.PolarsError as error:
            raise ConfigError(
                f"the item filter cannot be applied: {str(error).splitlines()[0]}",
                where="where",
                remedy=f"the items have the columns {', '.join(items.columns)}",
            ) from error
        if len(passed) != items.height:
            raise ConfigError("the item filter gives no value an item", where="where", remedy="compare columns")
        mask &= passed.fill_null(False).to_numpy()
    return mask


def indices(ids: Sequence[str], item_index: dict[str, int], where: str) -> NDArray[np.int32]:
    """Item indices of ids, in their order; DataError naming the unknown ones."""
    if isinstance(ids, str):
        raise ConfigError(f"{where} is one text, not a list of item ids", remedy=f"pass [{ids!r}]")
    ids = list(ids)  # what can be read but once is read once
    unknown = [str(i) for i in ids if str(i) not in item_index]
    if unknown:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise DataError(
            f"unknown item {', '.join(map(repr, unknown[:5]))}{more}",
            where=f"{where}, column {ITEM}",
            remedy="use ids of the catalogue this model was fitted on",
        )
    return np.array([item_index[str(i)] for i in ids], dtype=np.int32)
