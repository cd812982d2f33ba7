"""`--dry-run`: the memory it looks at is the run's, and its time is of the steps and of the validations."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tests import tiny
from tests.training.helpers import patched_clock, settings

from penchant.data.dataset import Dataset
from penchant.data.split import leave_last_out
from penchant.errors import ConfigError
from penchant.training import preview as preview_module
from penchant.training.held_out import greedy
from penchant.training.packing import Plan
from penchant.training.preview import preview
from penchant.training.recipe import Recipe


def figure(text: str, name: str) -> float:
    (line,) = [line for line in text.splitlines() if line.startswith(name)]
    return float(line.removeprefix(name).split()[0].replace(",", ""))


@pytest.mark.parametrize("packs", [1, 3])
def test_memory_is_of_as_many_packs_as_a_forward_has(
    monkeypatch: pytest.MonkeyPatch, toy: Dataset, byte_folder: Path, packs: int
) -> None:
    seen: list[int] = []
    plain = preview_module.collate
    monkeypatch.setattr(preview_module, "collate", lambda p, *rest: seen.append(len(p)) or plain(p, *rest))
    text = preview("next_item", settings(byte_folder, packs_per_step=4, packs_per_forward=packs), toy)
    assert seen == [packs]
    trained = figure(text, "trained weights")
    assert figure(text, "memory: optimiser") == round(trained * 12 / 2**20)
    assert figure(text, "memory: peak of two forwards") > 0


def test_the_time_is_of_the_steps_and_of_the_validations(
    monkeypatch: pytest.MonkeyPatch, toy: Dataset, byte_folder: Path
) -> None:
    """Whatever is timed takes 600 s here: a step's forward and backward, and the score of eight users of sixteen."""
    patched_clock(monkeypatch, "penchant.training.preview", 600)
    config = settings(byte_folder, epochs=4, eval_users=16, eval_every=10)
    text = preview("next_item", config, toy)
    recipe = Recipe("next_item", config, leave_last_out(toy))
    rows = recipe.rows()
    plan = Plan(rows.lengths, pack_tokens=256, packs_per_step=2, seed=0)
    steps = 4 * plan.steps_per_epoch
    each_token = 10 / sum(int(rows.lengths[r]) for r in plan.step(0)[0])  # minutes
    wanted = each_token * int(rows.lengths.sum()) * steps / plan.steps_per_epoch
    assert figure(text, "time of the steps, estimated") == pytest.approx(wanted, abs=0.06)
    held_out = each_token / 3 * sum(len(row) for pack in greedy(recipe.valid(), 256)[:16] for row in pack)
    looks = 1 + -(-steps // 10)
    validations = looks * (held_out + 20)
    assert figure(text, f"time of {looks} validations") == pytest.approx(validations, abs=0.06)
    assert figure(text, "time in all, estimated") == pytest.approx(wanted + validations, abs=0.11)


def test_a_time_box_bounds_the_steps_alone(monkeypatch: pytest.MonkeyPatch, toy: Dataset, byte_folder: Path) -> None:
    patched_clock(monkeypatch, "penchant.training.preview", 600)
    text = preview("next_item", settings(byte_folder, epochs=4, max_minutes=3), toy)
    assert figure(text, "time of the steps, estimated") == 3
    assert re.search(r"\(the time box; [\d,.]+ without it\)", text)


def test_rows_longer_than_the_context_are_refused_before_a_run(toy: Dataset, tmp_path: Path) -> None:
    small: Any = settings(tiny.save_model(tmp_path / "short", "byte", max_positions=64))
    with pytest.raises(ConfigError, match="the model's context only 64"):
        preview("next_item", small, toy)
