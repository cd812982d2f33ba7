"""The loop: what it learns, when it stops, what it writes, and that accumulation and memory tricks change nothing."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, on_main_process
from accelerate.utils import is_comet_ml_available
from tests.training.helpers import fresh_accelerate, losses_of, patched_clock, settings, steps_of

from penchant.data.dataset import Dataset
from penchant.data.split import leave_last_out
from penchant.errors import ConfigError, ModelError
from penchant.training.batch import collate
from penchant.training.config import NextItemConfig, TrainConfig
from penchant.training.loop import Loop
from penchant.training.processes import make_accelerator
from penchant.training.recipe import Recipe
from penchant.training.recipes import finetune
from penchant.training.student import Student
from penchant.training.task import Outcome, Task


def task_of(toy: Dataset, config: TrainConfig, **changes: Any) -> tuple[Recipe, Task]:
    recipe = Recipe("next_item", config, leave_last_out(toy))
    return recipe, dataclasses.replace(recipe.task(), score_name="NDCG@10", **changes)


def run(toy: Dataset, config: TrainConfig, out: Path, **changes: Any) -> tuple[Loop, Outcome]:
    recipe, task = task_of(toy, config, **changes)
    out.mkdir(parents=True)
    loop = Loop(task, recipe.student, config, out, accelerator=make_accelerator(config, out))
    return loop, loop.run()


# -- learning --------------------------------------------------------------------------------------


def test_losses_fall(toy: Dataset, byte_folder: Path, tmp_path: Path) -> None:
    config = settings(byte_folder, epochs=6, learning_rate=3e-2, patience=9)
    finetune("next_item", config, toy, tmp_path / "run")
    losses = losses_of(tmp_path / "run")
    held_out = [r["valid_loss"] for r in steps_of(tmp_path / "run", "validation")]
    assert len(losses) == 30
    assert losses[-1] < 0.7 * losses[0]
    assert held_out[-1] < 0.7 * held_out[0]


def test_the_loss_of_a_step_is_the_mean_over_its_weighted_tokens(
    toy: Dataset, byte_folder: Path, tmp_path: Path
) -> None:
    config = settings(byte_folder, max_steps=1, popularity_power=0.5)
    loop, _ = run(toy, config, tmp_path / "run")
    recipe, task = task_of(toy, config)  # the student as it began
    summed = weight = 0.0
    for pack in loop.plan.step(0):
        for r in pack:
            row = task.rows[r]
            with torch.no_grad():
                logp = recipe.student.eval()(collate([[row]], torch.float32))
            summed -= float((logp * torch.from_numpy(row.weight)).sum())
            weight += float(row.weight.sum())
    assert losses_of(tmp_path / "run") == [pytest.approx(summed / weight, rel=1e-5)]


def test_the_steps_are_adamws_on_the_clipped_gradient_of_the_mean(
    toy: Dataset, byte_folder: Path, tmp_path: Path
) -> None:
    """The whole loop written out: one row a forward, and torch's own optimiser."""
    config = settings(byte_folder, max_steps=6, epochs=3, weight_decay=0.1, max_grad_norm=0.5, warmup=0)
    loop, _ = run(toy, config, tmp_path / "run")
    recipe, task = task_of(toy, config)
    student = recipe.student.train()
    weights = list(student.trainable().values())
    optimiser = torch.optim.AdamW(weights, lr=1.0, weight_decay=0.1)
    losses = []
    for record in steps_of(tmp_path / "run"):
        rows = [task.rows[r] for pack in loop.plan.step(record["step"] - 1) for r in pack]
        mean = torch.stack([-student(collate([[row]], torch.float32)).sum() for row in rows]).sum()
        mean = mean / sum(len(row.label) for row in rows)
        optimiser.zero_grad()
        torch.autograd.backward(mean)
        torch.nn.utils.clip_grad_norm_(weights, 0.5)
        optimiser.param_groups[0]["lr"] = record["learning_rate"]
        optimiser.step()
        losses.append(float(mean.detach()))
    assert losses_of(tmp_path / "run") == pytest.approx(losses, rel=1e-5)
    assert max(r["gradient_norm"] for r in steps_of(tmp_path / "run")) > 0.5, "something was clipped"


