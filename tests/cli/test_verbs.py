"""The verbs end to end, on tiny real models: prepare, fit, recommend, evaluate, prompt, doctor, fetch."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from tests.conftest import toy_frames

from penchant.data.dataset import Dataset
from penchant.errors import PenchantWarning
from penchant.fetch import KNOWN
from penchant.files import sha256_file, write_json
from penchant.recommend import Recommender

# penchant, ready and Outcome are of conftest.py beside this file.
Call = Callable[..., Any]

TITLES = dict(zip(toy_frames()[1]["item_id"], toy_frames()[1]["title"], strict=True))
U0 = toy_frames()[0].filter(pl.col("user_id") == "u0")["item_id"].to_list()


def printed(out: str) -> list[dict[str, Any]]:
    """The rows that `recommend` printed."""
    rows = []
    for line in out.splitlines():
        *user, rank, item, title, score, stage = line.split("\t")
        rows.append({"user": user[0] if user else None, "rank": int(rank), "item": item, "title": title})
        rows[-1] |= {"score": float(score), "stage": stage}
    return rows


# -- prepare and fit ---------------------------------------------------------------------------


def test_prepare_then_load(ready: Any) -> None:
    dataset = Dataset.load(ready.data)
    assert (dataset.n_users, dataset.n_items, len(dataset.interactions)) == (30, 16, 270)


def test_prepare_again_replaces_the_dataset(penchant: Call, ready: Any, tmp_path: Path) -> None:
    for threshold in ("0", "2"):
        ended = penchant("prepare", ready.log, ready.items, "--out", tmp_path / "d", "--min-user-events", threshold)
        assert ended.code == 0
        assert ended.last == str(tmp_path / "d")
    assert Dataset.load(tmp_path / "d").report["options"]["min_user_events"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_fit_says_what_it_did_and_ends_with_the_run(ready: Any) -> None:
    lines = ready.fit_out.splitlines()
    assert lines[0].startswith("Dataset(30 users, 16 items, 270 interactions")
    assert lines[1].startswith("leave-last-out: 210 training events, 30 validation and 30 test targets")
    assert re.match(r"encoder: \d epochs, best \d, validation NDCG@10 0\.\d{4}", lines[2])
    assert re.match(r"neighbours: weight [\d.]+$", lines[3])
    fused = re.match(
        r"fusion: LLM weight [\d.]+, calibration [\d.]+, chosen on 5 validation users whose target was retrieved; "
        r"NDCG@10 on the (\d+) drawn 0\.\d{4}, encoder alone 0\.\d{4}$",
        lines[4],
    )
    assert fused is not None
    assert 5 <= int(fused[1]) <= 30
    assert re.match(r"seconds: embed items [\d.]+, train encoder [\d.]+, choose the fusion [\d.]+$", lines[5])
    assert lines[6:] == [str(ready.run)]
    stages = [line.split("] ")[1] for line in ready.fit_err.splitlines()]
    assert stages[:3] == ["embed items (16)", "train encoder (3)", "LLM on validation users (5)"]


def test_the_run_records_its_data_split_model_and_settings(ready: Any) -> None:
    manifest = json.loads((ready.run / "manifest.json").read_text())
    assert manifest["data"] == Dataset.load(ready.data).content_hash
    assert manifest["split"]["kind"] == "leave-last-out"
    assert manifest["engine"]["model"] == str(ready.model)
    assert manifest["config"]["candidates"] == 8
    assert manifest["config"]["encoder"]["epochs"] == 3
    assert set(manifest["files"]) == {"split.npz", "encoder.safetensors", "vectors.npy", "prior.npy"}
    model = Recommender.load(ready.run)
    assert model.split.spec == manifest["split"]
    assert len(model.split.test) == 30


def test_fit_takes_settings_from_yaml_and_options_go_over_them(penchant: Call, ready: Any, tmp_path: Path) -> None:
    asked = "max_history: 4\ncandidates: 3\nencoder:\n  dim: 16\n  epochs: 9\n  match: 8\n"
    (tmp_path / "fit.yaml").write_text(asked)
    ended = penchant(*ready.fit, "--config", tmp_path / "fit.yaml", "--out", tmp_path / "run")
    assert ended.code == 0, ended.err
    assert re.search(
        r"^text match: (weight [\d.]+, and [\d.]+ in the place|validation wants none)", ended.out, re.MULTILINE
    )
    config = json.loads((tmp_path / "run" / "manifest.json").read_text())["config"]
    assert (config["max_history"], config["encoder"]["dim"]) == (4, 16), "from the file"
    assert (config["candidates"], config["encoder"]["epochs"]) == (8, 3), "the options go over it"


def test_an_empty_yaml_is_all_defaults(penchant: Call, ready: Any, tmp_path: Path) -> None:
    (tmp_path / "fit.yaml").write_text("# nothing yet\n")
    assert penchant(*ready.fit, "--config", tmp_path / "fit.yaml", "--dry-run").code == 0


@pytest.mark.parametrize(
    ("options", "kind", "tested"),
    [
        (["--split", "none"], "leave-last-out, validation only", 0),
        (
            ["--split", "global-time", "--valid-from", "1970-01-12T13:52:30", "--test-from", "1970-01-12T13:53:30"],
            "global time",
            30,
        ),
    ],
)
def test_fit_cuts_as_asked(
    penchant: Call, ready: Any, tmp_path: Path, options: list[str], kind: str, tested: int
) -> None:
    ended = penchant(*ready.fit, *options, "--out", tmp_path / "run")
    assert ended.code == 0, ended.err
    split = Recommender.load(tmp_path / "run").split
    assert split.spec["kind"] == kind
    assert kind in ended.out
    assert (len(split.test) > 0) == (tested > 0)


def test_fit_again_replaces_the_run_and_leaves_nothing_beside_it(penchant: Call, ready: Any, tmp_path: Path) -> None:
    for seed in (1, 2):
        assert penchant(*ready.fit, "--seed", seed, "--out", tmp_path / "run").code == 0
    config = json.loads((tmp_path / "run" / "manifest.json").read_text())["config"]
    assert (config["seed"], config["encoder"]["seed"]) == (2, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_fit_without_out_needs_dry_run_which_says_the_cost_and_writes_nothing(
    penchant: Call, ready: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PENCHANT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    before = sorted(ready.run.parent.rglob("*"))
    ended = penchant(*ready.fit, "--dry-run", "--out", tmp_path / "run")
    assert ended.code == 0, ended.err
    for stage, unit in (
        ("embed items", "tokens"),
        ("train encoder, at most 3 epochs", "targets"),
        ("LLM on validation users", "tokens"),
        ("LLM without history, at most", "tokens"),
    ):
        assert re.search(rf"^{stage} +[1-9][\d,]* {unit} +\d+ s$", ended.out, re.MULTILINE), stage
    assert re.search(r"^in all +\d+ s$", ended.out, re.MULTILINE)
    assert len(re.findall(r"^memory: .+ [\d,]+ MiB$", ended.out, re.MULTILINE)) == 6
    assert list(tmp_path.iterdir()) == []
    assert sorted(ready.run.parent.rglob("*")) == before


def test_dry_run_counts_the_tokens_that_fit_will_run(penchant: Call, ready: Any) -> None:
    ended = penchant(*ready.fit, "--dry-run")
    model = Recommender.load(ready.run)
    embedded = sum(len(model.engine.codec.encode(text)) for text in model.texts)
    counted = int(re.search(r"embed items +([\d,]+)", ended.out)[1].replace(",", ""))  # type: ignore[index]
    assert counted == embedded
    assert re.search(r"train encoder, at most 3 epochs +540 targets", ended.out), "30 users, 6 targets each, 3 epochs"


def test_fit_with_templates_of_ones_own_keeps_them_in_the_run(penchant: Call, ready: Any, tmp_path: Path) -> None:
    header = "{#\npurpose: with the year\nversion: 1\nformat: plain\nvariables: [title, year]\n#}\n"
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "item.jinja").write_text(header + "{{ title }}, {{ year }}")
    ended = penchant(*ready.fit, "--prompts", tmp_path / "prompts", "--out", tmp_path / "run")
    assert ended.code == 0, ended.err
    (tmp_path / "prompts" / "item.jinja").unlink()
    shown = penchant("prompt", tmp_path / "run", "--user", "u0")
    assert f"{TITLES[U0[-1]]}, {1949 + int(U0[-1])}" in shown.out
    answer = penchant("recommend", tmp_path / "run", "--user", "u0", "-k", 1)
    assert printed(answer.out)[0]["title"] in TITLES.values(), "the title is the catalogue's, not the model's text"


# -- recommend ---------------------------------------------------------------------------------

METHODS = ("rank", "retrieve", "generate")
STAGES = {"rank": "llm+interest", "retrieve": "interest", "generate": "llm-generate"}


@pytest.mark.parametrize("method", METHODS)
def test_recommend_for_users(penchant: Call, ready: Any, method: str) -> None:
    ended = penchant("recommend", ready.llm, "--user", "u3", "--user", "u0", "-k", 3, "--method", method)
    assert ended.code == 0, ended.err
    assert ended.err == ""
    rows = printed(ended.out)
    assert [(row["user"], row["rank"]) for row in rows] == [(u, r) for u in ("u3", "u0") for r in (1, 2, 3)]
    for user in ("u3", "u0"):
        of_user = [row for row in rows if row["user"] == user]
        scores = [row["score"] for row in of_user]
        assert scores == sorted(scores, reverse=True)
        assert len({row["item"] for row in of_user}) == 3
    for row in rows:
        assert row["title"] == TITLES[row["item"]]
        assert row["stage"] == STAGES[method]
        assert row["user"] != "u0" or row["item"] not in U0, "seen items do not come again"


@pytest.mark.parametrize("method", METHODS)
def test_recommend_for_a_history_of_ids_or_titles(penchant: Call, ready: Any, method: str) -> None:
    by_id = penchant("recommend", ready.llm, "--history", " 4, 5 ,6", "-k", 4, "--method", method)
    titles = [argument for item in ("4", "5", "6") for argument in ("--history-title", TITLES[item])]
    by_title = penchant("recommend", ready.llm, *titles, "-k", 4, "--method", method)
    assert by_id.code == by_title.code == 0, by_id.err + by_title.err
    assert by_id.out == by_title.out
    rows = printed(by_id.out)
    assert [row["rank"] for row in rows] == [1, 2, 3, 4]
    assert {row["user"] for row in rows} == {None}
    assert not {"4", "5", "6"} & {row["item"] for row in rows}


@pytest.mark.parametrize("method", METHODS)
def test_a_user_s_own_history_given_by_hand_gets_the_user_s_answer(penchant: Call, ready: Any, method: str) -> None:
    by_user = penchant("recommend", ready.llm, "--user", "u0", "-k", 4, "--method", method)
    by_history = penchant("recommend", ready.llm, "--history", ",".join(U0), "-k", 4, "--method", method)
    assert [line.split("\t", 1)[1] for line in by_user.out.splitlines()] == by_history.out.splitlines()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        (["--where", "genres~Comedy", "--where", "year<1957"], {"2", "4", "6"}),
        (["--where", "year>=1964"], {"15", "16"}),
        (["--where", "title~Heat", "--where", "title!~Heathers"], {"1", "2"}),
        (["--allow", "8,3, 1"], {"1", "3", "8"}),
        (["--allow", "8,3,1", "--deny", "3"], {"1", "8"}),
        (["--deny", ",".join(str(i) for i in range(1, 15))], {"15", "16"}),
        (["--allow", "1,2,3", "--where", "genres=Thriller"], {"1", "3"}),
    ],
)
def test_filters_leave_exactly_what_passes_them(
    penchant: Call, ready: Any, method: str, filters: list[str], expected: set[str]
) -> None:
    ended = penchant("recommend", ready.llm, "--history", "12,13", *filters, "-k", 16, "--method", method)
    assert ended.code == 0, ended.err
    assert {row["item"] for row in printed(ended.out)} == expected


@pytest.mark.parametrize("method", METHODS)
def test_seen_items_come_again_only_when_asked(penchant: Call, ready: Any, method: str) -> None:
    common = ["recommend", ready.llm, "--history", "1,2,3", "-k", 100, "--method", method]
    assert {row["item"] for row in printed(penchant(*common).out)} == set(TITLES) - {"1", "2", "3"}
    assert {row["item"] for row in printed(penchant(*common, "--include-seen").out)} == set(TITLES)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "filters", [["--allow", "1", "--deny", "1"], ["--allow", ""], ["--where", "title=nobody"]], ids=lambda f: f[-1]
)
def test_when_nothing_is_left_it_says_so(penchant: Call, ready: Any, method: str, filters: list[str]) -> None:
    ended = penchant("recommend", ready.llm, "--user", "u0", *filters, "--method", method)
    assert (ended.code, ended.out) == (0, "")
    assert "nothing is left to recommend" in ended.err


@pytest.mark.parametrize("method", METHODS)
def test_who_has_seen_everything_gets_nothing_and_no_crash(penchant: Call, ready: Any, method: str) -> None:
    ended = penchant("recommend", ready.llm, "--history", ",".join(TITLES), "--method", method)
    assert (ended.code, ended.out) == (0, "")


def test_variety_caps_and_titles_on_the_command_line(penchant: Call, ready: Any) -> None:
    common = ["recommend", ready.llm, "--history", "1,2", "-k", 6, "--method", "retrieve"]
    plain = printed(penchant(*common).out)
    varied = printed(penchant(*common, "--diversity", "0.9").out)
    assert {row["item"] for row in varied} != {row["item"] for row in plain}
    capped = printed(penchant(*common, "--cap", "genres=2").out)
    genres = dict(toy_frames()[1].select("item_id", "genres").iter_rows())
    counts = [part for row in capped for part in genres[row["item"]].split("|")]
    assert max(counts.count(part) for part in counts) == 2
    for given in ("genres", "genres=many", "=3"):
        ended = penchant(*common, "--cap", given)
        assert ended.code == 2
        assert "cannot read" in ended.err


def test_a_wish_in_words(penchant: Call, ready: Any) -> None:
    rows = printed(penchant("recommend", ready.llm, "--text", "a slow thriller", "-k", 4).out)
    assert {row["stage"] for row in rows} == {"text"}
    assert len(rows) == 4
    assert penchant("recommend", ready.llm, "--text", " ").code == 2


def test_a_history_of_nothing_gets_what_is_popular(penchant: Call, ready: Any) -> None:
    rows = printed(penchant("recommend", ready.llm, "--history", "", "-k", 3).out)
    counts = toy_frames()[0]["item_id"].value_counts(name="n")["n"].sort(descending=True).to_list()
    assert [row["score"] for row in rows] == counts[:3]
    assert {row["stage"] for row in rows} == {"popularity"}


def test_k_may_be_beyond_all_reason(penchant: Call, ready: Any) -> None:
    for method in METHODS:
        ended = penchant("recommend", ready.llm, "--history", "1", "-k", 10**13, "--method", method)
        assert ended.code == 0, ended.err
        assert len(printed(ended.out)) == 15


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_recommend_into_a_file_gives_what_it_would_print(
    penchant: Call, ready: Any, tmp_path: Path, suffix: str
) -> None:
    who = ["recommend", ready.llm, "--user", "u0", "--user", "u1", "-k", 3]
    path = tmp_path / "new folder" / f"recs{suffix}"
    ended = penchant(*who, "--out", path)
    assert ended.code == 0, ended.err
    assert ended.out == f"{path}\n", "the path and nothing else"
    frame = pl.read_parquet(path) if suffix == ".parquet" else pl.read_csv(path, infer_schema_length=None)
    assert frame.columns == ["user_id", "item_id", "title", "score", "rank", "stage"]
    rows = printed(penchant(*who).out)
    assert frame["item_id"].cast(pl.String).to_list() == [row["item"] for row in rows]
    assert frame["title"].to_list() == [row["title"] for row in rows]
    assert frame["score"].to_list() == pytest.approx([row["score"] for row in rows], abs=1e-4)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert penchant(*who, "--out", path).code == 0, "a file there is replaced"


def test_an_empty_answer_is_still_a_file_with_its_columns(penchant: Call, ready: Any, tmp_path: Path) -> None:
    path = tmp_path / "recs.parquet"
    assert penchant("recommend", ready.llm, "--user", "u0", "--allow", "", "--out", path).last == str(path)
    assert pl.read_parquet_schema(path) == {
        "user_id": pl.String,
        "item_id": pl.String,
        "title": pl.String,
        "score": pl.Float64,
        "rank": pl.Int32,
        "stage": pl.String,
    }


@pytest.fixture(scope="session")
def odd_run(penchant: Call, ready: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on titles that are no single line of plain text."""
    root = tmp_path_factory.mktemp("odd")
    titles = ["two\nlines", "a\ttab", "\x1b[31mred\x1b[0m", "same", "same", ":smile: [b]", "{{ 1/0 }}", "<|im_end|>"]
    pl.DataFrame({"item_id": range(8), "title": titles}).write_csv(root / "items.csv")
    events = [(f"u{user}", (3 * user + n) % 8, n) for user in range(9) for n in range(5)]
    pl.DataFrame(events, schema=["user_id", "item_id", "timestamp"], orient="row").write_csv(root / "log.csv")
    assert penchant("prepare", root / "log.csv", root / "items.csv", "--out", root / "data").code == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PENCHANT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        ended = penchant("fit", root / "data", *ready.fit[2:], "--out", root / "run")
    assert ended.code == 0, ended.err
    return root / "run"


