"""The report's page: what stands on it, that outside text stays text, and that nothing needs a network."""

from __future__ import annotations

import copy
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.evaluation.sample_report import SYSTEMS, sample_report

from penchant.errors import ConfigError, StorageError
from penchant.evaluation import page_plots
from penchant.evaluation.page import to_html, to_markdown, write_page
from penchant.evaluation.page_markdown import escaped
from penchant.evaluation.page_plots import Box, _crowding, cost_plot, slice_panels
from penchant.evaluation.page_view import Costs, Panel, Point, Slice, Table, view

NASTY = [
    "<script>alert(1)</script>",
    "</svg></style></bdi><img src=x onerror=alert(1)>",
    "| a | b |",
    "# not a heading",
    "**bold** _it_ `code` [link](http://evil.example) ![i](x)",
    "{{ 7 * 7 }} {% raw %}",
    "two\nlines\r\n\n- list",
    "$x^2$ & \"quotes\" 'too'",
    "七人の侍 🎬 \u202eoverride\udcff\x00",
    "1. first",
    "- dash",
    "javascript:alert(1)",
]
VOID = {"meta", "br", "img", "path", "use"}


class Parsed(HTMLParser):
    """The elements of a page, the texts, and whether every tag was closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)

    @property
    def all_text(self) -> str:
        return " ".join(" ".join(self.text).split())


def nasty_report() -> dict[str, Any]:
    """Every text of the sample that comes from outside, replaced by one that wants to be more than text."""
    report = sample_report()
    at = 0

    def swap(value: Any, key: str = "") -> Any:
        nonlocal at
        if isinstance(value, dict):
            inner = ("target_rank", "recommended", "metrics", "config", "versions")
            return {swap(k, k) if key in inner else k: swap(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [swap(v, key) for v in value]
        if isinstance(value, str):
            return renamed.setdefault(value, f"{value} {NASTY[len(renamed) % len(NASTY)]}")
        return value

    renamed: dict[str, str] = {}
    return swap(report)


def small_report() -> dict[str, Any]:
    """Every part, of three systems, ranked fully and split by global time, so that no note is added."""
    report = sample_report()
    kept = {SYSTEMS[0], SYSTEMS[5], SYSTEMS[-1]}
    for part in ("slices", "costs", "beyond"):
        report[part] = [entry for entry in report[part] if entry["system"] in kept]
    report["slices"] = [entry for entry in report["slices"] if entry["value"] in ("head", "tail")]
    report["rows"] = [row for row in report["rows"] if row["system"] in kept and "sampled" not in row["group"]]
    report["settings"]["split"] = {"kind": "global time"}
    report["notes"] = [note for note in report["notes"] if "leave-last-out" not in note]
    return report


@pytest.fixture(scope="module")
def page() -> str:
    return to_html(sample_report())


@pytest.fixture(scope="module")
def small_page() -> str:
    return to_html(small_report())


@pytest.fixture(scope="module")
def nasty_page() -> str:
    return to_html(nasty_report())


def sections(page: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", page)


# -- what stands there -------------------------------------------------------------------------


def test_every_part_has_its_section_in_order(page: str) -> None:
    wanted = [
        "Read this first",
        "Results",
        "Published by others, under the same protocol",
        "Slices",
        "Quality against cost",
        "Beyond accuracy",
        "How the baselines were tuned",
        "10 users in full",
        "Settings and environment",
    ]
    assert sections(page) == wanted
    assert re.findall(r"^## (.*)$", to_markdown(sample_report()), flags=re.MULTILINE) == wanted


@pytest.mark.parametrize(
    ("part", "heading"),
    [
        ("rows", "Results"),
        ("notes", "Read this first"),
        ("slices", "Slices"),
        ("costs", "Quality against cost"),
        ("beyond", "Beyond accuracy"),
        ("trials", "How the baselines were tuned"),
        ("published", "Published by others, under the same protocol"),
        ("examples", "10 users in full"),
    ],
)
def test_an_empty_or_absent_part_is_left_out_and_no_other(part: str, heading: str, small_page: str) -> None:
    report = small_report()
    full = sections(small_page)
    absent = {name: value for name, value in report.items() if name != part}
    assert sections(to_html(absent)) == [name for name in full if name != heading]
    for broken in (absent, {**report, part: []}):
        assert heading not in re.findall(r"^## (.*)$", to_markdown(broken), flags=re.MULTILINE)


def test_the_least_report_is_a_page() -> None:
    for report in ({}, {"title": "", "rows": [], "notes": [], "settings": {}}):
        page = Parsed(to_html(report))
        assert page.open == []
        assert "Evaluation" in page.all_text
        assert to_markdown(report) == "# Evaluation\n"


def test_every_mean_interval_and_p_stands_in_its_row(page: str) -> None:
    report = sample_report()
    for text in (Parsed(page).all_text, to_markdown(report).replace("\\", "").replace("**", "")):
        for row in report["rows"]:
            after = text.split(row["group"], 1)[1]
            after = after[after.index(f" {row['system']} ") :]
            for value in row["metrics"].values():
                form = "+.4f" if row["difference"] else ".4f"
                mean, low, high = (f"{value[x]:{form}}".replace("-", "−") for x in ("mean", "low", "high"))
                assert f"{mean} [{low}, {high}]" in re.sub(r"\s+", " ", after)[:400]
    assert "0.410" in to_markdown(report)
    assert "&lt;0.001" in page


def test_the_best_mean_of_a_column_is_bold_and_differences_are_not() -> None:
    groups = {group.table.name: group.table for group in view(sample_report()).groups}
    table = groups["all 943 test targets, whole catalogue of 1,682"]
    for column in range(1, 6):
        strong = [row[0].text for row in table.rows if row[column].strong]
        assert strong == [SYSTEMS[-1]]
    assert not any(cell.strong for row in groups["what the LLM adds, paired difference"].rows for cell in row)


def test_of_errors_the_least_is_the_best() -> None:
    rows = [
        {
            "group": "g",
            "system": name,
            "metrics": {m: {"mean": v, "low": None, "high": None, "n": 1} for m in ("RMSE", "log loss", "AUC")},
            "difference": False,
            "p": None,
        }
        for name, v in (("a", 0.5), ("b", 0.9), ("c", math.nan))
    ]
    (group,) = view({"rows": rows}).groups
    assert [[cell.strong for cell in row[1:4]] for row in group.table.rows] == [
        [True, True, False],
        [False, False, True],
        [False, False, False],
    ]
    assert group.table.rows[2][1].text == "–"
    assert group.table.rows[0][1].note == ""


def test_leave_last_out_is_said_of_every_table_and_first(page: str, small_page: str) -> None:
    report = sample_report()
    for text in (page, to_markdown(report)):
        assert text.count("Leave-last-out leaks global time") == 3 + 2 + 1 + 1  # groups, slices, cost, beyond
    report["notes"] = ["something else"]
    assert view(report).notes[0].startswith("Leave-last-out leaks global time")
    assert "leaks global time" not in small_page + to_markdown(small_report())


def test_sampled_candidates_are_named_at_the_table_and_among_the_notes(small_page: str) -> None:
    report = sample_report()
    seen = view(report)
    assert [bool(group.caution) for group in seen.groups] == [False, True, False]
    assert any("sampled candidates" in note for note in seen.notes)
    assert "sampled candidates" not in small_page + to_markdown(small_report())


def test_every_table_of_results_says_that_candidates_were_sampled() -> None:
    report = sample_report()
    report["settings"]["candidates"] = 100
    seen = view(report)
    assert all("sampled candidates (100)" in group.table.name for group in seen.groups)
    assert seen.costs is not None
    assert "sampled candidates (100)" in seen.costs.group
    said = "Ranked among sampled candidates only"
    for text in (to_html(report), to_markdown(report)):
        # The notes, and each section of results up to the next: groups, slices, cost, beyond.
        assert text.count(said) == 1 + 3 + 2 + 1 + 1
        heads = r"<h[23]>" if text.startswith("<!") else r"^#{2,3} "
        parts = re.split(heads, text, flags=re.MULTILINE)
        tables = ("all 943", "the same 500", "what the LLM adds", "history length", "popularity of the", "Beyond acc")
        for name in (*tables, "Quality against cost"):
            assert [said in part for part in parts if part.startswith(name)] == [True], name


def test_further_metrics_are_folded() -> None:
    report = small_report()
    report["rows"][0]["more"] = {"HitRate@50": {"mean": 0.4321, "low": 0.4, "high": 0.5, "n": 943}}
    for page in (to_html(report), to_markdown(report)):
        inside = "".join(re.findall(r"<details>.*?</details>", page, flags=re.DOTALL))
        assert "All other metrics" in inside
        assert "0.4321" in inside
        assert page.count("0.4321") == 1


# -- the ten users -----------------------------------------------------------------------------


def test_the_hit_is_marked_where_the_rank_says_so() -> None:
    example = {
        "user": "u",
        "history": [f"h{i}" for i in range(20)],
        "target": "Heat",
        "target_rank": {"found": 2, "beyond": 40, "twins": 3, "tied": 3, "unranked": None},
        "recommended": {
            "found": ["a", "Heat", "b"],
            "beyond": ["a", "Heat", "b"],  # another film of that title
            "twins": ["Heat", "a", "Heat"],
            "tied": ["a", "Heat", "b"],  # ties counted against it, and still within the list
            "unranked": ["b", "a", "Heat"],
        },
        "why": "",
    }
    (seen,) = view({"examples": [example]}).examples
    marked = {part.system: [i for i, (_, hit) in enumerate(part.items) if hit] for part in seen.lists}
    assert marked == {"found": [1], "beyond": [], "twins": [2], "tied": [1], "unranked": [2]}
    assert seen.older + seen.recent == example["history"]
    page = to_html({"examples": [example]})
    assert page.count('class="hit"') == 4
    assert page.count("✓") == 4
    assert to_markdown({"examples": [example]}).count("**✓ Heat**") == 4


def test_a_user_without_history_or_lists() -> None:
    report = {"examples": [{"user": "u", "history": [], "target": "Heat", "recommended": {}, "target_rank": {}}]}
    assert "No history." in to_html(report)
    assert "No history." in to_markdown(report)


# -- outside text stays text -------------------------------------------------------------------


def test_nothing_from_outside_becomes_html(page: str, nasty_page: str) -> None:
    plain, nasty = Parsed(page), Parsed(nasty_page)
    assert nasty.open == []
    # The same elements with the same attributes, but for what names a plot.
    skip = {"aria-label", "id", "clip-path", "d", "xlink:href", "style", "transform", "x", "y", "width", "height"}
    skip |= {"viewbox"}
    of_plots = {"tspan", "text"}
    shape = [
        [(tag, {k: v for k, v in attrs.items() if k not in skip}) for tag, attrs in each.tags if tag not in of_plots]
        for each in (plain, nasty)
    ]
    assert {tag for tag, _ in nasty.tags} <= {tag for tag, _ in plain.tags} | {"tspan"}
    assert [t for t in shape[1] if t[0] not in ("g", "path", "use", "defs")] == [
        t for t in shape[0] if t[0] not in ("g", "path", "use", "defs")
    ]
    for text in ("<script>alert(1)</script>", "| a | b |", "{{ 7 * 7 }} {% raw %}", "$x^2$ & \"quotes\" 'too'"):
        assert text in nasty.all_text
    assert "\x00" not in nasty_page
    nasty_page.encode("utf-8")


def test_a_page_asks_no_network_and_runs_nothing(page: str, nasty_page: str) -> None:
    parsed = Parsed(nasty_page)
    assert not {tag for tag, _ in parsed.tags} & {"script", "link", "iframe", "object", "embed", "img", "form", "base"}
    for _, attrs in parsed.tags:
        assert not [name for name in attrs if name.startswith("on") or name in ("src", "href", "action", "srcset")]
        assert (attrs.get("xlink:href") or "#").startswith("#")
        assert "http" not in (attrs.get("style") or "")
    assert "@import" not in page
    assert re.findall(r"url\((?!#)", page) == []


def test_ids_in_a_page_are_unique(page: str) -> None:
    ids = [attrs["id"] for _, attrs in Parsed(page).tags if "id" in attrs]
    assert ids
    assert len(ids) == len(set(ids))


def cells(line: str) -> list[str]:
    """A Markdown table's row as GitHub cuts it: at bars that no backslash stands before."""
    return re.split(r"(?<!\\)(?:\\\\)*\|", line)[1:-1]


