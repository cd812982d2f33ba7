"""Slices: who belongs where, by plain loops, and what becomes of columns of every kind."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import polars as pl
import pytest
from tests.conftest import SHARED_DATA, toy_frames

from penchant.data.dataset import Dataset
from penchant.data.split import Split, global_time, leave_last_out
from penchant.errors import ConfigError, DataError
from penchant.evaluation.slices import (
    Slice,
    by_coldness,
    by_history_length,
    by_order,
    by_popularity,
    by_values,
    slices,
)


def masks(found: list[Slice]) -> dict[str, list[bool]]:
    return {s.value: s.mask.tolist() for s in found}


@pytest.fixture
def split() -> Split:
    """A global split of users with histories of many lengths, and an item that only the test window has."""
    interactions, items = toy_frames(n_users=20)
    late = pl.DataFrame({"user_id": ["new", "u1"], "item_id": ["17", "17"], "timestamp": [1_000_900, 1_000_901]})
    more = pl.DataFrame({"item_id": ["17"], "title": ["New One"], "genres": [""], "year": [""]})
    dataset = Dataset.read(pl.concat([interactions, late]), pl.concat([items, more]))
    moments = [datetime.fromtimestamp(1_000_000 + s, UTC) for s in (100, 300)]
    return global_time(dataset, valid_from=moments[0], test_from=moments[1])


def test_history_length_counts_what_the_user_had_before_the_target(split: Split) -> None:
    found = masks(by_history_length(split.test))
    lengths = [len(split.test.history(i)) for i in range(len(split.test))]
    assert found["0"] == [n == 0 for n in lengths]
    assert found["1-3 (cold users)"] == [1 <= n <= 3 for n in lengths] if any(1 <= n <= 3 for n in lengths) else True
    assert found["4-10"] == [4 <= n <= 10 for n in lengths]
    assert sum(map(sum, found.values())) == len(lengths)


@pytest.mark.parametrize(("length", "value"), [
    (0, "0"), (1, "1-3 (cold users)"), (3, "1-3 (cold users)"), (4, "4-10"), (10, "4-10"), (11, "11-50"),
    (50, "11-50"), (51, "over 50"),
])  # fmt: skip
def test_the_edges_of_the_lengths(length: int, value: str) -> None:
    interactions = pl.DataFrame(
        {
            "user_id": ["a"] * 60,
            "item_id": [str(i) for i in range(60)],
            "timestamp": [10_000_000 + i for i in range(60)],
        }
    )
    items = pl.DataFrame({"item_id": [str(i) for i in range(60)], "title": [f"t{i}" for i in range(60)]})
    split = leave_last_out(Dataset.read(interactions, items))
    targets = type(split.test)(split.log, np.array([length]))
    assert [s.value for s in by_history_length(targets)] == [value]


def test_cold_items_have_no_training_event(split: Split) -> None:
    found = masks(by_coldness(split, split.test))
    trained = set(split.log.item[split.train].tolist())
    cold = [int(i) not in trained for i in split.test.item]
    assert any(cold)
    assert found == {"cold items (no training event)": cold, "warm items": [not c for c in cold]}


def test_a_tie_with_the_event_before_is_told_apart() -> None:
    times = {"a": [10, 20, 30, 30], "b": [10, 20, 20, 40], "c": [10, 20, 30, 40], "d": [30, 30, 30, 30]}
    rows = [(user, str(i), 1_000_000 + t) for user, own in times.items() for i, t in enumerate(own)]
    interactions = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    items = pl.DataFrame({"item_id": ["0", "1", "2", "3"], "title": ["p", "q", "r", "s"]})
    split = leave_last_out(Dataset.read(interactions, items))
    tied, own = by_order(split.test)
    assert (tied.value, tied.mask.tolist()) == ("tied with another event (ordered by item)", [True, False, False, True])
    np.testing.assert_array_equal(own.mask, ~tied.mask)
    # Of two events at one time the first is tied too; another user's event at that time is nothing to it.
    first, third = (type(split.test)(split.log, split.log.start[:4] + n) for n in (0, 2))
    assert by_order(first)[0].mask.tolist() == [False, False, False, True]
    assert by_order(third)[0].mask.tolist() == [True, True, False, True]
    assert by_order(third.take([2])) == []
    assert [s.name for s in slices(split, split.test) if s.name == "time"] == ["time", "time"]


def test_head_middle_and_tail_by_hand() -> None:
    # Training events: a 4, b 3, c 2, d 2, e 1 of 12; every item is once a test target, of a user of its own.
    rows, clock = [], 10_000_000
    for item, n in zip("abcde", (4, 3, 2, 2, 1), strict=True):
        for _ in range(n):
            rows.append((f"train-{item}{len(rows)}", item, clock))
            clock += 1
    rows += [(f"test-{item}", item, clock + 2_000) for item in "abcdez"]
    rows.append(("valid", "a", clock + 1_000))
    interactions = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    items = pl.DataFrame({"item_id": list("abcdez"), "title": list("ABCDEZ")})
    moments = [datetime.fromtimestamp(clock + s, UTC) for s in (500, 1_500)]
    split = global_time(Dataset.read(interactions, items), valid_from=moments[0], test_from=moments[1])
    found = {
        s.value: [split.log.item_ids[i] for i in split.test.item[s.mask]] for s in by_popularity(split, split.test)
    }
    # Before a there are 0 of 12 events, before b 4, before c 7, before d 9, before e 11; z has none at all.
    assert found == {"head": ["a"], "middle": ["b", "c"], "tail": ["d", "e"]}


def test_families_without_genres_put_every_target_in_one_place(split: Split) -> None:
    found = slices(split, split.test, item_columns=["year"])
    for name in ("history length", "item coldness", "item year"):
        total = sum(s.mask.astype(int) for s in found if s.name == name)
        assert (total == 1).all(), name
    warm = next(s.mask for s in found if s.value == "warm items")
    assert (sum(s.mask.astype(int) for s in found if s.name == "item popularity") == warm).all()
    assert all(len(s) for s in found)


def test_item_columns_are_the_targets_items(split: Split) -> None:
    found = [s for s in slices(split, split.test, item_columns=["genres"]) if s.name == "item genres"]
    genres = split.dataset.items["genres"].to_list()
    for part in found:
        expected = [
            part.value in (genres[i] or "").split("|") if part.value != "(none)" else not genres[i]
            for i in split.test.item
        ]
        assert part.mask.tolist() == expected
    assert {s.value for s in found} == {"Comedy", "Drama", "Thriller", "(none)"}


def test_the_commonest_stand_alone_and_the_rest_together() -> None:
    values = pl.Series(["a"] * 5 + ["b"] * 4 + ["c", "d", " ", None])
    found = {s.value: len(s) for s in by_values("x", values, max_values=2)}
    assert found == {"a": 5, "b": 4, "(other)": 2, "(none)": 2}


def test_members_overlap_and_other_is_who_has_none_of_the_commonest() -> None:
    values = pl.Series(["a|b", "a", "b|a|a", "c", "d|b", "", None])
    found = masks(by_values("x", values, max_values=2))
    assert found == {
        "a": [True, True, True, False, False, False, False],
        "b": [True, False, True, False, True, False, False],
        "(other)": [False, False, False, True, False, False, False],
        "(none)": [False, False, False, False, False, True, True],
    }
    lists = pl.Series([["a", "b"], ["a"], ["b", "a", "a"], ["c"], ["d", "b"], [], None])
    assert masks(by_values("x", lists, max_values=2)) == found


@pytest.mark.parametrize("as_text", [True, False])
def test_many_numbers_become_quartiles(as_text: bool, rng: np.random.Generator) -> None:
    values = rng.permutation(40)
    series = pl.Series([*values.tolist(), None])
    found = by_values("x", series.cast(pl.String) if as_text else series)
    assert [(s.value, len(s)) for s in found] == [
        ("0 to 9", 10), ("10 to 19", 10), ("20 to 29", 10), ("30 to 39", 10), ("(none)", 1)
    ]  # fmt: skip
    assert found[0].mask.tolist() == [*(values < 10).tolist(), False]


def test_quartiles_of_long_numbers_are_told_apart() -> None:
    found = by_values("x", pl.Series(range(20240101, 20240129)))
    assert [s.value for s in found] == [f"{20240101 + 7 * i} to {20240107 + 7 * i}" for i in range(4)]
    found = by_values("x", pl.Series([1.23456789 + n * 1e-7 for n in range(28)]))
    assert len({s.value for s in found}) == 4


def test_one_very_common_number_gives_fewer_slices_and_none_is_lost() -> None:
    values = pl.Series([0.0] * 30 + [float(i) for i in range(1, 13)])
    found = by_values("x", values)
    assert sum(len(s) for s in found) == 42
    assert found[0].value == "0"
    assert len(found[0]) == 30


def test_few_numbers_are_categories() -> None:
    found = {s.value: len(s) for s in by_values("x", pl.Series(["1", "5", "5"]))}
    assert found == {"5": 2, "1": 1}


def test_user_columns_need_a_table_of_users(split: Split) -> None:
    with pytest.raises(ConfigError, match="no table of users"):
        slices(split, split.test, user_columns=["age"])
    users = pl.DataFrame({"user_id": ["u1", "u2"], "job": ["cook", "nurse"]})
    found = {
        s.value: s.mask for s in slices(split, split.test, user_columns=["job"], users=users) if s.name == "user job"
    }
    ids = [split.log.user_ids[u] for u in split.test.user]
    assert found["cook"].tolist() == [u == "u1" for u in ids]
    assert found["(none)"].tolist() == [u not in ("u1", "u2") for u in ids]
    with pytest.raises(ConfigError, match="users have no column 'age'"):
        slices(split, split.test, user_columns=["age"], users=users)
    with pytest.raises(ConfigError, match="users have no column 'user_id'"):
        slices(split, split.test, user_columns=["job"], users=users.drop("user_id"))
    with pytest.raises(DataError, match="twice"):
        slices(split, split.test, user_columns=["job"], users=pl.concat([users, users]))
    with pytest.raises(ConfigError, match="items have no column 'nothing'"):
        slices(split, split.test, item_columns=["nothing"])
    with pytest.raises(ConfigError, match="max_values"):
        slices(split, split.test, max_values=0)


def test_ids_of_users_may_be_numbers() -> None:
    interactions, items = toy_frames(n_users=6)
    numbered = interactions.with_columns(pl.col("user_id").str.strip_prefix("u"))
    split = leave_last_out(Dataset.read(numbered, items))
    users = pl.DataFrame({"user_id": range(6), "even": ["no" if i % 2 else "yes" for i in range(6)]})
    found = {s.value: len(s) for s in slices(split, split.test, user_columns=["even"], users=users)}
    assert (found["yes"], found["no"]) == (3, 3)


def test_real_genres_and_years() -> None:
    folder = SHARED_DATA / "ml-latest-small"
    if not folder.is_dir():
        pytest.skip(f"MovieLens is not at {folder}")
    dataset = Dataset.read(
        folder / "ratings.csv", folder / "movies.csv", map={"user_id": "userId", "item_id": "movieId"}
    )
    split = leave_last_out(dataset)
    found = slices(split, split.test, item_columns=["genres"])
    drama = next(s for s in found if s.value == "Drama")
    genres = dataset.items["genres"].to_list()
    assert len(drama) == sum("Drama" in genres[i].split("|") for i in split.test.item)