def same_losses(toy: Dataset, folder: Path, out: Path, **changes: Any) -> list[float]:
    config = settings(folder, max_steps=4, epochs=4, packs_per_step=4, pack_tokens=128, eval_every=99, **changes)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "no validation was better")  # by four users' NDCG
        run(toy, config, out)
    return losses_of(out)


def test_accumulation_and_checkpointing_do_not_change_the_losses(
    toy: Dataset, byte_folder: Path, tmp_path: Path
) -> None:
    plain = same_losses(toy, byte_folder, tmp_path / "1")
    assert len(plain) == 4
    assert max(plain) - min(plain) > 0.1
    for name, changes in {
        "2": {"packs_per_forward": 2},
        "3": {"packs_per_forward": 3},  # four packs or five: the last forward is a short one
        "all": {"packs_per_forward": 99},
        "checkpointing": {"gradient_checkpointing": True},
        "both, scored": {"gradient_checkpointing": True, "packs_per_forward": 2, "eval_users": 4},
    }.items():
        assert same_losses(toy, byte_folder, tmp_path / name, **changes) == pytest.approx(plain, abs=1e-5), name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_checkpointing_runs_each_block_again(byte_folder: Path, toy: Dataset, checkpointing: bool) -> None:
    config: NextItemConfig = settings(byte_folder, gradient_checkpointing=checkpointing)
    recipe, task = task_of(toy, config)
    blocks = recipe.student.causal_lm.base_model.layers
    calls: list[int] = []
    for number, block in enumerate(blocks):
        # Running anew ends as soon as all that is needed is there again: before the hooks of a block's last part.
        block.self_attn.register_forward_hook(lambda *_, number=number: calls.append(number))
    batch = collate([[task.rows[0]]], recipe.student.dtype)
    recipe.student.train()
    torch.autograd.backward(task.loss(recipe.student, recipe.student, batch))  # type: ignore[operator]
    assert sorted(calls) == sorted([*range(len(blocks))] * (2 if checkpointing else 1))


def test_no_environment_divides_the_gradient(
    monkeypatch: pytest.MonkeyPatch, toy: Dataset, byte_folder: Path, tmp_path: Path
) -> None:
    """accelerate's own accumulation would: ours divides by the step's weight."""
    norms = []
    for steps in ("1", "4"):
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", steps)
        with fresh_accelerate():
            finetune("next_item", settings(byte_folder, max_steps=2), toy, tmp_path / steps)
        norms.append([r["gradient_norm"] for r in steps_of(tmp_path / steps)])
    assert norms[0] == norms[1]


def test_checkpointing_with_dropout_recomputes_the_same_noise(toy: Dataset, byte_folder: Path, tmp_path: Path) -> None:
    noise = {"lora": {"r": 4, "alpha": 8, "dropout": 0.3}}
    plain = same_losses(toy, byte_folder, tmp_path / "1", **noise)
    assert same_losses(toy, byte_folder, tmp_path / "2", **noise, gradient_checkpointing=True) == pytest.approx(plain)
    assert plain != pytest.approx(same_losses(toy, byte_folder, tmp_path / "3"), abs=1e-3)


def test_a_run_is_a_function_of_its_seed(toy: Dataset, byte_folder: Path, tmp_path: Path) -> None:
    first, again, other = (same_losses(toy, byte_folder, tmp_path / str(i), seed=s) for i, s in enumerate((3, 3, 4)))
    assert first == again
    assert first != other


def test_the_rate_warms_up_and_falls_along_a_cosine(toy: Dataset, byte_folder: Path, tmp_path: Path) -> None:
    config = settings(byte_folder, max_steps=20, epochs=9, warmup=0.2, learning_rate=1e-3, patience=99)
    run(toy, config, tmp_path / "run")
    rates = [r["learning_rate"] for r in steps_of(tmp_path / "run")]
    assert rates[:4] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3])
    wanted = [1e-3 * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (s - 4) / 16))) for s in range(4, 20)]
    assert rates[4:] == pytest.approx(wanted)


# -- when it stops ---------------------------------------------------------------------------------


def scripted(values: list[float]) -> Callable[[Student], dict[str, float]]:
    left = iter(values)
    return lambda student: {"NDCG@10": next(left)}


