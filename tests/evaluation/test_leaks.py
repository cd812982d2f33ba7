"""The leak check: clean runs pass, and every kind of leak made on purpose is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from tests.conftest import toy_frames
from tests.fake_engine import FakeEngine

from penchant.adapter_card import CARD
from penchant.data.dataset import Dataset
from penchant.data.history import EventLog, Targets
from penchant.data.provenance import LeakCheck
from penchant.data.split import Split, global_time, leave_last_out
from penchant.errors import ConfigError, DataError
from penchant.evaluation import leaks as module
from penchant.evaluation.baselines.events import TrainingEvents
from penchant.evaluation.leaks import check_contents, check_reading, check_run, check_split
from penchant.evaluation.systems import Queries
from penchant.files import write_json
from penchant.interest.behaviour import Behaviour
from penchant.interest.config import EncoderConfig
from penchant.interest.inputs import Columns, Reading
from penchant.interest.words import reading_of
from penchant.recommend import Recommender
from penchant.run_folder import FitConfig
from penchant.tokens import Prompt, Segment


@pytest.fixture
def whole() -> Split:
    """One moment for everybody, after four or five events each."""
    moments = [datetime.fromtimestamp(1_000_000 + s, UTC) for s in (250, 420)]
    return global_time(Dataset.read(*toy_frames(n_users=5)), valid_from=moments[0], test_from=moments[1])


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
def model() -> Recommender:
    return fit(leave_last_out(Dataset.read(*toy_frames(n_users=5))))


@pytest.fixture
def split(model: Recommender) -> Split:
    return model.split


@pytest.mark.parametrize("block", [1, 20, 4_000_000])
def test_a_clean_run_passes(model: Recommender, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", block)
    found = check_run(model, asked=model.split.test.sample(4, 0))
    # Five validation prompts of 7 events, five of the test's 8, their targets; five dense rows of 7 events. The LLM is
    # asked about four test users, and was about three validation users.
    assert found == LeakCheck(prompts=10, training_rows=5, events=5 * (7 + 8 + 2) + 5 * (6 + 7), texts=4 + 3)
    assert "10 prompts and 5 training rows (150 events)" in found.notes()[0]
    assert "7 prompts, all that the LLM is asked, were rendered" in found.notes()[0]
    assert "rendered" not in check_run(model).notes()[0]


def test_targets_that_are_given_are_checked_too(split: Split) -> None:
    own = check_split(split)
    assert check_split(split, split.test) == own
    some = split.test.take(np.array([3, 1]))
    assert check_split(split, some) == own + LeakCheck(prompts=2, events=2 * 9)

    class Knowing(Targets):
        def history(self, i: int) -> np.ndarray:
            return self.log.item[self.log.before(int(self.position[i])).start : self.position[i] + 1]

        def take(self, rows: np.ndarray) -> Targets:
            return Knowing(self.log, self.position[rows])

    with pytest.raises(DataError, match="a given history is not the events before its target"):
        check_split(split, Knowing(split.log, some.position))
    learnt = Targets(split.log, np.array([3], dtype=np.int64))
    with pytest.raises(DataError, match="a given prompt has a training event as its target"):
        check_split(split, learnt)


def test_a_clean_run_of_a_global_split_with_users_of_no_history_passes(
    whole: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = Dataset(
        whole.dataset.interactions.filter(~((pl.col("user_id") == "u0") & (pl.col("timestamp") < 1_000_430_000_000))),
        whole.dataset.items,
    )
    moments = [datetime.fromtimestamp(1_000_000 + s, UTC) for s in (250, 420)]
    split = global_time(late, valid_from=moments[0], test_from=moments[1])
    n = len(split.valid) + len(split.test)
    assert any(len(split.test.history(i)) == 0 for i in range(len(split.test)))
    reading, _ = reading_of(split, Columns())
    for block in (1, 4_000_000):
        monkeypatch.setattr(module, "_BLOCK", block)
        assert check_split(split).prompts == n
        check_reading(split, Columns(), reading)


def test_a_production_run_without_a_test_passes(model: Recommender) -> None:
    assert check_run(dataclasses.replace(model, split=leave_last_out(model.split.dataset, test=False))).prompts == 5


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


def _encoder_trained_on_all(patch: pytest.MonkeyPatch) -> None:
    def behaviours(split: Split, reading: Reading) -> list[Behaviour]:
        return [reading.of(split.log.all_of(u)) for u in range(split.log.n_users)]

    patch.setattr(module, "training_behaviours", behaviours)


def _baselines_trained_on_all(patch: pytest.MonkeyPatch) -> None:
    honest = TrainingEvents.of.__func__  # type: ignore[attr-defined]

    def of(cls: type[TrainingEvents], split: Split) -> TrainingEvents:
        return honest(cls, dataclasses.replace(split, train=np.ones_like(split.train)))

    patch.setattr(TrainingEvents, "of", classmethod(of))


def _encoder_told_the_target(patch: pytest.MonkeyPatch) -> None:
    def before(self: Reading, positions: np.ndarray) -> list[Behaviour]:
        return [self.of(slice(self.log.before(int(p)).start, int(p) + 1)) for p in positions]

    patch.setattr(Reading, "before", before)


@pytest.mark.parametrize(
    ("leak", "what"),
    [
        (_target_in_history, "its own target among its inputs"),
        (_other_users_history, "another user's event"),
        (_target_rendered, "is not the events before its target"),
        (_target_asked, "is not the events before its target"),
        (_target_instead_of_the_last, "is not the events before its target"),
        (_training_on_all, "not its user's training events"),
        (_encoder_trained_on_all, "the item that the encoder reads in training"),
        (_baselines_trained_on_all, "the baselines learn from other than training events"),
        (_encoder_told_the_target, "the item that the encoder reads before a valid target"),
    ],
)
def test_a_deliberately_leaky_run_is_refused(
    model: Recommender, leak: Callable[[pytest.MonkeyPatch], None], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    leak(monkeypatch)
    with pytest.raises(DataError, match=what):
        check_run(model)


def test_a_run_whose_training_mask_holds_the_test_is_refused(split: Split) -> None:
    for held in (split.test, split.valid):
        train = split.train.copy()
        train[held.position[2]] = True
        leaky = dataclasses.replace(split, train=train)
        with pytest.raises(DataError, match="a held-out event among its targets"):
            check_split(leaky)


def test_a_run_whose_log_is_not_its_interactions_is_refused(split: Split) -> None:
    events = split.dataset.interactions
    for column, value in (("timestamp", pl.lit(10**15)), ("item_id", pl.lit("3")), ("user_id", pl.lit("u4"))):
        changed = events.with_columns(
            pl.when(pl.int_range(pl.len()).is_in([3, 5])).then(value).otherwise(pl.col(column)).alias(column)
        )
        leaky = dataclasses.replace(split, dataset=Dataset(changed, split.dataset.items))
        with pytest.raises(DataError, match=f"another {column.removesuffix('_id').replace('timestamp', 'time')} than"):
            check_split(leaky)


def test_interactions_out_of_order_are_refused(split: Split) -> None:
    # A dataset made by hand whose rows are not in the order of time: the test target is the earliest event.
    flipped = split.dataset.interactions.sort(["user_id", "timestamp"], descending=[False, True])
    dataset = Dataset(flipped, split.dataset.items)
    log = EventLog.from_dataset(dataset)
    last = log.start[1:] - 1
    train = np.ones(len(log.item), dtype=bool)
    train[last] = train[last - 1] = False
    leaky = Split(dataset, log, train, Targets(log, last - 1), Targets(log, last), {"kind": "leave-last-out"})
    with pytest.raises(DataError, match="an input later than its target"):
        check_split(leaky)


def told(n_users: int) -> tuple[Split, Columns]:
    """Events with a type, a review and a rating."""
    interactions, items = toy_frames(n_users=n_users)
    n = len(interactions)
    more = interactions.with_columns(
        pl.Series("event_type", [["view", "buy"][i * i % 3 % 2] for i in range(n)]),
        pl.Series("review", [f"opinion {i % 5}" if i % 7 else None for i in range(n)]),
        pl.Series("rating", [1.0 + i % 5 if i % 6 else None for i in range(n)]),
    )
    split = leave_last_out(Dataset.read(more, items))
    config = EncoderConfig(inputs=("event_type", "gap", "rating", "review"), loss="mse")
    return split, Columns.fit(split.dataset.interactions.filter(split.train), config)


@pytest.mark.parametrize("what", ["codes", "words", "value"])
def test_a_reading_that_holds_the_target_is_refused(what: str) -> None:
    split, columns = told(5)
    reading, _ = reading_of(split, columns)
    check_reading(split, columns, reading)
    # Each event read with what belongs to the one after it: the newest of a history knows the target.
    shifted = np.roll(getattr(reading, what), -1, axis=0)
    with pytest.raises(DataError, match=f"the {what} that the encoder reads in training"):
        check_reading(split, columns, dataclasses.replace(reading, **{what: shifted}))
    with pytest.raises(DataError, match=f"the {what} that the encoder reads"):
        check_reading(split, columns, dataclasses.replace(reading, **{what: None}))


@pytest.mark.parametrize("block", [20, 4_000_000])
@pytest.mark.parametrize("what", ["codes", "words", "value"])
def test_no_event_is_left_unread(what: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", block)
    split, columns = told(230)
    reading, _ = reading_of(split, columns)
    check_reading(split, columns, reading)
    # The one event of one user of many that no training row holds: the validation event, before the test target.
    changed = getattr(reading, what).copy()
    changed[split.valid.position[217]] += 1
    user = split.log.user_ids[split.valid.user[217]]
    with pytest.raises(DataError, match=f"user {user}: the {what} that the encoder reads before a test target"):
        check_reading(split, columns, dataclasses.replace(reading, **{what: changed}))


def test_what_is_read_of_an_event_before_the_test_is_compared_with_the_past_alone() -> None:
    split, columns = told(5)
    honest = Columns.codes

    def peeking(self: Columns, events: pl.DataFrame) -> np.ndarray | None:
        found = honest(self, events)
        return None if found is None else np.roll(found, -1, axis=0)  # each event as the next one there is

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Columns, "codes", peeking)
        reading, _ = reading_of(split, columns)
        with pytest.raises(DataError, match="the codes that the encoder reads in training"):
            check_reading(split, columns, reading)


def test_a_prompt_that_renders_its_answer_is_refused(
    model: Recommender, split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranker = type(model.ranker)
    honest = ranker.prompt

    def prompt(self: object, history: np.ndarray) -> object:
        told = answers.get(tuple(history.tolist()))
        return honest(self, history if told is None else np.append(history, told))  # type: ignore[arg-type]

    # The last user's alone: no prompt is left unread.
    answers = {tuple(split.test.history(4).tolist()): int(split.test.item[4])}
    check_run(model, asked=split.test)
    monkeypatch.setattr(ranker, "prompt", prompt)
    check_run(model)  # histories are clean
    check_run(model, asked=split.test.take(np.arange(4)))
    with pytest.raises(DataError, match="names its own answer"):
        check_run(model, asked=split.test)


@pytest.mark.parametrize("who", ["ranks", "embeds"])
def test_an_adapter_that_learnt_what_is_held_out_here_fails_the_run(
    who: str, model: Recommender, split: Split, tmp_path: Path
) -> None:
    source = {"model": "fake", "adapter": str(tmp_path)}
    made = dataclasses.replace(
        model,
        engine_source=source if who == "ranks" else None,
        embedder={"fingerprint": "other", "source": source} if who == "embeds" else None,
    )
    assert "does not say what it was trained on" in check_run(made).notes()[1]
    card = {"data": split.dataset.content_hash, "split": split.spec}
    write_json(tmp_path / CARD, card)
    assert len(check_run(made).notes()) == 1
    write_json(tmp_path / CARD, card | {"split": {"kind": "leave-last-out, validation only", "min_events": 2}})
    with pytest.raises(ConfigError, match="under another split"):
        check_run(made)


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
