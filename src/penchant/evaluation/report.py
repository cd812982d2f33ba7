"""What an evaluation found, as data, as a table for people, and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from penchant.environment import environment
from penchant.evaluation.statistics import Estimate
from penchant.files import without_nan


@dataclass(frozen=True, slots=True)
class Row:
    """One system's metrics on one group of targets.

    ``metrics`` are the headline, ``more`` all others. A ``difference`` of two systems is shown with its sign; its
    ``p`` is the paired permutation test's on NDCG, corrected by Holm over all differences of the report.
    """

    group: str
    system: str
    metrics: dict[str, Estimate]
    difference: bool = False
    p: float | None = None
    more: dict[str, Estimate] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SliceRow:
    """One system's headline metrics on the ``n`` targets whose ``slice`` is ``value``."""

    slice: str
    value: str
    n: int
    system: str
    metrics: dict[str, Estimate]


@dataclass(frozen=True, slots=True)
class Cost:
    """What a system takes: seconds and LLM tokens for a thousand users, and the seconds of fitting it once.

    ``p50_ms`` and ``p99_ms`` are milliseconds of single requests; ``price_per_1000_users`` has the price's currency.
    """

    system: str
    seconds_per_1000_users: float
    tokens_per_1000_users: float | None = None
    fit_seconds: float | None = None
    p50_ms: float | None = None
    p99_ms: float | None = None
    price_per_1000_users: float | None = None


@dataclass(frozen=True, slots=True)
class Example:
    """A real user: titles of the newest history (oldest first), the true item, each system's list and its rank."""

    user: str
    history: list[str]
    target: str
    target_rank: dict[str, int]
    recommended: dict[str, list[str]]
    why: str


@dataclass(frozen=True, slots=True)
class Report:
    """Rows in the order to be read, notes on the protocol, and the settings that make it again.

    ``beyond`` are the systems' numbers beyond accuracy (see penchant.evaluation.beyond), ``trials`` what tuning
    tried, ``published`` other people's numbers under the same protocol. Any of the parts may be empty.
    """

    rows: list[Row]
    notes: list[str]
    settings: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)
    title: str = "Evaluation"
    slices: list[SliceRow] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    beyond: list[dict[str, Any]] = field(default_factory=list)
    trials: list[dict[str, Any]] = field(default_factory=list)
    published: list[dict[str, Any]] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)

    def find(self, system: str, group: str | None = None) -> Row:
        """The first row of that system (and group); KeyError where there is none."""
        for row in self.rows:
            if row.system == system and group in (None, row.group):
                return row
        raise KeyError(system)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: every part, and the machine and versions it ran on; null where there is no number."""
        return {**without_nan(asdict(self)), "environment": environment()}

    def to_text(self) -> str:
        """The table: one block a group of users, mean [95% interval]."""
        lines: list[str] = []
        width = max((len(row.system) for row in self.rows), default=0)
        group = None
        for row in self.rows:
            if row.group != group:
                group = row.group
                head = "".join(f"{name:>28}" for name in row.metrics)
                lines += ["", heading(group, self.settings), f"  {'':<{width}}{head}"]
            cells = "".join(f"{_cell(estimate, row.difference):>28}" for estimate in row.metrics.values())
            p = "" if row.p is None else f"  p {row.p:.2g}"
            lines.append(f"  {row.system:<{width}}{cells}{p}")
        lines += ["", *(f"* {note}" for note in self.notes)]
        return "\n".join(lines).lstrip("\n")


def heading(group: str, settings: Mapping[str, Any]) -> str:
    """A group's name as every table shows it: where targets stood among sampled candidates, it says so."""
    n = settings.get("candidates")
    return group if n is None or "sampled candidates" in group else f"{group}, sampled candidates ({n})"


def _cell(estimate: Estimate, difference: bool) -> str:
    form = "+.4f" if difference else ".4f"
    return f"{estimate.mean:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"
