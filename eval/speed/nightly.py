"""A shop's night: read the log, embed the titles, train the encoder, write everybody's list; and how that grows.

    python eval/speed/nightly.py --data-dir data --out eval/results/nightly-games.json
    python eval/speed/nightly.py --data-dir data --out /tmp/quick.json --share 0.05 --growth 0.02 --epochs 1

Each row is a process of its own, on all cores, with a cache of its own. The first is the whole night of the task's data
and settings (`--share` of the users and all items; 1: everybody); then with the LLM behind it `--llm-users` of them,
from which everybody's follows by the users. Behind it stand, for `--growth`, nights of that share of the users with the
whole catalogue, and of that share of the catalogue with the users' events of it, with two epochs: seconds an epoch, an
item and a user. Shares are drawn by seed 0.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import polars as pl
import torch
import typer

from penchant.batch import run as batch
from penchant.cli.script import script
from penchant.data.dataset import Dataset
from penchant.data.split import leave_last_out
from penchant.engine.loading import load_engine
from penchant.engine.noise import quiet_libraries
from penchant.environment import made_by, process_mib
from penchant.errors import ConfigError
from penchant.evaluation.tasks import load_task, read_data
from penchant.fetch import fetch
from penchant.files import write_json
from penchant.fusion import Fusion
from penchant.recommend import Recommender
from penchant.schema import ITEM, USER

MODEL = "smollm2-135m"
app = typer.Typer(add_completion=False)


@app.command(hidden=True)
def night(task: str, data_dir: Path, users: float, items: float, epochs: int, llm_users: int) -> None:
    """One whole night, in this process; tells its seconds by part as a line of JSON."""
    quiet_libraries()
    asked = load_task(task)
    engine = load_engine(MODEL)
    engine.score(["warm"], [["up"]])
    seconds: dict[str, float] = {}
    begun = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal begun
        now = time.perf_counter()
        seconds[name], begun = now - begun, now

    data = some(read_data(asked, data_dir), users, items)
    split = leave_last_out(data, test=False)
    lap("read the log")
    encoder = asked.fit.encoder
    encoder = encoder.model_copy(update={"epochs": epochs} if epochs else {})
    config = asked.fit.model_copy(update={"encoder": encoder, "validation_users": 1})
    model = Recommender.fit(split, engine, config)
    seconds |= {name: value for name, value in model.seconds.items() if name != "choose the fusion"}
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        batch(model, Path(folder) / "all", None, k=10, method="retrieve")
        lap("write everybody's ten")
        known = model.log.user_ids
        found: dict[str, Any] = {
            "users": len(known),
            "items": len(model.texts),
            "events": len(data.interactions),
            "epochs": len(model.training),
            "seconds": {name: round(value, 2) for name, value in seconds.items()},
        }
        if llm_users:
            model.fusion = Fusion(0.3, 0.0)  # that it is asked, whatever validation would choose
            drawn = np.random.default_rng(0).choice(len(known), size=llm_users, replace=False)
            pl.DataFrame({"user_id": [known[i] for i in drawn]}).write_parquet(Path(folder) / "some.parquet")
            begun = time.perf_counter()
            batch(model, Path(folder) / "llm", Path(folder) / "some.parquet", k=10, method="rank")
            found["llm"] = {"users": llm_users, "seconds": round(time.perf_counter() - begun, 2)}
    found["peak_mib"] = round(process_mib(peak=True))
    print(json.dumps(found))


def some(data: Dataset, users: float, items: float) -> Dataset:
    """The data with seeded shares of its users and items, and the events of these alone."""
    rng = np.random.default_rng(0)
    events, catalogue = data.interactions, data.items
    if items < 1:
        catalogue = catalogue[np.sort(rng.permutation(len(catalogue))[: round(items * len(catalogue))])]
        events = events.filter(pl.col(ITEM).is_in(catalogue[ITEM].implode()))
    if users < 1:
        known = events[USER].unique(maintain_order=True)
        kept = known[np.sort(rng.permutation(len(known))[: round(users * len(known))])]
        events = events.filter(pl.col(USER).is_in(kept.implode()))
    return Dataset(events, catalogue) if users < 1 or items < 1 else data


def apart(*arguments: object) -> dict[str, Any]:
    """``night`` in a process of its own, with a cache that holds nothing but the model."""
    with tempfile.TemporaryDirectory() as cache:
        (Path(cache) / MODEL).symlink_to(fetch(MODEL))
        command = [sys.executable, __file__, "night", *map(str, arguments)]
        ended = subprocess.run(
            command, stdout=subprocess.PIPE, check=True, text=True, env=os.environ | {"PENCHANT_CACHE": cache}
        )
    found = json.loads(ended.stdout.splitlines()[-1])
    print(found, flush=True)
    return found


def each(row: dict[str, Any]) -> dict[str, float]:
    """Seconds an epoch, a thousand items and a thousand users."""
    took = row["seconds"]
    return {
        "seconds an epoch": round(took["train encoder"] / row["epochs"], 2),
        "seconds a thousand items": round(1000 * took["embed items"] / row["items"], 2),
        "seconds a thousand users": round(1000 * took["write everybody's ten"] / row["users"], 3),
    }


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    data_dir: Annotated[Path | None, typer.Option(help="Folder that holds the data sets' folders.")] = None,
    out: Annotated[Path | None, typer.Option(help="The JSON file to write.")] = None,
    task: Annotated[str, typer.Option(help="Whose data and settings.")] = "games",
    share: Annotated[float, typer.Option(help="Of the users, in all rows but those of other users.")] = 1.0,
    growth: Annotated[str, typer.Option(help="Shares of the other rows, separated by commas.")] = "0.25,0.5",
    epochs: Annotated[int, typer.Option(help="Of the first row; 0: the task's.")] = 0,
    llm_users: Annotated[int, typer.Option(help="Users the LLM is asked for.")] = 256,
) -> None:
    """Measure the night and its growth, and write them with machine and versions."""
    if context.invoked_subcommand is not None:
        return
    if data_dir is None or out is None:
        raise ConfigError("nothing to do", where="nightly.py", remedy="give --data-dir and --out")
    whole = apart(task, data_dir, share, 1.0, epochs, llm_users)
    whole["seconds"]["in all"] = round(sum(whole["seconds"].values()), 1)
    whole |= each(whole)
    if "llm" in whole:
        whole["llm"]["seconds a user"] = round(whole["llm"]["seconds"] / whole["llm"]["users"], 3)
        whole["llm"]["hours for everybody, estimated"] = round(
            whole["llm"]["seconds a user"] * whole["users"] / 3600, 2
        )
    rows = []
    for part in map(float, growth.split(",")):
        for users, items in ((part, 1.0), (share, part)):
            row = apart(task, data_dir, users, items, 2, 0)
            rows.append({"share of users": users, "share of items": items, **row, **each(row)})
    about = {"task": task, "threads": torch.get_num_threads(), "model": MODEL}
    write_json(out, {"night": whole, "growth": rows, **about, **made_by(__file__)})
    print(out)


if __name__ == "__main__":
    script(app)
