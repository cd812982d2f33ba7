"""Splits: what is held out, and that nothing later helps to predict it."""

from __future__ import annotations

import dataclasses
import zipfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from penchant.data.dataset import Dataset
from penchant.data.history import EventLog, Targets
from penchant.data.split import Split, global_time, leave_last_out
from penchant.errors import ConfigError, DataError, StorageError

ML100K = Path(__file__).parents[3] / "shared" / "data" / "ml-100k"
Row = tuple[str, str, int]  # user, item, seconds

logs = st.lists(
    st.tuples(st.sampled_from("abcde"), st.integers(1, 15).map(str), st.integers(0, 12)), min_size=6, max_size=60
)


def made(rows: list[Row], items: list[str] | None = None) -> Dataset:
    items = sorted({item for _, item, _ in rows}) if items is None else items
    return Dataset.read(
        pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row"),
        pl.DataFrame({"item_id": items, "title": [f"title {i}" for i in items]}),
    )


def named(split: Split, position: int) -> tuple[str, str]:
    return split.log.user_ids[split.log.user[position]], split.log.item_ids[split.log.item[position]]


def held(targets: Targets, split: Split) -> set[tuple[str, str]]:
    return {named(split, int(p)) for p in targets.position}


def trained(split: Split) -> list[tuple[str, str]]:
    return [named(split, int(p)) for p in np.flatnonzero(split.train)]


HAND = [
    ("a", "1", 1), ("a", "2", 2), ("a", "10", 3), ("a", "9", 3),  # 9 before 10: the tie leaves 10 for the test
    ("b", "3", 5), ("b", "4", 4), ("b", "1", 6),
    ("c", "1", 1), ("c", "2", 9),
    ("d", "3", 7),
]  # fmt: skip


# -- leave last out ----------------------------------------------------------------------------


def test_leave_last_out_by_hand() -> None:
    split = leave_last_out(made(HAND))
    assert held(split.test, split) == {("a", "10"), ("b", "1")}
    assert held(split.valid, split) == {("a", "9"), ("b", "3")}
    # Users of fewer than three events are all training.
    assert trained(split) == [("a", "1"), ("a", "2"), ("b", "4"), ("c", "1"), ("c", "2"), ("d", "3")]
    ids = split.log.item_ids
    histories = {named(split, int(split.test.position[i])): split.test.history(i) for i in range(2)}
    # A test history holds the validation event.
    assert [ids[i] for i in histories["a", "10"]] == ["1", "2", "9"]
    assert [ids[i] for i in histories["b", "1"]] == ["4", "3"]
    assert split.ties == {"valid": 1, "test": 1}
    assert {ids[i]: int(n) for i, n in enumerate(split.train_counts)} == {
        "1": 2,
        "2": 2,
        "3": 1,
        "4": 1,
        "9": 0,
        "10": 0,
    }


def test_a_tie_of_ids_that_are_text_falls_to_their_code_points() -> None:
    rows = [("a", "x1", 1), ("a", "x9", 3), ("a", "x10", 3)]
    split = leave_last_out(made(rows))
    assert held(split.test, split) == {("a", "x9")}
    assert held(split.valid, split) == {("a", "x10")}


def test_without_a_test_only_the_last_event_is_held_out() -> None:
    split = leave_last_out(made(HAND), test=False)
    assert len(split.test) == 0
    assert held(split.valid, split) == {("a", "10"), ("b", "1"), ("c", "2")}
    assert trained(split) == [("a", "1"), ("a", "2"), ("a", "9"), ("b", "4"), ("b", "3"), ("c", "1"), ("d", "3")]


def test_ties_count_targets_sharing_their_moment_with_an_event_of_the_same_user_only() -> None:
    rows = [
        # Valid and test tie with each other.
        ("a", "1", 1), ("a", "2", 2), ("a", "3", 2),
        # Valid ties with training.
        ("b", "1", 2), ("b", "2", 2), ("b", "3", 3),
        # All three tie.
        ("c", "1", 3), ("c", "2", 3), ("c", "3", 3),
        # No tie; the neighbour at the same moment is another user's.
        ("d", "1", 3), ("d", "2", 4), ("d", "3", 5),
        ("e", "1", 5), ("e", "2", 6), ("e", "3", 7),
    ]  # fmt: skip
    assert leave_last_out(made(rows)).ties == {"valid": 3, "test": 2}


