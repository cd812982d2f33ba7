"""The curves of fine-tuning as a picture: NDCG@10 of the same 20 candidates against minutes of training.

    python eval/curves.py eval/results/finetuning-*.json --out eval/results/finetuning.png

One panel a recipe, from the JSON of eval/finetuning.py: the order of the LLM alone (at the calibration that validation
chose), of LLM and encoder fused, and of the encoder, whose order does not depend on training; bars are 95% intervals
over users.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from matplotlib.figure import Figure

from penchant.cli.script import script
from penchant.files import read_json

_LINES = {
    "llm, calibration from validation": ("LLM alone", "tab:orange", "o"),
    "fused": ("LLM and encoder", "tab:blue", "s"),
}


def main(
    files: Annotated[list[Path], typer.Argument(help="JSON files of eval/finetuning.py.")],
    out: Annotated[Path, typer.Option(help="The PNG file to write.")],
) -> None:
    """Draw one panel a file."""
    figure = Figure(figsize=(3.4 * len(files) + 0.6, 3.4), layout="constrained")
    axes = figure.subplots(1, len(files), sharey=True, squeeze=False)[0]
    for panel, path in zip(axes, files, strict=True):
        run = read_json(path)
        points = run["points"]
        minutes = np.array([point["minutes_trained"] for point in points])
        for name, (label, colour, marker) in _LINES.items():
            found = [point["systems"][name]["NDCG@10"] for point in points]
            mean = np.array([f["mean"] for f in found])
            spread = np.array([[f["mean"] - f["low"], f["high"] - f["mean"]] for f in found]).T
            panel.errorbar(minutes, mean, yerr=spread, label=label, color=colour, marker=marker, capsize=2, linewidth=1)
        encoder = points[0]["systems"]["encoder"]["NDCG@10"]["mean"]
        panel.axhline(encoder, color="0.4", linestyle="--", linewidth=1, label="encoder")
        panel.set_title(path.stem.removeprefix("finetuning-"), fontsize=10)
        panel.set_xlabel("minutes of training")
        panel.grid(alpha=0.3)
    axes[0].set_ylim(bottom=0)
    axes[0].set_ylabel("NDCG@10 [95% interval]")
    axes[-1].legend(fontsize=8, loc="lower right")
    figure.savefig(out, dpi=120)
    typer.echo(str(out))


if __name__ == "__main__":
    script(main)
