"""Offline scoring against the bare model calls: memory, overhead, the LLM's rate, and two Ray workers against one.

    python eval/speed/batch.py --out eval/results/speed-batch.json
    python eval/speed/batch.py --only retrieve --users 20000 --small-users 5000 --items 2000 --out /tmp/quick.json

Rows:
  retrieve  synthetic users (histories of 5 to 50 items) against synthetic items: peak memory of the whole process for
            --users and for --small-users, and the seconds against a loop of ``model.retrieve`` over histories that
            are in memory already (--small-users of them, by the user)
  llm       MovieLens-100K's users with 20 candidates, SmolLM2-135M: the job's seconds, opening and checking included,
            against a loop of ``engine.score`` over prompts and candidates made before; the items' likelihood without
            history, which a job scores once for the whole catalogue, is a number of its own
  ray       the same LLM by Ray with one worker and with two: users a second from the time when a quarter of the shards
            was done to the end, so that loading the model isn't in it; one run each
Each side has a process and one thread (by Ray, each worker) of its own, and the loops are given the batches of the job.
retrieve and llm take their sides in turn, --rounds times: of retrieve the smallest times and the largest peaks count,
of llm the median of the rounds' ratios.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import typer

from penchant.batch import BatchOptions
from penchant.batch import run as batch
from penchant.batch.rows import Preparer, batches
from penchant.cli.script import script
from penchant.data.dataset import Dataset
from penchant.data.split import leave_last_out
from penchant.engine.loading import load_engine
from penchant.engine.noise import quiet_libraries
from penchant.environment import made_by, process_mib
from penchant.errors import ConfigError
from penchant.fetch import fetch
from penchant.files import write_json
from penchant.fusion import Fusion
from penchant.interest.behaviour import Behaviour
from penchant.interest.config import EncoderConfig
from penchant.interest.encoder import InterestEncoder
from penchant.prompt import Templates
from penchant.recommend import Recommender
from penchant.run_folder import FitConfig

app = typer.Typer(add_completion=False)
ROWS = ("retrieve", "llm", "ray")
_WRITTEN = 50_000  # users made at a time


# -- what is measured on ---------------------------------------------------------------------------


def synthetic_run(folder: Path, n_items: int) -> None:
    """A run of that many items whose encoder is as it was initialised: as fast as a trained one."""
    rng = np.random.default_rng(0)
    titles = pl.DataFrame({"item_id": [str(i) for i in range(n_items)], "title": [f"Item {i}" for i in range(n_items)]})
    events = pl.DataFrame(
        {
            "user_id": np.repeat([f"known{i}" for i in range(200)], 10),
            "item_id": rng.integers(n_items, size=2000).astype(str),
            "timestamp": np.arange(2000) + 1_000_000,
        }
    )
    split = leave_last_out(Dataset.read(events, titles))
    config = FitConfig(encoder=EncoderConfig(use_text=False, neighbours=0), layer=0)
    torch.manual_seed(0)
    templates = Templates()
    texts = templates.item_texts(split.dataset.items.to_dict(as_series=False), split.log.item_ids).texts
    vectors = rng.standard_normal((n_items, 8), dtype=np.float32)
    encoder = InterestEncoder(config.encoder, n_items, None).eval()
    Recommender(split, config, templates, texts, vectors, encoder, None, "none").save(folder)


def synthetic_users(path: Path, n: int, n_items: int) -> None:
    """Users with histories of their own; written in pieces, so that making them takes no memory either."""
    rng = np.random.default_rng(1)
    kind = pa.schema([("user_id", pa.string()), ("history", pa.list_(pa.string()))])
    with pq.ParquetWriter(path, kind) as writer:
        for start in range(0, n, _WRITTEN):
            stop = min(start + _WRITTEN, n)
            lengths = rng.integers(5, 51, size=stop - start)
            ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
            items = pa.array(rng.integers(n_items, size=int(ends[-1]))).cast(pa.string())
            histories = pa.ListArray.from_arrays(ends, items)
            users = pa.array([f"user{i}" for i in range(start, stop)])
            writer.write_table(pa.table([users, histories], schema=kind))


def film_run(folder: Path) -> None:
    """MovieLens-100K with a short fit; the LLM's say is set, so that it is asked whatever validation would choose."""
    source = fetch("movielens-100k")
    dataset = Dataset.read(source / "interactions.csv", source / "items.csv")
    config = FitConfig(encoder=EncoderConfig(epochs=3), validation_users=5)
    model = Recommender.fit(leave_last_out(dataset), load_engine("smollm2-135m"), config)
    model.fusion = Fusion(0.3, 1.0)
    model.save(folder)


