"""Checkpoints that survive a kill: written whole beside the last one, which goes only then. No pickle."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from penchant.errors import StorageError
from penchant.files import read_json, staged_folder, write_json
from penchant.training.student import Student

_NAME = re.compile(r"step-(\d{7})")
_FILES = ("trainable.safetensors", "optimiser.safetensors", "state.json")


def save_checkpoint(
    folder: Path, student: Student, optimiser: torch.optim.Optimizer, step: int, state: dict[str, Any]
) -> Path:
    """Write ``folder``/step-0000123: the trained weights, AdamW's moments, and ``state`` (JSON). Returns its path."""
    target = folder / f"step-{step:07d}"
    named = student.trainable()
    moments: dict[str, torch.Tensor] = {}
    for name, parameter in named.items():
        for key, value in optimiser.state.get(parameter, {}).items():
            moments[f"{name}|{key}"] = torch.as_tensor(value).detach().contiguous()
    with staged_folder(target) as stage:
        save_file({n: p.detach().contiguous() for n, p in named.items()}, stage / "trainable.safetensors")
        save_file(moments, stage / "optimiser.safetensors")
        write_json(stage / "state.json", {"step": step, **state})
    return target


def load_checkpoint(path: Path, student: Student, optimiser: torch.optim.Optimizer | None) -> dict[str, Any]:
    """Put a checkpoint's weights (and the optimiser's moments) back; returns its state. StorageError where torn."""
    try:
        weights = load_file(path / "trainable.safetensors")
        moments = load_file(path / "optimiser.safetensors")
    except (OSError, SafetensorError) as error:
        raise StorageError(f"cannot be read: {error}", where=str(path), remedy="delete it and resume again") from error
    named = student.trainable()
    if set(weights) != set(named):
        raise StorageError(
            "is of another adapter or model", where=str(path), remedy="resume with the configuration it was made with"
        )
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(weights[name].to(parameter.device))
    if optimiser is not None:
        for key, value in moments.items():
            name, _, part = key.rpartition("|")
            # AdamW keeps its step count on the CPU and its moments beside the weights.
            optimiser.state[named[name]][part] = value if part == "step" else value.to(named[name].device)
    state = read_json(path / "state.json")
    if not isinstance(state, dict):
        raise StorageError("holds no state", where=str(path / "state.json"), remedy="delete it and resume again")
    return state


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a folder, oldest first; what a kill left half written is not among them."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if _NAME.fullmatch(p.name) and all((p / f).is_file() for f in _FILES)]
    return sorted(found, key=lambda p: p.name)


def prune(folder: Path, keep: set[str]) -> None:
    """Delete all checkpoints but the newest two and those named in ``keep``.

    Two, for the newest is known to be good only when the next step's loss is a number.
    """
    for path in checkpoints(folder)[:-2]:
        if path.name not in keep:
            shutil.rmtree(path)
