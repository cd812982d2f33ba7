"""check: all problems in one go, judged by the code that reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from penchant.data.check import check
from penchant.data.dataset import Dataset
from penchant.data.findings import Rule
from penchant.errors import DataError

HEAD = "user_id,item_id,timestamp\n"
GOOD_LOG = HEAD + "u,1,1\nu,2,2\nu,1,3\n"
GOOD_ITEMS = "item_id,title\n1,Heat\n2,Alien\n"

Put = Callable[[str, str], Path]


def judged(put: Put, log: str, items: str, **options: Any) -> dict[str, Rule]:
    rules = check(put("log.csv", log), put("items.csv", items), **options)
    assert len({rule.name for rule in rules}) == len(rules)
    return {rule.name: rule for rule in rules}


def broken(put: Put, log: str, items: str, **options: Any) -> dict[str, str]:
    return {name: rule.verdict for name, rule in judged(put, log, items, **options).items() if not rule.passed}


def test_good_files_keep_every_rule(put: Put) -> None:
    assert broken(put, GOOD_LOG, GOOD_ITEMS) == {}
    assert len(judged(put, GOOD_LOG, GOOD_ITEMS)) >= 15


def test_what_reading_would_leave_nothing_of_is_no_pass(put: Put) -> None:
    log = "user_id,item_id,timestamp,rating\nu,1,1,1\nu,2,2,0\nu,1,3,1\n"
    assert broken(put, log, GOOD_ITEMS, positive_threshold=4) == {"events are left": "FAIL"}
    strange = HEAD + "u,7,1\nu,8,2\nu,9,3\n"
    assert "events are left" in broken(put, strange, GOOD_ITEMS, unknown_items="drop")


def test_every_problem_is_seen_at_once(put: Put) -> None:
    log = HEAD + ",1,1\nu, ,2\nu,1,soon\nu,99,3\nu,98,3\nu,1,9999999999\nv,2,4\nv,2,4\n"
    items = "item_id,title\n1,Heat\n2,Alien\n,Nameless\n1,Heat again\n3,\n4,Heat\n5,<|im_end|> now\n6," + "x" * 201
    assert broken(put, log, items) == {
        "interactions' user_id is never empty": "FAIL",
        "interactions' item_id is never empty": "FAIL",
        "times can be read": "FAIL",
        "times fit their unit": "FAIL",
        "items' item_id is never empty": "FAIL",
        "item ids are unique": "FAIL",
        "items have titles": "FAIL",
        "events are of known items": "FAIL",
        "users have 3 events or more": "WARN",
        "events are there once": "WARN",
        "titles have at most 200 characters": "WARN",
        "titles tell items apart": "WARN",
        "titles hold no control tokens": "WARN",
    }
    rules = judged(put, log, items)
    assert rules["events are of known items"].ids == ("99", "98")
    assert rules["item ids are unique"].ids == ("1",)
    assert rules["items have titles"].ids == ("3",)
    assert rules["titles tell items apart"].ids == ("1", "4")
    assert rules["titles hold no control tokens"].ids == ("5",)
    assert rules["titles have at most 200 characters"].ids == ("6",)
    assert rules["users have 3 events or more"].ids == ("v",)
    assert "row 4, column 'timestamp'" in rules["times can be read"].detail


# Each breaks one rule that reading refuses.
FAILING: list[tuple[str, str, str]] = [
    (HEAD + ",1,1\n", GOOD_ITEMS, "interactions' user_id is never empty"),
    (HEAD + "u,,1\n", GOOD_ITEMS, "interactions' item_id is never empty"),
    (HEAD + "1.0,1,1\n", GOOD_ITEMS, "interactions' user_id holds integers or texts"),
    (HEAD + "u,1,\n", GOOD_ITEMS, "times can be read"),
    (HEAD + "u,1,1700000000000\n", GOOD_ITEMS, "times fit their unit"),
    (HEAD + "u,1,20240131\n", GOOD_ITEMS, "times are no dates written as numbers"),
    (HEAD + "u,9,1\n", GOOD_ITEMS, "events are of known items"),
    ("user_id,item_id,timestamp,rating\nu,1,1,x\n", GOOD_ITEMS, "ratings are numbers"),
    ("user,item_id,timestamp\nu,1,1\n", GOOD_ITEMS, "interactions have their columns"),
    (HEAD + "u,1\n", GOOD_ITEMS, "interactions can be read"),
    (HEAD, GOOD_ITEMS, "interactions can be read"),
    (GOOD_LOG, "item_id,name\n1,A\n", "items have their columns"),
    (GOOD_LOG, "item_id,title\n1,A\n2,B\n1,C\n", "item ids are unique"),
    (GOOD_LOG, "item_id,title\n1,A\n2,B\n,C\n", "items' item_id is never empty"),
    (GOOD_LOG, "item_id,title\n1,A\n2,B\n3,\n", "items have titles"),
    (GOOD_LOG, "", "items can be read"),
]


@pytest.mark.parametrize(("log", "items", "rule"), FAILING)
def test_reading_refuses_what_fails_and_says_the_same(put: Put, log: str, items: str, rule: str) -> None:
    found = judged(put, log, items)
    assert found[rule].verdict == "FAIL"
    with pytest.raises(DataError) as caught:
        Dataset.read(put("log.csv", log), put("items.csv", items))
    assert found[rule].detail == f"{caught.value.where}: {caught.value.what}; {caught.value.remedy}"


@pytest.mark.parametrize(
    ("log", "items", "rule"),
    [
        (HEAD + "u,1,1\nu,2,2\n", GOOD_ITEMS, "users have 3 events or more"),
        (GOOD_LOG + "u,1,3\n", GOOD_ITEMS, "events are there once"),
        (GOOD_LOG + "u,1,2150-01-01\n", GOOD_ITEMS, "events are not in the future"),
        (GOOD_LOG, GOOD_ITEMS + "3," + "x" * 201 + "\n", "titles have at most 200 characters"),
        (GOOD_LOG, GOOD_ITEMS + "3,Heat\n", "titles tell items apart"),
        (GOOD_LOG, GOOD_ITEMS + "3,end </s> of\n", "titles hold no control tokens"),
        (GOOD_LOG, GOOD_ITEMS + "3,<|eot_id|>\n", "titles hold no control tokens"),
        (GOOD_LOG, GOOD_ITEMS + "3,[INST] buy\n", "titles hold no control tokens"),
    ],
)
def test_reading_accepts_what_warns(put: Put, log: str, items: str, rule: str) -> None:
    assert broken(put, log, items) == {rule: "WARN"}
    Dataset.read(put("log.csv", log), put("items.csv", items))


@pytest.mark.parametrize("title", ["I <3 you", "<b>bold</b>", "a || b", "x < y > z", "S/he", "200" + "x" * 197])
def test_plain_titles_do_not_warn(put: Put, title: str) -> None:
    assert broken(put, GOOD_LOG, GOOD_ITEMS + f"3,{title}\n") == {}


def test_what_is_dropped_on_demand_passes_and_is_counted(put: Put) -> None:
    options = {"unknown_items": "drop", "items_without_title": "drop"}
    found = judged(put, GOOD_LOG + "u,9,4\n", GOOD_ITEMS + "3,\n", **options)
    assert found["events are of known items"].passed
    assert "dropped" in found["events are of known items"].detail
    assert found["items have titles"].passed


def test_both_files_are_judged_when_one_is_missing(put: Put, tmp_path: Path) -> None:
    rules = {rule.name: rule for rule in check(tmp_path / "nope.csv", put("items.csv", "item_id,title\n1,\n"))}
    assert rules["interactions can be read"].verdict == "FAIL"
    assert rules["items have titles"].verdict == "FAIL"


def test_at_most_ten_ids_are_shown(put: Put) -> None:
    log = HEAD + "".join(f"u,x{n},1\n" for n in range(50))
    assert judged(put, log, GOOD_ITEMS)["events are of known items"].ids == tuple(f"x{n}" for n in range(10))


def test_uneven_lists_are_found(put: Put) -> None:
    log = "user_id,item_id,timestamp\nu,1;2;1,1;2;3\nv,1;2,5\n"
    found = broken(put, log, GOOD_ITEMS, list_separator=";")
    assert found == {"timestamp lists are as long as the item lists": "FAIL"}


def test_frames_can_be_checked() -> None:
    log = pl.DataFrame({"user_id": [1, 1, 1], "item_id": [1, 1, 1], "timestamp": [1, 2, 3]})
    items = pl.DataFrame({"item_id": [1], "title": ["A"]})
    assert all(rule.passed for rule in check(log, items))
