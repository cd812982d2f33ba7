"""What was past as of a moment, against plain lists."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penchant.data.dataset import Dataset
from penchant.data.history import EventLog, Targets
from penchant.errors import DataError

Row = tuple[str, str, int]  # user, item, seconds


def made(rows: list[Row], items: list[str] | None = None) -> Dataset:
    items = sorted({item for _, item, _ in rows}) if items is None else items
    return Dataset.read(
        pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row"),
        pl.DataFrame({"item_id": items, "title": [f"title {i}" for i in items]}),
    )


# Two users, integer ids, rows out of order, and a tie of user 2 at second 7.
HAND = [("10", "3", 5), ("2", "10", 7), ("2", "9", 7), ("2", "3", 1), ("10", "9", 4), ("2", "3", 9)]

logs = st.lists(
    st.tuples(st.sampled_from("abcd"), st.integers(1, 12).map(str), st.integers(0, 8)), min_size=1, max_size=40
)


@pytest.fixture
def hand() -> EventLog:
    return EventLog.from_dataset(made(HAND))


def test_events_lie_by_user_then_time_then_numeric_item(hand: EventLog) -> None:
    assert hand.user_ids == ["2", "10"]  # as numbers, not as text
    assert hand.item_ids == ["3", "9", "10"]
    assert hand.start.tolist() == [0, 4, 6]
    assert [hand.item_ids[i] for i in hand.item] == ["3", "9", "10", "3", "9", "3"]
    assert (hand.time // 1_000_000).tolist() == [1, 7, 7, 9, 4, 5]
    assert hand.user.tolist() == [0, 0, 0, 0, 1, 1]
    assert (hand.n_users, hand.n_items) == (2, 3)
    assert hand.user_index == {"2": 0, "10": 1}
    assert hand.item_index == {"3": 0, "9": 1, "10": 2}


def test_an_item_nobody_touched_still_has_an_index() -> None:
    log = EventLog.from_dataset(made([("a", "2", 1)], ["1", "2", "3"]))
    assert log.item_ids == ["1", "2", "3"]
    assert log.item.tolist() == [1]


def test_before_ends_just_before_the_event_and_stays_with_its_user(hand: EventLog) -> None:
    assert [hand.item[hand.before(j)].tolist() for j in range(6)] == [[], [0], [0, 1], [0, 1, 2], [], [1]]
    assert hand.item[hand.all_of(0)].tolist() == [0, 1, 2, 0]
    assert hand.item[hand.all_of(1)].tolist() == [1, 0]


@settings(max_examples=80)
@given(rows=logs)
def test_every_history_is_what_plain_sorting_gives(rows: list[Row]) -> None:
    dataset = made(rows)
    log = EventLog.from_dataset(dataset)
    position = 0
    for user in sorted({u for u, _, _ in rows}):
        events = sorted((at, int(item)) for u, item, at in rows if u == user)
        assert [int(log.item_ids[i]) for i in log.item[log.all_of(log.user_index[user])]] == [i for _, i in events]
        for n, (at, item) in enumerate(events):
            assert (log.time[position], log.item_ids[log.item[position]]) == (at * 1_000_000, str(item))
            assert [int(log.item_ids[i]) for i in log.item[log.before(position)]] == [i for _, i in events[:n]]
            assert log.user_ids[log.user[position]] == user
            position += 1
    assert position == len(rows) == log.start[-1]
    # Event j is row j of the interactions.
    assert [log.item_ids[i] for i in log.item] == dataset.interactions["item_id"].to_list()


def test_targets_have_the_history_before_them(hand: EventLog) -> None:
    targets = Targets(hand, np.array([3, 5]))
    assert len(targets) == 2
    assert (targets.user.tolist(), targets.item.tolist()) == ([0, 1], [0, 0])
    assert [targets.history(i).tolist() for i in range(2)] == [[0, 1, 2], [1]]
    assert targets.take(np.array([1])).position.tolist() == [5]


def test_a_sample_is_seeded_without_repeats_and_in_order() -> None:
    log = EventLog.from_dataset(made([("a", "1", t) for t in range(50)]))
    targets = Targets(log, np.arange(5, 50))
    first, again, other = targets.sample(10, 1), targets.sample(10, 1), targets.sample(10, 2)
    assert first.position.tolist() == again.position.tolist() != other.position.tolist()
    assert first.position.tolist() == sorted(set(first.position.tolist()))
    assert len(first) == 10
    assert set(first.position) <= set(range(5, 50))
    assert targets.sample(45, 0).position.tolist() == targets.sample(99, 0).position.tolist() == list(range(5, 50))


def test_interactions_not_grouped_by_user_are_refused() -> None:
    dataset = made(HAND)
    mixed = Dataset(dataset.interactions[[0, 4, 1]], dataset.items)
    with pytest.raises(DataError, match="not grouped by user"):
        EventLog.from_dataset(mixed)