def test_it_stops_by_the_score_and_not_by_the_loss(toy: Dataset, byte_folder: Path, tmp_path: Path) -> None:
    """The held-out loss falls all the while; the score was best at its third look."""
    config = settings(byte_folder, epochs=20, eval_every=2, patience=3, checkpoint_every=1)
    loop, outcome = run(toy, config, tmp_path / "run", score=scripted([0.1, 0.2, 0.5, 0.4, 0.5, 0.3, 0.9]))
    found = steps_of(tmp_path / "run", "validation")
    assert [r["score"] for r in found] == [0.1, 0.2, 0.5, 0.4, 0.5, 0.3]
    assert [r["best"] for r in found] == [False, True, True, False, False, False]
    held_out = [r["valid_loss"] for r in found]
    assert held_out == sorted(held_out, reverse=True)
    assert (outcome.steps, outcome.best_step) == (10, 4)
    assert outcome.stopped == "no better validation in 3"
    assert outcome.best is not None
    assert outcome.best["score"] == 0.5
    kept = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-0000004", "step-0000009", "step-0000010"], "the best and the newest two"
    assert loop.best_checkpoint().name == "step-0000004"


def test_a_run_that_gets_worse_stops_early_by_default(toy: Dataset, byte_folder: Path, tmp_path: Path) -> None:
    config = settings(byte_folder, epochs=8, eval_every=None)
    _, outcome = run(toy, config, tmp_path / "run", score=scripted([0.1, 0.5, 0.4, 0.3, 0.2]))
    assert (outcome.total_steps, outcome.steps, outcome.best_step) == (40, 30, 10)
    assert outcome.stopped.startswith("no better validation")


def test_the_best_checkpoint_is_what_is_published(toy: Dataset, byte_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    config = settings(byte_folder, epochs=8, learning_rate=0.3, eval_every=2, eval_users=0, patience=2)
    outcome = finetune("next_item", config, toy, tmp_path / "run")
    found = {r["step"]: r["valid_loss"] for r in steps_of(tmp_path / "run", "validation")}
    best = min(found, key=lambda step: found[step])
    assert outcome.best_step == best
    assert 0 < best < outcome.steps, "this rate is too high: it gets worse after a while"
    trained = load_file(tmp_path / "run" / "checkpoints" / f"step-{best:07d}" / "trainable.safetensors")
    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert len(saved) == len(trained)
    for name, value in saved.items():
        assert torch.equal(value, trained[name.replace(".weight", ".default.weight")])


def test_resuming_a_run_that_stopped_early_does_not_go_on(toy: Dataset, byte_folder: Path, tmp_path: Path) -> None:
    config = settings(byte_folder, epochs=20, eval_every=2, patience=1)
    score = scripted([0.1, 0.5, 0.2])
    run(toy, config, tmp_path / "run", score=score)
    recipe, task = task_of(toy, config, score=score)
    loop = Loop(task, recipe.student, config, tmp_path / "run", accelerator=make_accelerator(config, tmp_path))
    outcome = loop.run(resume=True)
    assert (outcome.steps, outcome.best_step, outcome.stopped) == (4, 2, "no better validation in 1")


def test_where_nothing_can_be_measured_the_newest_is_kept(toy: Dataset, byte_folder: Path, tmp_path: Path) -> None:
    config = settings(byte_folder, epochs=3, eval_every=1, patience=1)
    with pytest.warns(UserWarning, match="no held-out row"):
        _, outcome = run(toy, config, tmp_path / "run", valid=[])
    assert outcome.best_step == outcome.steps == 15
    assert outcome.stopped == "finished"
    plain_json(tmp_path / "run")
    recipe, task = task_of(toy, config, valid=[])
    loop = Loop(task, recipe.student, config, tmp_path / "run", accelerator=make_accelerator(config, tmp_path))
    assert loop.run(resume=True).best_step == 15


def plain_json(out: Path) -> None:
    """All that a run wrote is JSON that others read too: NaN is none."""
    states = [p.read_text() for p in (out / "checkpoints").glob("*/state.json")]
    assert states
    for text in [*states, *(out / "log.jsonl").read_text().splitlines()]:
        json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_a_score_that_is_no_number_leaves_the_loss_to_decide(toy: Dataset, byte_folder: Path, tmp_path: Path) -> None:
    config = settings(byte_folder, epochs=2, eval_every=2)
    _, outcome = run(toy, config, tmp_path / "run", score=lambda student: {"NDCG@10": math.nan})
    assert outcome.best_step == outcome.steps
    plain_json(tmp_path / "run")


def test_a_run_that_never_got_better_says_so(toy: Dataset, byte_folder: Path, tmp_path: Path) -> None:
    config = settings(byte_folder, epochs=2, eval_every=2)
    with pytest.warns(UserWarning, match="was better than the one before training"):
        _, outcome = run(toy, config, tmp_path / "run", score=scripted([0.5, 0.4, 0.3, 0.2, 0.1]))
    assert outcome.best_step == 2, "the best of the trained ones: the untrained adapter would be none"
    assert any("the untuned model may serve better" in w for w in outcome.warnings)


def test_a_time_box_fixes_how_many_steps_fit(
    monkeypatch: pytest.MonkeyPatch, toy: Dataset, byte_folder: Path, tmp_path: Path
) -> None:
    """A step looks at the clock twice: at ten seconds a look, each takes ten."""
    patched_clock(monkeypatch, "penchant.training.loop", 10)
    config = settings(byte_folder, epochs=100, max_minutes=2.5, patience=99)
    _, outcome = run(toy, config, tmp_path / "run")
    steps = steps_of(tmp_path / "run")
    assert (outcome.steps, outcome.total_steps, outcome.seconds) == (15, 15, 150)
    assert outcome.stopped == "finished"
    assert steps[0]["of"] == 500
    assert {r["of"] for r in steps[4:]} == {15}
    assert steps[-1]["learning_rate"] < 0.05 * config.learning_rate, "the cosine ends with the box"
    assert steps_of(tmp_path / "run", "validation")[-1]["step"] == 15


def test_a_time_box_wider_than_the_epochs_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, toy: Dataset, byte_folder: Path, tmp_path: Path
) -> None:
    patched_clock(monkeypatch, "penchant.training.loop", 1)
    _, outcome = run(toy, settings(byte_folder, epochs=3, max_minutes=60), tmp_path / "run")
    assert outcome.steps == outcome.total_steps == 15