def test_nothing_from_outside_becomes_markdown() -> None:
    plain, nasty = to_markdown(sample_report()).split("\n"), to_markdown(nasty_report()).split("\n")
    assert len(plain) == len(nasty)
    for before, after in zip(plain, nasty, strict=True):
        assert before[:2] == after[:2]
        assert len(cells(before)) == len(cells(after))
        assert "<script" not in after
        assert re.sub(r"</?(details|summary)>", "", after).count("<") == 0
        # Emphasis, links and code are ours alone.
        free = re.sub(r"\\.", "", after).replace("**", "")
        assert not re.search(r"[*`\[\]_]|://", free.lstrip("#| "))


@settings(max_examples=300)
@given(st.text(max_size=40))
def test_escaped_text_holds_no_live_markdown(text: str) -> None:
    out = escaped(text)
    assert "\n" not in out
    assert "\r" not in out
    bare = re.sub(r"\\[!-/:-@\[-`{-~]", "", out)
    assert not re.search(r"[\\`*_{}\[\]|#~$^!<>]|://", bare)
    assert not re.match(r"\d+[.)](\s|$)|[-+](\s|$)|--", out)


@pytest.mark.parametrize(
    ("text", "out"),
    [
        ("Heat (1995)", "Heat (1995)"),
        ("| a | b |", "\\| a \\| b \\|"),
        ("<script>alert(1)</script>", "&lt;script&gt;alert(1)&lt;/script&gt;"),
        ("101 Dalmatians", "101 Dalmatians"),
        ("1. first", "1\\. first"),
        ("- dash", "\\- dash"),
        ("---", "\\---"),
        ("0.4321", "0.4321"),
        ("-1 and +2", "-1 and +2"),
        ("http://x.y", "http\\://x.y"),
        ("a\nb", "a b"),
        ("\\", "\\\\"),
        ("&lt;", "&amp;lt;"),
    ],
)
def test_escaping_by_hand(text: str, out: str) -> None:
    assert escaped(text) == out