# -- one side each, in a process of its own --------------------------------------------------------


@app.command(hidden=True)
def job(run: Path, users: str, out: Path, method: str, shard_rows: int) -> None:
    """A whole job; users "all": those of the run."""
    model = Recommender.load(run)
    if method == "rank":
        model.engine.score(["warm"], [["up"]])
    begun = time.perf_counter()
    summary = batch(model, out, None if users == "all" else users, method=method, shard_rows=shard_rows or None)
    tell(seconds=time.perf_counter() - begun, **summary)


def as_asked(model: Recommender, rows: pl.DataFrame, method: str) -> list[list[Behaviour]]:
    """The histories of a job's batches, composed and in the order as the job asks for them."""
    options = BatchOptions.of(None, method=method)
    prepare = Preparer(model, options, np.zeros(0, dtype=np.int64))
    found = []
    for shard, start in enumerate(range(0, len(rows), options.rows)):
        prepared = prepare(shard, start, rows.slice(start, options.rows))
        found += [[prepared.histories[at] for at in places] for places in batches(prepared, options.batch)]
    return found


@app.command(hidden=True)
def bare(run: Path, users: Path, k: int) -> None:
    """The model's own retrieval over histories in memory, in the job's batches."""
    model = Recommender.load(run)
    histories = as_asked(model, pl.read_parquet(users), "retrieve")
    model.retrieve(histories[0], k)
    begun = time.perf_counter()
    for part in histories:
        model.retrieve(part, k)
    tell(seconds=time.perf_counter() - begun, users=sum(map(len, histories)))


@app.command(hidden=True)
def loop(run: Path, users: Path) -> None:
    """The engine's own scoring of prompts and candidates made before, in the job's batches; and the likelihood without
    history.
    """
    model = Recommender.load(run)
    made = []
    for part in as_asked(model, pl.read_parquet(users), "rank"):
        items, _ = model.retrieve(part, model.config.candidates)
        prompts = [model.ranker.prompt(history.item).prompt for history in part]
        made.append((prompts, [model.ranker.tokens(row) for row in items]))
    model.engine.score(["warm"], [["up"]])
    begun = time.perf_counter()
    for prompts, tokens in made:
        model.engine.score(prompts, tokens)
    seconds = time.perf_counter() - begun
    begun = time.perf_counter()
    model.ranker.priors(np.arange(len(model.texts)))
    prior = time.perf_counter() - begun
    tell(seconds=seconds, users=sum(len(prompts) for prompts, _ in made), prior_seconds=prior)


@app.command(hidden=True)
def ray(run: Path, users: Path, out: Path, workers: int, shard_rows: int) -> None:
    """A job by Ray; users a second once a quarter of the shards is done."""
    begun = time.perf_counter()
    summary = batch(run, out, users, runner="ray", workers=workers, shard_rows=shard_rows, n_threads=1)
    seconds = time.perf_counter() - begun
    ended = sorted(path.stat().st_mtime for path in (out / "latest" / "records").iterdir())
    first = len(ended) // 4  # by then every worker has loaded the model
    rows = shard_rows * (len(ended) - 1 - first)
    tell(seconds=seconds, users=summary["rows"], users_per_s=rows / (ended[-1] - ended[first]))


def tell(**numbers: Any) -> None:
    """One line for the process that asked, with this one's peak memory."""
    print(json.dumps({**numbers, "peak_mib": round(process_mib(peak=True), 1)}))


