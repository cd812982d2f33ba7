"""What a report's page shows, as plain tables and lists: shared by its HTML and its Markdown.

Nothing here is escaped or laid out: that is each writer's own job.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from penchant.evaluation.page_numbers import NONE, amount, as_float, interval, is_number, number, p_value
from penchant.evaluation.report import heading

LEAK = (
    "Leave-last-out leaks global time: whatever is trained on all users has seen other users' events that are later "
    "than a target."
)
SAMPLED = "Ranked among sampled candidates only: such numbers are higher than, and not comparable with, full ranking."
# Metrics of which less is better; the best of a column is set in bold.
_ERRORS = ("log loss", "logloss", "rmse", "mae")
_BEYOND = {
    "coverage": "coverage",
    "intra_list_distance": "intra-list distance",
    "novelty": "novelty",
    "popularity_lift": "popularity lift",
    "gini": "Gini",
    "genre_calibration": "genre calibration",
    "duplicates": "duplicates",
    "invalid": "invalid",
}
# Shown where they were measured.
_COSTS = {
    "p50_ms": "one request, p50 ms",
    "p99_ms": "one request, p99 ms",
    "price_per_1000_users": "price per 1,000 users",
}
# History shown before the rest is folded, newest last.
_RECENT = 12


@dataclass(frozen=True, slots=True)
class Cell:
    """``text`` with a smaller ``note`` (an interval); ``number``: set to the right; ``strong``: the best."""

    text: str
    note: str = ""
    number: bool = True
    strong: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """A head and its rows, each as long as the head; ``name`` stands above it."""

    name: str
    head: list[str]
    rows: list[list[Cell]]


@dataclass(frozen=True, slots=True)
class Point:
    """One system in a plot: its metric with the interval (NaN where there is none), and what it costs."""

    system: str
    mean: float
    low: float
    high: float
    seconds: float = math.nan


@dataclass(frozen=True, slots=True)
class Panel:
    """One value of a slice: how many targets, and each system on them."""

    value: str
    n: str
    points: list[Point]


@dataclass(frozen=True, slots=True)
class Slice:
    """The panels show ``metric``; the tables hold every metric."""

    name: str
    metric: str
    panels: list[Panel]
    tables: list[Table]


@dataclass(frozen=True, slots=True)
class Costs:
    """Quality in ``group`` against cost; ``absent``: systems that have a cost and cannot stand in the plot."""

    metric: str
    group: str
    points: list[Point]
    table: Table
    absent: list[str]


@dataclass(frozen=True, slots=True)
class Listed:
    """One system's list for a user: (title, whether it is the hit), and the rank of the true item."""

    system: str
    rank: str
    items: list[tuple[str, bool]]


@dataclass(frozen=True, slots=True)
class Example:
    user: str
    older: list[str]
    recent: list[str]
    target: str
    lists: list[Listed]
    why: str


@dataclass(frozen=True, slots=True)
class Group:
    """The headline table of a group of users, all its other metrics, and that both are of sampled candidates."""

    table: Table
    more: Table | None
    caution: str


@dataclass(frozen=True, slots=True)
class View:
    """``remarks`` are what every table of results must say: of leave-last-out, and of sampled candidates."""

    title: str
    notes: list[str]
    remarks: list[str]
    groups: list[Group]
    has_p: bool
    published: Table | None
    slices: list[Slice]
    costs: Costs | None
    beyond: Table | None
    trials: list[Table]
    examples: list[Example]
    settings: list[Table]


def view(report: Mapping[str, Any]) -> View:
    """Everything of a report's dict (`Report.to_dict`); parts that are absent or empty are left out."""
    notes = [str(note) for note in report.get("notes") or []]
    settings = report.get("settings") or {}
    kind, sampled = str(settings.get("split", "")), settings.get("candidates") is not None
    leaks = "leave-last-out" in kind or any(note.lower().startswith("leave-last-out") for note in notes)
    rows = [{**row, "group": heading(str(row.get("group", "")), settings)} for row in report.get("rows") or []]
    groups = [_group(name, part) for name, part in _by(rows, "group").items()]
    if (sampled or any(group.caution for group in groups)) and not any("sampled candidates" in note for note in notes):
        notes.insert(0, SAMPLED)
    if leaks and not any(note.lower().startswith("leave-last-out") for note in notes):
        notes.insert(0, LEAK)
    return View(
        title=str(report.get("title") or "Evaluation"),
        notes=notes,
        remarks=[*([SAMPLED] if sampled else []), *([LEAK] if leaks else [])],
        groups=groups,
        has_p=any(row.get("p") is not None for row in rows),
        published=_published(report.get("published") or []),
        slices=[_slice(name, part) for name, part in _by(report.get("slices") or [], "slice").items()],
        costs=_costs(report.get("costs") or [], rows),
        beyond=_beyond(report.get("beyond") or []),
        trials=[_trials(name, part) for name, part in _by(report.get("trials") or [], "system").items()],
        examples=[_example(example) for example in report.get("examples") or []],
        settings=[
            Table(name, ["", ""], [[Cell(key, number=False), Cell(value, number=False)] for key, value in flat])
            for name in ("settings", "seconds", "environment")
            if (flat := _flat(report.get(name) or {}))
        ],
    )


