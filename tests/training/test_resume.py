"""A run killed in the middle goes on as if nothing had been; one with other settings is refused."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests import tiny
from tests.conftest import toy_frames
from tests.training.helpers import losses_of, patched_clock, settings, steps_of
from tests.training.test_yes_no import entry

from penchant.data.dataset import Dataset
from penchant.errors import ConfigError, PenchantError, StorageError
from penchant.resources import shipped
from penchant.training.checkpoints import checkpoints, load_checkpoint, prune, save_checkpoint
from penchant.training.config import YesNoConfig
from penchant.training.recipe import Recipe
from penchant.training.recipes import finetune
from penchant.training.student import Student, load_student
from penchant.training.task import Outcome

PROGRAMS = Path(__file__).resolve().parents[2] / "finetune"
# With dropout: a resumed run must draw the noise that the unbroken one drew.
OPTIONS = {
    "--dtype": "float32",
    "--device": "cpu",
    "--lora.r": "4",
    "--lora.dropout": "0.2",
    "--learning-rate": "1e-2",
    "--pack-tokens": "128",
    "--packs-per-step": "1",
    "--max-steps": "40",
    "--epochs": "9",
    "--eval-every": "7",
    "--eval-users": "4",
    "--retriever.epochs": "2",
    "--candidates": "6",
    "--patience": "99",
    "--checkpoint-every": "3",
}
OWN = {"next_item": {}, "contrastive": {"--pack-tokens": "256", "--max-history": "4", "--hard": "1"}}


def command(recipe: str, model: Path, data: Path, out: Path, *more: str) -> list[str]:
    places = {"--model": model, "--data": data, "--out": out}
    options = {**places, **OPTIONS, **OWN[recipe]}
    return [sys.executable, str(PROGRAMS / f"{recipe}.py"), *(str(x) for pair in options.items() for x in pair), *more]


def environment(tmp_path: Path) -> dict[str, str]:
    return {**os.environ, "PENCHANT_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}


def in_this_process(arguments: list[str]) -> None:
    from penchant.cli import app

    app(["finetune", Path(arguments[1]).stem, *arguments[2:]], standalone_mode=False)


@pytest.mark.filterwarnings("ignore:no validation")  # by a few users' NDCG
@pytest.mark.timeout(280)
@pytest.mark.parametrize("recipe", OWN)
def test_after_a_kill_every_step_is_what_it_would_have_been(
    toy: Dataset, byte_folder: Path, tmp_path: Path, recipe: str
) -> None:
    toy.save(tmp_path / "data")
    out = tmp_path / "killed"
    process = subprocess.Popen(
        command(recipe, byte_folder, tmp_path / "data", out),
        env=environment(tmp_path),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until = time.monotonic() + 240
        while not any(p.name >= "step-0000012" for p in checkpoints(out / "checkpoints")):
            assert process.poll() is None, "it ended before it was killed"
            assert time.monotonic() < until
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    done = int(checkpoints(out / "checkpoints")[-1].name.removeprefix("step-"))
    assert 12 <= done < 40
    assert not (out / "adapter_model.safetensors").exists()

    in_this_process(command(recipe, byte_folder, tmp_path / "data", out, "--resume"))
    whole = tmp_path / "whole"
    in_this_process(command(recipe, byte_folder, tmp_path / "data", whole))
    resumed, unbroken = losses_of(out), losses_of(whole)
    assert len(unbroken) == 40
    assert resumed == unbroken, "to the last bit, dropout and all"
    for name in ("gradient_norm", "learning_rate", "targets", "tokens"):
        assert [r[name] for r in steps_of(out)] == [r[name] for r in steps_of(whole)], name
    validations = [
        [{k: v for k, v in r.items() if k not in ("minutes", "validation_seconds")} for r in steps_of(o, "validation")]
        for o in (out, whole)
    ]
    assert validations[0] == validations[1]
    mine, other = (load_file(o / "adapter_model.safetensors") for o in (out, whole))
    assert all(torch.equal(mine[name], other[name]) for name in other)
    outcome = json.loads((out / "penchant.json").read_text())["outcome"]
    assert outcome["targets"] == sum(r["targets"] for r in steps_of(whole))


def stop_after(records: int) -> Any:
    """An on_record that breaks off the run, as a kill would."""
    left = [records]

    def stop(record: dict[str, Any]) -> None:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    return stop


# What the tests below break off in all ways: ten steps, a checkpoint every second, validation at the fifth.
SHORT: dict[str, Any] = {"epochs": 2, "checkpoint_every": 2, "eval_every": 5, "patience": 2}


@pytest.fixture(scope="module")
def whole(byte_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """The same run, unbroken."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PENCHANT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        return out, finetune("next_item", settings(byte_folder, **SHORT), Dataset.read(*toy_frames()), out)