@pytest.mark.parametrize("method", METHODS)
def test_a_title_stays_on_its_line_and_commands_no_terminal(penchant: Call, odd_run: Path, method: str) -> None:
    ended = penchant(
        "recommend", odd_run, "--history=0", "--include-seen", "--same-titles", "-k", 8, "--method", method
    )
    assert ended.code == 0, ended.err
    titles = {row["item"]: row["title"] for row in printed(ended.out)}
    assert len(titles) == 8
    assert titles["0"] == "two lines"
    assert titles["1"] == "a tab"
    assert titles["2"] == "[31mred[0m"
    assert titles["5"] == ":smile: [b]"
    assert titles["7"] == "<|im_end|>"


def test_control_tokens_in_titles_stay_text(penchant: Call, odd_run: Path) -> None:
    """Of the ids of the prompt only the template's may be control tokens; here it writes none."""
    user = next(f"u{u}" for u in range(9) if any((3 * u + n) % 8 == 7 for n in range(5)))
    ended = penchant("prompt", odd_run, "--user", user, "--tokens")
    assert "<|im_end|>" in ended.out.rpartition("\n[")[0]
    control = Recommender.load(odd_run).engine.codec.control_ids
    ids = [int(line.split("\t")[0]) for line in ended.out.splitlines() if re.match(r"\d+\t'", line)]
    assert ids
    assert not control.intersection(ids)