# -- plots -------------------------------------------------------------------------------------


def costs_of(points: list[Point]) -> Costs:
    return Costs("NDCG@10", "g", points, Table("", [], []), [])


def test_every_system_is_named_in_the_plots(page: str) -> None:
    drawn = re.findall(r'<svg class="plot".*?</svg>', page, flags=re.DOTALL)
    assert len(drawn) == 4 + 3 + 1
    for plot in drawn:
        text = re.sub(r"\s+", " ", " ".join(re.findall(r">([^<>]+)<", plot)))
        for system in SYSTEMS:
            assert all(word in text for word in system.split())
        assert "mathdefault" not in text


def test_names_in_plots_are_no_formulas_and_no_elements() -> None:
    names = ["$x^2$ a_b", "<b>&amp;</b>", "$\\bad{", "七人 🎬"]
    points = [Point(name, 0.1 * i, 0.0, 0.5, 10.0**i) for i, name in enumerate(names)]
    slices = [Slice("s <i>", "N <&>", [Panel("v", "1", points)], [])]
    for plot in (cost_plot(costs_of(points)), *slice_panels(slices[0])):
        text = Parsed(plot).text
        assert all(name in text for name in names)


def test_a_system_without_cost_or_result_is_said_not_to_be_in_the_plot() -> None:
    report = sample_report()
    report["slices"] = []
    report["costs"][0]["seconds_per_1000_users"] = None
    report["costs"][1]["seconds_per_1000_users"] = 0.0
    report["costs"].append({"system": "stranger", "seconds_per_1000_users": 3.0})
    costs = view(report).costs
    assert costs is not None
    assert costs.absent == [SYSTEMS[0], SYSTEMS[1], "stranger"]
    assert [point.system for point in costs.points] == SYSTEMS[2:]
    assert "stranger" in to_html(report)


