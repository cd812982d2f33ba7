"""Where a broken rule goes: the first one raises while reading, all of them are kept while checking.

Reading and checking run the same code, so that they can never disagree on what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, TypeVar

import polars as pl

from penchant.errors import DataError

MAX_IDS = 10

T = TypeVar("T")


@dataclass(frozen=True)
class Problem:
    """What is wrong, where (file, row, column), what to do, and the ids that show it (at most ten)."""

    what: str
    where: str
    remedy: str
    ids: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rule:
    """One rule and whether the data keep it.

    A broken rule of level ``fail`` makes `Dataset.read` raise; one of level ``warn`` is read all the same.
    """

    name: str
    passed: bool
    detail: str
    ids: tuple[str, ...] = ()
    level: Literal["fail", "warn"] = "fail"

    @property
    def verdict(self) -> Literal["PASS", "FAIL", "WARN"]:
        """PASS, or what a broken rule of this level is called."""
        if self.passed:
            return "PASS"
        return "FAIL" if self.level == "fail" else "WARN"


class Findings:
    """The judge of one reading. With ``keep_going`` it collects the rules, else the first broken one raises."""

    def __init__(self, *, keep_going: bool = False) -> None:
        self.keep_going = keep_going
        self.rules: list[Rule] = []

    def judge(self, name: str, problem: Problem | None, *, fine: str = "") -> bool:
        """Note whether the rule ``name`` is kept, and return whether it is broken.

        Raises DataError for a problem unless the findings keep going.
        """
        if problem is not None and not self.keep_going:
            raise DataError(problem.what, where=problem.where, remedy=problem.remedy)
        if problem is None:
            self.rules.append(Rule(name, True, fine))
        else:
            detail = f"{problem.where}: {problem.what}; {problem.remedy}"
            self.rules.append(Rule(name, False, detail, problem.ids[:MAX_IDS]))
        return problem is not None

    def attempt(self, name: str, read: Callable[[], T]) -> T | None:
        """What ``read`` returns; its DataError is a broken rule, and then None is returned."""
        try:
            value = read()
        except DataError as error:
            if not self.keep_going:
                raise
            remedy = f"; {error.remedy}" if error.remedy else ""
            self.rules.append(Rule(name, False, f"{error.where}: {error.what}{remedy}"))
            return None
        self.rules.append(Rule(name, True, ""))
        return value


def some_ids(values: pl.Series | Iterable[object]) -> tuple[str, ...]:
    """The first ten different values as strings, in their order."""
    distinct = values.unique(maintain_order=True).head(MAX_IDS) if isinstance(values, pl.Series) else values
    return tuple("" if value is None else str(value) for value in distinct)[:MAX_IDS]