# -- parts -------------------------------------------------------------------------------------


def _by(entries: Iterable[Mapping[str, Any]], key: str) -> dict[str, list[Mapping[str, Any]]]:
    """Entries in lists by what stands under ``key``, both in the order given."""
    out: dict[str, list[Mapping[str, Any]]] = {}
    for entry in entries:
        out.setdefault(str(entry.get(key, "")), []).append(entry)
    return out


def _names(entries: Iterable[Mapping[str, Any]], key: str = "metrics") -> list[str]:
    return list(dict.fromkeys(name for entry in entries for name in entry.get(key) or {}))


def _primary(names: Sequence[str]) -> str:
    return next((name for name in names if name.lower().startswith("ndcg")), names[0] if names else "")


def _best(name: str, values: Iterable[Any]) -> float:
    known = [float(value) for value in values if is_number(value)]
    if not known:
        return math.nan
    return min(known) if name.lower().startswith(_ERRORS) else max(known)


def _counts(estimates: Iterable[Any]) -> str:
    """How many users: one number, or the least and the most."""
    known = sorted({int(n) for n in estimates if is_number(n)})
    if not known:
        return NONE
    return f"{known[0]:,}" if len(known) == 1 else f"{known[0]:,}–{known[-1]:,}"


def _group(name: str, rows: Sequence[Mapping[str, Any]]) -> Group:
    with_p = any(row.get("p") is not None for row in rows)
    columns = _estimates(rows, "metrics")
    counts = [_counts(e.get("n") for e in row["metrics"].values()) for row in rows]
    cells = [
        [*row_cells, Cell(n), *([Cell(p_value(row.get("p")))] if with_p else [])]
        for row, row_cells, n in zip(rows, columns.rows, counts, strict=True)
    ]
    table = Table(name, [*columns.head, "n", *(["p"] if with_p else [])], cells)
    further = [row for row in rows if row.get("more")]
    more = _estimates(further, "more") if further else None
    return Group(table, more, SAMPLED if "sampled candidates" in name else "")


def _estimates(rows: Sequence[Mapping[str, Any]], key: str) -> Table:
    """A column a metric, the best mean of those that are no differences in bold."""
    metrics = _names(rows, key)
    plain = [row for row in rows if not row.get("difference")]
    best = {m: _best(m, [(row[key].get(m) or {}).get("mean") for row in plain]) for m in metrics}
    out = []
    for row in rows:
        difference = bool(row.get("difference"))
        cells = [Cell(str(row["system"]), number=False)]
        for metric in metrics:
            estimate = row[key].get(metric) or {}
            mean = estimate.get("mean")
            strong = not difference and len(plain) > 1 and mean == best[metric]
            cells.append(Cell(number(mean, sign=difference), interval(estimate, difference), strong=strong))
        out.append(cells)
    return Table("", ["system", *metrics], out)


def _published(entries: Sequence[Mapping[str, Any]]) -> Table | None:
    if not entries:
        return None
    metrics = _names(entries)
    rows = [
        [
            Cell(str(entry["system"]), number=False),
            *(Cell(number(entry["metrics"].get(metric))) for metric in metrics),
            Cell(str(entry.get("source", "")), number=False),
            Cell(str(entry.get("protocol", "")), number=False),
        ]
        for entry in entries
    ]
    return Table("", ["system", *metrics, "source", "protocol"], rows)


def _slice(name: str, entries: Sequence[Mapping[str, Any]]) -> Slice:
    metrics = _names(entries)
    values = _by(entries, "value")
    systems = list(_by(entries, "system"))
    at = {(str(entry.get("value", "")), str(entry["system"])): entry for entry in entries}
    n = {value: _counts(entry.get("n") for entry in part) for value, part in values.items()}
    tables = []
    for metric in metrics:
        rows = []
        for system in systems:
            found = [at.get((value, system), {}).get("metrics", {}).get(metric) or {} for value in values]
            rows.append([Cell(system, number=False), *(Cell(number(e.get("mean")), interval(e)) for e in found)])
        tables.append(Table(metric, ["system", *(f"{value} (n {n[value]})" for value in values)], rows))
    primary = _primary(metrics)
    panels = [
        Panel(value, n[value], points)
        for value, part in values.items()
        if (points := [p for entry in part if (p := _point(entry, primary)) is not None])
    ]
    return Slice(name, primary, panels, tables)