@pytest.mark.parametrize("records", [1, 2, 4, 9])
def test_wherever_it_is_broken_off_the_log_is_the_unbroken_runs(
    toy: Dataset, byte_folder: Path, tmp_path: Path, whole: tuple[Path, Outcome], records: int
) -> None:
    """Before the first checkpoint, right after it, and between two of them."""
    config = settings(byte_folder, **SHORT)
    with pytest.raises(KeyboardInterrupt):
        finetune("next_item", config, toy, tmp_path / "broken", on_record=stop_after(records))
    broken = finetune("next_item", config, toy, tmp_path / "broken", resume=True)
    out, unbroken = whole
    assert losses_of(tmp_path / "broken") == losses_of(out)
    kinds = [
        [(r["kind"], r["step"]) for r in map(json.loads, (folder / "log.jsonl").read_text().splitlines())]
        for folder in (tmp_path / "broken", out)
    ]
    assert kinds[0] == kinds[1], "no step and no validation is missing or there twice"
    for name in ("best_step", "targets", "stopped"):
        assert getattr(broken, name) == getattr(unbroken, name)


def test_a_time_boxed_run_goes_on_with_the_steps_that_were_fixed(
    monkeypatch: pytest.MonkeyPatch, toy: Dataset, byte_folder: Path, tmp_path: Path
) -> None:
    """Broken off before its first regular checkpoint, and resumed on a clock ten times as fast."""
    config = settings(byte_folder, epochs=100, max_minutes=2.5, patience=99)
    patched_clock(monkeypatch, "penchant.training.loop", 10)
    whole = finetune("next_item", config, toy, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        finetune("next_item", config, toy, tmp_path / "broken", on_record=stop_after(9))
    patched_clock(monkeypatch, "penchant.training.loop", 1)
    broken = finetune("next_item", config, toy, tmp_path / "broken", resume=True)
    assert broken.total_steps == whole.total_steps == 15
    assert losses_of(tmp_path / "broken") == losses_of(tmp_path / "whole")


@pytest.mark.filterwarnings("ignore:nothing learnt", "ignore:no validation")
def test_other_examples_of_the_same_name_are_refused(byte_folder: Path, prompts: Path, tmp_path: Path) -> None:
    """Without a dataset nothing else says what was trained on."""
    titles = ["Heat (1995)", "Alien (1979)", "Up (2009)", "M (1931)"]

    def write(name: str, yes: str, no: str) -> str:
        rows = [entry(f'"{a}"', "", b, yes if i % 2 else no) for i, (a, b) in enumerate(permutations(titles, 2))]
        (tmp_path / name).write_text(json.dumps(rows))
        return str(tmp_path / name)

    files = {"examples": write("train.json", "Yes.", "No."), "valid_examples": write("valid.json", "Yes.", "No.")}
    more = {"prompts": str(prompts), "pack_tokens": 512, "max_steps": 2, "learning_rate": 1e-3}
    config = settings(byte_folder, YesNoConfig, **files, **more)
    finetune("yes_no", config, None, tmp_path / "run")
    finetune("yes_no", config, None, tmp_path / "run", resume=True)
    card = json.loads((tmp_path / "run" / "penchant.json").read_text())
    assert set(card["examples"]) == {"examples", "valid_examples"}
    for name in ("train.json", "valid.json"):
        write(name, "No.", "Yes.")
        with pytest.raises(ConfigError, match="in: examples"):
            finetune("yes_no", config, None, tmp_path / "run", resume=True)
        write(name, "Yes.", "No.")


def test_a_finished_run_resumed_trains_no_more(toy: Dataset, byte_folder: Path, tmp_path: Path) -> None:
    config = settings(byte_folder)
    first = finetune("next_item", config, toy, tmp_path / "run")
    before = losses_of(tmp_path / "run")
    again = finetune("next_item", config, toy, tmp_path / "run", resume=True)
    assert losses_of(tmp_path / "run") == before
    assert (again.steps, again.targets, again.best) == (first.steps, first.targets, first.best)


# -- what may not be resumed -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def begun(byte_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, made once."""
    out = tmp_path_factory.mktemp("begun") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PENCHANT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        finetune("next_item", settings(byte_folder, max_steps=2), Dataset.read(*toy_frames()), out)
    return out


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"learning_rate": 2e-2}, "config.learning_rate"),
        ({"seed": 1}, "config.seed"),
        ({"lora": {"r": 8, "alpha": 8}}, "config.lora"),
        ({"window": 3}, "config.window"),
    ],
)
def test_another_setting_is_refused_by_its_name(
    toy: Dataset, byte_folder: Path, begun: Path, change: dict[str, Any], name: str
) -> None:
    with pytest.raises(ConfigError, match="differs from the run begun there") as raised:
        finetune("next_item", settings(byte_folder, **{"max_steps": 2, **change}), toy, begun, resume=True)
    assert name in raised.value.what
    assert "config.dtype" not in raised.value.what


