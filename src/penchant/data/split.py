"""Train, validation and test, by each user's last events or by one moment for everybody.

Leave-last-out is what most tables use; it lets whatever is trained on all users see events that are
later, in global time, than another user's target. The global-time split does not.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from penchant.data.dataset import Dataset
from penchant.data.history import EventLog, Targets
from penchant.errors import ConfigError, DataError, StorageError
from penchant.files import read_json, write_json


@dataclass(frozen=True, eq=False)
class Split:
    """A dataset cut in three. ``train`` (n_events,) marks training events; ``valid`` and ``test`` are targets.

    ``ties`` counts the targets that only the item order within one timestamp decided; ``spec`` says how it was cut.
    """

    dataset: Dataset
    log: EventLog
    train: NDArray[np.bool_]
    valid: Targets
    test: Targets
    spec: dict[str, Any] = field(default_factory=dict)

    @property
    def ties(self) -> dict[str, int]:
        return {"valid": int(tied(self.valid).sum()), "test": int(tied(self.test).sum())}

    @property
    def train_counts(self) -> NDArray[np.int64]:
        """Training events of each item (n_items,)."""
        return np.bincount(self.log.item[self.train], minlength=self.log.n_items)

    def summary(self) -> str:
        """One line for people: sizes, and how many targets a tie decided."""
        return (
            f"{self.spec['kind']}: {int(self.train.sum()):,} training events, {len(self.valid):,} validation and "
            f"{len(self.test):,} test targets; a tie in time decided {self.ties['test']:,} test targets, "
            "ordered by item id"
        )

    def verify(self) -> None:
        """Re-derive that nothing is later than what it helps to predict; DataError naming the user otherwise."""
        log = self.log
        latest = _latest_before(log)
        for name, targets in (("valid", self.valid), ("test", self.test)):
            late = targets.position[latest[targets.position] > log.time[targets.position]]
            if late.size:
                raise DataError(
                    "a history holds an event later than its target",
                    where=f"{name}, user {log.user_ids[log.user[late[0]]]}",
                    remedy="the interactions are not in order: make the dataset again with `penchant prepare`",
                )
            if self.train[targets.position].any():
                raise DataError("a target is also a training event", where=name, remedy="split the dataset again")
        held = np.concatenate([self.valid.position, self.test.position])
        # The first held-out event of each user: its training events must all stand before it.
        first = np.full(log.n_users, len(log.item), dtype=np.int64)
        np.minimum.at(first, log.user[held], held)
        late = np.flatnonzero(self.train & (np.arange(len(log.item)) > first[log.user]))
        if late.size:
            raise DataError(
                "a training event is later than the user's held-out event",
                where=f"user {log.user_ids[log.user[late[0]]]}",
                remedy="split the dataset again",
            )
        # What validation chooses serves the test: it must stand before it.
        first_test = np.full(log.n_users, len(log.item), dtype=np.int64)
        np.minimum.at(first_test, self.test.user, self.test.position)
        early = np.flatnonzero(self.valid.position >= first_test[self.valid.user])
        if early.size:
            raise DataError(
                "a validation target is not before the user's test target",
                where=f"user {log.user_ids[self.valid.user[early[0]]]}",
                remedy="split the dataset again",
            )
        if self.spec.get("kind") == "global time":
            parts = (("training", log.time[self.train]), ("valid", log.time[self.valid.position]))
            for (name, time), later in zip(parts, (self.valid, self.test), strict=True):
                if time.size and len(later) and time.max() >= log.time[later.position].min():
                    raise DataError(
                        "an event is not before what it helps to predict, of whichever user",
                        where=name,
                        remedy="split the dataset again",
                    )

    def save(self, folder: Path) -> None:
        """Write the split beside a run (the dataset itself is saved apart)."""
        write_json(folder / "split.json", {"data": self.dataset.content_hash, "spec": self.spec})
        np.savez(
            folder / "split.npz",
            train=self.train,
            valid=self.valid.position,
            test=self.test.position,
            allow_pickle=False,
        )

    @classmethod
    def load(cls, folder: Path, dataset: Dataset) -> Split:
        """Read a saved split of this dataset; StorageError where it is of another one."""
        log = EventLog.from_dataset(dataset)
        saved = read_json(folder / "split.json")
        if not isinstance(saved, dict) or saved.get("data") != dataset.content_hash:
            raise StorageError("is of another dataset", where=str(folder / "split.json"), remedy="make the run again")
        path = folder / "split.npz"
        try:
            with path.open("rb") as handle, np.load(handle, allow_pickle=False) as arrays:
                train, valid, test = arrays["train"], arrays["valid"], arrays["test"]
        except (OSError, EOFError, ValueError, KeyError, BadZipFile) as error:
            raise StorageError(f"cannot be read ({error})", where=str(path), remedy="make the run again") from error
        if train.shape != log.item.shape:
            raise StorageError(
                f"is of {train.size} events, the dataset has {log.item.size}",
                where=str(path),
                remedy="make the run again",
            )
        return cls(dataset, log, train, Targets(log, valid), Targets(log, test), saved["spec"])


def _latest_before(log: EventLog) -> NDArray[np.int64]:
    """The latest time in each event's history, (n_events,); the smallest integer where there is no history."""
    times, rank = np.unique(log.time, return_inverse=True)
    # Ranks raised by user: a running maximum then starts anew with each user, and nothing overflows.
    raised = np.maximum.accumulate(log.user.astype(np.int64) * len(times) + rank)
    before = np.concatenate([[0], raised[:-1]])
    latest = times[before % len(times)]
    latest[log.start[:-1]] = np.iinfo(np.int64).min
    return latest


