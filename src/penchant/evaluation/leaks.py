"""The leak check: nothing that a prompt or a training row was made of is later than what it helps to predict.

It trusts no code that builds histories. Rows say which events they were made of; who those events belong to and
when they were is read again from the dataset's own columns, and what a run renders is compared with them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import polars as pl
from numpy.typing import NDArray

from penchant.data.history import Targets
from penchant.data.split import Split
from penchant.errors import ConfigError, DataError
from penchant.evaluation.systems import Queries
from penchant.interest.fit import training_sequences
from penchant.schema import ITEM, TIME, USER
from penchant.tokens import Prompt

if TYPE_CHECKING:
    from penchant.recommend import Recommender

Part = Literal["train", "valid", "test"]
Ints = NDArray[np.int64]

_NONE: Ints = np.zeros(0, dtype=np.int64)
# Targets of a part whose encoder inputs are made again from the events before them.
_INPUTS = 200
# Events of histories looked at together: 4M positions are 32 MB.
_BLOCK = 4_000_000
_REMEDY = "this is a leak: no number of this run means anything; build the row from the events before its target"


class Provenance(Protocol):
    """What a prompt or training row says of where it came from. A training package's own rows are such.

    ``user`` is an index of the log's ``user_ids``; ``inputs`` are the positions in the log of all events rendered or
    used as input, in the order in which they stand in the row; ``targets`` those of the events to be predicted.
    """

    @property
    def user(self) -> int: ...
    @property
    def inputs(self) -> NDArray[np.int64]: ...
    @property
    def targets(self) -> NDArray[np.int64]: ...


@dataclass(frozen=True, eq=False)
class Row:
    """Provenance of one prompt or training row; ``text_time`` are the times of texts carried along (tags, reviews)."""

    user: int
    inputs: NDArray[np.int64]
    targets: NDArray[np.int64]
    text_time: NDArray[np.int64] = field(default_factory=lambda: _NONE)


@dataclass(frozen=True, eq=False)
class Rows:
    """Many rows, flat: row i has ``inputs[input_start[i]:input_start[i + 1]]``, and so with targets and texts."""

    user: Ints
    inputs: Ints
    input_start: Ints
    targets: Ints
    target_start: Ints
    text_time: Ints
    text_start: Ints

    @classmethod
    def of(cls, rows: Iterable[Provenance]) -> Rows:
        """From rows one by one; a row's ``text_time`` counts where it has one."""
        users, inputs, targets, texts = [], [], [], []
        for row in rows:
            users.append(row.user)
            inputs.append(np.asarray(row.inputs, dtype=np.int64))
            targets.append(np.asarray(row.targets, dtype=np.int64))
            texts.append(np.asarray(getattr(row, "text_time", _NONE), dtype=np.int64))
        flat = [part for arrays in (inputs, targets, texts) for part in _flat(arrays)]
        return cls(np.array(users, dtype=np.int64), *flat)

    def __len__(self) -> int:
        return len(self.user)


@dataclass(frozen=True, slots=True)
class LeakCheck:
    """What was checked and found clean: numbers of prompts, training rows, events in both, and prompts as text."""

    prompts: int = 0
    training_rows: int = 0
    events: int = 0
    texts: int = 0

    def __add__(self, other: LeakCheck) -> LeakCheck:
        return LeakCheck(
            self.prompts + other.prompts,
            self.training_rows + other.training_rows,
            self.events + other.events,
            self.texts + other.texts,
        )

    def note(self) -> str:
        """One line for a report."""
        read = f"; {self.texts:,} prompts were read as text for their answer" if self.texts else ""
        return (
            f"leak check: {self.prompts:,} prompts and {self.training_rows:,} training rows ({self.events:,} events) "
            f"re-derived from the interactions, and nothing in them is later than its target{read}"
        )


# -- provenance ------------------------------------------------------------------------------------


def check_rows(split: Split, rows: Rows | Iterable[Provenance], part: Part) -> LeakCheck:
    """Re-derive from the interactions that every row is of one user and of events before its target.

    Raises DataError at the first row in which an input or target is another user's; an input is later than the
    target, or is it, or comes after it in the user's order; a text is later than a target. A row of several targets
    must have its inputs oldest first (each target then sees those before it, as a causal model does), and each
    target but the last among them. ``part`` "train": no event of the row may be held out, or stand after the user's
    first held-out event; "valid" and "test": the targets must be that part's, and validation sees no test event.
    """
    return _check(split, _Own.of(split), rows if isinstance(rows, Rows) else Rows.of(rows), part)