def test_the_summary_says_how_many_ties_decided() -> None:
    assert "a tie in time decided 1 test targets" in leave_last_out(made(HAND)).summary()


def test_a_dataset_of_short_histories_cannot_be_split() -> None:
    with pytest.raises(DataError, match="no user has a validation event"):
        leave_last_out(made([("a", "1", 1), ("a", "2", 2), ("b", "1", 1)]))


@settings(max_examples=60)
@given(rows=logs, test=st.booleans())
def test_leave_last_out_holds_out_each_users_last_events_and_nothing_twice(rows: list[Row], test: bool) -> None:
    users = {u: sorted((at, int(i)) for v, i, at in rows if v == u) for u in {r[0] for r in rows}}
    least = 3 if test else 2
    assume(any(len(events) >= least for events in users.values()))
    split = leave_last_out(made(rows), test=test)
    _nothing_is_later_or_twice(split)
    assert int(split.train.sum()) + len(split.valid) + len(split.test) == len(rows)
    for user, events in users.items():
        index = split.log.user_index[user]
        mine = [int(split.log.item_ids[i]) for i in split.log.item[split.log.all_of(index)]]
        assert mine == [i for _, i in events]
        n_train = int(split.train[split.log.all_of(index)].sum())
        assert n_train == (len(events) - (least - 1) if len(events) >= least else len(events))
        for targets, back in ((split.test, 1), (split.valid, 2)) if test else ((split.valid, 1),):
            where = targets.position[targets.user == index]
            expected = [int(split.log.start[index + 1]) - back] if len(events) >= least else []
            assert where.tolist() == expected


def _nothing_is_later_or_twice(split: Split) -> None:
    log = split.log
    places = [set(np.flatnonzero(split.train)), set(split.valid.position), set(split.test.position)]
    assert sum(map(len, places)) == len(places[0] | places[1] | places[2])
    for targets in (split.valid, split.test):
        for i, position in enumerate(targets.position):
            past = range(int(log.start[log.user[position]]), int(position))
            assert targets.history(i).tolist() == log.item[list(past)].tolist()
            assert all(log.time[p] <= log.time[position] for p in past)
            assert all(log.user[p] == log.user[position] for p in past)
            assert not any(split.train[position : log.start[log.user[position] + 1]])


def test_movielens_100k_has_415_test_targets_that_a_tie_decides() -> None:
    if not ML100K.is_dir():
        pytest.skip(f"the data set ml-100k is not at {ML100K}")
    dataset = Dataset.read(
        ML100K / "u.data",
        ML100K / "u.item",
        interactions_table={"separator": "\t", "columns": ["user_id", "item_id", "rating", "timestamp"]},
        items_table={"separator": "|", "encoding": "latin-1", "quote": None, "columns": ["item_id", "title"]},
    )
    split = leave_last_out(dataset)
    assert split.ties["test"] == 415
    assert len(split.test) == len(split.valid) == 943
    # Counted again from the file: users whose last second has more than one event.
    times: dict[str, list[int]] = {}
    for line in (ML100K / "u.data").read_text().splitlines():
        user, _, _, at = line.split("\t")
        times.setdefault(user, []).append(int(at))
    assert sum(all_.count(max(all_)) > 1 for all_ in times.values()) == 415
    first = split.test.history(0)
    last_of_user_1 = max(
        (int(row[3]), int(row[1]))
        for row in (line.split("\t") for line in (ML100K / "u.data").read_text().splitlines())
        if row[0] == "1"
    )
    assert (split.log.item_ids[split.test.item[0]], len(first)) == (str(last_of_user_1[1]), len(times["1"]) - 1)


# -- verify ------------------------------------------------------------------------------------


