"""Recommendations from anywhere, as a table, scored by the same rules as our own.

A table has USER, ITEM and RANK or SCORE (or both: RANK then decides, and lists whose scores say otherwise, as those
that were made diverse, are counted). What cannot be judged is refused with a
DataError: an unknown user or item, an item twice for one user, ranks that are not 1 to n, scores that are not
finite. What can be judged is, and counted: a user without a list misses; a place that is missing misses; an item
the user had before keeps its place and cannot hit; of items with equal scores the target comes last.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray
from polars.exceptions import PolarsError

from penchant.data.history import EventLog, Targets
from penchant.errors import ConfigError, DataError
from penchant.schema import ITEM, RANK, SCORE, USER

# Places of lists looked at together: 8M keys are 64 MB.
_BLOCK = 8_000_000


@dataclass(frozen=True, slots=True)
class Findings:
    """What was counted while a table was scored; each is a number of targets unless it says otherwise."""

    targets: int
    without_list: int
    short: int
    missing_places: int  # of k, over the targets that have a list
    seen_places: int  # of the first k, items the target's user had before it
    with_seen: int
    repeats: int  # whose own item the user had before
    tied: int  # that share their score with another item of the list
    users_not_asked: int  # users of the table without a target
    disagree: int  # users whose scores rise somewhere along their ranks

    def to_dict(self) -> dict[str, int]:
        return asdict(self)

    def notes(self, k: int, *, repeats: bool = False) -> list[str]:
        """What a reader of the table must know, one line each; none where there is nothing to say."""
        again = "count like any other" if repeats else "cannot be found and count as misses"
        seen = f"hold {self.seen_places:,} items that the user had before: they keep their places and take up room"
        lines = (
            (self.without_list, "targets are of users without a list, and count as misses"),
            (self.short, f"lists have fewer than {k} items: {self.missing_places:,} places that miss"),
            (self.with_seen, f"lists {seen}"),
            (self.repeats, f"targets are repeats of an item the user has already; they {again}"),
            (self.tied, "targets share their score with other items of the list, and were put last among them"),
            (self.disagree, "users' lists have a higher score at a lower place: their ranks count, not their scores"),
            (self.users_not_asked, "users of the table have no target, and were left out"),
        )
        return [f"{number:,} {text}" for number, text in lines if number]


@dataclass(frozen=True, eq=False)
class Scored:
    """``rank`` (n_targets,) from 1, n_items + 1 where it cannot be found; ``top`` (n_targets, k), padded with -1.

    ``top`` orders equal scores by index; only ``rank`` puts the target last among them.
    """

    rank: NDArray[np.int64]
    top: NDArray[np.int32]
    findings: Findings


def score_lists(table: pl.DataFrame | Path | str, targets: Targets, k: int = 10, *, repeats: bool = False) -> Scored:
    """Where each target stands in its user's list, by the rules above; ``table`` may be a parquet file.

    A user's list answers all of the user's targets. ``repeats``: a target that the user had before may be hit.
    """
    if k < 1:
        raise ConfigError(f"k is {k}", where="score_lists", remedy="give 1 or more")
    where = "recommendations" if isinstance(table, pl.DataFrame) else str(table)
    lists = _Lists.of(_read(table, where), targets.log, where)
    return lists.score(targets, k, repeats)


# -- reading ---------------------------------------------------------------------------------------


def _read(table: pl.DataFrame | Path | str, where: str) -> pl.DataFrame:
    """The columns that count, typed and without nulls."""
    if isinstance(table, pl.DataFrame):
        frame = table
    else:
        try:
            frame = pl.read_parquet(table)
        except (PolarsError, OSError) as error:
            raise DataError(
                f"cannot be read as parquet ({error})", where=where, remedy="give a parquet file"
            ) from error
    order = [column for column in (RANK, SCORE) if column in frame.columns]
    lacking = [column for column in (USER, ITEM) if column not in frame.columns]
    if lacking or not order:
        raise DataError(
            f"has no column {', '.join(lacking) or f'{RANK} or {SCORE}'}",
            where=where,
            remedy=f"give {USER}, {ITEM} and {RANK} or {SCORE}; there are {', '.join(frame.columns) or 'none'}",
        )
    frame = frame.select(USER, ITEM, *order)
    nulls = next((column for column in frame.columns if frame[column].null_count()), None)
    if nulls is not None:
        row = int(frame[nulls].is_null().arg_true()[0])
        raise DataError("is empty", where=f"{where}, row {row}, column {nulls}", remedy="fill it, or drop the row")
    for column in (USER, ITEM):
        kind = frame.schema[column]
        if not (kind == pl.String or kind.is_integer() or isinstance(kind, pl.Categorical | pl.Enum)):
            raise DataError(f"ids are {kind}", where=f"{where}, column {column}", remedy="give texts or whole numbers")
    for column in order:
        if not frame.schema[column].is_numeric() or frame.schema[column].is_decimal():
            raise DataError(f"is {frame.schema[column]}", where=f"{where}, column {column}", remedy="give numbers")
    return frame.with_columns(pl.col(USER, ITEM).cast(pl.String))


def _codes(ids: pl.Series, names: list[str], where: str) -> NDArray[np.int64]:
    """Indices of ids in ``names``; DataError naming some of the unknown ones."""
    code = ids.replace_strict(names, np.arange(len(names)), default=-1, return_dtype=pl.Int64).to_numpy()
    unknown = ids.filter(code < 0).unique(maintain_order=True)
    if len(unknown):
        more = f" and {len(unknown) - 5:,} more" if len(unknown) > 5 else ""
        raise DataError(
            f"unknown {ids.name} {', '.join(map(repr, unknown[:5]))}{more}",
            where=where,
            remedy="use the ids of the data the targets are of; take rows of other ones out knowingly",
        )
    return code


# -- judging ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Lists:
    """All lists, flat: user u has ``item[start[u]:start[u + 1]]``, best first, equal scores by index.

    ``place`` (from 1) is where an item stands at worst among its equals; ``tied`` whether it has any;
    ``disagree`` how many users' scores rise along their ranks.
    """

    start: NDArray[np.int64]
    item: NDArray[np.int64]
    place: NDArray[np.int64]
    tied: NDArray[np.bool_]
    disagree: int = 0

    @classmethod
    def of(cls, frame: pl.DataFrame, log: EventLog, where: str) -> _Lists:
        user = _codes(frame[USER], log.user_ids, where)
        item = _codes(frame[ITEM], log.item_ids, where)
        _refuse_duplicates(frame, user * log.n_items + item, where)
        score = frame[SCORE].to_numpy().astype(np.float64) if SCORE in frame.columns else None
        if score is not None and not np.isfinite(score).all():
            raise DataError(
                f"a score is {score[~np.isfinite(score)][0]}",
                where=f"{where}, row {int(np.flatnonzero(~np.isfinite(score))[0])}",
                remedy="leave out what is not recommended",
            )
        if RANK in frame.columns:
            return cls._by_rank(frame, user, item, score, log.n_users, where)
        if score is None:
            raise DataError(f"has no column {RANK} or {SCORE}", where=where)
        order = _order(user, -score, item)
        user, item, score = user[order], item[order], score[order]
        start = np.searchsorted(user, np.arange(log.n_users + 1))
        new = np.append(True, (user[1:] != user[:-1]) | (score[1:] != score[:-1]))[: len(user)]
        edges = np.append(np.flatnonzero(new), len(user))
        run = np.cumsum(new) - 1
        return cls(start, item, edges[run + 1] - start[user], np.diff(edges)[run] > 1)

    @classmethod
    def _by_rank(
        cls,
        frame: pl.DataFrame,
        user: NDArray[np.int64],
        item: NDArray[np.int64],
        score: NDArray[np.float64] | None,
        n_users: int,
        where: str,
    ) -> _Lists:
        rank = frame[RANK].to_numpy()
        order = _order(user, rank)
        user, item, rank = user[order], item[order], rank[order]
        start = np.searchsorted(user, np.arange(n_users + 1))
        place = np.arange(1, len(user) + 1) - start[user]
        wrong = np.flatnonzero(rank != place)
        if wrong.size:
            raise DataError(
                f"ranks are not 1 to n: {rank[wrong[0]]} where {place[wrong[0]]} was expected",
                where=f"{where}, user {frame[USER][int(order[wrong[0]])]}",
                remedy="number each user's items from 1, without gaps, or leave the column out",
            )
        disagree = 0
        if score is not None:
            score = score[order]
            rising = (user[1:] == user[:-1]) & (score[1:] > score[:-1])
            disagree = len(np.unique(user[1:][rising]))
        return cls(start, item, place, np.zeros(len(item), dtype=bool), disagree)

    def score(self, targets: Targets, k: int, repeats: bool) -> Scored:
        log, n = targets.log, len(targets)
        user, item = targets.user.astype(np.int64), targets.item.astype(np.int64)
        length = np.diff(self.start)
        at = self._find(user * log.n_items + item, log.n_items)
        first = _first_events(log)
        repeated = first.before(user * log.n_items + item, targets.position)
        found = (at >= 0) & (repeats | ~repeated)
        rank = np.where(found, self.place[np.maximum(at, 0)] if len(self.item) else 0, log.n_items + 1)
        top = np.full((n, k), -1, dtype=np.int32)
        seen_places, with_seen = 0, 0
        step = max(1, _BLOCK // k)
        for begin in range(0, n, step):
            rows = slice(begin, min(begin + step, n))
            place = self.start[user[rows], None] + np.arange(k)
            real = place < self.start[user[rows] + 1, None]
            items = self.item[np.where(real, place, 0)] if len(self.item) else np.zeros(real.shape, dtype=np.int64)
            top[rows] = np.where(real, items, -1)
            had = real & first.before(user[rows, None] * log.n_items + items, targets.position[rows, None])
            seen_places += int(had.sum())
            with_seen += int(had.any(axis=1).sum())
        given = length[user]
        findings = Findings(
            targets=n,
            without_list=int((given == 0).sum()),
            short=int(((given > 0) & (given < k)).sum()),
            missing_places=int(np.maximum(k - given[given > 0], 0).sum()),
            seen_places=seen_places,
            with_seen=with_seen,
            repeats=int(repeated.sum()),
            tied=int(self.tied[at[found]].sum()),
            users_not_asked=int((length > 0).sum() - (length[np.unique(user)] > 0).sum()),
            disagree=self.disagree,
        )
        return Scored(rank, top, findings)

    def _find(self, keys: NDArray[np.int64], n_items: int) -> NDArray[np.int64]:
        """Where each (user, item) stands in ``item``, -1 where it doesn't."""
        own = np.repeat(np.arange(len(self.start) - 1), np.diff(self.start)) * n_items + self.item
        order = np.argsort(own)
        at = np.searchsorted(own[order], keys)
        inside = np.minimum(at, len(own) - 1)
        if not len(own):
            return np.full(len(keys), -1)
        return np.where(own[order][inside] == keys, order[inside], -1)