def test_a_box_that_is_over_stops_before_its_steps(
    monkeypatch: pytest.MonkeyPatch, toy: Dataset, byte_folder: Path, tmp_path: Path
) -> None:
    patched_clock(monkeypatch, "penchant.training.loop", 10)
    _, outcome = run(toy, settings(byte_folder, epochs=100, max_minutes=0.4), tmp_path / "run")
    assert "time box" in outcome.stopped
    assert outcome.steps == 3, "24 seconds and a twentieth more, full before four steps could be timed"
    validations = [r["step"] for r in steps_of(tmp_path / "run", "validation")]
    assert validations == [0, 3], "measured once where it stopped"


def test_it_validates_and_keeps_at_the_minutes_asked_for(
    monkeypatch: pytest.MonkeyPatch, toy: Dataset, byte_folder: Path, tmp_path: Path
) -> None:
    patched_clock(monkeypatch, "penchant.training.loop", 10)
    config = settings(byte_folder, epochs=3, eval_every=6, eval_minutes=[0.5, 1.4], checkpoint_every=1)
    run(toy, config, tmp_path / "run")
    assert [r["step"] for r in steps_of(tmp_path / "run", "validation")] == [0, 3, 6, 9, 12, 15]
    kept = {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()}
    assert {"step-0000000", "step-0000003", "step-0000009", "step-0000015"} <= kept