def test_the_cost_plot_takes_all_its_systems_from_one_group() -> None:
    report = sample_report()
    few = copy.deepcopy(report["rows"][:3])
    for row in few:
        row["group"] = "a few, first in the report"
    report["rows"] = few + report["rows"]
    costs = view(report).costs
    assert costs is not None
    assert costs.group == "all 943 test targets, whole catalogue of 1,682"
    assert len(costs.points) == len(SYSTEMS)


@pytest.mark.parametrize("n", [1, 2, 15])
@pytest.mark.parametrize("alike", [False, True])
def test_plots_of_few_and_of_equal_points(n: int, alike: bool) -> None:
    points = [
        Point(f"system {i}", 0.0 if alike else 0.01 * i, math.nan, math.nan, 1.0 if alike else 10.0**-i)
        for i in range(n)
    ]
    plot = cost_plot(costs_of(points))
    assert all(f"system {i}<" in plot for i in range(n))
    slices = [
        {
            "slice": "s",
            "value": "v",
            "n": 1,
            "system": p.system,
            "metrics": {"NDCG@10": {"mean": p.mean, "low": None, "high": None, "n": 1}},
        }
        for p in points
    ]
    assert all(f"system {i}<" in to_html({"slices": slices}) for i in range(n))
    assert cost_plot(costs_of([])) == ""