def test_a_title_that_stdout_cannot_show_is_no_reason_to_stop(penchant: Call, ready: Any) -> None:
    ended = penchant("recommend", ready.llm, "--history", "1", "--allow", "8", encoding="latin-1")
    assert ended.code == 0, ended.err
    assert "\\u4e03\\u4eba" in ended.out


def test_errors_show_data_as_it_is(penchant: Call, ready: Any) -> None:
    """Neither emoji codes nor markup in somebody's ids are rendered."""
    ended = penchant("recommend", ready.run, "--user", ":heart: [red]x[/red]")
    assert "no user ':heart: [red]x[/red]'" in ended.err


# -- evaluate ----------------------------------------------------------------------------------


def test_evaluate_prints_an_honest_table_and_keeps_it(penchant: Call, ready: Any, tmp_path: Path) -> None:
    ended = penchant("evaluate", ready.llm, "-k", 5, "--llm-users", 6, "--json", tmp_path / "report.json")
    assert ended.code == 0, ended.err
    assert ended.last == str(tmp_path / "report.json")
    assert "all 30 test targets, whole catalogue of 16" in ended.out
    assert "the same 6 of them (seed 0) for every system" in ended.out
    for name in ("encoder", "popularity", "last item", "llm likelihood", "random order", "llm+interest minus encoder"):
        assert name in ended.out
    assert len(re.findall(r"-?[\d.]+ \[[+-]?[\d.]+, [+-]?[\d.]+\]", ended.out)) >= 16, "each number has its interval"
    report = json.loads((tmp_path / "report.json").read_text())
    parts = {"title", "rows", "notes", "settings", "seconds", "environment"}
    assert set(report) == parts | {"slices", "costs", "beyond", "trials", "published", "examples"}
    assert report["settings"]["k"] == 5
    assert report["settings"]["data"] == Dataset.load(ready.data).content_hash
    assert report["environment"]["versions"]["torch"]
    assert {"Recall@5", "NDCG@5", "MRR"} == set(report["rows"][0]["metrics"])
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_evaluate_twice_says_the_same(penchant: Call, ready: Any) -> None:
    once, again = (penchant("evaluate", ready.llm, "--llm-users", 4, "--seed", 3).out for _ in range(2))
    assert once == again