@dataclass(frozen=True, eq=False)
class _Own:
    """The interactions' own columns: user and item as indices of the log's ids (-1: not among them), and the time."""

    user: Ints
    item: Ints
    time: Ints

    @classmethod
    def of(cls, split: Split) -> _Own:
        events, ids = split.dataset.interactions, (split.log.user_ids, split.dataset.items[ITEM].to_list())
        user, item = (
            events[column]
            .replace_strict(names, np.arange(len(names)), default=-1, return_dtype=pl.Int64)
            .fill_null(-1)
            .to_numpy()
            for column, names in zip((USER, ITEM), ids, strict=True)
        )
        return cls(user, item, events[TIME].to_numpy())


def _check(split: Split, own: _Own, rows: Rows, part: Part) -> LeakCheck:
    if part not in ("train", "valid", "test"):
        raise ConfigError(f"unknown part {part!r}", where="leak check", remedy="use train, valid or test")
    n = len(rows)
    n_targets = np.diff(rows.target_start)
    fail = _Failure(split, rows, part)
    fail.in_row(n_targets == 0, "has no target, so nothing can be checked against it")
    if not n:
        return LeakCheck()
    input_row = np.repeat(np.arange(n), np.diff(rows.input_start))
    target_row = np.repeat(np.arange(n), n_targets)
    for row, position, what in ((input_row, rows.inputs, "an input"), (target_row, rows.targets, "a target")):
        fail.of(row, (position < 0) | (position >= len(own.time)), f"{what} that is no event")
        other = (own.user[position] != rows.user[row]) | (rows.user[row] < 0)
        fail.of(row, other, f"{what} that is another user's event")
    last = np.maximum.reduceat(rows.targets, rows.target_start[:-1])
    fail.of(input_row, own.time[rows.inputs] > own.time[last][input_row], "an input later than its target")
    fail.of(input_row, rows.inputs == last[input_row], "its own target among its inputs")
    fail.of(input_row, rows.inputs > last[input_row], "an input after its target in the user's order")
    first_time = np.minimum.reduceat(own.time[rows.targets], rows.target_start[:-1])
    text_row = np.repeat(np.arange(n), np.diff(rows.text_start))
    fail.of(text_row, rows.text_time > first_time[text_row], "a text later than its target")
    _check_dense(rows, input_row, target_row, last, n_targets, fail)
    _check_part(split, own, rows, part, (input_row, target_row), fail)
    events = len(rows.inputs) + len(rows.targets)
    return LeakCheck(training_rows=n, events=events) if part == "train" else LeakCheck(prompts=n, events=events)


def _check_dense(rows: Rows, input_row: Ints, target_row: Ints, last: Ints, n_targets: Ints, fail: _Failure) -> None:
    """Rows of several targets: each target sees what stands before it, so the inputs must stand in order."""
    several = n_targets > 1
    if not several.any():
        return
    same = (input_row[1:] == input_row[:-1]) & several[input_row[1:]]
    fail.of(input_row[1:], same & (np.diff(rows.inputs) <= 0), "several targets, and inputs not oldest first")
    among = several[target_row] & (rows.targets != last[target_row])
    # Positions raised by row: equal only where the row and the event are, and ascending as the inputs are.
    stride = int(max(rows.inputs.max(initial=0), rows.targets.max())) + 1
    seen = (input_row * stride + rows.inputs)[several[input_row]]
    wanted = (target_row * stride + rows.targets)[among]
    lost = np.zeros(len(rows.targets), dtype=bool)
    at = np.minimum(np.searchsorted(seen, wanted), len(seen) - 1)
    lost[among] = seen[at] != wanted if len(seen) else True
    fail.of(target_row, lost, "a target that is neither its last event nor among its inputs")


