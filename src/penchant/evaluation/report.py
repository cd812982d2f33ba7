"""What an evaluation found, as data, as a table for people, and as JSON."""

from __future__ import annotations

import math
import os
import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from penchant.evaluation.statistics import Estimate

_PACKAGES = ("penchant", "torch", "transformers", "peft", "numpy", "polars")


@dataclass(frozen=True, slots=True)
class Row:
    """One system's metrics on one group of users."""

    group: str
    system: str
    metrics: dict[str, Estimate]
    difference: bool = False  # of two systems: shown with its sign


@dataclass(frozen=True, slots=True)
class Report:
    """Rows in the order to be read, notes on the protocol, and the settings that make it again."""

    rows: list[Row]
    notes: list[str]
    settings: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)

    def find(self, system: str, group: str | None = None) -> Row:
        """The first row of that system (and group); KeyError where there is none."""
        for row in self.rows:
            if row.system == system and group in (None, row.group):
                return row
        raise KeyError(system)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: rows, notes, settings, seconds, and the machine and versions it ran on; null where no number."""
        return {**_without_nan(asdict(self)), "environment": environment()}

    def to_text(self) -> str:
        """The table: one block a group of users, mean [95% interval]."""
        lines: list[str] = []
        width = max((len(row.system) for row in self.rows), default=0)
        group = None
        for row in self.rows:
            if row.group != group:
                group = row.group
                head = "".join(f"{name:>28}" for name in row.metrics)
                lines += ["", f"{group}", f"  {'':<{width}}{head}"]
            cells = "".join(f"{_cell(estimate, row.difference):>28}" for estimate in row.metrics.values())
            lines.append(f"  {row.system:<{width}}{cells}")
        lines += ["", *(f"* {note}" for note in self.notes)]
        return "\n".join(lines).lstrip("\n")


def _without_nan(value: Any) -> Any:
    """NaN, which JSON has no word for, as None."""
    if isinstance(value, dict):
        return {name: _without_nan(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _cell(estimate: Estimate, difference: bool) -> str:
    form = "+.4f" if difference else ".4f"
    return f"{estimate.mean:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"


def environment() -> dict[str, Any]:
    """Machine and versions, for every number that is kept."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "system": platform.system(),
        "versions": versions,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as handle:
            for line in handle:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        return platform.processor()
    return platform.processor()
