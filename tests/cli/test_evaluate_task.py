"""`penchant evaluate` on a task's targets, on a table of recommendations, and its pages."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from penchant.prompt import Templates
from penchant.recommend import Recommender
from penchant.resources import shipped

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
        (["--baselines", "ease,magic"], "unknown baseline 'magic'"),
        (["--baselines", "llm"], "unknown baseline 'llm'"),
        (["--baselines", ","], "no baseline is named"),
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


def test_a_task_s_protocol_holds_unless_an_option_is_given(penchant: Call, ready: Any, tmp_path: Path) -> None:
    changes = {"k": "3", "seen": "keep", "average": "user", "llm_users": "2", "seeds": "[7, 8]"}
    asked = ["evaluate", ready.run, "--task", task_file(tmp_path, **changes), "--data-dir", ready.log.parent]
    ended = penchant(*asked, "--json", tmp_path / "task.json")
    assert ended.code == 0, ended.err
    settings = json.loads((tmp_path / "task.json").read_text())["settings"]
    want = {"k": 3, "seen": "keep", "average": "user", "llm_users": 2, "seed": 7}
    assert {name: settings[name] for name in want} == want
    assert "the same 2 of them (seed 7)" in ended.out
    given = ["-k", 4, "--seen", "mask", "--average", "event", "--llm-users", 0, "--seed", 0]
    ended = penchant(*asked, *given, "--json", tmp_path / "given.json")
    assert ended.code == 0, ended.err
    settings = json.loads((tmp_path / "given.json").read_text())["settings"]
    want = {"k": 4, "seen": "mask", "average": "event", "llm_users": 0, "seed": 0}
    assert {name: settings[name] for name in want} == want


@pytest.mark.parametrize("options", [["-k", 5], ["--seen", "keep"], ["--average", "user"], ["--lists"]])
def test_published_numbers_are_of_the_task_s_protocol_alone(
    penchant: Call, ready: Any, tmp_path: Path, options: list[object]
) -> None:
    asked = ["--task", task_file(tmp_path), "--data-dir", ready.log.parent, "--json", tmp_path / "r.json"]
    if options == ["--lists"]:
        pl.DataFrame({"user_id": ["u0"], "item_id": ["1"], "rank": [1]}).write_parquet(tmp_path / "x.parquet")
        ended = penchant("evaluate", ready.run, *asked, "--lists", tmp_path / "x.parquet")
    else:
        ended = evaluate(penchant, ready, *asked, *options)
    assert ended.code == 0, ended.err
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["published"] == []
    name = "--k" if options[0] == "-k" else options[0]
    assert any(note.startswith(f"published numbers are left out: with {name} the") for note in report["notes"])
    same = evaluate(penchant, ready, *asked, "-k", 10, "--seen", "mask")
    assert same.code == 0, same.err
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["published"]
    assert "left out" not in "".join(report["notes"])


def test_lists_are_sliced_like_systems_and_refuse_what_no_list_can_follow(
    penchant: Call, ready: Any, tmp_path: Path
) -> None:
    pl.DataFrame({"user_id": ["u0"], "item_id": ["1"], "rank": [1]}).write_parquet(tmp_path / "x.parquet")
    users = pl.DataFrame({"user_id": [f"u{i}" for i in range(30)], "job": ["baker", "smith"] * 15})
    users.write_csv(tmp_path / "users.csv")
    asked = ["evaluate", ready.run, "--lists", tmp_path / "x.parquet"]
    ended = penchant(
        *asked, "--slice-by", "genres", "--users", tmp_path / "users.csv", "--json", tmp_path / "r.json"
    )  # fmt: skip
    assert ended.code == 0, ended.err
    found = {(part["slice"], part["value"]): part for part in json.loads((tmp_path / "r.json").read_text())["slices"]}
    assert found["user job", "baker"]["n"] == 15
    assert ("item genres", "Comedy") in found
    refused = penchant(*asked, "--llm-users", 3)
    assert refused.code == 2
    assert "is set beside popularity alone" in refused.err
    assert penchant(*asked, "--baselines", "ease").code == 2
    task = ["--task", task_file(tmp_path, seen_last="3"), "--data-dir", ready.log.parent]
    refused = penchant(*asked, *task)
    assert refused.code == 2
    assert "the last 3 seen items masked" in refused.err


def test_baselines_are_fitted_tuned_and_tested_against(penchant: Call, ready: Any, tmp_path: Path) -> None:
    ended = evaluate(penchant, ready, "--baselines", "popularity, item_knn,ease", "--json", tmp_path / "r.json")
    assert ended.code == 0, ended.err
    report = json.loads((tmp_path / "r.json").read_text())
    every = [row["system"] for row in report["rows"] if row["group"].startswith("all 30 test targets")]
    assert sorted(every) == sorted(["encoder", "last item (LLM vectors)", "popularity", "ItemKNN", "EASE"])
    means = {row["system"]: row["metrics"]["NDCG@10"]["mean"] for row in report["rows"]}
    best = max(("popularity", "ItemKNN", "EASE"), key=means.__getitem__)
    (tested,) = [row for row in report["rows"] if row["difference"]]
    assert tested["system"] == f"encoder minus {best}"
    assert tested["p"] is not None
    assert {trial["system"] for trial in report["trials"]} == {"popularity", "ItemKNN", "EASE"}
    assert "baselines tuned on validation NDCG@10, each at most 8 configurations, none begun after 600 s" in ended.out
    assert "their whole grid in these seconds" in ended.out


def test_a_yes_no_task_asks_the_run_s_own_llm(penchant: Call, ready: Any, tmp_path: Path) -> None:
    # The tiny tokenizer has no single tokens for yes and no.
    text = (shipped("prompts") / "yes_no.jinja").read_text(encoding="utf-8")
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts/yes_no.jinja").write_text(text.replace('["Yes", "No"]', '["A", "B"]'), encoding="utf-8")
    model = Recommender.load(ready.run)
    model.templates = Templates(tmp_path / "prompts")
    model.save(tmp_path / "run")
    rows = [
        {
            "input": f'User Preference: "Heat (1995)"\nUser Unpreference: "Up (2009)"\nWhether the user will like the '
            f'target movie "{title}"?',
            "output": "Yes." if i % 2 else "No.",
        }
        for i, title in enumerate(["M (1931)", "Alien (1979)", "Se7en (1995)", "Aliens (1986)"])
    ]
    (tmp_path / "t").mkdir()
    for part in ("train", "valid", "test"):
        (tmp_path / f"t/{part}.json").write_text(json.dumps(rows))
    fields = "kind: tallrec, folder: t, train: train.json, valid: valid.json, test: test.json"
    published = "[{system: Theirs, source: a paper, protocol: the same, metrics: {AUC: 0.6}}]"
    task = tmp_path / "yes.yaml"
    task.write_text(f"version: 1\nabout: a toy\ndata: {{{fields}}}\npublished: {published}\n")
    asked = ["evaluate", tmp_path / "run", "--task", task, "--data-dir", tmp_path]
    ended = penchant(*asked, "--json", tmp_path / "r.json", "--html", tmp_path / "r.html")
    assert ended.code == 0, ended.err
    report = json.loads((tmp_path / "r.json").read_text())
    assert [row["system"] for row in report["rows"]] == [
        "llm yes_no",
        "llm likelihood, likes minus dislikes",
        "llm yes_no and shares of likes of user and item",
        "llm likelihood, likes minus dislikes and shares of likes of user and item",
        "shares of likes of user and item",
        "share of likes in the user's history",
        "the share of yes in training",
    ]
    assert set(report["rows"][0]["metrics"]) == {"AUC", "log loss", "accuracy"}
    assert report["published"][0]["metrics"] == {"AUC": 0.6}
    refused = penchant(*asked, "-k", 3)
    assert refused.code == 2
    assert "a yes/no task ranks nothing" in refused.err
    assert penchant(*asked[:-2]).code == 2