# -- what it says ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:no validation")  # by a few users' NDCG
def test_the_log_and_the_curve(picture: None, toy: Dataset, byte_folder: Path, tmp_path: Path) -> None:
    config = settings(byte_folder, epochs=2, eval_users=5, packs_per_forward=3)
    seen: list[dict[str, Any]] = []
    outcome = finetune("next_item", config, toy, tmp_path / "run", on_record=seen.append)
    lines = (tmp_path / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert records == json.loads(json.dumps(seen))
    steps = steps_of(tmp_path / "run")
    assert [r["step"] for r in steps] == list(range(1, outcome.steps + 1))
    for r in steps:
        for name in ("examples/s", "tokens/s", "targets/s", "memory_mib", "gradient_norm", "learning_rate", "loss"):
            assert r[name] > 0, name
        assert r["tokens/s"] == pytest.approx(r["tokens"] / r["seconds"], rel=0.05)
        assert 0 <= r["padding"] < 1
    assert sum(r["targets"] for r in steps) == outcome.targets == 2 * int(leave_last_out(toy).train.sum())
    assert sum(r["tokens"] for r in steps) == outcome.tokens
    assert sum(r["examples"] for r in steps) == 2 * 30
    for r in steps_of(tmp_path / "run", "validation"):
        assert r["score"] == r["NDCG@10"]
        assert {"encoder NDCG@10", "fused NDCG@10", "LLM NDCG@10, calibration 0.5"} <= set(r)
    assert (tmp_path / "run" / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


class Fake(GeneralTracker):
    """A tracker that only remembers."""

    name = "fake"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[tuple[int | None, dict[str, Any]]] = []
        self.config: dict[str, Any] = {}
        self.finished = 0

    @property
    def tracker(self) -> Any:
        return self

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.config = values

    def log(self, values: dict[str, Any], step: int | None = None, **more: Any) -> None:
        self.logged.append((step, values))

    @on_main_process
    def finish(self) -> None:
        self.finished += 1


def test_trackers_get_the_settings_and_every_record(
    monkeypatch: pytest.MonkeyPatch, toy: Dataset, byte_folder: Path, tmp_path: Path
) -> None:
    fake = Fake()
    config = settings(byte_folder, report_to=["fake"])
    monkeypatch.setattr(
        "penchant.training.recipes.make_accelerator", lambda c, out: Accelerator(cpu=True, log_with=fake)
    )
    outcome = finetune("next_item", config, toy, tmp_path / "run")
    assert fake.config["recipe"] == "next_item"
    assert fake.config["learning_rate"] == 1e-2
    assert fake.config["lora.r"] == 4
    assert fake.finished == 1
    losses = {step: values["step/loss"] for step, values in fake.logged if "step/loss" in values}
    assert losses == {r["step"]: r["loss"] for r in steps_of(tmp_path / "run")}
    assert len(losses) == outcome.steps
    assert sum("validation/valid_loss" in values for _, values in fake.logged) == len(
        steps_of(tmp_path / "run", "validation")
    )


def test_tensorboard_writes_its_files_where_it_is_installed(toy: Dataset, byte_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    finetune("next_item", settings(byte_folder, report_to=["tensorboard"]), toy, tmp_path / "run")
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))


@pytest.mark.parametrize("name", ["nonsense", "comet_ml"])
def test_a_tracker_that_is_not_there_is_refused(byte_folder: Path, tmp_path: Path, name: str) -> None:
    """accelerate leaves out what isn't installed without a word."""
    if name == "comet_ml" and is_comet_ml_available():
        pytest.skip("it is installed")
    with pytest.raises(ConfigError, match=name):
        make_accelerator(settings(byte_folder, report_to=[name]), tmp_path)


# -- what cannot be trained ------------------------------------------------------------------------


def test_a_model_in_which_nothing_is_trained_is_refused(toy: Dataset, byte_folder: Path, tmp_path: Path) -> None:
    config = settings(byte_folder)
    recipe, task = task_of(toy, config)
    for parameter in recipe.student.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing in the model is to be trained"):
        Loop(task, recipe.student, config, tmp_path, accelerator=make_accelerator(config, tmp_path))


class Pretend:
    """As many processes as one likes."""

    def __init__(self, n: int) -> None:
        self.num_processes, self.process_index, self.is_main_process = n, 0, True

    def prepare(self, student: Student) -> Student:
        return student


@pytest.mark.parametrize(("packs_per_step", "pack_tokens"), [(2, 256), (4, 2000)])
def test_more_processes_than_packs_in_a_step_are_refused(
    toy: Dataset, byte_folder: Path, tmp_path: Path, packs_per_step: int, pack_tokens: int
) -> None:
    """The second case has packs_per_step enough, but rows for two packs only: a process without any would hang."""
    config: NextItemConfig = settings(byte_folder, packs_per_step=packs_per_step, pack_tokens=pack_tokens)
    recipe, task = task_of(toy, config)
    two, three = (Pretend(n) for n in (2, 3))
    Loop(task, recipe.student, config, tmp_path, accelerator=two)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="3 processes share 2 packs a step"):
        Loop(task, recipe.student, config, tmp_path, accelerator=three)  # type: ignore[arg-type]


def test_weights_that_sum_to_nothing_are_refused(toy: Dataset, byte_folder: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no held-out row"), pytest.raises(ModelError, match="no weighted target"):
        run(toy, settings(byte_folder), tmp_path / "run", weight=lambda batch: 0.0, valid=[])