def _check_part(split: Split, own: _Own, rows: Rows, part: Part, row_of: tuple[Ints, Ints], fail: _Failure) -> None:
    """What the split allows: training rows see nothing held out, prompts answer the targets of their part."""
    n_events = len(own.time)
    valid, test = np.zeros(n_events, dtype=bool), np.zeros(n_events, dtype=bool)
    valid[split.valid.position], test[split.test.position] = True, True
    input_row, target_row = row_of
    if part != "train":
        fail.of(target_row, ~(valid if part == "valid" else test)[rows.targets], f"a target that is no {part} target")
        if part == "valid":
            fail.of(input_row, test[rows.inputs], "a test event among its inputs")
        return
    held = np.flatnonzero(valid | test)
    first = np.full(len(split.log.user_ids), n_events)
    np.minimum.at(first, own.user[held], held)
    moment = np.iinfo(np.int64).max
    if split.spec.get("kind") == "global time" and held.size:
        moment = own.time[held].min()
    for row, position, what in ((input_row, rows.inputs, "inputs"), (target_row, rows.targets, "targets")):
        fail.of(row, (valid | test)[position], f"a held-out event among its {what}")
        fail.of(row, ~split.train[position], f"an event that is not for training among its {what}")
        fail.of(row, position > first[rows.user[row]], f"an event after the user's held-out one among its {what}")
        fail.of(row, own.time[position] >= moment, f"an event of the held-out time among its {what}")


@dataclass(frozen=True)
class _Failure:
    """Raises for the first row that has something wrong, with its user's id."""

    split: Split
    rows: Rows
    part: Part

    def of(self, row: Ints, wrong: NDArray[np.bool_], what: str) -> None:
        """``wrong`` and ``row`` have one entry an event (or text)."""
        if wrong.any():
            self._raise(int(row[np.flatnonzero(wrong)[0]]), f"has {what}", len(np.unique(row[wrong])))

    def in_row(self, wrong: NDArray[np.bool_], what: str) -> None:
        """``wrong`` has one entry a row."""
        if wrong.any():
            self._raise(int(np.flatnonzero(wrong)[0]), what, int(wrong.sum()))

    def _raise(self, row: int, what: str, n: int) -> None:
        user, ids = int(self.rows.user[row]), self.split.log.user_ids
        name = ids[user] if 0 <= user < len(ids) else f"number {user}, who is not in the data"
        others = f" ({n:,} rows have)" if n > 1 else ""
        kind = "training row" if self.part == "train" else f"{self.part} prompt"
        raise DataError(f"a {kind} {what}{others}", where=f"leak check, user {name}", remedy=_REMEDY)


# -- a whole run -----------------------------------------------------------------------------------


def check_run(model: Recommender, *, texts: int = 0, seed: int = 0) -> LeakCheck:
    """Re-derive every validation and test prompt of a run and every training sequence; DataError at a leak.

    What the run takes as histories and training sequences must be, item by item, what the interactions say was past.
    ``texts``: so many prompts of each part, drawn with ``seed``, are rendered too and searched for their answers
    (this needs the engine, which is loaded if it isn't yet).
    """
    split, own = model.split, _Own.of(model.split)
    log = split.log
    for what, theirs, ours in (
        ("user", log.user, own.user),
        ("item", log.item, own.item),
        ("time", log.time, own.time),
    ):
        if not np.array_equal(theirs, ours):
            raise DataError(
                f"the run's event log has another {what} than the interactions", where="leak check", remedy=_REMEDY
            )
    found = _check_training(split, own)
    parts: tuple[tuple[Part, Targets], ...] = (("valid", split.valid), ("test", split.test))
    for part, targets in parts:
        found += _check_prompts(split, own, targets, part)
        _check_inputs(model, own, targets.sample(_INPUTS, seed), part)
        if texts:
            found += _check_rendered(model, targets.sample(texts, seed))
    return found


def _check_training(split: Split, own: _Own) -> LeakCheck:
    """The training sequences are each user's training events, all before any held-out one."""
    position = np.flatnonzero(split.train)
    if not len(position):
        return LeakCheck()
    edge = np.flatnonzero(np.diff(own.user[position])) + 1
    start = np.concatenate([[0], edge, [len(position)]]).astype(np.int64)
    sequences = training_sequences(split)
    lengths = np.array([len(s) for s in sequences], dtype=np.int64)
    if not np.array_equal(lengths, np.diff(start)) or not np.array_equal(
        np.concatenate([_NONE, *sequences]), own.item[position]
    ):
        raise DataError("a training sequence is not its user's training events", where="leak check", remedy=_REMEDY)
    # Dense: every event is a target, and an input of those after it.
    rows = Rows(
        user=own.user[position[start[:-1]]],
        inputs=np.delete(position, start[1:] - 1),
        input_start=start - np.arange(len(start)),
        targets=position,
        target_start=start,
        text_time=_NONE,
        text_start=np.zeros(len(start), dtype=np.int64),
    )
    return _check(split, own, rows, "train")