def _retimed(split: Split, time: np.ndarray) -> Split:
    log = dataclasses.replace(split.log, time=time)
    return dataclasses.replace(
        split, log=log, valid=Targets(log, split.valid.position), test=Targets(log, split.test.position)
    )


def test_verify_passes_what_was_cut_here() -> None:
    leave_last_out(made(HAND)).verify()


def test_verify_names_the_user_whose_history_is_later_than_the_target() -> None:
    split = leave_last_out(made(HAND))
    time = split.log.time.copy()
    b = split.log.start[split.log.user_index["b"]]
    time[b] = time[b + 2] + 1
    with pytest.raises(DataError, match=r"user b: a history holds an event later"):
        _retimed(split, time).verify()


@settings(max_examples=60)
@given(rows=logs, seed=st.integers(0, 2**32 - 1))
def test_verify_refuses_shuffled_times_exactly_when_a_history_got_later_than_its_target(
    rows: list[Row], seed: int
) -> None:
    assume(any(sum(r[0] == u for r in rows) >= 3 for u in "abcde"))
    split = leave_last_out(made(rows))
    tampered = _retimed(split, np.random.default_rng(seed).permutation(split.log.time))
    log = tampered.log
    broken = any(
        log.time[past] > log.time[position]
        for targets in (tampered.valid, tampered.test)
        for position in targets.position
        for past in range(log.start[log.user[position]], position)
    )
    if broken:
        with pytest.raises(DataError, match="later than its target"):
            tampered.verify()
    else:
        tampered.verify()


@pytest.mark.parametrize("which", ["valid", "test"])
def test_verify_refuses_a_target_that_is_trained_on(which: str) -> None:
    split = leave_last_out(made(HAND))
    train = split.train.copy()
    train[getattr(split, which).position[0]] = True
    with pytest.raises(DataError, match="also a training event"):
        dataclasses.replace(split, train=train).verify()


def test_verify_refuses_a_training_event_after_the_users_target() -> None:
    rows = [("a", str(n), n) for n in range(1, 6)]
    split = leave_last_out(made(rows))
    early = dataclasses.replace(
        split, valid=Targets(split.log, np.array([1])), test=split.test, train=np.array([1, 0, 1, 1, 0], dtype=bool)
    )
    with pytest.raises(DataError, match=r"user a: a training event is later"):
        early.verify()


def test_verify_refuses_a_validation_target_at_or_after_the_test_target() -> None:
    split = leave_last_out(made(HAND))
    for valid, test in ((split.test, split.test), (split.test, split.valid)):
        with pytest.raises(DataError, match="validation target is not before"):
            dataclasses.replace(split, valid=valid, test=test).verify()


def test_verify_refuses_a_global_split_that_trains_on_a_later_event_of_another_user() -> None:
    rows = [("a", str(n), n) for n in range(1, 11)] + [("b", "1", 1), ("b", "2", 10)]
    split = global_time(made(rows), valid_from=_at(5), test_from=_at(8), targets="first")
    train = split.train.copy()
    train[-2:] = True
    tampered = dataclasses.replace(split, train=train, test=split.test.take(np.array([0])))
    with pytest.raises(DataError, match="of whichever user"):
        tampered.verify()


# -- global time -------------------------------------------------------------------------------


def _at(second: int) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=second)


GLOBAL = [
    ("a", "1", 1), ("a", "2", 5), ("a", "3", 6), ("a", "4", 8), ("a", "5", 9),
    ("b", "1", 2), ("b", "2", 4), ("b", "3", 7), ("b", "4", 12),
    ("c", "1", 7),
]  # fmt: skip


