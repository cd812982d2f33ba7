"""bfloat16 against float32 on this machine, and what embedding at a low layer spares.

    python eval/speed/dtype.py --out eval/results/speed-dtype.json
    python eval/speed/dtype.py --films 100 --users 2 --out /tmp/quick.json

`dtype="auto"` takes bfloat16 where the processor multiplies it and float32 elsewhere; this says what that is worth on
one machine. SmolLM2-135M embeds titles of MovieLens-100K at a low layer, at the default one and at the last, and ranks
20 candidates behind 200 tokens of history for each user. Both sides are warmed and take turns in one run; the faster of
two counts.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from penchant.cli.script import script
from penchant.engine.device import DType, resolve_device, resolve_dtype
from penchant.engine.loading import load_engine
from penchant.engine.noise import quiet_libraries
from penchant.engine.transformers import TransformersEngine
from penchant.environment import made_by
from penchant.fetch import fetch
from penchant.files import write_json
from penchant.interest.vectors import default_layer

LOW = 4
DTYPES: tuple[DType, ...] = ("float32", "bfloat16")


def main(
    out: Annotated[Path, typer.Option(help="The JSON file to write.")],
    films: Annotated[int, typer.Option(help="Titles that are embedded; 0: all.")] = 0,
    users: Annotated[int, typer.Option(help="Users whose candidates are ranked.")] = 16,
) -> None:
    """Seconds of each side, and their ratios."""
    quiet_libraries()
    with (fetch("movielens-100k") / "items.csv").open(encoding="utf-8") as handle:
        titles = [row["title"] for row in csv.DictReader(handle)]
    rng = np.random.default_rng(0)
    histories = ["\n".join(titles[i] for i in rng.choice(len(titles), size=25)) for _ in range(users)]
    candidates = [[titles[i] for i in rng.choice(len(titles), size=20, replace=False)] for _ in range(users)]
    embedded = titles[: films or None]
    engines: dict[str, TransformersEngine] = {name: load_engine("smollm2-135m", dtype=name) for name in DTYPES}
    layers = {"low": LOW, "default": default_layer(engines["float32"].n_layers), "last": engines["float32"].n_layers}
    works: dict[str, Callable[[TransformersEngine], Any]] = {
        f"embed at the {name} layer": partial(TransformersEngine.embed, texts=embedded, layer=layer)
        for name, layer in layers.items()
    }
    works["rank 20 candidates"] = partial(TransformersEngine.score, prompts=histories, continuations=candidates)
    rows: list[dict[str, Any]] = []
    for name, work in works.items():
        seconds = in_turns(work, engines)
        rows += [{"work": name, "dtype": dtype, "seconds": took} for dtype, took in seconds.items()]
        print(*rows[-2:], sep="\n", flush=True)
    took = {(row["work"], row["dtype"]): row["seconds"] for row in rows}
    found = {
        **made_by(__file__),
        "threads": torch.get_num_threads(),
        "auto": resolve_dtype("auto", resolve_device("auto")),
        "films": len(embedded),
        "users": users,
        "layers": layers,
        "rows": rows,
        "bfloat16 takes times float32": {
            work: round(took[work, "bfloat16"] / took[work, "float32"], 3) for work, dtype in took if dtype == "float32"
        },
        "the low layer takes of the last": {
            dtype: round(took["embed at the low layer", dtype] / took["embed at the last layer", dtype], 3)
            for dtype in DTYPES
        },
    }
    write_json(out, found)
    print(out)


def in_turns(work: Callable[[TransformersEngine], Any], engines: dict[str, TransformersEngine]) -> dict[str, float]:
    """Seconds of each, the faster of two runs in turns behind a first one, which warms."""
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(3):
        for name, engine in engines.items():
            begun = time.perf_counter()
            work(engine)
            seconds[name].append(time.perf_counter() - begun)
    return {name: round(min(took[1:]), 3) for name, took in seconds.items()}


if __name__ == "__main__":
    script(main)