@dataclass(frozen=True, eq=False)
class _First:
    """The position of each user's first event with an item, by ascending key."""

    key: NDArray[np.int64]
    position: NDArray[np.int64]

    def before(self, keys: NDArray[np.int64], position: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether the user had the item before that position; both broadcast together."""
        at = np.minimum(np.searchsorted(self.key, keys), len(self.key) - 1)
        return (self.key[at] == keys) & (self.position[at] < position)


def _first_events(log: EventLog) -> _First:
    # np.unique's index is that of the first occurrence, and a user's events are in the order of time.
    key, position = np.unique(log.user.astype(np.int64) * log.n_items + log.item, return_index=True)
    return _First(key, position)


def _order(*keys: NDArray[np.generic]) -> NDArray[np.int64]:
    """What sorts by the first key, among its equals by the second, and so on; equal rows keep their order."""
    frame = pl.DataFrame({str(i): key for i, key in enumerate(keys)})
    return frame.select(pl.arg_sort_by(*frame.columns, maintain_order=True)).to_series().to_numpy().astype(np.int64)


def _refuse_duplicates(frame: pl.DataFrame, keys: NDArray[np.int64], where: str) -> None:
    order = np.argsort(keys, kind="stable")
    twice = np.flatnonzero(np.diff(keys[order]) == 0)
    if twice.size:
        row = int(order[twice[0] + 1])
        raise DataError(
            f"item {frame[ITEM][row]!r} is recommended twice",
            where=f"{where}, user {frame[USER][row]}, row {row}",
            remedy="give an item once a user, at its best place",
        )