@pytest.mark.parametrize(
    ("targets", "valid", "test"),
    [
        ("all", {("a", "2"), ("a", "3"), ("b", "3"), ("c", "1")}, {("a", "4"), ("a", "5"), ("b", "4")}),
        ("first", {("a", "2"), ("b", "3"), ("c", "1")}, {("a", "4"), ("b", "4")}),
        ("last", {("a", "3"), ("b", "3"), ("c", "1")}, {("a", "5"), ("b", "4")}),
    ],
)
def test_global_time_by_moments(targets: str, valid: set[tuple[str, str]], test: set[tuple[str, str]]) -> None:
    split = global_time(made(GLOBAL), valid_from=_at(5), test_from=_at(8), targets=targets)
    assert held(split.valid, split) == valid
    assert held(split.test, split) == test
    # An event at the very moment is in the window, not in training.
    assert trained(split) == [("a", "1"), ("b", "1"), ("b", "2")]
    # As-of: a test history holds what came before it, the validation window included.
    where = next(i for i in range(len(split.test)) if named(split, int(split.test.position[i])) == ("b", "4"))
    assert [split.log.item_ids[i] for i in split.test.history(where)] == ["1", "2", "3"]
    # A user who begins inside a window has no history there.
    where = next(i for i in range(len(split.valid)) if named(split, int(split.valid.position[i]))[0] == "c")
    assert split.valid.history(where).size == 0


