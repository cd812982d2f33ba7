"""What a recipe hands to the loop, and what the loop hands back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from penchant.training.batch import Batch
from penchant.training.objectives import Loss, StepLoss
from penchant.training.rows import Row
from penchant.training.store import RowStore
from penchant.training.student import Student


@dataclass(frozen=True, eq=False)
class Task:
    """What a recipe hands to the loop.

    ``loss`` gives a batch's summed loss in nats by the (possibly wrapped) forward and the student itself, after
    a look at all batches of the step where it is a StepLoss; ``weight`` what the sum is divided by. ``score``
    measures the student on validation users: a dict whose ``score_name`` entry decides when to stop (larger is
    better; an empty name leaves that to the held-out loss), or None. ``notes`` are warnings about the data.
    """

    name: str
    rows: RowStore
    valid: Sequence[Row]
    loss: Loss | StepLoss
    weight: Callable[[Batch], float]
    score: Callable[[Student], dict[str, float]] | None = None
    score_name: str = "NDCG@10"
    notes: Sequence[str] = ()


@dataclass(eq=False)
class Outcome:
    """Where training ended: steps done and planned, the best step and its validation, what was seen, why it stopped."""

    steps: int
    total_steps: int
    best_step: int
    best: dict[str, Any] | None
    targets: int
    tokens: int
    seconds: float
    stopped: str
    warnings: list[str] = field(default_factory=list)
