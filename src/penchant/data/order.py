"""The one order of users, items and events, so that equal content is equal byte for byte."""

from __future__ import annotations

import polars as pl

from penchant.schema import ITEM, TIME, USER

# Eighteen digits always fit into an Int64; longer ids, and other scripts' digits, are ordered as strings.
_INTEGER = r"^-?[0-9]{1,18}$"


def is_integer_ids(ids: pl.Series) -> bool:
    """Whether every id reads as an integer, so that "10" comes after "9"."""
    return bool(ids.str.contains(_INTEGER).all())


def item_order(ids: pl.Series) -> pl.Series:
    """The distinct ids in order: numeric when all are integers, else by code point."""
    distinct = ids.unique()
    if not is_integer_ids(distinct):
        return distinct.sort()
    # Ties ("7" and "07") fall to the text, so that the order is total.
    return distinct.to_frame("id").sort(pl.col("id").cast(pl.Int64), "id")["id"].alias(ids.name)


def id_ranks(ids: pl.Series, order: pl.Series) -> pl.Series:
    """Each id's position in ``order`` (UInt32), which must hold every id."""
    return ids.cast(pl.Enum(order)).to_physical()


def sort_items(items: pl.DataFrame) -> pl.DataFrame:
    """The items in item order."""
    ranks = id_ranks(items[ITEM], item_order(items[ITEM]))
    return items[ranks.arg_sort()]


def sort_interactions(interactions: pl.DataFrame, items: pl.DataFrame) -> pl.DataFrame:
    """The events by user, then time, then item order; events equal in all three keep their order."""
    keys = pl.DataFrame(
        {
            "user": id_ranks(interactions[USER], item_order(interactions[USER])),
            "time": interactions[TIME],
            "item": id_ranks(interactions[ITEM], item_order(items[ITEM])),
        }
    )
    places = keys.select(pl.arg_sort_by("user", "time", "item", maintain_order=True)).to_series()
    return interactions[places]
