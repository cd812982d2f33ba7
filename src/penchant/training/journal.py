"""What training says of itself: one JSON line a step and a validation, and the curves as a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from penchant.errors import StorageError
from penchant.files import disk_full, staged_file, without_nan


class Journal:
    """``log.jsonl``, one record a line; a resumed run drops what was logged after its checkpoint."""

    def __init__(self, path: Path, *, resume_step: int | None = None) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        if resume_step is not None and path.is_file():
            self.records = [r for r in read_log(path) if r["step"] <= resume_step]
        with staged_file(path) as stage:
            stage.write_text("".join(_line(r) for r in self.records), encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        try:
            with self.path.open("a", encoding="utf-8") as handle:
                handle.write(_line(record))
        except OSError as error:
            if not disk_full(error):
                raise
            raise StorageError(
                f"no room to write it ({error}); the last checkpoint is whole",
                where=str(self.path),
                remedy="free disk space and resume",
            ) from error


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a log; a last line torn by a kill is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def _line(record: dict[str, Any]) -> str:
    return json.dumps(without_nan(record), ensure_ascii=False) + "\n"


def plot(records: list[dict[str, Any]], path: Path, title: str) -> None:
    """The loss of steps and of held-out rows, and the validation score where there is one, as a PNG."""
    steps = [r for r in records if r["kind"] == "step"]
    every = [r for r in records if r["kind"] == "validation"]
    valid = [r for r in every if r["valid_loss"] is not None]
    scored = [r for r in every if r.get("score") is not None]
    figure = Figure(figsize=(7.5, 3.2 if not scored else 5.6), layout="constrained")
    axes = figure.subplots(2 if scored else 1, 1, sharex=True, squeeze=False)[:, 0]
    axes[0].plot([r["step"] for r in steps], [r["loss"] for r in steps], color="#9aa7b5", lw=0.8, label="each step")
    width = max(1, len(steps) // 25)
    if len(steps) >= 2 * width:
        smooth = [sum(r["loss"] for r in steps[i - width : i]) / width for i in range(width, len(steps) + 1)]
        axes[0].plot(
            [r["step"] for r in steps[width - 1 :]], smooth, color="#1f5f99", lw=1.6, label=f"mean of {width} steps"
        )
    if valid:
        axes[0].plot(
            [r["step"] for r in valid], [r["valid_loss"] for r in valid], "o-", color="#c2571a", ms=4, label="held out"
        )
    axes[0].set_ylabel("loss (nats)")
    axes[0].set_title(title, fontsize=10)
    axes[0].legend(frameon=False, fontsize=8)
    if scored:
        name = scored[0].get("score_name", "score")
        axes[1].plot([r["step"] for r in scored], [r["score"] for r in scored], "o-", color="#2b7a4b", ms=4)
        axes[1].set_ylabel(f"validation {name}")
    axes[-1].set_xlabel("step")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    with staged_file(path) as stage:
        figure.savefig(stage, format="png", dpi=130)