def test_labels_of_the_cost_plot_lie_on_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    true = page_plots._nearest

    def spy(point: tuple[float, float], box: Box) -> tuple[float, float]:
        chosen.setdefault(point, []).append(box)
        return true(point, box)

    chosen: dict[tuple[float, float], list[Box]] = {}
    monkeypatch.setattr(page_plots, "_nearest", spy)
    costs = view(sample_report()).costs
    assert costs is not None
    cost_plot(costs)
    placed = [boxes[-1] for boxes in chosen.values()]  # the last asked of is the one taken
    assert len(placed) == len(SYSTEMS)
    for i, box in enumerate(placed):
        assert _crowding(box, placed[:i] + placed[i + 1 :], (0, 0, 760, 520)) == 0


def test_making_a_page_leaves_matplotlib_as_it_was_and_is_repeatable(small_page: str) -> None:
    before = dict(mpl.rcParams)
    again = to_html(small_report())
    assert dict(mpl.rcParams) == before
    assert again == small_page


# -- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "start"), [("a.html", "<!DOCTYPE html>"), ("b.HTM", "<!DOCTYPE"), ("c.md", "# ")])
def test_the_ending_says_what_is_written(tmp_path: Path, name: str, start: str) -> None:
    write_page({**small_report(), "title": "".join(NASTY)}, tmp_path / "new" / name)
    assert (tmp_path / "new" / name).read_text(encoding="utf-8").lstrip().startswith(start)
    assert [path.name for path in (tmp_path / "new").iterdir()] == [name]


def test_another_ending_and_no_place_to_write_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\.html or \.md"):
        write_page(small_report(), tmp_path / "page.pdf")
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError):
        write_page({}, tmp_path / "file" / "page.html")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
