"""The provenance of rows: clean ones pass, and every leak made on purpose is refused."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime

import numpy as np
import polars as pl
import pytest
from tests.conftest import toy_frames

from penchant.data.dataset import Dataset
from penchant.data.history import Targets
from penchant.data.provenance import LeakCheck, Row, Rows, check_rows
from penchant.data.split import Split, global_time, leave_last_out
from penchant.errors import ConfigError, DataError


def row(user: int, inputs: list[int], targets: list[int], text_time: list[int] | None = None) -> Row:
    return Row(
        user,
        np.array(inputs, dtype=np.int64),
        np.array(targets, dtype=np.int64),
        np.array(text_time or [], dtype=np.int64),
    )


@pytest.fixture
def split() -> Split:
    """Users of nine events each: user u has positions 9u to 9u + 8, the last two held out."""
    return leave_last_out(Dataset.read(*toy_frames(n_users=5)))


@pytest.fixture
def whole() -> Split:
    """One moment for everybody, after four or five events each."""
    moments = [datetime.fromtimestamp(1_000_000 + s, UTC) for s in (250, 420)]
    return global_time(Dataset.read(*toy_frames(n_users=5)), valid_from=moments[0], test_from=moments[1])


def test_clean_rows_pass_and_are_counted(split: Split) -> None:
    found = check_rows(split, [row(0, [0, 1, 2], [3]), row(1, [], [9])], "train")
    assert found == LeakCheck(training_rows=2, events=5)
    # Dense: every event but the first is a target, and an input of the next.
    check_rows(split, [row(2, [18, 19, 20, 21], [19, 20, 21, 22])], "train")
    assert check_rows(split, [row(0, list(range(7)), [7])], "valid") == LeakCheck(prompts=1, events=8)
    check_rows(split, [row(0, list(range(8)), [8])], "test")
    assert check_rows(split, [], "train") == LeakCheck()
    time = int(split.log.time[3])
    check_rows(split, [row(0, [0], [3], [time, time - 5])], "train")


@pytest.mark.parametrize(
    ("bad", "part", "what"),
    [
        (row(0, [0, 9], [3]), "train", "an input that is another user's event"),
        (row(1, [0, 1], [3]), "train", "another user's event"),
        (row(0, [0], [12]), "train", "a target that is another user's event"),
        (row(99, [0], [3]), "train", "another user's event"),
        (row(-1, [0], [3]), "train", "another user's event"),
        (row(0, [0, 4], [3]), "train", "an input later than its target"),
        (row(0, [0, 3], [3]), "train", "its own target among its inputs"),
        (row(0, [-1], [3]), "train", "no event"),
        (row(0, [10_000], [3]), "train", "no event"),
        (row(0, [0], []), "train", "has no target"),
        (row(0, [0, 1], [7]), "train", "a held-out event among its targets"),
        (row(0, [0, 1, 7], [8]), "train", "a held-out event among its inputs"),
        (row(0, [0, 2, 1], [1, 2, 3]), "train", "inputs not oldest first"),
        (row(0, [0, 0, 1], [1, 2]), "train", "inputs not oldest first"),
        (row(0, [0, 1], [2, 3]), "train", "neither its last event nor among its inputs"),
        (row(0, [0, 1], [8]), "valid", "a target that is no valid target"),
        (row(0, [0, 1], [7]), "test", "a target that is no test target"),
        (row(0, [0, 1], [6]), "test", "no test target"),
        (row(0, [0], [3], [10**18]), "train", "a text later than its target"),
    ],
)
def test_every_leak_in_a_row_is_refused(split: Split, bad: Row, part: str, what: str) -> None:
    for rows in ([bad], [row(0, [0, 1], [3 if part == "train" else 7 if part == "valid" else 8]), bad]):
        with pytest.raises(DataError, match=what) as caught:
            check_rows(split, rows, part)  # type: ignore[arg-type]
        if 0 <= bad.user < 5:
            assert f"user u{bad.user}" in str(caught.value)


def test_texts_of_a_dense_row_may_not_be_later_than_its_first_target(split: Split) -> None:
    time = split.log.time
    check_rows(split, [row(0, [0, 1, 2], [1, 2, 3], [int(time[1])])], "train")
    with pytest.raises(DataError, match="a text later"):
        check_rows(split, [row(0, [0, 1, 2], [1, 2, 3], [int(time[2])])], "train")


def test_events_equal_in_time_are_judged_by_their_order() -> None:
    interactions, items = toy_frames(n_users=3)
    at_once = interactions.with_columns(pl.lit(1_000_000).alias("timestamp"))
    split = leave_last_out(Dataset.read(at_once, items))
    check_rows(split, [row(0, [0, 1], [2])], "train")
    with pytest.raises(DataError, match="after its target in the user's order"):
        check_rows(split, [row(0, [0, 3], [2])], "train")


def test_a_training_row_may_not_stand_after_its_users_held_out_event(split: Split) -> None:
    # Trained on by mistake: the split's mask says that the test event is training, and validation is left.
    leaky = dataclasses.replace(split, test=split.test.take(np.array([1, 2, 3, 4])), train=split.train.copy())
    leaky.train[8] = True
    check_rows(leaky, [row(0, [0], [1])], "train")
    with pytest.raises(DataError, match="after the user's held-out one among its targets"):
        check_rows(leaky, [row(0, [0], [8])], "train")


def test_validation_may_not_see_a_test_event(split: Split) -> None:
    # Cut the wrong way round: each user's test target stands before the validation target.
    turned = dataclasses.replace(split, valid=split.test, test=split.valid)
    check_rows(turned, [row(0, [0, 1], [8])], "valid")
    with pytest.raises(DataError, match="a test event among its inputs"):
        check_rows(turned, [row(0, [0, 7], [8])], "valid")


def test_an_event_of_the_held_out_windows_that_is_no_target_is_not_for_training_either(whole: Split) -> None:
    first = dataclasses.replace(
        whole, valid=whole.valid.take(np.arange(0, len(whole.valid), 50)), test=whole.test.take(np.array([0]))
    )
    lost = int(whole.valid.position[1])
    with pytest.raises(DataError, match="not for training among its targets"):
        check_rows(first, [row(int(whole.log.user[lost]), [], [lost])], "train")


def test_an_event_of_a_user_whom_the_log_does_not_know_is_nobodys(split: Split) -> None:
    renamed = split.dataset.interactions.with_columns(
        pl.when(pl.int_range(pl.len()) < 2).then(pl.lit("who")).otherwise(pl.col("user_id")).alias("user_id")
    )
    lying = dataclasses.replace(split, dataset=Dataset(renamed, split.dataset.items))
    for user in (-1, 0):
        with pytest.raises(DataError, match="another user's event"):
            check_rows(lying, [row(user, [0], [1])], "train")


def test_a_mask_that_says_a_held_out_event_is_for_training_is_not_believed(split: Split) -> None:
    leaky = dataclasses.replace(split, train=np.ones_like(split.train))
    with pytest.raises(DataError, match="a held-out event among its targets"):
        check_rows(leaky, [row(0, [0], [8])], "train")


def test_a_global_split_trains_on_nothing_of_the_held_out_time(whole: Split) -> None:
    # The first held-out moment is everybody's, also of users without a target.
    late = int(np.flatnonzero(whole.log.time >= whole.log.time[whole.valid.position].min())[0])
    user = int(whole.log.user[late])
    one = int(np.flatnonzero(whole.log.user != user)[0])
    leaky = dataclasses.replace(
        whole,
        train=np.ones_like(whole.train),
        valid=Targets(whole.log, whole.valid.position[whole.valid.user != user]),
        test=Targets(whole.log, whole.test.position[whole.test.user != user]),
    )
    check_rows(leaky, [row(int(whole.log.user[one]), [], [one])], "train")
    last = int(whole.log.start[user + 1]) - 1
    with pytest.raises(DataError, match="the held-out time"):
        check_rows(leaky, [row(user, [], [last])], "train")


def test_time_is_read_from_the_interactions_and_not_from_the_log(split: Split) -> None:
    # The log says that all is well; the table says that user 0's second event is later than the sixth.
    swapped = split.dataset.interactions.with_columns(
        pl.when(pl.int_range(pl.len()) == 1).then(10**15).otherwise(pl.col("timestamp")).alias("timestamp")
    )
    lying = dataclasses.replace(split, dataset=Dataset(swapped, split.dataset.items))
    with pytest.raises(DataError, match="an input later than its target"):
        check_rows(lying, [row(0, [0, 1], [5])], "train")


def test_rows_of_another_class_are_read_by_their_provenance(split: Split) -> None:
    @dataclasses.dataclass
    class Other:
        user: int
        inputs: np.ndarray
        targets: np.ndarray

    check_rows(split, [Other(0, np.array([0]), np.array([1]))], "train")
    with pytest.raises(DataError, match="its own target"):
        check_rows(split, [Other(0, np.array([1]), np.array([1]))], "train")


def test_a_part_that_does_not_exist(split: Split) -> None:
    with pytest.raises(ConfigError, match="unknown part"):
        check_rows(split, [row(0, [0], [1])], "testing")  # type: ignore[arg-type]


def test_one_bad_row_of_many_is_found_and_the_number_of_bad_ones_said(split: Split) -> None:
    rows = [row(u, [9 * u, 9 * u + 1], [9 * u + 2]) for u in range(5)] * 50
    check_rows(split, Rows.of(rows), "train")
    rows[77] = row(2, [18, 19], [19])
    with pytest.raises(DataError, match=r"user u2: a training row has its own target among its inputs\n"):
        check_rows(split, rows, "train")
    rows[78] = row(3, [27, 28], [28])
    with pytest.raises(DataError, match=r"\(2 rows have\)"):
        check_rows(split, rows, "train")