def side(*arguments: object) -> dict[str, Any]:
    """Run one of the above and hear what it tells."""
    command = [sys.executable, __file__, *map(str, arguments)]
    ended = subprocess.run(
        command, stdout=subprocess.PIPE, check=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    return json.loads(ended.stdout.splitlines()[-1])


# -- the rows --------------------------------------------------------------------------------------


def retrieve_row(work: Path, users: int, small: int, items: int, rounds: int) -> dict[str, Any]:
    synthetic_run(work / "run", items)
    for name, n in (("large", users), ("small", small)):
        synthetic_users(work / f"{name}.parquet", n, items)
    told: dict[str, list[dict[str, Any]]] = {"small": [], "large": [], "bare": []}
    for round_ in range(rounds):
        for name in ("small", "large"):
            out = work / f"{name}-{round_}"
            told[name].append(side("job", work / "run", work / f"{name}.parquet", out, "retrieve", 0))
        told["bare"].append(side("bare", work / "run", work / "small.parquet", 10))
    least = {name: min(one["seconds"] for one in found) for name, found in told.items()}
    peak = {name: max(one["peak_mib"] for one in found) for name, found in told.items()}
    each = least["bare"] / small
    return {
        "users": users,
        "small_users": small,
        "items": items,
        "rounds": rounds,
        "job_seconds": round(least["large"], 2),
        "small_job_seconds": round(least["small"], 2),
        "bare_seconds_small": round(least["bare"], 2),
        "users_per_s": round(users / least["large"], 1),
        "overhead": round(least["large"] / (each * users) - 1, 4),
        "small_overhead": round(least["small"] / least["bare"] - 1, 4),
        "peak_mib": peak["large"],
        "small_peak_mib": peak["small"],
        "memory_ratio": round(peak["large"] / peak["small"], 4),
    }


def llm_row(work: Path, run: Path, users: int, rounds: int) -> dict[str, Any]:
    model = Recommender.load(run)
    films = work / "films.parquet"
    pl.DataFrame({"user_id": model.log.user_ids[:users]}).write_parquet(films)
    own, made = [], []
    for round_ in range(rounds):
        own.append(side("loop", run, films))
        made.append(side("job", run, films, work / f"llm-{round_}", "rank", 0))
    both = list(zip(own, made, strict=True))
    shares = [o["seconds"] / m["seconds"] for o, m in both]
    without = [o["seconds"] / (m["seconds"] - o["prior_seconds"]) for o, m in both]
    return {
        "users": own[0]["users"],
        "candidates": model.config.candidates,
        "rounds": rounds,
        "job_seconds": [round(one["seconds"], 2) for one in made],
        "loop_seconds": [round(one["seconds"], 2) for one in own],
        "prior_seconds": [round(one["prior_seconds"], 2) for one in own],
        "share_of_engine_rate": round(statistics.median(shares), 4),
        "share_but_for_the_prior": round(statistics.median(without), 4),
        "cached_share": made[0]["cached_share"],
        "peak_mib": max(one["peak_mib"] for one in made),
    }


def ray_row(work: Path, run: Path, users: int, shard_rows: int) -> dict[str, Any]:
    pl.DataFrame({"user_id": Recommender.load(run).log.user_ids[:users]}).write_parquet(work / "some.parquet")
    found = {n: side("ray", run, work / "some.parquet", work / f"ray-{n}", n, shard_rows) for n in (1, 2)}
    return {
        "users": users,
        "shard_rows": shard_rows,
        "runs_each": 1,
        **{f"users_per_s_{n}": round(one["users_per_s"], 3) for n, one in found.items()},
        **{f"seconds_{n}": round(one["seconds"], 2) for n, one in found.items()},
        "times_faster": round(found[2]["users_per_s"] / found[1]["users_per_s"], 3),
    }


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    only: Annotated[str, typer.Option(help="Rows, separated by commas.")] = ",".join(ROWS),
    users: Annotated[int, typer.Option(help="Of retrieve.")] = 1_000_000,
    small_users: Annotated[int, typer.Option(help="Of retrieve, for memory and the bare loop.")] = 100_000,
    items: Annotated[int, typer.Option(help="Of retrieve.")] = 100_000,
    rounds: Annotated[int, typer.Option(help="Of retrieve and llm.")] = 2,
    llm_users: Annotated[int, typer.Option(help="Of llm.")] = 943,
    ray_users: Annotated[int, typer.Option(help="Of ray.")] = 320,
    ray_shard_rows: Annotated[int, typer.Option(help="Of ray.")] = 16,
    run: Annotated[Path | None, typer.Option(help="Of llm and ray: a fitted run; else one is fitted.")] = None,
) -> None:
    """Measure the rows and write them, with machine and versions."""
    quiet_libraries()
    if context.invoked_subcommand is not None:
        return
    asked = only.split(",")
    if out is None or not set(asked) <= set(ROWS):
        raise ConfigError("nothing to do", where="batch.py", remedy=f"give --out, and --only of {', '.join(ROWS)}")
    found: dict[str, Any] = {**made_by(__file__), "threads": 1}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        films = run or work / "films"
        if run is None and {"llm", "ray"} & set(asked):
            film_run(films)
        if "retrieve" in asked:
            found["retrieve"] = retrieve_row(work, users, small_users, items, rounds)
        if "llm" in asked:
            found["llm"] = llm_row(work, films, llm_users, rounds)
        if "ray" in asked:
            found["ray"] = ray_row(work, films, ray_users, ray_shard_rows)
    write_json(out, found)
    print(json.dumps({name: found[name] for name in asked}, indent=2))


if __name__ == "__main__":
    script(app)
