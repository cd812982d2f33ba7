"""Hold two files against every rule at once, so that all problems are seen in one go."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from penchant.data import rules
from penchant.data.dataset import events_left, read_both
from penchant.data.findings import Findings, Problem, Rule
from penchant.data.options import ReadOptions
from penchant.data.reading import Rows, Source


def check(interactions: Source, items: Source, options: ReadOptions | None = None, **kw: Any) -> list[Rule]:
    """Every rule, kept or broken, in the order in which it was looked at.

    The rules of level ``fail`` are those of `Dataset.read`, judged by the same code; it raises at the first one
    broken. Those of level ``warn`` are read all the same. After a broken rule the rows that keep it are looked at
    further. A file that cannot be read at all has no further rules.
    """
    options = ReadOptions.of(options, **kw)
    findings = Findings(keep_going=True)
    events, catalogue, dropped = read_both(interactions, items, options, findings)
    if events is not None and catalogue is not None and all(rule.passed for rule in findings.rules):
        findings.attempt("events are left", partial(events_left, events, catalogue, dropped, options))
    return [*findings.rules, *_event_warnings(events), *_item_warnings(catalogue), *_both_warnings(events, catalogue)]


def _event_warnings(events: Rows | None) -> list[Rule]:
    if events is None:
        return []
    frame, where = events.frame, events.where
    return [
        _warning("users have 3 events or more", rules.few_events(frame, where)),
        _warning("events are there once", rules.duplicate_events(frame, where)),
        _warning("events are not in the future", rules.future_times(frame, where)),
    ]


def _item_warnings(items: Rows | None) -> list[Rule]:
    if items is None:
        return []
    frame, where = items.frame, items.where
    return [
        _warning("titles have at most 200 characters", rules.long_titles(frame, where)),
        _warning("titles tell items apart", rules.shared_titles(frame, where)),
        _warning("titles hold no control tokens", rules.control_titles(frame, where)),
    ]


def _both_warnings(events: Rows | None, items: Rows | None) -> list[Rule]:
    if events is None or items is None:
        return []
    problem = rules.strange_titles(events.frame, items.frame, items.where)
    return [_warning("titles go with what follows what", problem)]


def _warning(name: str, problem: Problem | None) -> Rule:
    findings = Findings(keep_going=True)
    findings.judge(name, problem)
    return replace(findings.rules[0], level="warn")
