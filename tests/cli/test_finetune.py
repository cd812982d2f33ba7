"""`penchant finetune` and `penchant merge`: what they print, and that bad input is one error and exit code 2."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.training.helpers import letter_prompts

from penchant.data.dataset import Dataset
from penchant.data.split import leave_last_out

Call = Callable[..., Any]


def quick(ready: Any, recipe: str = "next_item", **changes: object) -> list[object]:
    """The verb on the toy data with settings that take a moment."""
    options: dict[str, object] = {
        "model": ready.model,
        "dtype": "float32",
        "device": "cpu",
        "learning-rate": "1e-2",
        "pack-tokens": 256,
        "packs-per-step": 2,
        "retriever.epochs": 2,
        "candidates": 6,
        "eval-users": 0,
        "max-steps": 4,
        **{name.replace("_", "-"): value for name, value in changes.items()},
    }
    return ["finetune", recipe, "--data", ready.data, *(x for k, v in options.items() for x in (f"--{k}", v))]


@pytest.fixture(autouse=True)
def _accelerate() -> Any:
    from tests.training.helpers import fresh_accelerate

    with fresh_accelerate():
        yield


@pytest.fixture(scope="module")
def adapter(penchant: Call, ready: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """One run, and how it ended."""
    out = tmp_path_factory.mktemp("adapter") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PENCHANT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        return out, penchant(*quick(ready), "--lora.r", 4, "--out", out)


def bad(ended: Any, *words: str) -> None:
    """One clear error: exit code 2, a single block on stderr, no traceback, nothing on stdout."""
    assert ended.code == 2, ended.err
    assert "Traceback" not in ended.err
    assert ended.err.lower().count("error") == 1
    for word in words:
        assert word in ended.err, ended.err
    assert ended.out == ""


# -- what it does ----------------------------------------------------------------------------------


def test_it_says_how_it_ended_and_prints_the_folder_last(adapter: tuple[Path, Any]) -> None:
    out, ended = adapter
    assert ended.code == 0, ended.err
    assert ended.last == str(out)
    card = json.loads((out / "penchant.json").read_text())["outcome"]
    pattern = rf"finished: 4 of 4 steps, {card['targets']} targets, [\d,]+ tokens, \d+ s; best at step 4"
    assert re.match(pattern, ended.out)
    assert len(ended.out.splitlines()) == 2
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 4


def test_progress_says_what_is_done_a_second(adapter: tuple[Path, Any]) -> None:
    lines = adapter[1].err.splitlines()
    steps = [line for line in lines if re.match(r"step +\d+ of 4", line)]
    assert len(steps) == 3, "the first three steps, then every tenth"
    for line in steps:
        for word in ("loss", "lr", "examples/s", "tokens/s", "targets/s", "MiB"):
            assert word in line
    assert any("held-out loss" in line for line in lines)


def test_a_config_and_options_over_it(penchant: Call, ready: Any, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("max_steps: 9\nlora: {r: 2, alpha: 4}\n")
    ended = penchant(*quick(ready, max_steps=1), "--config", path, "--out", tmp_path / "run", "--lora.alpha=16")
    assert ended.code == 0, ended.err
    saved = json.loads((tmp_path / "run" / "run.json").read_text())["config"]
    assert (saved["max_steps"], saved["lora"]["r"], saved["lora"]["alpha"]) == (1, 2, 16)


def test_resume_of_a_finished_run(penchant: Call, ready: Any, adapter: tuple[Path, Any]) -> None:
    out, first = adapter
    again = penchant(*quick(ready), "--lora.r", 4, "--out", out, "--resume")
    assert again.code == 0, again.err
    assert again.last == first.last


def test_warnings_are_said(penchant: Call, ready: Any, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="untuned model may serve|nothing learnt") as caught:
        ended = penchant(*quick(ready, learning_rate="30.0", max_steps=1), "--out", tmp_path / "run")
    assert ended.code == 0
    assert any("untuned model may serve" in str(w.message) for w in caught)
    assert "warning: no validation" in ended.err


def test_the_list_of_settings(penchant: Call) -> None:
    ended = penchant("finetune", "choose", "--settings")
    assert ended.code == 0
    names = [line.split()[0] for line in ended.out.splitlines()]
    assert {"--learning-rate", "--lora.r", "--letters", "--insert-missed", "--max-minutes"} <= set(names)
    assert "--window" not in names


# -- dry run ---------------------------------------------------------------------------------------


def figure(out: str, name: str) -> float:
    (line,) = [line for line in out.splitlines() if line.startswith(name + " ")]
    return float(line.removeprefix(name).split()[0].rstrip("%").replace(",", ""))


def marked(out: str) -> list[str]:
    """What stands between the marks in the examples, the sentence that explains them left out."""
    return re.findall(r"\[\[(.*?)\]\]", out.partition("Three examples")[2].partition("\n")[2], flags=re.DOTALL)


def test_a_dry_run_says_what_it_would_train(penchant: Call, ready: Any, tmp_path: Path) -> None:
    ended = penchant(*quick(ready, max_steps="null", epochs=3), "--dry-run", "--out", tmp_path / "run")
    assert ended.code == 0, ended.err
    assert not (tmp_path / "run").exists(), "it writes nothing"
    split = leave_last_out(Dataset.load(ready.data))
    assert figure(ended.out, "examples") == 30
    assert figure(ended.out, "supervised targets") == split.train.sum() == 210
    assert figure(ended.out, "steps in all") == 3 * figure(ended.out, "steps an epoch")
    assert figure(ended.out, "tokens an epoch") > 210
    assert 0 <= figure(ended.out, "padding") < 25
    for name in ("trained weights", "memory: weights", "memory: peak of two forwards", "speed, measured"):
        assert figure(ended.out, name) >= 0
    assert "minutes" in ended.out
    shown = marked(ended.out)
    titles = set(Dataset.load(ready.data).items["title"])
    assert len(shown) == 3, "three examples, in each of them all titles from the first to the last"
    for text in shown:
        assert text.endswith("\n")
        assert len(text.splitlines()) == 7
        assert set(text.splitlines()) <= titles
    assert ended.out.count("One user's history") == 3
    assert not any("One user's history" in text for text in shown)


def test_a_dry_run_shows_answers_and_rivals(penchant: Call, ready: Any, tmp_path: Path) -> None:
    prompts = letter_prompts(tmp_path / "prompts")
    for recipe, more in {"choose": {"letters": 5, "insert-missed": "true"}, "yes_no": {}}.items():
        made = quick(ready, recipe, pack_tokens=600, prompts=prompts, targets_per_user=2, **more)
        ended = penchant(*made, "--dry-run")
        assert ended.code == 0, ended.err
        answers = marked(ended.out)
        assert len(answers) == 3
        assert set(answers) <= set("ABCDE")
    ended = penchant(*quick(ready, "preference", negatives=2), "--dry-run")
    assert ended.code == 0, ended.err
    rivals = re.findall(r"rather '(.*?)' than '(.*?)'", ended.out)
    titles = set(Dataset.load(ready.data).items["title"])
    assert rivals
    assert all({a, b} <= titles and a != b for a, b in rivals)


# -- bad input -------------------------------------------------------------------------------------


def test_no_out_is_refused(penchant: Call, ready: Any) -> None:
    bad(penchant(*quick(ready)), "no folder to write to", "--out")


def test_no_data_is_refused(penchant: Call, ready: Any, tmp_path: Path) -> None:
    bad(penchant("finetune", "next_item", "--out", tmp_path / "x"), "no data", "--data")
    bad(penchant("finetune", "next_item", "--data", tmp_path / "absent", "--out", tmp_path / "x"), "absent")
    assert not (tmp_path / "x").exists()


def test_a_recipe_that_is_none_is_refused(penchant: Call, ready: Any) -> None:
    ended = penchant("finetune", "cook", "--data", ready.data)
    assert ended.code == 2
    assert "next_item" in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--learning-rate", "-1e-3"], ["learning_rate", "greater than 0"]),
        (["--learning-rate"], ["has no value"]),
        (["--learning-rte", "1"], ["no setting is called learning_rte"]),
        (["--lora.rank", "3"], ["lora.rank"]),
        (["--dtype", "int3"], ["dtype"]),
        (["--report-to", "[nonsense]"], ["nonsense"]),
        (["--start-from", "/no/such/adapter"], ["/no/such/adapter"]),
        (["--model", "/no/such/model"], ["/no/such/model"]),
        (["--prompts", "/no/such/prompts"], ["/no/such/prompts"]),
        (["--split", "global-time", "--valid-from", "1980-01-01", "--test-from", "1979-01-01"], ["validation window"]),
        (["--lora.targets", "[nothing]"], ["no such adapter", "lora.targets"]),
        (["--pack-tokens", "17"], ["cut off", "pack_tokens"]),
        (["--split", "global-time", "--valid-from", "2020-99-99"], ["valid_from", "2020-99-99"]),
        (["--model", "2024-13-01"], ["2024-13-01"]),
        (["--device", "meta"], ["device meta"]),
        (["loose"], ["'loose' is no option"]),
    ],
)
def test_a_wrong_setting_is_one_error(
    penchant: Call, ready: Any, tmp_path: Path, more: list[str], words: list[str]
) -> None:
    bad(penchant(*quick(ready), "--out", tmp_path / "run", *more), *words)
    assert not (tmp_path / "run").exists(), "and nothing is left that would stand in the next run's way"


@pytest.mark.parametrize("content", [b"learning_rate: [", b"- a list", b"\xff\xfe", b"no_such: 1"])
def test_a_config_that_is_none_is_refused(penchant: Call, ready: Any, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    bad(penchant(*quick(ready), "--config", path, "--out", tmp_path / "run"), str(path))
    bad(penchant(*quick(ready), "--config", tmp_path / "none.yaml", "--out", tmp_path / "run"), "none.yaml")


def test_a_folder_that_holds_something_is_left_alone(
    penchant: Call, ready: Any, tmp_path: Path, adapter: tuple[Path, Any]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a").write_text("b")
    bad(penchant(*quick(ready), "--out", tmp_path / "mine"), "no run of this kind")
    bad(penchant(*quick(ready), "--out", adapter[0]), "--resume")
    bad(penchant(*quick(ready, seed=3), "--lora.r", 4, "--out", adapter[0], "--resume"), "config.seed")


def test_labels_of_several_tokens_are_refused(penchant: Call, ready: Any, tmp_path: Path) -> None:
    bad(penchant(*quick(ready, "yes_no"), "--out", tmp_path / "run"), "'Yes'", "must be one")


def test_examples_that_are_none_are_refused(penchant: Call, ready: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('[{"input": 3}]')
    prompts = letter_prompts(tmp_path / "prompts")
    made = ["finetune", "yes_no", "--examples", path, "--model", ready.model, "--prompts", prompts]
    bad(penchant(*made, "--device", "cpu", "--out", tmp_path / "run"), f"{path}, row 0")


# -- merge -----------------------------------------------------------------------------------------


def test_merge_says_how_far_scores_moved(penchant: Call, ready: Any, adapter: tuple[Path, Any], tmp_path: Path) -> None:
    ended = penchant("merge", adapter[0], "--out", tmp_path / "merged", "--dtype", "float32")
    assert ended.code == 0, ended.err
    assert ended.last == str(tmp_path / "merged")
    found = re.match(r"scores moved by (\S+) nats a text on average and (\S+) at most, saved as float32", ended.out)
    assert found
    assert float(found[1]) <= float(found[2]) < 1e-4


def test_merge_refuses_what_it_must(penchant: Call, adapter: tuple[Path, Any], tmp_path: Path) -> None:
    bad(penchant("merge", adapter[0], "--out", tmp_path), "stands there already")
    bad(penchant("merge", tmp_path, "--out", tmp_path / "m"), "no adapter_config.json")
    bad(penchant("merge", adapter[0], "--out", tmp_path / "m", "--dtype", "int8"), "unknown dtype")
    bad(penchant("merge", adapter[0], "--out", tmp_path / "m", "--base", "/no/such"), "/no/such")
    assert not (tmp_path / "m").exists()


def test_the_adapter_is_fitted_and_recommends(
    penchant: Call, ready: Any, adapter: tuple[Path, Any], tmp_path: Path
) -> None:
    ended = penchant(*ready.fit, "--adapter", adapter[0], "--out", tmp_path / "run")
    assert ended.code == 0, ended.err
    ended = penchant("recommend", tmp_path / "run", "--user", "u0", "-k", "3")
    assert ended.code == 0, ended.err
    assert len(ended.out.splitlines()) == 3
