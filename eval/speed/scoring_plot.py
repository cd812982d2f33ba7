"""Items scored a second for more candidates and longer histories, as a picture of scoring.py's row growth.

python eval/speed/scoring_plot.py eval/results/speed-scoring.json --out eval/results/speed-scoring.png
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from penchant.cli.script import script
from penchant.errors import ConfigError
from penchant.files import read_json


def main(
    file: Annotated[Path, typer.Argument(help="JSON file of scoring.py.")],
    out: Annotated[Path, typer.Option(help="The PNG file to write.")],
) -> None:
    """Draw one line a length of history."""
    run = read_json(file)
    if "growth" not in run:
        raise ConfigError("no row growth was measured", where=str(file), remedy="run scoring.py --only growth")
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for tokens in dict.fromkeys(found["history_tokens"] for found in run["growth"]):
        some = [found for found in run["growth"] if found["history_tokens"] == tokens]
        rates = [found["items_per_second"] for found in some]
        axes.plot([found["candidates"] for found in some], rates, marker="o", label=f"{tokens} tokens")
    axes.set(xscale="log", yscale="log", xlabel="candidates a user", ylabel="items scored a second")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:,.0f}")
        axis.set_minor_locator(NullLocator())
    axes.set_title("Shared-prefix scoring, SmolLM2-135M, 4 users")
    axes.legend(title="history")
    axes.grid(alpha=0.3)
    figure.savefig(out, dpi=120)
    typer.echo(str(out))


if __name__ == "__main__":
    script(main)
