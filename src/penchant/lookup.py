"""Users and items by the names people know them by; what isn't found is met with what lies near."""

from __future__ import annotations

import difflib

import numpy as np
import polars as pl

from penchant import schema
from penchant.data.history import EventLog
from penchant.errors import DataError

# Names compared for a near one: enough to catch a slip, few enough not to be waited for.
_COMPARED = 10_000


def find_user(log: EventLog, user_id: str) -> int:
    """Index of a user; DataError, naming near ones, where the log has no such user."""
    found = log.user_index.get(user_id)
    if found is None:
        raise DataError(
            f"no user {user_id!r}" + _near(user_id, log.user_ids, ", "),
            where=f"column {schema.USER}",
            remedy="use a user of the data this model was fitted on, or give a history of item ids",
        )
    return found


def find_title(items: pl.DataFrame, title: str) -> int:
    """Index of the one item of that title; DataError where there is none, or several."""
    titles = items[schema.TITLE]
    found = np.flatnonzero((titles == title).to_numpy())
    if len(found) == 1:
        return int(found[0])
    if len(found) > 1:
        ids = items[schema.ITEM][found[:5].tolist()].to_list()
        raise DataError(
            f"{len(found)} items have the title {title!r}: {', '.join(ids)}",
            where="history_titles",
            remedy="give their ids in `history`",
        )
    raise DataError(
        f"no item has the title {title!r}" + _near(title, titles.to_list(), "; "),
        where="history_titles",
        remedy="give the title as the catalogue has it, or item ids in `history`",
    )


def _near(name: str, names: list[str], between: str) -> str:
    first = name[:3].casefold()
    alike = [one for one in names if one[:3].casefold() == first]  # most slips come later
    compared = dict.fromkeys([*alike[:_COMPARED], *names[:_COMPARED]])
    near = difflib.get_close_matches(name, list(compared)[:_COMPARED], n=3)
    return f" (near: {between.join(near)})" if near else ""