def test_shares_of_times_that_tie_leave_whole_moments_to_each_window() -> None:
    # Twenty users, one event on each of five days: a tenth for each window is one day for each.
    rows = [(f"u{user:02}", str(day), day) for user in range(20) for day in range(1, 6)]
    split = global_time(made(rows))
    assert {split.log.time[at] // 1_000_000 for at in split.test.position} == {5}
    assert {split.log.time[at] // 1_000_000 for at in split.valid.position} == {4}
    assert split.train.sum() == 60


def test_a_moment_without_a_zone_is_utc_and_another_zone_is_the_same_moment() -> None:
    dataset = made(GLOBAL)
    aware = global_time(dataset, valid_from=_at(5), test_from=_at(8))
    naive = global_time(
        dataset, valid_from=_at(5).replace(tzinfo=None), test_from=_at(8).astimezone(datetime.now().astimezone().tzinfo)
    )
    assert naive.spec == aware.spec
    assert aware.spec["test_from"] == "1970-01-01T00:00:08+00:00"
    assert naive.test.position.tolist() == aware.test.position.tolist()


@pytest.mark.parametrize(("valid", "test"), [(0.1, 0.1), (0.2, 0.3), (0.3, 0.3), (0.1, 0.8), (0.29, 0.57)])
def test_shares_are_the_shares_of_events_in_each_window(valid: float, test: float) -> None:
    rows = [(f"u{n % 3}", str(n % 5 + 1), n) for n in range(100)]
    split = global_time(made(rows), valid_share=valid, test_share=test)
    assert (len(split.valid), len(split.test)) == (round(100 * valid), round(100 * test))
    assert int(split.train.sum()) == 100 - round(100 * valid) - round(100 * test)


@settings(max_examples=60)
@given(
    rows=logs,
    valid=st.floats(0.05, 0.45),
    test=st.floats(0.05, 0.45),
    targets=st.sampled_from(["all", "first", "last"]),
)
def test_global_time_trains_strictly_before_validation_and_that_before_test(
    rows: list[Row], valid: float, test: float, targets: str
) -> None:
    try:
        split = global_time(made(rows), valid_share=valid, test_share=test, targets=targets)
    except (ConfigError, DataError):  # many events at one moment can leave a window or the training empty
        assume(False)
        raise
    _nothing_is_later_or_twice(split)
    log = split.log
    assert log.time[split.train].max() < log.time[split.valid.position].min()
    assert log.time[split.valid.position].max() < log.time[split.test.position].min()
    # Each window again, one event at a time.
    low, high = (
        round(datetime.fromisoformat(split.spec[name]).timestamp() * 1e6) for name in ("valid_from", "test_from")
    )
    assert split.train.tolist() == [at < low for at in log.time]
    for part, inside in (
        (split.valid, [p for p in range(len(log.item)) if low <= log.time[p] < high]),
        (split.test, [p for p in range(len(log.item)) if high <= log.time[p]]),
    ):
        pick = {"all": list, "first": lambda mine: [min(mine)], "last": lambda mine: [max(mine)]}[targets]
        expected = [pick([p for p in inside if log.user[p] == u]) for u in sorted(set(log.user[inside]))]
        assert part.position.tolist() == [p for mine in expected for p in mine]


@pytest.mark.parametrize(("test_from", "valid_from"), [(70, 60), (99, 89), (15, 5)])
def test_behind_a_test_that_begins_at_a_moment_validation_is_its_share_right_before(
    test_from: int, valid_from: int
) -> None:
    dataset = made([(f"u{n % 3}", str(n % 5 + 1), n) for n in range(100)])
    split = global_time(dataset, test_from=_at(test_from))
    assert split.spec["valid_from"] == _at(valid_from).isoformat()
    assert len(split.valid) == 10
    assert len(split.test) == 100 - test_from
    with pytest.raises(ConfigError, match="validation window is empty"):
        global_time(dataset, test_from=_at(0))


def test_global_time_refuses_what_leaves_a_part_empty() -> None:
    dataset = made(GLOBAL)
    with pytest.raises(ConfigError, match="validation window is empty"):
        global_time(dataset, valid_from=_at(8), test_from=_at(8))
    with pytest.raises(ConfigError, match="leave no training"):
        global_time(dataset, valid_share=0.5, test_share=0.5)
    with pytest.raises(ConfigError, match="unknown targets"):
        global_time(dataset, targets="some")
    with pytest.raises(DataError, match="no training event"):
        global_time(dataset, valid_from=_at(1), test_from=_at(8))
    with pytest.raises(DataError, match="no user has a validation event"):
        global_time(dataset, valid_from=_at(10), test_from=_at(11))


# -- saving ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["last", "no test", "global"])
def test_a_saved_split_comes_back_the_same(kind: str, tmp_path: Path) -> None:
    dataset = made(GLOBAL)
    split = {
        "last": lambda: leave_last_out(dataset),
        "no test": lambda: leave_last_out(dataset, test=False),
        "global": lambda: global_time(dataset, valid_from=_at(5), test_from=_at(8)),
    }[kind]()
    split.save(tmp_path)
    again = Split.load(tmp_path, dataset)
    assert again.train.tolist() == split.train.tolist()
    assert again.valid.position.tolist() == split.valid.position.tolist()
    assert again.test.position.tolist() == split.test.position.tolist()
    assert (again.spec, again.ties, again.summary()) == (split.spec, split.ties, split.summary())
    again.verify()


def test_a_split_of_another_dataset_is_refused(tmp_path: Path) -> None:
    leave_last_out(made(GLOBAL)).save(tmp_path)
    with pytest.raises(StorageError):
        Split.load(tmp_path, made(GLOBAL[:-1]))
    # As many events, other ones.
    other = [*GLOBAL[:-1], ("c", "1", 8)]
    with pytest.raises(StorageError, match="another dataset"):
        Split.load(tmp_path, made(other))


def test_a_torn_split_is_a_storage_error(tmp_path: Path) -> None:
    dataset = made(GLOBAL)
    leave_last_out(dataset).save(tmp_path)
    path = tmp_path / "split.npz"
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        assert all(name.endswith(".npy") for name in archive.namelist())
    for torn in (whole[: len(whole) // 2], b"", b"not a zip"):
        path.write_bytes(torn)
        with pytest.raises(StorageError, match="cannot be read"):
            Split.load(tmp_path, dataset)
    path.unlink()
    with pytest.raises(StorageError, match="cannot be read"):
        Split.load(tmp_path, dataset)


def test_the_log_of_a_split_is_that_of_its_dataset() -> None:
    split = leave_last_out(made(GLOBAL))
    assert split.log.time.tolist() == EventLog.from_dataset(split.dataset).time.tolist()


def test_ids_in_other_scripts_digits_are_names() -> None:
    split = leave_last_out(made([("\uff11", str(n), n) for n in range(1, 4)] + [("2", str(n), n) for n in range(1, 4)]))
    assert split.log.user_ids == ["2", "\uff11"]
