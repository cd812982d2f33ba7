"""The leak check: clean runs pass, and every kind of leak made on purpose is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

import numpy as np
import polars as pl
import pytest
import torch
from tests.conftest import toy_frames
from tests.fake_engine import FakeEngine

from penchant.data.dataset import Dataset
from penchant.data.history import EventLog, Targets
from penchant.data.split import Split, global_time, leave_last_out
from penchant.errors import ConfigError, DataError
from penchant.evaluation import leaks as module
from penchant.evaluation.leaks import LeakCheck, Row, Rows, check_contents, check_rows, check_run
from penchant.evaluation.systems import Queries
from penchant.interest.config import EncoderConfig
from penchant.recommend import Recommender
from penchant.run_folder import FitConfig
from penchant.tokens import Prompt, Segment

NONE = np.zeros(0, dtype=np.int64)


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


# -- rows ------------------------------------------------------------------------------------------


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


# -- runs ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def _quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PENCHANT_CACHE", str(tmp_path_factory.mktemp("module-cache")))
        yield
    torch.set_num_threads(before)


def fit(split: Split) -> Recommender:
    encoder = EncoderConfig(dim=8, blocks=1, max_length=8, epochs=1, batch_rows=8)
    return Recommender.fit(split, FakeEngine(), FitConfig(encoder=encoder, candidates=3, validation_users=3))


@pytest.fixture(scope="module")
def fitted() -> Recommender:
    return fit(leave_last_out(Dataset.read(*toy_frames(n_users=5))))


@pytest.fixture
def model(fitted: Recommender) -> Iterator[Recommender]:
    """The run, whose split a test may put another in place of."""
    kept = fitted.split
    yield fitted
    fitted.split = kept


@pytest.mark.parametrize("block", [1, 20, 4_000_000])
def test_a_clean_run_passes(model: Recommender, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", block)
    found = check_run(model, texts=4)
    # Five validation prompts of 7 events, five of the test's 8, their targets; five dense rows of 7 events.
    assert found == LeakCheck(prompts=10, training_rows=5, events=5 * (7 + 8 + 2) + 5 * (6 + 7), texts=8)
    assert "10 prompts and 5 training rows (150 events)" in found.note()
    assert "8 prompts were read as text" in found.note()


def test_a_clean_run_of_a_global_split_with_users_of_no_history_passes(
    whole: Split, model: Recommender, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = Dataset(
        whole.dataset.interactions.filter(~((pl.col("user_id") == "u0") & (pl.col("timestamp") < 1_000_430_000_000))),
        whole.dataset.items,
    )
    moments = [datetime.fromtimestamp(1_000_000 + s, UTC) for s in (250, 420)]
    model.split = global_time(late, valid_from=moments[0], test_from=moments[1])
    n = len(model.split.valid) + len(model.split.test)
    assert any(len(model.split.test.history(i)) == 0 for i in range(len(model.split.test)))
    for block in (1, 4_000_000):
        monkeypatch.setattr(module, "_BLOCK", block)
        assert check_run(model).prompts == n


def test_a_production_run_without_a_test_passes(model: Recommender) -> None:
    model.split = leave_last_out(model.split.dataset, test=False)
    assert check_run(model).prompts == 5


def _target_in_history(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(EventLog, "before", lambda self, p: slice(int(self.start[self.user[p]]), int(p) + 1))


def _other_users_history(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(EventLog, "before", lambda self, p: slice(0, int(p)))


def _target_rendered(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Targets, "history", lambda self, i: self.log.item[: int(self.position[i]) + 1][-8:])


def _target_asked(patch: pytest.MonkeyPatch) -> None:
    honest = Queries.of.__func__  # type: ignore[attr-defined]

    def of(cls: type[Queries], targets: Targets) -> Queries:
        made = honest(cls, targets)
        return Queries(made.user, [np.append(h, t) for h, t in zip(made.history, targets.item, strict=True)], made.time)

    patch.setattr(Queries, "of", classmethod(of))


def _target_instead_of_the_last(patch: pytest.MonkeyPatch) -> None:
    honest = Targets.history

    def history(self: Targets, i: int) -> np.ndarray:
        return np.append(honest(self, i)[:-1], self.item[i])

    patch.setattr(Targets, "history", history)


def _training_on_all(patch: pytest.MonkeyPatch) -> None:
    def sequences(split: Split) -> list[np.ndarray]:
        return [split.log.item[split.log.all_of(u)] for u in range(split.log.n_users)]

    patch.setattr(module, "training_sequences", sequences)


@pytest.mark.parametrize(
    ("leak", "what"),
    [
        (_target_in_history, "its own target among its inputs"),
        (_other_users_history, "another user's event"),
        (_target_rendered, "is not the events before its target"),
        (_target_asked, "is not the events before its target"),
        (_target_instead_of_the_last, "is not the events before its target"),
        (_training_on_all, "not its user's training events"),
    ],
)
def test_a_deliberately_leaky_run_is_refused(
    model: Recommender, leak: Callable[[pytest.MonkeyPatch], None], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    leak(monkeypatch)
    with pytest.raises(DataError, match=what):
        check_run(model)


def test_a_run_whose_training_mask_holds_the_test_is_refused(model: Recommender) -> None:
    for held in (model.split.test, model.split.valid):
        train = model.split.train.copy()
        train[held.position[2]] = True
        kept, model.split = model.split, dataclasses.replace(model.split, train=train)
        with pytest.raises(DataError, match="a held-out event among its targets"):
            check_run(model)
        model.split = kept


def test_a_run_whose_log_is_not_its_interactions_is_refused(model: Recommender) -> None:
    events = model.split.dataset.interactions
    kept = model.split
    for column, value in (("timestamp", pl.lit(10**15)), ("item_id", pl.lit("3")), ("user_id", pl.lit("u4"))):
        changed = events.with_columns(
            pl.when(pl.int_range(pl.len()).is_in([3, 5])).then(value).otherwise(pl.col(column)).alias(column)
        )
        model.split = dataclasses.replace(kept, dataset=Dataset(changed, kept.dataset.items))
        with pytest.raises(DataError, match=f"another {column.removesuffix('_id').replace('timestamp', 'time')} than"):
            check_run(model)
    model.split = kept


def test_interactions_out_of_order_are_refused(model: Recommender) -> None:
    # A dataset made by hand whose rows are not in the order of time: the test target is the earliest event.
    flipped = model.split.dataset.interactions.sort(["user_id", "timestamp"], descending=[False, True])
    dataset = Dataset(flipped, model.split.dataset.items)
    log = EventLog.from_dataset(dataset)
    last = log.start[1:] - 1
    train = np.ones(len(log.item), dtype=bool)
    train[last] = train[last - 1] = False
    model.split = Split(dataset, log, train, Targets(log, last - 1), Targets(log, last), {"kind": "leave-last-out"})
    with pytest.raises(DataError, match="an input later than its target"):
        check_run(model)


@pytest.mark.parametrize("what", ["codes", "words"])
def test_a_reading_that_holds_the_target_is_refused(what: str) -> None:
    interactions, items = toy_frames()
    n = len(interactions)
    more = interactions.with_columns(
        pl.Series("event_type", [["view", "buy"][i * i % 3 % 2] for i in range(n)]),
        pl.Series("review", [f"opinion {i % 5}" for i in range(n)]),
    )
    encoder = EncoderConfig(dim=8, blocks=1, epochs=1, batch_rows=8, inputs=("event_type", "gap", "review"))
    config = FitConfig(encoder=encoder, candidates=5, validation_users=3)
    model = Recommender.fit(leave_last_out(Dataset.read(more, items)), FakeEngine(), config)
    check_run(model)
    # Each event read with what belongs to the one after it: the newest of a history knows the target.
    shifted = np.roll(getattr(model.reading, what), -1, axis=0)
    model.reading = dataclasses.replace(model.reading, **{what: shifted})
    with pytest.raises(DataError, match=f"the {what} that the encoder reads"):
        check_run(model)


def test_a_prompt_that_renders_its_answer_is_refused(model: Recommender, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {tuple(model.split.test.history(i).tolist()): int(model.split.test.item[i]) for i in range(5)}
    ranker = type(model.ranker)
    honest = ranker.prompt

    def prompt(self: object, history: np.ndarray) -> object:
        told = answers.get(tuple(history.tolist()))
        return honest(self, history if told is None else np.append(history, told))  # type: ignore[arg-type]

    check_run(model, texts=5)
    monkeypatch.setattr(ranker, "prompt", prompt)
    check_run(model)  # histories are clean
    with pytest.raises(DataError, match="names its own answer"):
        check_run(model, texts=5)


# -- contents --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "answer", "history", "leaks"),
    [
        ("Alien\nUp\n", "Heat", ["Alien", "Up"], False),
        ("Alien\nHeat\n", "Heat", ["Alien"], True),
        ("Alien\nHeat\n", "Heat", ["Alien", "Heat"], False),  # had before, or one of the same name
        ("Heathers\n", "Heat", ["Alien"], False),  # a part of a word is no name
        ("Toy Story 2\n", "Toy Story", ["Toy Story 2"], False),  # nor is a part of another title
        ("Toy Story 2\nToy Story\n", "Toy Story", ["Toy Story 2"], True),
        ("Toy Story 2\n", "Toy Story", ["Toy"], True),
        ("reviewed: as good as Heat (1995)!", "Heat (1995)", ["Alien"], True),
        ("七人の侍\n", "七人の侍", [], True),
        ("Alien", "", [], False),
        ("", "Heat", [], False),
    ],
)
def test_contents_by_hand(prompt: str, answer: str, history: list[str], leaks: bool) -> None:
    if leaks:
        with pytest.raises(DataError, match="prompt 1 names its own answer"):
            check_contents(["", prompt], ["Heat", answer], [[], history])
    else:
        check_contents(["", prompt], ["Heat", answer], [[], history])


def test_what_the_template_says_is_no_leak_and_what_the_data_says_is() -> None:
    ours = Prompt((Segment("Name the Next title.\n", False), Segment("Alien", True), Segment("\n", False)))
    check_contents([ours], ["Next"], [["Alien"]])
    theirs = Prompt((*ours.segments, Segment("Next", True)))
    with pytest.raises(DataError, match="'Next'"):
        check_contents([theirs], ["Next"], [["Alien"]])