def _point(entry: Mapping[str, Any], metric: str, seconds: Any = None) -> Point | None:
    estimate = entry["metrics"].get(metric) or {}
    if not is_number(estimate.get("mean")):
        return None
    low, high = as_float(estimate.get("low")), as_float(estimate.get("high"))
    return Point(str(entry["system"]), float(estimate["mean"]), low, high, as_float(seconds))


def _costs(costs: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> Costs | None:
    """The group with the most of the systems, so that all stand on the same users."""
    if not costs:
        return None
    systems = [str(cost["system"]) for cost in costs]
    groups = _by([row for row in rows if not row.get("difference")], "group")
    found = {name: {str(row["system"]): row for row in part} for name, part in groups.items()}
    group = max(found, key=lambda name: len(found[name].keys() & set(systems)), default="")
    chosen = found.get(group, {})
    metric = _primary(_names(chosen.values()))
    further = [key for key in _COSTS if any(is_number(cost.get(key)) for cost in costs)]
    points, table, absent = [], [], []
    for cost, system in zip(costs, systems, strict=True):
        seconds = cost.get("seconds_per_1000_users")
        point = _point(chosen[system], metric, seconds) if system in chosen else None
        if point is not None and point.seconds > 0:
            points.append(point)
        else:
            absent.append(system)
        table.append(
            [
                Cell(system, number=False),
                Cell(number(point.mean if point else None)),
                Cell(amount(seconds)),
                Cell(amount(cost.get("tokens_per_1000_users"))),
                Cell(amount(cost.get("fit_seconds"))),
                *(Cell(amount(cost.get(key))) for key in further),
            ]
        )
    head = ["system", metric or "quality", "seconds per 1,000 users", "tokens per 1,000 users", "seconds to fit"]
    head += [_COSTS[key] for key in further]
    return Costs(metric, group, points, Table("", head, table), absent)


def _beyond(entries: Sequence[Mapping[str, Any]]) -> Table | None:
    keys = [key for key in _BEYOND if any(is_number(entry.get(key)) for entry in entries)]
    if not keys:
        return None
    rows = [
        [Cell(str(entry["system"]), number=False), *(Cell(number(entry.get(key), 3)) for key in keys)]
        for entry in entries
    ]
    return Table("", ["system", *(_BEYOND[key] for key in keys)], rows)


def _trials(system: str, entries: Sequence[Mapping[str, Any]]) -> Table:
    best = _best("ndcg", [entry.get("valid_ndcg@10") for entry in entries])
    rows = [
        [
            Cell(", ".join(f"{key} {value}" for key, value in _flat(entry.get("config") or {})), number=False),
            Cell(number(entry.get("valid_ndcg@10")), strong=entry.get("valid_ndcg@10") == best),
            Cell(amount(entry.get("seconds"))),
        ]
        for entry in entries
    ]
    return Table(system, ["configuration", "validation NDCG@10", "seconds"], rows)


def _example(entry: Mapping[str, Any]) -> Example:
    history = [str(title) for title in entry.get("history") or []]
    ranks = entry.get("target_rank") or {}
    lists = []
    for system, titles in (entry.get("recommended") or {}).items():
        hit = _hit([str(title) for title in titles], str(entry["target"]), ranks.get(system))
        items = [(str(title), place == hit) for place, title in enumerate(titles)]
        lists.append(Listed(str(system), f"{ranks[system]:,}" if is_number(ranks.get(system)) else NONE, items))
    return Example(
        user=str(entry["user"]),
        older=history[:-_RECENT],
        recent=history[-_RECENT:],
        target=str(entry["target"]),
        lists=lists,
        why=str(entry.get("why") or ""),
    )


def _hit(titles: Sequence[str], target: str, rank: Any) -> int:
    """Where the true item stands in the list, -1 where it isn't counted as found.

    Two items may have one title, and ties count against the system: the rank says whether it is a hit, the
    title where.
    """
    if target not in titles or (is_number(rank) and rank > len(titles)):
        return -1
    if is_number(rank) and titles[int(rank) - 1] == target:
        return int(rank) - 1
    return titles.index(target)


def _flat(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as ("a.b", value) pairs."""
    out: list[tuple[str, str]] = []
    for key, inner in value.items():
        name = f"{prefix}{key}"
        if isinstance(inner, Mapping) and inner:
            out += _flat(inner, f"{name}.")
        else:
            out.append((name, inner if isinstance(inner, str) else json.dumps(inner, ensure_ascii=False, default=str)))
    return out
