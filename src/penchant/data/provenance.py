"""Which events a prompt or a training row was made of, and that none of them is later than what it helps to predict.

It trusts no code that builds histories. Rows say which events they were made of; who those events belong to and
when they were is read again from the dataset's own columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import polars as pl
from numpy.typing import NDArray

from penchant.data.split import Split
from penchant.errors import ConfigError, DataError
from penchant.schema import ITEM, TIME, USER

Part = Literal["train", "valid", "test", "given"]
Ints = NDArray[np.int64]

NONE: Ints = np.zeros(0, dtype=np.int64)
REMEDY = "this is a leak: no number of this run means anything; build the row from the events before its target"


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
    text_time: NDArray[np.int64] = field(default_factory=lambda: NONE)


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
            texts.append(np.asarray(getattr(row, "text_time", NONE), dtype=np.int64))
        arrays = [part for each in (inputs, targets, texts) for part in flat(each)]
        return cls(np.array(users, dtype=np.int64), *arrays)

    def __len__(self) -> int:
        return len(self.user)


@dataclass(frozen=True, slots=True)
class LeakCheck:
    """What was checked and found clean: numbers of prompts, training rows, events in both, and prompts as text.

    ``weights`` is what a reader must know of the weights that the run began with, a line each.
    """

    prompts: int = 0
    training_rows: int = 0
    events: int = 0
    texts: int = 0
    weights: tuple[str, ...] = ()

    def __add__(self, other: LeakCheck) -> LeakCheck:
        return LeakCheck(
            self.prompts + other.prompts,
            self.training_rows + other.training_rows,
            self.events + other.events,
            self.texts + other.texts,
            tuple(dict.fromkeys(self.weights + other.weights)),
        )

    def notes(self) -> list[str]:
        """Lines for a report."""
        read = ""
        if self.texts:
            read = f"; {self.texts:,} prompts, all that the LLM is asked, were rendered and read for their answer"
        return [
            f"leak check: {self.prompts:,} prompts and {self.training_rows:,} training rows ({self.events:,} events) "
            f"re-derived from the interactions, and nothing in them is later than its target{read}",
            *self.weights,
        ]


@dataclass(frozen=True, eq=False)
class Own:
    """The interactions' own columns: user and item as indices of the log's ids (-1: not among them), and the time."""

    user: Ints
    item: Ints
    time: Ints

    @classmethod
    def of(cls, split: Split) -> Own:
        events, ids = split.dataset.interactions, (split.log.user_ids, split.dataset.items[ITEM].to_list())
        user, item = (
            events[column]
            .replace_strict(names, np.arange(len(names)), default=-1, return_dtype=pl.Int64)
            .fill_null(-1)
            .to_numpy()
            for column, names in zip((USER, ITEM), ids, strict=True)
        )
        return cls(user, item, events[TIME].to_numpy())


def check_rows(split: Split, rows: Rows | Iterable[Provenance], part: Part, *, own: Own | None = None) -> LeakCheck:
    """Re-derive from the interactions that every row is of one user and of events before its target.

    Raises DataError at the first row in which an input or target is another user's; an input is later than the
    target, or is it, or comes after it in the user's order; a text is later than a target. A row of several targets
    must have its inputs oldest first (each target then sees those before it, as a causal model does), and each
    target but the last among them. ``part`` "train": no event of the row may be held out, or stand after the user's
    first held-out event; "valid" and "test": the targets must be that part's, and validation sees no test event;
    "given": any targets that were not trained on. ``own``: the split's interactions, where they were read already.
    """
    if part not in ("train", "valid", "test", "given"):
        raise ConfigError(f"unknown part {part!r}", where="leak check", remedy="use train, valid, test or given")
    own = Own.of(split) if own is None else own
    rows = rows if isinstance(rows, Rows) else Rows.of(rows)
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


def _check_part(split: Split, own: Own, rows: Rows, part: Part, row_of: tuple[Ints, Ints], fail: _Failure) -> None:
    """What the split allows: training rows see nothing held out, prompts answer the targets of their part."""
    n_events = len(own.time)
    valid, test = np.zeros(n_events, dtype=bool), np.zeros(n_events, dtype=bool)
    valid[split.valid.position], test[split.test.position] = True, True
    input_row, target_row = row_of
    if part == "given":
        fail.of(target_row, split.train[rows.targets], "a training event as its target")
        return
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
        raise DataError(f"a {kind} {what}{others}", where=f"leak check, user {name}", remedy=REMEDY)


def flat(arrays: Sequence[NDArray[np.integer]]) -> tuple[Ints, Ints]:
    """Arrays one after another, and where each begins (one more than there are)."""
    start = np.concatenate([[0], np.cumsum([len(a) for a in arrays])]).astype(np.int64)
    return np.concatenate([NONE, *arrays]).astype(np.int64, copy=False), start
