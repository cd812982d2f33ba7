"""`penchant evaluate` on a task's targets, on a table of recommendations, and its pages."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from penchant.recommend import Recommender

# penchant and ready are of conftest.py beside this file.
Call = Callable[..., Any]

FILES = "kind: tables, folder: toy, interactions: log.csv, items: items.csv"


def task_file(folder: Path, **changes: str) -> Path:
    """A task over the toy data's own files, in ``folder``."""
    fields = {
        "version": "1",
        "about": "a toy",
        "data": f"{{{FILES}}}",
        "split": "{kind: leave-last-out}",
        "published": "[{system: Theirs, source: a paper, protocol: the same, metrics: {NDCG@10: 0.5}}]",
        **changes,
    }
    path = folder / "toy.yaml"
    path.write_text("".join(f"{name}: {value}\n" for name, value in fields.items()))
    return path


def evaluate(penchant: Call, ready: Any, *options: object) -> Any:
    return penchant("evaluate", ready.run, "--llm-users", 0, *options)


def test_a_task_of_the_same_data_and_split(penchant: Call, ready: Any, tmp_path: Path) -> None:
    options = ["--task", task_file(tmp_path), "--data-dir", ready.log.parent]
    ended = evaluate(penchant, ready, *options, "--json", tmp_path / "r.json", "--html", tmp_path / "r.html")
    assert ended.code == 0, ended.err
    plain = evaluate(penchant, ready)
    assert ended.out.splitlines()[:-2] == plain.out.splitlines()
    assert json.loads((tmp_path / "r.json").read_text())["published"][0]["system"] == "Theirs"
    page = (tmp_path / "r.html").read_text()
    assert "Theirs" in page
    assert "popularity" in page


def test_the_candidates_of_a_task_are_used(penchant: Call, ready: Any, tmp_path: Path) -> None:
    model = Recommender.load(ready.run)
    ids = model.log.item_ids
    rows = [f"{model.log.user_ids[u]}\t{' '.join(ids)}" for u in model.split.test.user[:7]]
    (ready.log.parent / "cand.txt").write_text("\n".join(rows) + "\n")
    path = task_file(tmp_path, candidates="{file: cand.txt, n: 4}")
    ended = evaluate(penchant, ready, "--task", path, "--data-dir", ready.log.parent, "-k", 4)
    assert ended.code == 0, ended.err
    assert "all 7 test targets, sampled candidates (4)" in ended.out
    assert ended.out.count("1.0000 [1.0000, 1.0000]") >= 3, "one of four is always among four"
    refused = evaluate(
        penchant, ready, "--task", path, "--data-dir", ready.log.parent, "--lists", tmp_path / "x.parquet"
    )
    assert refused.code == 2
    assert "cannot be ranked among sampled candidates" in refused.err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"split": "{kind: global-time}"}, "the run's split"),
        ({"data": f"{{{FILES}, read_as: {{min_item_events: 19}}}}"}, "the run is of other data"),
    ],
    ids=["split", "data"],
)
def test_a_run_of_another_split_or_other_data_is_refused(
    penchant: Call, ready: Any, tmp_path: Path, changes: dict[str, str], said: str
) -> None:
    path = task_file(tmp_path, **changes)
    ended = evaluate(penchant, ready, "--task", path, "--data-dir", ready.log.parent)
    assert ended.code == 2
    assert said in ended.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--average", "item"], "unknown --average 'item'"),
        (["--seen", "hide"], "unknown --seen 'hide'"),
        (["--html", "page.txt"], "does not end in .html"),
        (["--markdown", "page.html"], "does not end in .md"),
        (["--task", "no-such-task"], "no such task"),
        (["--users", "nobody.csv"], "cannot be read as CSV"),
        (["--lists", "nothing.parquet"], "nothing.parquet"),
        (["--slice-by", "colour"], "no column 'colour'"),
    ],
)
def test_wrong_options_are_one_error(penchant: Call, ready: Any, options: list[str], said: str) -> None:
    ended = evaluate(penchant, ready, *options)
    assert ended.code == 2
    assert ended.err.count("error: ") == 1
    assert said in ended.err


def test_pages_averages_and_slices(penchant: Call, ready: Any, tmp_path: Path) -> None:
    users = pl.DataFrame({"user_id": [f"u{i}" for i in range(30)], "job": ["baker", "smith"] * 15})
    users.write_csv(tmp_path / "users.csv")
    ended = evaluate(
        penchant, ready, "--average", "user", "--seen", "keep", "--slice-by", "genres",
        "--users", tmp_path / "users.csv", "--markdown", tmp_path / "r.md",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert "each the mean of the user's targets" in ended.out
    assert "repeats count, seen items are not masked" in ended.out
    page = (tmp_path / "r.md").read_text()
    for word in ("baker", "Comedy", "popularity"):
        assert word in page


def test_a_table_of_recommendations(penchant: Call, ready: Any, tmp_path: Path) -> None:
    """Lists with each user's true item first, for all users but one, who then is a miss."""
    model = Recommender.load(ready.run)
    log, targets = model.log, model.split.test
    rows = [
        {"user_id": log.user_ids[u], "item_id": log.item_ids[i], "rank": 1}
        for u, i in zip(targets.user[1:], targets.item[1:], strict=True)
    ]
    pl.DataFrame(rows).write_parquet(tmp_path / "mine.parquet")
    ended = evaluate(penchant, ready, "--lists", tmp_path / "mine.parquet", "--json", tmp_path / "r.json")
    assert ended.code == 0, ended.err
    report = json.loads((tmp_path / "r.json").read_text())
    mine = next(row for row in report["rows"] if row["system"] == "mine")
    assert mine["metrics"]["Recall@10"]["mean"] == pytest.approx(29 / 30)
    assert "mine minus popularity" in ended.out
    assert "1 targets are of users without a list" in ended.out
    assert "is for its maker to show" in ended.out
