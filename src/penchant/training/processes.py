"""The processes that share a run (`accelerate launch`): how they are set up, and what each tells the others."""

from __future__ import annotations

import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
)

from penchant.environment import process_mib
from penchant.errors import ConfigError
from penchant.training.config import TrainConfig
from penchant.training.objectives import alone

# How long a process waits for another: torch's ten minutes are less than encoders of a large log take.
_PATIENCE = timedelta(hours=24)


def make_accelerator(config: TrainConfig, out: Path) -> Accelerator:
    """Processes and devices as `accelerate launch` set them up; one process without it."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*no supported trackers", UserWarning)
            found = Accelerator(
                cpu=config.device == "cpu" or not torch.cuda.is_available(),
                mixed_precision="no",
                # The loss is divided by the step's weight, and by no count of batches that the environment asks for.
                gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
                # The others wait while the first process trains the retriever's encoders and makes the rows.
                kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)],
                log_with=config.report_to or None,
                project_dir=str(out) if config.report_to else None,
            )
    except ValueError as error:
        raise ConfigError(str(error), where="report_to", remedy="name one of accelerate's trackers") from error
    # A tracker whose package is missing is left out, without a word where there are others.
    absent = sorted(set(config.report_to) - {"all", *map(str, found.log_with)})
    if absent:
        raise ConfigError(
            f"the package of {', '.join(absent)} is not installed", where="report_to", remedy="install it, or leave it"
        )
    return found


class Processes:
    """What the processes of an accelerator tell one another; of one process alone, what it says itself."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    def sum(self, value: float) -> float:
        """The sum of what each has."""
        if self._accelerator.num_processes == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self._accelerator.device)
        return float(self._accelerator.reduce(tensor, "sum"))

    def gather(self, mine: Any) -> tuple[list[Any], int]:
        """What each gives, on all of them, and which of it is one's own."""
        if self._accelerator.num_processes == 1:
            return alone(mine)
        return gather_object([mine]), self._accelerator.process_index

    def same(self, found: dict[str, Any]) -> dict[str, Any]:
        """The main process' answer, on all of them."""
        if self._accelerator.num_processes == 1:
            return found
        box: list[Any] = [found]
        broadcast_object_list(box, from_process=0)
        return dict(box[0])


def memory_mib() -> int:
    """Peak memory so far: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated() / 2**20)
    return int(process_mib(peak=True))
