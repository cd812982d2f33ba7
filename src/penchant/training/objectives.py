"""Each recipe's loss of a batch as a sum in nats, and the weight it is divided by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch

from penchant.errors import ConfigError
from penchant.training.batch import Batch
from penchant.training.config import PreferenceConfig, TrainConfig
from penchant.training.losses import (
    choice_loss,
    first_of_group,
    next_item_loss,
    preference_terms,
    sequence_logprobs,
)
from penchant.training.student import Student

Forward = Callable[[Batch], torch.Tensor]
Loss = Callable[[Forward, Student, Batch], torch.Tensor]
# What each process gives, as all of them have it, and which of them is one's own.
Gather = Callable[[Any], tuple[list[Any], int]]


@runtime_checkable
class StepLoss(Protocol):
    """A loss in which all of a step's batches meet, such as one with in-batch negatives."""

    def over(self, student: Student, batches: Sequence[Batch], gather: Gather) -> Loss:
        """Look at all batches of a step, and give a loss for each: their sum has the step's value and gradient."""
        ...


def alone(mine: Any) -> tuple[list[Any], int]:
    """The Gather of a process that shares its work with none."""
    return [mine], 0


def over(loss: Loss | StepLoss, student: Student, batches: Sequence[Batch], gather: Gather = alone) -> Loss:
    """The loss of each batch of a step, whichever of the two kinds a recipe has."""
    return loss.over(student, batches, gather) if isinstance(loss, StepLoss) else loss


def _next_item(config: TrainConfig) -> tuple[Loss, Callable[[Batch], float]]:
    return (lambda forward, student, batch: next_item_loss(forward(batch), batch)), (lambda b: float(b.weight.sum()))


def _choice(config: TrainConfig) -> tuple[Loss, Callable[[Batch], float]]:
    return (lambda forward, student, batch: choice_loss(forward(batch), batch)), (lambda b: float(b.weight.sum()))


def _preference(config: TrainConfig) -> tuple[Loss, Callable[[Batch], float]]:
    if not isinstance(config, PreferenceConfig):
        raise ConfigError("wants its own settings", where="preference")

    def loss(forward: Forward, student: Student, batch: Batch) -> torch.Tensor:
        reference = torch.zeros_like(batch.lead)
        if config.reference:
            with torch.no_grad(), student.adapter_off():
                reference = sequence_logprobs(student(batch), batch)
        logp = forward(batch)
        sequences = sequence_logprobs(logp, batch)
        summed = preference_terms(sequences, reference, batch.group, config.beta, config.beside * batch.lead).sum()
        if config.likelihood_weight:
            length = sequence_logprobs(torch.ones_like(logp), batch)
            # Per token, as next_item has it, so that a long title does not count for more.
            summed = summed - config.likelihood_weight * (sequences / length)[first_of_group(batch.group)].sum()
        return summed

    return loss, lambda batch: float(batch.n_targets)


_LOSSES: dict[str, Callable[[TrainConfig], tuple[Loss, Callable[[Batch], float]]]] = {
    "next_item": _next_item,
    "yes_no": _choice,
    "choose": _choice,
    "preference": _preference,
}


def task_loss(name: str, config: TrainConfig) -> tuple[Loss, Callable[[Batch], float]]:
    """A recipe's summed loss of a batch, and what it is divided by."""
    return _LOSSES[name](config)