def test_other_data_another_model_or_template_are_refused(
    toy: Dataset, byte_folder: Path, begun: Path, tmp_path: Path
) -> None:
    config = settings(byte_folder, max_steps=2)
    with pytest.raises(ConfigError, match="in: data"):
        finetune("next_item", config, Dataset.read(*toy_frames(seed=9)), begun, resume=True)
    tiny.save_model(tmp_path / "model", "byte", seed=5)
    with pytest.raises(ConfigError, match=r"in: base, config\.model$|in: base, config\.model\n"):
        finetune("next_item", settings(tmp_path / "model", max_steps=2), toy, begun, resume=True)
    text = (shipped("prompts") / "next_item.jinja").read_text(encoding="utf-8")
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "next_item.jinja").write_text(text.replace("One user's", "A user's"), encoding="utf-8")
    changed = settings(byte_folder, max_steps=2, prompts=str(tmp_path / "prompts"))
    with pytest.raises(ConfigError, match="template_texts"):
        finetune("next_item", changed, toy, begun, resume=True)


def test_rows_that_came_out_otherwise_are_refused(
    toy: Dataset, byte_folder: Path, begun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where their cache is gone and another machine's encoder brings other candidates."""
    plain = Recipe.rows

    def other(self: Recipe) -> Any:
        rows = plain(self)
        rows.content = "0" * 64
        return rows

    monkeypatch.setattr(Recipe, "rows", other)
    with pytest.raises(ConfigError, match="rows are not those that this training was begun with"):
        finetune("next_item", settings(byte_folder, max_steps=2), toy, begun, resume=True)


def test_a_run_is_not_written_over(toy: Dataset, byte_folder: Path, begun: Path) -> None:
    before = {p: p.read_bytes() for p in begun.rglob("*") if p.is_file()}
    with pytest.raises(StorageError, match="a run was begun there") as raised:
        finetune("next_item", settings(byte_folder, max_steps=2), toy, begun)
    assert "--resume" in str(raised.value.remedy)
    assert {p: p.read_bytes() for p in begun.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("resume", [False, True])
def test_a_foreign_folder_is_left_alone(toy: Dataset, byte_folder: Path, tmp_path: Path, resume: bool) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(StorageError, match="no run of this kind"):
        finetune("next_item", settings(byte_folder), toy, tmp_path / "mine", resume=resume)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="is a file"):
        finetune("next_item", settings(byte_folder), toy, tmp_path / "file", resume=resume)


def test_a_run_refused_for_its_rows_leaves_nothing_in_the_way(toy: Dataset, byte_folder: Path, tmp_path: Path) -> None:
    """The mended settings need no --resume, which would refuse them as changed."""
    with pytest.raises(PenchantError):
        finetune("next_item", settings(byte_folder, pack_tokens=17), toy, tmp_path / "run")
    finetune("next_item", settings(byte_folder, max_steps=1), toy, tmp_path / "run")


def test_resuming_where_nothing_was_begun_begins(toy: Dataset, byte_folder: Path, tmp_path: Path) -> None:
    assert finetune("next_item", settings(byte_folder, max_steps=1), toy, tmp_path / "run", resume=True).steps == 1


# -- checkpoints -----------------------------------------------------------------------------------


def trained(folder: Path, n: int, student: Student | None = None) -> tuple[Student, torch.optim.Optimizer]:
    student = student or load_student(settings(folder))
    optimiser = torch.optim.AdamW(student.trainable().values(), lr=1e-2)
    for _ in range(n):
        torch.autograd.backward(torch.stack([(p - 1).square().sum() for p in student.trainable().values()]).sum())
        optimiser.step()
        optimiser.zero_grad()
    return student, optimiser


def test_a_checkpoint_brings_weights_and_moments_back(byte_folder: Path, tmp_path: Path) -> None:
    student, optimiser = trained(byte_folder, 3)
    path = save_checkpoint(tmp_path, student, optimiser, 3, {"targets": 7})
    fresh, moments = trained(byte_folder, 0)
    assert load_checkpoint(path, fresh, moments) == {"step": 3, "targets": 7}
    for _ in range(2):  # the next steps are the same: moments and step counts are back
        for s, o in ((student, optimiser), (fresh, moments)):
            torch.autograd.backward(torch.stack([(p - 1).square().sum() for p in s.trainable().values()]).sum())
            o.step()
            o.zero_grad()
    for name, value in student.trainable().items():
        assert torch.equal(value, fresh.trainable()[name])


@pytest.mark.parametrize("file", ["trainable.safetensors", "optimiser.safetensors", "state.json"])
def test_a_torn_checkpoint_is_refused(byte_folder: Path, tmp_path: Path, file: str) -> None:
    student, optimiser = trained(byte_folder, 1)
    path = save_checkpoint(tmp_path, student, optimiser, 1, {})
    whole = (path / file).read_bytes()
    (path / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StorageError):
        load_checkpoint(path, student, optimiser)
    (path / file).unlink()
    assert checkpoints(tmp_path) == [], "what is not whole is no checkpoint"


def test_a_checkpoint_of_another_adapter_is_refused(byte_folder: Path, tmp_path: Path) -> None:
    student, optimiser = trained(byte_folder, 1)
    path = save_checkpoint(tmp_path, student, optimiser, 1, {})
    other = load_student(settings(byte_folder, lora={"r": 4, "alpha": 8, "targets": ["q_proj"]}))
    with pytest.raises(StorageError, match="another adapter"):
        load_checkpoint(path, other, None)


def test_pruning_keeps_the_newest_two_and_those_named(byte_folder: Path, tmp_path: Path) -> None:
    student, optimiser = trained(byte_folder, 0)
    for step in (1, 5, 7, 10, 20):
        save_checkpoint(tmp_path, student, optimiser, step, {})
    (tmp_path / ".step-0000025.abc.tmp").mkdir()
    prune(tmp_path, {"step-0000005"})
    assert [p.name for p in checkpoints(tmp_path)] == ["step-0000005", "step-0000010", "step-0000020"]


# -- a full disk -----------------------------------------------------------------------------------


@contextmanager
def largest_file(n: int) -> Iterator[None]:
    """No file may grow past ``n`` bytes: how a full disk looks to whoever writes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_last_checkpoint_and_the_run_goes_on(
    toy: Dataset, byte_folder: Path, tmp_path: Path, whole: tuple[Path, Outcome]
) -> None:
    config = settings(byte_folder, **SHORT)
    out = tmp_path / "run"

    def fill(record: dict[str, Any]) -> None:
        if record["step"] == 5 and record["kind"] == "step":
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (8000, hard))

    with largest_file(2**40), pytest.raises(StorageError, match="no room"):
        finetune("next_item", config, toy, out, on_record=fill)
    left = checkpoints(out / "checkpoints")
    assert left[-1].name == "step-0000004"
    assert [p.name for p in (out / "checkpoints").iterdir() if p.name.startswith(".")] == []
    finetune("next_item", config, toy, out, resume=True)
    assert losses_of(out) == losses_of(whole[0])
    assert len(losses_of(out)) == 10


def test_a_full_disk_while_the_log_is_written(
    toy: Dataset, byte_folder: Path, tmp_path: Path, whole: tuple[Path, Outcome]
) -> None:
    """The line is torn in its middle; the run goes on from the checkpoint before it."""
    config = settings(byte_folder, **SHORT)
    out = tmp_path / "run"

    def fill(record: dict[str, Any]) -> None:
        if record["step"] == 3 and record["kind"] == "step":
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, ((out / "log.jsonl").stat().st_size + 150, hard))

    with largest_file(2**40), pytest.raises(StorageError, match="no room"):
        finetune("next_item", config, toy, out, on_record=fill)
    finetune("next_item", config, toy, out, resume=True)
    assert losses_of(out) == losses_of(whole[0])


def test_a_full_disk_while_the_adapter_is_published(
    monkeypatch: pytest.MonkeyPatch, toy: Dataset, byte_folder: Path, tmp_path: Path
) -> None:
    config = settings(byte_folder, max_steps=2)
    plain = Student.save

    def full(student: Student, folder: Path) -> None:
        with largest_file(2000):
            plain(student, folder)

    monkeypatch.setattr(Student, "save", full)
    with pytest.raises(StorageError, match="no room"):
        finetune("next_item", config, toy, tmp_path / "run")
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()
    monkeypatch.setattr(Student, "save", plain)
    assert finetune("next_item", config, toy, tmp_path / "run", resume=True).steps == 2
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "run" / "new").exists()
