"""Dataset.read: what is kept, in what order, and what a bad input says."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from penchant.data.dataset import Dataset, ReadOptions, is_integer_ids, item_order
from penchant.errors import ConfigError, DataError

HEAD = "user_id,item_id,timestamp\n"
ITEMS = "item_id,title\n1,Heat\n2,Alien\n10,Brazil\n"


Put = Callable[[str, str], Path]


def events(dataset: Dataset) -> list[tuple[Any, ...]]:
    return dataset.interactions.rows()


def test_events_are_by_user_time_and_item_in_numbers_where_all_are_numbers(put: Put) -> None:
    log = put("log.csv", HEAD + "10,10,5\n10,2,5\n9,1,7\n10,1,4\n")
    dataset = Dataset.read(log, put("items.csv", ITEMS))
    assert events(dataset) == [
        ("9", "1", 7_000_000),
        ("10", "1", 4_000_000),
        ("10", "2", 5_000_000),
        ("10", "10", 5_000_000),
    ]
    assert dataset.items["item_id"].to_list() == ["1", "2", "10"]


def test_one_id_that_is_no_number_makes_the_order_textual(put: Put) -> None:
    log = put("log.csv", HEAD + "10,10,5\n10,2,5\nu,1,1\n9,1,7\n")
    dataset = Dataset.read(log, put("items.csv", ITEMS + "x,Extra\n"))
    assert [row[:2] for row in events(dataset)] == [("10", "10"), ("10", "2"), ("9", "1"), ("u", "1")]
    assert dataset.items["item_id"].to_list() == ["1", "10", "2", "x"]


def test_item_order() -> None:
    assert item_order(pl.Series(["10", "9", "-1", "9", "09"])).to_list() == ["-1", "09", "9", "10"]
    assert item_order(pl.Series(["10", "9", "a"])).to_list() == ["10", "9", "a"]
    assert is_integer_ids(pl.Series(["1", "-2"]))
    assert not is_integer_ids(pl.Series(["1", "1.0"]))
    assert not is_integer_ids(pl.Series(["12345678901234567890"]))


def test_equal_events_stay_in_file_order(put: Put) -> None:
    log = put("log.csv", "user_id,item_id,timestamp,rating\n1,1,5,3\n1,1,5,1\n1,1,5,2\n")
    assert Dataset.read(log, put("items.csv", ITEMS)).interactions["rating"].to_list() == [3, 1, 2]


def test_columns_are_mapped_in_both_files_where_present(put: Put) -> None:
    log = put("log.csv", "userId,movieId,created_at,place\n1,2,2020-01-01,home\n")
    items = put("items.csv", "movieId,name,created_at\n2,Alien,2019\n")
    mapping = {"user_id": "userId", "item_id": "movieId", "timestamp": "created_at", "title": "name"}
    dataset = Dataset.read(log, items, map=mapping, context=["place"])
    assert dataset.interactions.columns == ["user_id", "item_id", "timestamp", "place"]
    # The time of an event means nothing of an item: there the column keeps its name.
    assert dataset.items.rows(named=True) == [{"item_id": "2", "title": "Alien", "created_at": "2019"}]
    assert dataset.report["mapping"]["items"]["title"] == "name"


def test_a_mapped_column_wins_over_one_of_that_name(put: Put) -> None:
    items = put("items.csv", "item_id,title,long_title\n1,T,Long\n")
    dataset = Dataset.read(put("log.csv", HEAD + "1,1,1\n"), items, map={"title": "long_title"})
    assert dataset.items.rows(named=True) == [{"item_id": "1", "title": "Long"}]


def test_item_columns_can_be_renamed(put: Put) -> None:
    items = put("items.csv", "item_id,title,genres\n1,T,Drama\n")
    dataset = Dataset.read(put("log.csv", HEAD + "1,1,1\n"), items, map={"category": "genres"})
    assert dataset.items["category"].to_list() == ["Drama"]


def test_optional_columns_are_kept_and_others_are_not(put: Put) -> None:
    text = "hour,query,review,rating,event_type,timestamp,item_id,user_id\n9,q,,4.5,view,1,1,u\n"
    dataset = Dataset.read(put("log.csv", text), put("items.csv", ITEMS))
    assert dataset.interactions.rows(named=True) == [
        {
            "user_id": "u",
            "item_id": "1",
            "timestamp": 1_000_000,
            "event_type": "view",
            "rating": 4.5,
            "review": None,
            "query": "q",
        }
    ]
    assert dataset.interactions.schema["review"] == pl.String


def test_frames_lists_and_structures_become_text() -> None:
    log = pl.DataFrame({"user_id": [7], "item_id": [1], "timestamp": [1]})
    items = pl.DataFrame(
        {
            "item_id": [1, 2],
            "title": ["A", "B"],
            "tags": [["x", "y"], []],
            "size": [1.5, None],
            "deep": [{"k": [1, 2]}, {"k": []}],
            "new": [True, False],
        }
    )
    rows = Dataset.read(log, items).items.rows()
    assert rows[0] == ("1", "A", "x|y", "1.5", '{"k":[1,2]}', "true")
    assert rows[1][2:4] == (None, None)


@pytest.mark.parametrize(
    ("header", "remedies"),
    [
        ("userId,movieId,ts", ["--map user_id=userId", "--map item_id=movieId"]),
        ("User-ID,item_id,timestamp", ["--map user_id=User-ID"]),
        ("user_id,asin,timestamp", ["--map item_id=asin"]),
        ("user_id,item_id,unixReviewTime", ["--map timestamp=unixReviewTime"]),
        ("user_id,item_id,timestmap", ["--map timestamp=timestmap"]),
        ("q,item_id,timestamp", ["--map user_id=<the file's column>"]),
        ("user_id;item_id;timestamp", ["--sep ';'"]),
    ],
)
def test_missing_columns_list_what_is_there_and_the_map_to_type(put: Put, header: str, remedies: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        Dataset.read(put("log.csv", header + "\n1,1,1\n"), put("items.csv", ITEMS))
    assert "columns found: " + ", ".join(header.split(",")) in caught.value.what
    assert all(remedy in str(caught.value.remedy) for remedy in remedies)


def test_spellings_are_not_guessed(put: Put) -> None:
    with pytest.raises(DataError, match="no column 'title'"):
        Dataset.read(put("log.csv", HEAD + "1,1,1\n"), put("items.csv", "item_id,name\n1,A\n"))


def test_lists_in_cells(put: Put) -> None:
    log = put("log.csv", "user_id,item_id,timestamp,rating\nu,1;10; 2,3;2;1,5\nv,2,7,4\n")
    assert events(Dataset.read(log, put("items.csv", ITEMS), list_separator=";")) == [
        ("u", "2", 1_000_000, 5.0),
        ("u", "10", 2_000_000, 5.0),
        ("u", "1", 3_000_000, 5.0),
        ("v", "2", 7_000_000, 4.0),
    ]


def test_context_may_hold_lists_too(put: Put) -> None:
    log = put("log.csv", "user_id,item_id,timestamp,device,shop\nu,1;2,1;2,web;app,north\nv,2,7,tv,north\n")
    read = Dataset.read(log, put("items.csv", ITEMS), list_separator=";", context=["device", "shop"])
    assert read.interactions["device"].to_list() == ["web", "app", "tv"]
    assert read.interactions["shop"].to_list() == ["north"] * 3
    uneven = put("uneven.csv", "user_id,item_id,timestamp,device\nu,1;2,1;2,web;app;tv\n")
    with pytest.raises(DataError, match="2 values of 'item_id' and 3 of 'device'"):
        Dataset.read(uneven, put("items.csv", ITEMS), list_separator=";", context=["device"])


def test_without_times_the_place_in_the_list_is_the_time(put: Put) -> None:
    log = put("log.csv", "user_id,item_id\nu,10;1\nv,2\nu,1;2\n")
    assert events(Dataset.read(log, put("items.csv", ITEMS), list_separator=";")) == [
        ("u", "10", 0),
        ("u", "1", 1),
        ("u", "1", 2),
        ("u", "2", 3),
        ("v", "2", 0),
    ]


def test_list_columns_need_no_separator(tmp_path: Path, put: Put) -> None:
    frame = pl.DataFrame({"user_id": [1, 2], "item_id": [[2, 1], []], "timestamp": [[5, 6], []]})
    frame.write_parquet(tmp_path / "log.parquet")
    frame.write_ndjson(tmp_path / "log.jsonl")
    items = put("items.csv", ITEMS)
    expected = [("1", "2", 5_000_000), ("1", "1", 6_000_000)]
    for source in (frame, tmp_path / "log.parquet", tmp_path / "log.jsonl"):
        assert events(Dataset.read(source, items)) == expected


def test_lists_of_unequal_length_name_the_row(put: Put) -> None:
    log = put("log.csv", "user_id,item_id,timestamp\nv,1;2,1;2\nu,1;2,1\n")
    with pytest.raises(DataError, match="2 values of 'item_id' and 1 of 'timestamp'") as caught:
        Dataset.read(log, put("items.csv", ITEMS), list_separator=";")
    assert caught.value.where == f"{log}, row 3, column 'timestamp'"


def test_neither_times_nor_lists_is_an_error(put: Put) -> None:
    with pytest.raises(DataError, match="no column 'timestamp'"):
        Dataset.read(put("log.csv", "user_id,item_id\nu,1\n"), put("items.csv", ITEMS))


def test_positive_threshold_keeps_what_is_rated_at_least_so(put: Put) -> None:
    log = put("log.csv", "user_id,item_id,timestamp,rating\n1,1,1,3\n1,2,2,4\n1,10,3,\n1,1,4,nan\n")
    dataset = Dataset.read(log, put("items.csv", ITEMS), positive_threshold=4)
    assert [row[1] for row in events(dataset)] == ["2"]
    assert dataset.report["dropped"] == {"events_without_rating": 2, "events_below_threshold": 1}


@pytest.mark.parametrize(("repeats", "kept"), [("keep", [1, 2, 3, 4]), ("first", [2, 3]), ("last", [3, 4])])
def test_repeats(put: Put, repeats: str, kept: list[int]) -> None:
    # Ratings mark the file's rows; times are 9 5 7 9.
    log = put("log.csv", "user_id,item_id,timestamp,rating\nu,1,9,1\nu,1,5,2\nu,2,7,3\nu,1,9,4\n")
    dataset = Dataset.read(log, put("items.csv", ITEMS), repeats=repeats)
    assert sorted(dataset.interactions["rating"].to_list()) == kept


def test_unknown_items(put: Put) -> None:
    log = put("log.csv", HEAD + "u,1,1\nu,a,1\nu,b,1\nu,c,1\nu,d,1\nu,e,1\nu,f,1\nu,a,2\n")
    with pytest.raises(DataError, match=r"6 unknown items in 7 events.*: a, b, c, d, e, \.\.\.") as caught:
        Dataset.read(log, put("items.csv", ITEMS))
    assert "--unknown-items drop" in str(caught.value.remedy)
    assert caught.value.where == f"{log}, row 3, column 'item_id'"
    dataset = Dataset.read(log, put("items.csv", ITEMS), unknown_items="drop")
    assert dataset.report["dropped"] == {"events_of_unknown_items": 7}


def test_items_without_title_go_with_their_events(put: Put) -> None:
    items = put("items.csv", "item_id,title\n1,Heat\n2,\n3,  \n")
    log = put("log.csv", HEAD + "u,1,1\nu,2,2\n")
    with pytest.raises(DataError, match="item '2' has no title") as caught:
        Dataset.read(log, items)
    assert caught.value.where == f"{items}, row 3, column 'title'"
    dataset = Dataset.read(log, items, items_without_title="drop")
    assert dataset.items["item_id"].to_list() == ["1"]
    assert dataset.report["dropped"] == {"items_without_title": 2, "events_of_items_without_title": 1}


def brute_core(pairs: list[tuple[str, str]], least_user: int, least_item: int) -> list[tuple[str, str]]:
    while True:
        users, items = Counter(u for u, _ in pairs), Counter(i for _, i in pairs)
        kept = [(u, i) for u, i in pairs if users[u] >= least_user and items[i] >= least_item]
        if kept == pairs:
            return pairs
        pairs = kept


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("least_user", "least_item"), [(3, 3), (2, 5), (0, 4), (4, 0)])
def test_the_core_equals_a_brute_loop(seed: int, least_user: int, least_item: int) -> None:
    rng = random.Random(seed)
    pairs = [(f"u{int(rng.random() ** 2 * 30)}", f"i{int(rng.random() ** 2 * 25)}") for _ in range(150)]
    log = pl.DataFrame(pairs, schema=["user_id", "item_id"], orient="row").with_columns(timestamp=pl.lit(0))
    items = pl.DataFrame({"item_id": [f"i{n}" for n in range(30)], "title": [f"T{n}" for n in range(30)]})
    dataset = Dataset.read(log, items, min_user_events=least_user, min_item_events=least_item)
    core = brute_core(pairs, least_user, least_item)
    assert sorted(row[:2] for row in events(dataset)) == sorted(core)
    assert dataset.report["dropped"].get("events_outside_the_core", 0) == len(pairs) - len(core)
    # Without a least number of events an item nobody has met stays in the catalogue.
    assert set(dataset.items["item_id"]) == ({i for _, i in core} if least_item else set(items["item_id"]))


def test_nothing_left_says_why(put: Put) -> None:
    with pytest.raises(DataError, match=r"no events are left of 2 rows \(events_outside_the_core 2\)"):
        Dataset.read(put("log.csv", HEAD + "u,1,1\nu,2,2\n"), put("items.csv", ITEMS), min_user_events=3)


GOOD = HEAD + "1,1,1\n"
BAD: list[tuple[str, str, str, str | None, str]] = [
    (HEAD, ITEMS, "log.csv", None, "no rows"),
    (GOOD, "item_id,title\n", "items.csv", None, "no rows"),
    (HEAD + "1,1,1\n,1,1\n", ITEMS, "log.csv", "row 3, column 'user_id'", "user_id is empty"),
    (HEAD + "1,1,1\n1,  ,1\n", ITEMS, "log.csv", "row 3, column 'item_id'", "item_id is empty"),
    (HEAD + "1.0,1,1\n2.0,1,1\n", ITEMS, "log.csv", "column 'user_id'", "type Float64"),
    (GOOD, "item_id,title\n1,A\n,B\n", "items.csv", "row 3, column 'item_id'", "item_id is empty"),
    (GOOD, "item_id,title\n1,A\n2,B\n1,C\n", "items.csv", "row 4, column 'item_id'", "'1' is there twice, in rows 2"),
    (HEAD + "1,1\n", ITEMS, "log.csv", "row 2, column 3", "2 fields where the table has 3"),
    ("user_id,item_id,timestamp,rating\n1,1,1,5\n1,1,1,x\n", ITEMS, "log.csv", "row 3, column 'rating'", "'x' is not"),
    ("user_id,item_id,timestamp,rating\n1,1,1,inf\n", ITEMS, "log.csv", "row 2, column 'rating'", "'inf' is not"),
]


@pytest.mark.parametrize(("log", "items", "file", "place", "said"), BAD)
def test_bad_input_names_file_row_column_and_remedy(
    put: Put, tmp_path: Path, log: str, items: str, file: str, place: str | None, said: str
) -> None:
    paths = put("log.csv", log), put("items.csv", items)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError) as caught:
        Dataset.read(*paths).save(tmp_path / "out")
    assert caught.value.where == str(tmp_path / file) + (f", {place}" if place else "")
    assert said in caught.value.what
    assert caught.value.remedy
    assert sorted(tmp_path.rglob("*")) == before


def test_float_and_other_ids_are_refused() -> None:
    items = pl.DataFrame({"item_id": [1], "title": ["A"]})
    for ids in ([3.0], [True], [b"x"], [date(2020, 1, 1)]):
        log = pl.DataFrame({"user_id": ids, "item_id": [1], "timestamp": [1]})
        with pytest.raises(DataError, match="interactions, column 'user_id': the ids are of type"):
            Dataset.read(log, items)


def test_bytes_are_no_item_text() -> None:
    log = pl.DataFrame({"user_id": [1], "item_id": [1], "timestamp": [1]})
    with pytest.raises(DataError, match="column 'picture': the column holds Binary"):
        Dataset.read(log, pl.DataFrame({"item_id": [1], "title": ["A"], "picture": [b"x"]}))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"nonsense": 1}, "option nonsense"),
        ({"repeats": "some"}, "option repeats"),
        ({"items_table": {"encoding": "hex"}}, "option items_table.encoding"),
        ({"min_user_events": -1}, "option min_user_events"),
    ],
)
def test_bad_options_are_config_errors(put: Put, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Dataset.read(put("log.csv", GOOD), put("items.csv", ITEMS), **options)


@pytest.mark.parametrize(
    ("mapping", "remedy"),
    [
        ({"user_id": "uesr_id"}, "leave --map user_id out"),
        ({"category": "titel"}, "--map category=title"),
        ({"place": "timestamp"}, "--context place"),
    ],
)
def test_a_mapping_that_fits_nothing_is_an_error(put: Put, mapping: dict[str, str], remedy: str) -> None:
    with pytest.raises(DataError, match="isn't there") as caught:
        Dataset.read(put("log.csv", GOOD), put("items.csv", ITEMS), map=mapping)
    assert remedy in str(caught.value.remedy)


def test_keywords_change_the_options_given(put: Put) -> None:
    options = ReadOptions(time_unit="ms", repeats="last")
    dataset = Dataset.read(put("log.csv", GOOD), put("items.csv", ITEMS), options=options, repeats="first")
    assert (dataset.report["options"]["time_unit"], dataset.report["options"]["repeats"]) == ("ms", "first")


def test_every_option_says_what_it_is() -> None:
    assert all(field.description for field in ReadOptions.model_fields.values())