def tied(targets: Targets) -> NDArray[np.bool_]:
    """Which targets (n,) share their time with a neighbour of the same user: the items' order alone made them so."""
    log, position = targets.log, targets.position
    before, after = np.maximum(position - 1, 0), np.minimum(position + 1, len(log.item) - 1)
    found = np.zeros(len(position), dtype=np.bool_)
    for other in (before, after):
        found |= (other != position) & (log.user[other] == log.user[position]) & (log.time[other] == log.time[position])
    return found


def leave_last_out(dataset: Dataset, *, test: bool = True) -> Split:
    """Each user's last event is the test target and the one before it the validation target.

    Users with fewer than three events (two without a test) are all training. ``test=False`` holds out
    only a validation event, the last: for production, where every event else should be learnt from.
    """
    log = EventLog.from_dataset(dataset)
    held = 2 if test else 1
    last = log.start[1:][np.diff(log.start) > held] - 1
    train = np.ones(len(log.item), dtype=bool)
    for back in range(held):
        train[last - back] = False
    spec = {"kind": "leave-last-out" if test else "leave-last-out, validation only", "min_events": held + 1}
    split = Split(
        dataset,
        log,
        train,
        Targets(log, last - (held - 1)),
        Targets(log, last if test else last[:0]),
        spec,
    )
    return _checked(split)


def global_time(
    dataset: Dataset,
    *,
    valid_from: datetime | None = None,
    test_from: datetime | None = None,
    valid_share: float = 0.1,
    test_share: float = 0.1,
    targets: Literal["all", "first", "last"] = "all",
) -> Split:
    """Training before one moment, validation up to a second, test after it, for every user alike.

    Give the moments (naive: UTC), or the shares of all events that shall lie in each window: behind ``test_from``
    alone, validation is the ``valid_share`` of all events that comes right before it. ``targets``: every event of a
    window, or each user's first or last in it.
    """
    log = EventLog.from_dataset(dataset)
    if targets not in ("all", "first", "last"):
        raise ConfigError(f"unknown targets {targets!r}", remedy="use all, first or last")
    if not (0 < valid_share < 1 and 0 < test_share < 1 and valid_share + test_share < 1):
        raise ConfigError(
            f"shares {valid_share} and {test_share} leave no training", remedy="use shares whose sum is below 1"
        )
    ordered = np.sort(log.time)
    n_test, n_valid = (max(1, round(len(ordered) * share)) for share in (test_share, valid_share))
    until_test = _micros(test_from) if test_from else int(ordered[-n_test])
    before = int(np.searchsorted(ordered, until_test))  # events of the same moment as the edge are all of the test
    until_valid = _micros(valid_from) if valid_from else int(ordered[max(0, before - n_valid)])
    if until_valid >= until_test:
        raise ConfigError(
            "the validation window is empty",
            where="global_time",
            remedy="let valid_from be before test_from, and events before it",
        )

    def window(low: int, high: int | None) -> NDArray[np.int64]:
        inside = np.flatnonzero((log.time >= low) & (log.time < (high if high is not None else np.iinfo(np.int64).max)))
        if targets == "all" or not inside.size:
            return inside
        new_user = np.flatnonzero(np.diff(log.user[inside])) + 1
        edges = np.concatenate([[0], new_user]) if targets == "first" else np.concatenate([new_user, [inside.size]]) - 1
        return inside[edges]

    spec = {
        "kind": "global time",
        "valid_from": _iso(until_valid),
        "test_from": _iso(until_test),
        "targets": targets,
    }
    split = Split(
        dataset,
        log,
        log.time < until_valid,
        Targets(log, window(until_valid, until_test)),
        Targets(log, window(until_test, None)),
        spec,
    )
    return _checked(split)


def _checked(split: Split) -> Split:
    if len(split.valid) == 0:
        raise DataError(
            "no user has a validation event under this split",
            where=split.spec["kind"],
            remedy="give users with more events, or another split",
        )
    if not split.train.any():
        raise DataError("no training event is left", where=split.spec["kind"], remedy="use another split")
    split.verify()
    return split


def _micros(moment: datetime) -> int:
    aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return round(aware.timestamp() * 1_000_000)


def _iso(micros: int) -> str:
    return datetime.fromtimestamp(micros / 1_000_000, UTC).isoformat()
