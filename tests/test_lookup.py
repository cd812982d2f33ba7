"""Names that aren't found, and the near ones that are told."""

from __future__ import annotations

import polars as pl
import pytest

from penchant.errors import DataError
from penchant.lookup import find_title


def test_a_slip_is_found_behind_many_others_that_begin_otherwise() -> None:
    titles = [f"item number {n}" for n in range(20_000)] + ["Heat (1995)"]
    items = pl.DataFrame({"item_id": [str(n) for n in range(len(titles))], "title": titles})
    with pytest.raises(DataError, match=r"'Heat \(1996\)' \(near: Heat \(1995\)\)"):
        find_title(items, "Heat (1996)")