def test_evaluate_without_the_llm_does_not_load_it(penchant: Call, ready: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_engine(*arguments: object, **options: object) -> None:
        raise AssertionError("the LLM is not needed")

    monkeypatch.setattr("penchant.engine.loading.load_engine", load_engine)
    ended = penchant("evaluate", ready.llm, "--llm-users", 0)
    assert ended.code == 0, ended.err
    assert "encoder" in ended.out
    assert "llm" not in ended.out


def test_evaluate_where_no_target_has_a_history(penchant: Call, ready: Any, tmp_path: Path) -> None:
    """All test users are new: popularity stands in for every system, and there is nobody to ask the LLM about."""
    old = [f"old{u},{(u + n) % 16 + 1},{n}" for u in range(4) for n in range(6)]
    new = [f"new{u},{u + 1},{1000 + u}" for u in range(5)]
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp\n" + "\n".join(old + new) + "\n")
    assert penchant("prepare", tmp_path / "log.csv", ready.items, "--out", tmp_path / "data").code == 0
    when = ["--split", "global-time", "--valid-from", "1970-01-01T00:00:04", "--test-from", "1970-01-01T00:10:00"]
    assert penchant("fit", tmp_path / "data", *ready.fit[2:], *when, "--out", tmp_path / "run").code == 0
    ended = penchant("evaluate", tmp_path / "run")
    assert ended.code == 0, ended.err
    assert "5 targets have no history" in ended.out
    assert "no target has a history, so the LLM stage ran on none" in ended.out


# -- prompt ------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["next_item", "user", "yes_no", "choose"])
def test_prompt_shows_what_the_model_reads(penchant: Call, ready: Any, template: str) -> None:
    ended = penchant("prompt", ready.run, "--user", "u0", "--template", template)
    assert ended.code == 0, ended.err
    text, _, report = ended.out.rpartition("\n[")
    places = [text.index(f"{TITLES[item]}\n") for item in U0]
    assert places == sorted(places), "the whole history, oldest first"
    found = re.match(r"(\d+) tokens of a budget of 768; 9 of 9 events kept, the oldest 0 dropped; ", report)
    assert found
    assert f"template {template}, hash {Recommender.load(ready.run).templates.hash(template)[:12]}" in report
    assert ("<|im_start|>system" in text) == (template in ("yes_no", "choose")), "chat templates are wrapped"
    if template == "choose":
        candidates = re.findall(r"^[A-Z]\. (.+)$", text, re.MULTILINE)
        assert len(candidates) == len(set(TITLES) - set(U0)), "those retrieved: no more than the 8 asked for, none seen"
        assert not {TITLES[item] for item in U0} & set(candidates)


def test_prompt_asks_about_the_item_given(penchant: Call, ready: Any) -> None:
    ended = penchant("prompt", ready.run, "--user", "u0", "--template", "yes_no", "--item", "11")
    assert "next?\n- M (1931)\n" in ended.out


def test_prompt_counts_what_happened_since_the_fit(penchant: Call, ready: Any, tmp_path: Path) -> None:
    shutil.copytree(ready.run, tmp_path / "run")
    model = Recommender.load(tmp_path / "run")
    model.update("somebody new", [{"item_id": "11"}])
    taken, removed, *left = sorted(set(TITLES) - set(U0))
    model.update("u0", [{"item_id": taken}])
    model.remove_items([removed])
    ended = penchant("prompt", tmp_path / "run", "--user", "somebody new")
    assert "1 of 1 events kept" in ended.out
    assert "M (1931)\n" in ended.out
    ended = penchant("prompt", tmp_path / "run", "--user", "u0", "--template", "choose")
    assert "10 of 10 events kept" in ended.out
    candidates = re.findall(r"^[A-Z]\. (.+)$", ended.out, re.MULTILINE)
    assert sorted(candidates) == sorted(TITLES[item] for item in left)


def test_prompt_shows_the_runs_own_question_as_the_ranker_asks_it(penchant: Call, ready: Any, tmp_path: Path) -> None:
    assert penchant(*ready.fit, "--question", "choose", "--out", tmp_path / "run").code == 0
    ended = penchant("prompt", tmp_path / "run", "--user", "u0")
    assert "template choose" in ended.out
    model = Recommender.load(tmp_path / "run")
    history = model.behaviour("u0")
    retrieved = model.retrieve([history], model.config.candidates)[0][0]
    asked, order = model.ranker.lettered(history.item, retrieved[retrieved >= 0])
    assert order.tolist() != sorted(order.tolist()), "shuffled: the retriever's order must not show"
    codec = model.engine.codec
    assert ended.out.startswith(codec.tokenizer.decode(codec.encode(asked.prompt)))


def test_prompt_tokens_are_those_it_counts(penchant: Call, ready: Any) -> None:
    ended = penchant("prompt", ready.run, "--user", "u0", "--tokens")
    lines = ended.out.splitlines()
    at = next(n for n, line in enumerate(lines) if re.match(r"\[\d+ tokens of", line))
    tokens = [line.split("\t") for line in lines[at + 1 :]]
    assert lines[at].startswith(f"[{len(tokens)} tokens")
    tokenizer = Recommender.load(ready.run).engine.codec.tokenizer
    assert tokenizer.decode([int(token_id) for token_id, _ in tokens]) == "\n".join(lines[:at])
    assert [repr(t) for t in tokenizer.convert_ids_to_tokens([int(i) for i, _ in tokens])] == [t for _, t in tokens]


@pytest.mark.parametrize("template", ["next_item", "user", "yes_no", "choose"])
@pytest.mark.parametrize(
    ("option", "value"), [("--max-history", 3), ("--prompt-tokens", {"next_item": 60, "user": 60, "yes_no": 240})]
)
def test_prompt_says_what_was_cut_and_the_newest_survives(
    penchant: Call, ready: Any, tmp_path: Path, template: str, option: str, value: Any
) -> None:
    budget = value if isinstance(value, int) else value.get(template, 330)
    assert penchant(*ready.fit, option, budget, "--out", tmp_path / "run").code == 0
    ended = penchant("prompt", tmp_path / "run", "--user", "u0", "--template", template)
    assert ended.code == 0, ended.err
    found = re.search(r"\[(\d+) tokens of a budget of (\d+); (\d) of 9 events kept, the oldest (\d) dropped", ended.out)
    assert found
    tokens, limit, kept, dropped = map(int, found.groups())
    assert tokens <= limit
    assert kept + dropped == 9
    assert 0 < kept < 9
    if option == "--max-history":
        assert kept == 3
    history = ended.out.split("Candidates:")[0]
    shown = [item for item in dict.fromkeys(U0) if f"{TITLES[item]}\n" in history]
    assert shown == [item for item in dict.fromkeys(U0) if item in U0[dropped:]]


# -- doctor, fetch, help -----------------------------------------------------------------------


def test_doctor_says_what_works_and_why_the_rest_does_not(
    penchant: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PENCHANT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "vllm", None)
    ended = penchant("doctor")
    assert (ended.code, ended.err) == (0, "")
    for name in ("penchant", "python", "torch", "transformers", "peft", "device", "memory", "cache"):
        assert re.search(rf"^{name} +\S", ended.out, re.MULTILINE), name
    assert f"{tmp_path / 'cache'} (writable" in ended.out
    for name in KNOWN:
        assert f"{name}: not fetched yet" in ended.out
    assert re.search(
        r"^vllm +not usable \(.+\); for GPU serving: pip install 'penchant\[vllm\]'$", ended.out, re.MULTILINE
    )
    assert list(tmp_path.iterdir()) == [], "it looks, and makes nothing"


def test_doctor_fails_where_the_core_is_broken(penchant: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    ended = penchant("doctor")
    assert ended.code == 1
    assert re.search(r"^peft +does not import: ", ended.out, re.MULTILINE)


def test_a_warning_of_ours_is_one_line_and_a_library_s_names_its_place(penchant: Call) -> None:
    penchant("--version")
    assert warnings.formatwarning("slow [b]", PenchantWarning, "f.py", 1) == "warning: slow [b]\n"
    assert warnings.formatwarning("old", FutureWarning, "f.py", 1, "").startswith("f.py:1: FutureWarning: old")


def test_fetch_ends_with_the_folder(penchant: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the cache, which needs no network; the rest of fetching is in test_fetch.py."""
    monkeypatch.setenv("PENCHANT_CACHE", str(tmp_path))
    name = "movielens-100k"
    folder = tmp_path / name
    folder.mkdir()
    files = {}
    for file in KNOWN[name].required:
        (folder / file).write_text("x")
        entry = (folder / file).stat()
        files[file] = {"sha256": sha256_file(folder / file), "size": 1, "mtime_ns": entry.st_mtime_ns}
    write_json(folder / "manifest.json", {"files": files, "source": "here", "licence": "free"})
    ended = penchant("fetch", name)
    assert (ended.code, ended.out) == (0, f"{folder.resolve()}\n")
    assert "licence: free" in ended.err


HEAVY = """
import contextlib, io, sys
from penchant.cli import main
heavy = ["torch", "transformers", "peft", "vllm", "tokenizers", "safetensors", "scipy"]
for arguments in {calls!r}:
    sys.argv = ["penchant", *arguments]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            main()
        except SystemExit as ended:
            assert not ended.code, (arguments, ended.code)
    assert out.getvalue(), arguments
    loaded = [name for name in heavy if name in sys.modules]
    assert not loaded, (arguments, loaded)
"""


def test_help_and_prepare_load_no_heavy_library(ready: Any, tmp_path: Path) -> None:
    verbs = ["fetch", "prepare", "fit", "recommend", "evaluate", "prompt", "doctor", "demo"]
    calls = [["--help"], ["--version"], *([verb, "--help"] for verb in verbs)]
    calls.append(["prepare", str(ready.log), str(ready.items), "--out", str(tmp_path / "data")])
    command = [sys.executable, "-c", HEAVY.format(calls=calls)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_arguments_is_the_help(penchant: Call) -> None:
    ended = penchant()
    assert ended.code == 2
    assert "recommend" in ended.out + ended.err
    assert "Traceback" not in ended.err


# -- as a program ------------------------------------------------------------------------------


def test_as_a_program_only_answers_are_on_stdout(ready: Any, tmp_path: Path) -> None:
    """The model library's bars and notices stay away, though none of these tests' own settings quiets it here."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TRANSFORMERS_", "HF_"))}
    environment = {**kept, "PENCHANT_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "penchant", *map(str, ready.fit), "--out", str(tmp_path / "run")]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    parts = ("leave-last-out", "encoder", "neighbours", "fusion", "seconds")
    starts = ["Dataset(", *(f"{part}: " for part in parts), str(tmp_path / "run")]
    lines = done.stdout.splitlines()
    assert [line.startswith(start) for line, start in zip(lines, starts, strict=True)] == [True] * 7, done.stdout
    assert all(re.match(r"\[ *[\d.]+ s\] ", line) for line in done.stderr.splitlines()), done.stderr
