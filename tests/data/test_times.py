"""Times of every form, and what is said of those that are none."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, datetime, timedelta, timezone
from pathlib import Path

import polars as pl
import pytest

from penchant.data.dataset import Dataset
from penchant.errors import DataError

HEAD = "user_id,item_id,timestamp\n"
ITEMS = "item_id,title\n1,Heat\n2,Alien\n10,Brazil\n"


Put = Callable[[str, str], Path]


@pytest.mark.parametrize(
    ("text", "unit", "expected"),
    [
        ("881250949", "s", 881_250_949_000_000),
        ("881250949.25", "s", 881_250_949_250_000),
        ("8.8e8", "s", 880_000_000_000_000),
        ("-5", "s", -5_000_000),
        (" 5 ", "s", 5_000_000),
        ("1700000000123", "ms", 1_700_000_000_123_000),
        ("1700000000123456", "us", 1_700_000_000_123_456),
        ("1970-01-02", "s", 86_400_000_000),
        ("1970-01-01 00:00:01", "s", 1_000_000),
        ("1970-01-01T00:00:01.5", "ms", 1_500_000),
        ("1970-01-01T00:01", "s", 60_000_000),
        ("1970-01-01T00:00:01Z", "s", 1_000_000),
        ("1970-01-01 00:00:01 UTC", "s", 1_000_000),
        ("1970-01-01T01:00:01+01:00", "s", 1_000_000),
        ("1969-12-31T20:00-0400", "s", 0),
    ],
)
def test_times(put: Put, text: str, unit: str, expected: int) -> None:
    log = put("log.csv", HEAD + f"1,1,{text}\n")
    assert Dataset.read(log, put("items.csv", ITEMS), time_unit=unit).interactions["timestamp"].to_list() == [expected]


def test_forms_of_time_may_be_mixed(put: Put) -> None:
    log = put("log.csv", HEAD + "1,1,1\n1,1,1970-01-01\n1,1,2.5\n1,1,1970-01-01T00:00:02Z\n")
    times = Dataset.read(log, put("items.csv", ITEMS)).interactions["timestamp"].to_list()
    assert times == [0, 1_000_000, 2_000_000, 2_500_000]


@pytest.mark.parametrize(
    "value",
    [
        datetime(1970, 1, 1, 0, 0, 1),
        datetime(1970, 1, 1, 1, 0, 1, tzinfo=timezone(timedelta(hours=1))),
        date(1970, 1, 2),
        1,
        1.0,
    ],
)
def test_typed_times(value: object) -> None:
    log = pl.DataFrame({"user_id": ["u"], "item_id": ["1"], "timestamp": [value]})
    expected = 86_400_000_000 if type(value) is date else 1_000_000
    items = pl.DataFrame({"item_id": ["1"], "title": ["A"]})
    assert Dataset.read(log, items).interactions["timestamp"].to_list() == [expected]


@pytest.mark.parametrize(
    "text",
    ["soon", "05-06-24", "5-6-2024", "28-12-23T10:00", "2020-02-30", "inf", "nan", "", "  ", "2020-01-01T25:00:00"],
)
def test_what_is_no_time_names_row_and_column(put: Put, text: str) -> None:
    log = put("log.csv", HEAD + f"1,1,1\n1,1,{text}\n")
    with pytest.raises(DataError) as caught:
        Dataset.read(log, put("items.csv", ITEMS))
    assert caught.value.where == f"{log}, row 3, column 'timestamp'"
    assert "--time-unit" in str(caught.value.remedy)


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("1700000000000", "--time-unit ms"),
        ("1700000000000000", "--time-unit us"),
        ("1700000000000.5", "--time-unit ms"),
        ("1700000000000000000", "nanoseconds"),
        ("99999999999999999999999", "nanoseconds"),
        ("20240131183000", "write times as 2024"),
        ("202401311830", "write times as 2024"),
    ],
)
def test_a_number_past_2200_is_of_another_unit(put: Put, text: str, remedy: str) -> None:
    with pytest.raises(DataError, match=r"row 2, column 'timestamp'.* lies after the year 2200") as caught:
        Dataset.read(put("log.csv", HEAD + f"1,1,{text}\n"), put("items.csv", ITEMS))
    assert remedy in str(caught.value.remedy)


def test_dates_written_as_numbers_are_not_read_as_seconds(put: Put) -> None:
    with pytest.raises(DataError, match="look like dates"):
        Dataset.read(put("log.csv", HEAD + "1,1,20240131\n1,2,20231224\n"), put("items.csv", ITEMS))
