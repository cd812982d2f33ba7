"""A report's page in GitHub's Markdown, in which nothing from outside is Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence

from penchant.evaluation.page_view import Cell, Example, Table, View
from penchant.tokens import clean

# What CommonMark and GitHub's tables, strikethrough and maths read as more than a character.
_SPECIAL = re.compile(r"[\\`*_{}\[\]|#~$^!]")
# What makes a list or a rule where a line begins.
_LEADING = re.compile(r"^(\d{1,9})([.)])(?=\s|$)|^([-+](?=\s|$)|-(?=-))")
_LINK = re.compile(r"://|\bwww\.", re.IGNORECASE)


def escaped(value: object) -> str:
    """Any value as one line that Markdown shows as it stands."""
    text = clean(value, None)
    text = _SPECIAL.sub(lambda found: f"\\{found[0]}", text)
    text = _LINK.sub(lambda found: found[0].replace(":", "\\:").replace(".", "\\."), text)
    text = _LEADING.sub(lambda found: f"{found[1]}\\{found[2]}" if found[1] else f"\\{found[3]}", text)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def markdown(view: View) -> str:
    """The page, section after section; empty sections are left out."""
    sections = (_head, _results, _published, _slices, _costs, _beyond, _trials, _examples, _settings)
    return "\n\n".join(part for section in sections for part in section(view)) + "\n"


def _head(view: View) -> list[str]:
    title = [f"# {escaped(view.title)}"]
    return [*title, "## Read this first", _bullets(view.notes)] if view.notes else title


def _results(view: View) -> list[str]:
    parts = ["## Results", _RESULTS + (_P if view.has_p else "")] if view.groups else []
    for group in view.groups:
        parts += [
            f"### {escaped(group.table.name)}",
            _table(group.table),
            *_remarks(*dict.fromkeys([group.caution, *view.remarks])),
        ]
        if group.more:
            parts.append(_folded("All other metrics", _table(group.more)))
    return parts


def _published(view: View) -> list[str]:
    return ["## Published by others, under the same protocol", _table(view.published)] if view.published else []


def _slices(view: View) -> list[str]:
    parts = ["## Slices"] if view.slices else []
    for part in view.slices:
        parts.append(f"### {escaped(part.name)}")
        for table in part.tables:
            parts += [f"{escaped(table.name)}:", _table(table)]
        parts += _remarks(*view.remarks)
    return parts


def _costs(view: View) -> list[str]:
    if not view.costs:
        return []
    on = f"{escaped(view.costs.metric)} on: {escaped(view.costs.group)}."
    return [
        "## Quality against cost",
        *([on] if view.costs.group else []),
        _table(view.costs.table),
        *_remarks(*view.remarks),
    ]


def _beyond(view: View) -> list[str]:
    return ["## Beyond accuracy", _table(view.beyond), *_remarks(*view.remarks)] if view.beyond else []


def _trials(view: View) -> list[str]:
    head = ["## How the baselines were tuned"] if view.trials else []
    return head + [_folded(f"{t.name}, {_count(len(t.rows), 'trial')}", _table(t)) for t in view.trials]


def _examples(view: View) -> list[str]:
    head = [f"## {_count(len(view.examples), 'user')} in full"] if view.examples else []
    return head + [block for example in view.examples for block in _example(example)]


def _settings(view: View) -> list[str]:
    head = ["## Settings and environment"] if view.settings else []
    return head + [_folded(table.name, _table(table)) for table in view.settings]


_RESULTS = "Mean and 95% interval; bold is the best mean of a column, which alone is no proof of a difference."
_P = " A row that is a difference has the p of a paired permutation test."


def _count(n: int, thing: str) -> str:
    return f"{n} {thing}" if n == 1 else f"{n} {thing}s"


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {escaped(line)}" for line in lines)


def _remarks(*remarks: str) -> list[str]:
    return [escaped(remark) for remark in remarks if remark]


def _table(table: Table) -> str:
    numbers = [all(row[i].number for row in table.rows) for i in range(len(table.head))]
    lines = [
        "| " + " | ".join(escaped(name) for name in table.head) + " |",
        "| " + " | ".join("---:" if number else "---" for number in numbers) + " |",
        *("| " + " | ".join(_cell(cell) for cell in row) + " |" for row in table.rows),
    ]
    return "\n".join(lines)


def _cell(cell: Cell) -> str:
    text = escaped(cell.text)
    if cell.strong:
        text = f"**{text}**"
    return f"{text} {escaped(cell.note)}" if cell.note else text


def _folded(summary: str, content: str) -> str:
    return f"<details><summary>{escaped(summary)}</summary>\n\n{content}\n\n</details>"


def _example(example: Example) -> list[str]:
    parts = [f"### User {escaped(example.user)}"]
    if example.older:
        older = _folded(f"{_count(len(example.older), 'earlier item')}", _bullets(example.older))
        parts += ["History, oldest first:", older, _bullets(example.recent)]
    elif example.recent:
        parts += ["History, oldest first:", _bullets(example.recent)]
    else:
        parts.append("No history.")
    parts.append(f"Came next: **{escaped(example.target)}**")
    if example.lists:
        head = ["", *(f"{part.system} (true item's rank {part.rank})" for part in example.lists)]
        depth = max(len(part.items) for part in example.lists)
        rows = []
        for place in range(depth):
            row = [Cell(str(place + 1))]
            for part in example.lists:
                title, hit = part.items[place] if place < len(part.items) else ("", False)
                row.append(Cell(f"✓ {title}" if hit else title, number=False, strong=hit))
            rows.append(row)
        parts.append(_table(Table("", head, rows)))
    if example.why:
        parts.append(f"What was wrong: {escaped(example.why)}")
    return parts
