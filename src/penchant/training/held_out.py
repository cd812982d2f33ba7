"""The loss of held-out rows, and what a validation is worth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from penchant.training.batch import collate
from penchant.training.config import TrainConfig
from penchant.training.objectives import over
from penchant.training.rows import Row
from penchant.training.student import Student
from penchant.training.task import Task

# Held-out rows whose loss is looked at; more would cost more than they tell.
VALID_PACKS = 16


@torch.no_grad()
def held_out_loss(task: Task, student: Student, config: TrainConfig) -> float | None:
    """Mean loss in nats over the validation rows (the first packs of them), None where there are none."""
    student.eval()
    device = student.causal_lm.device
    packs = greedy(task.valid, config.pack_tokens)[:VALID_PACKS]
    batches = [collate([rows], student.dtype, device) for rows in packs]
    if not batches:
        return None
    loss_of = over(task.loss, student, batches)
    summed = sum(float(loss_of(student, student, batch)) for batch in batches)
    weight = sum(task.weight(batch) for batch in batches)
    return summed / weight if weight else None


def worth(found: dict[str, Any]) -> float:
    """What early stopping compares: the score, or the held-out loss where nothing can be scored; NaN without either."""
    score, loss = found.get("score"), found["valid_loss"]
    if score is not None:
        return float(score)
    return math.nan if loss is None else -float(loss)


def finite(loss: float | None) -> bool:
    """Whether a held-out loss is a number, or there is none."""
    return loss is None or math.isfinite(loss)


def greedy(rows: Sequence[Row], size: int) -> list[list[Row]]:
    """Rows in their order, as many to a pack as fit."""
    packs: list[list[Row]] = []
    used = size
    for row in rows:
        if used + len(row) > size:
            packs.append([])
            used = 0
        packs[-1].append(row)
        used += len(row)
    return packs


def validation_every(config: TrainConfig, total_steps: int) -> int:
    """Steps between validations of a run of so many steps."""
    return config.eval_every or max(1, math.ceil(total_steps / 4))