def _check_prompts(split: Split, own: _Own, targets: Targets, part: Part) -> LeakCheck:
    """Histories as the run takes them, from the log and as evaluation's queries, against the events before."""
    log, found = split.log, LeakCheck()
    events = np.cumsum(targets.position - log.start[targets.user])
    edges = np.searchsorted(events, np.arange(_BLOCK, events[-1] if len(events) else 0, _BLOCK))
    for first, last in pairwise([0, *edges.tolist(), len(targets)]):
        some = targets.take(np.arange(first, last))
        before = [log.before(int(p)) for p in some.position]
        rows = Rows(
            some.user.astype(np.int64),
            *_flat([np.arange(s.start, s.stop, dtype=np.int64) for s in before]),
            some.position,
            np.arange(len(some) + 1),
            _NONE,
            np.zeros(len(some) + 1, dtype=np.int64),
        )
        found += _check(split, own, rows, part)
        for histories in ([some.history(i) for i in range(len(some))], Queries.of(some).history):
            items, start = _flat(histories)
            if not np.array_equal(start, rows.input_start) or not np.array_equal(items, own.item[rows.inputs]):
                raise DataError(
                    f"a {part} history is not the events before its target", where="leak check", remedy=_REMEDY
                )
    return found


def _check_inputs(model: Recommender, own: _Own, targets: Targets, part: Part) -> None:
    """What the encoder reads of events beside their items (types, gaps, ratings, words) is made of the past alone."""
    events, columns = model.split.dataset.interactions, model.columns
    if not columns.columns:
        return
    for position, read in zip(targets.position.tolist(), model.reading.before(targets.position), strict=True):
        past = events[int(np.searchsorted(own.user, own.user[position])) : position]
        codes = columns.codes(past)
        said = [[model.word_rows.get(text or "", -1) for text in column] for column in columns.texts(past)]
        words = np.array(said, dtype=np.int32).T if said else None
        for name, theirs, ours in (("codes", read.codes, codes), ("words", read.words, words)):
            if not (theirs is None and ours is None) and not np.array_equal(
                np.asarray(theirs).reshape(-1), np.asarray(ours).reshape(-1)
            ):
                raise DataError(
                    f"the {name} that the encoder reads before a {part} target are not of the events before it",
                    where=f"leak check, user {model.log.user_ids[own.user[position]]}",
                    remedy=_REMEDY,
                )


def _check_rendered(model: Recommender, targets: Targets) -> LeakCheck:
    histories = [targets.history(i) for i in range(len(targets))]
    check_contents(
        [model.ranker.prompt(history).prompt for history in histories],
        [model.texts[i] for i in targets.item],
        [[model.texts[i] for i in history] for history in histories],
    )
    return LeakCheck(texts=len(targets))


def _flat(arrays: Sequence[NDArray[np.integer]]) -> tuple[Ints, Ints]:
    start = np.concatenate([[0], np.cumsum([len(a) for a in arrays])]).astype(np.int64)
    return np.concatenate([_NONE, *arrays]).astype(np.int64, copy=False), start


# -- contents --------------------------------------------------------------------------------------


def check_contents(prompts: Sequence[Prompt | str], answers: Sequence[str], histories: Sequence[Sequence[str]]) -> None:
    """No prompt may name its own answer (the target's text), unless the user had an item of that name before.

    ``histories`` holds each user's item texts: an answer inside a longer one of these ("Toy Story" in "Toy Story 2")
    is no leak. Of a Prompt only the data is read, of a text all of it. Raises DataError naming the first.
    """
    for number, (prompt, answer, history) in enumerate(zip(prompts, answers, histories, strict=True)):
        text = prompt if isinstance(prompt, str) else "\n".join(s.text for s in prompt.segments if s.is_data)
        if not answer or answer not in text:
            continue
        # Only names that hold the answer may explain it; blanking a shorter one would tear the answer apart.
        for known in sorted((h for h in history if answer in h), key=len, reverse=True):
            text = text.replace(known, "\n")
        if re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text):
            raise DataError(
                f"prompt {number:,} names its own answer, {answer!r}, and the user did not have it before",
                where="leak check",
                remedy=_REMEDY,
            )
