"""A job from its input to its published results: the one way through, whoever runs the shards."""

from __future__ import annotations

import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from penchant.batch.asked import COLUMNS, Asked, asked
from penchant.batch.duplicates import repeated_rows
from penchant.batch.folder import SUMMARY, JobFolder, StoppedWaiting, part_of
from penchant.batch.identity import Identity, identity_of, with_input
from penchant.batch.local import run_local
from penchant.batch.options import BatchOptions
from penchant.batch.progress import Progress, cached_share, totals
from penchant.batch.ray import run_ray
from penchant.batch.setup import SETUP, needs_prior, pieces_done, prior_of, score_pieces
from penchant.batch.shards import QUARANTINE, Record, Shards
from penchant.batch.worker import Worker, save_fixed
from penchant.engine.threads import threads
from penchant.environment import environment
from penchant.errors import ConfigError, DataError
from penchant.files import read_json, write_json
from penchant.recommend import Recommender

Runner = Literal["local", "ray"]
SETUP_NUMBERS = "setup.json"  # of a run: what its set-up took
_SETUP_SUMS = ("items", "tokens_asked", "tokens_run", "seconds")


def run(
    model: Recommender | Path | str,
    out: Path | str,
    rows: Path | str | None = None,
    options: BatchOptions | None = None,
    *,
    part: str | None = None,
    runner: Runner = "local",
    workers: int = 2,
    worker_gpus: float = 0.0,
    max_bad_share: float = 0.01,
    n_threads: int | None = None,
    stop: threading.Event | None = None,
    tell: Callable[[dict[str, Any]], None] | None = None,
    **settings: object,
) -> dict[str, Any]:
    """Answer every row, or go on where a run of the same job was; returns the summary (also in summary.json).

    ``model`` is a fitted run's folder, or a Recommender; ``rows`` is Parquet (file, folder, glob or fsspec URL) with
    user_id or history (a list of item ids, oldest first), for pairs item_id too; None: every user, or item, the run
    knows. ``settings`` are fields of BatchOptions. Results are in out/run-NNNN/parts, and out/latest points to the
    newest complete run.

    ``part`` "i/n" takes every n-th shard, for array jobs. ``runner`` "ray" gives shards to ``workers`` actors, each
    with ``worker_gpus`` GPUs; the folders must then be ones that all machines see. Over ``max_bad_share`` of
    quarantined rows it is a DataError. SIGTERM, or setting ``stop``, lets the shard in hand be finished: the summary's
    state is then "stopped". SIGKILL costs the shard in hand and the one before it if that is still being written; of
    the set-up (see setup.py) the piece in hand. ``tell`` is given the numbers of progress.json at each shard, and
    before the first those of ``score_pieces``, whose state is "setting up".

    StorageError where another process is at the job, where an unfinished job differs (it says in what), or where there
    is no room; ModelError where the engine stops. After any of them the same call goes on where it was.
    """
    if runner not in ("local", "ray"):
        raise ConfigError(f"unknown runner {runner!r}", remedy="use local or ray")
    if not 0 <= max_bad_share <= 1:
        raise ConfigError(f"max_bad_share is {max_bad_share}", where="batch", remedy="give a share from 0 to 1")
    own = part_of(part)
    with stop_on_sigterm(stop or threading.Event()) as stopping:
        job = asked(model, rows, options, n_threads=n_threads, **settings)
        if job.source.searches(Path(out)):
            raise ConfigError(
                f"would be read as rows: it lies in {rows}",
                where=str(out),
                remedy="give an --out that is not in the input's folder",
            )
        if runner == "ray" and job.path is None:
            raise ConfigError("the ray runner opens the run itself", where="model", remedy="give the run's folder")
        folder = JobFolder(Path(out))
        try:
            with folder.locked(own, stopping.is_set):
                with folder.setting_up(stopping.is_set):
                    identity = with_input(identity_of(job.model, job.options), job.source)
                    place = folder.find(identity) or _make(folder, job, identity, runner, stopping.is_set, tell)
                    if place is None:
                        return _not_begun(folder, job)
                    shutil.rmtree(folder.path / SETUP, ignore_errors=True)
                path, manifest = place
                shards = Shards(path, job.source.rows, job.options.rows)
                shards.make()
                mine = shards.of_part(*own)
                shards.sweep(mine)
                kept = [found for shard in mine if (found := shards.whole(shard)) is not None]
                todo = sorted(set(mine).difference(record["shard"] for record in kept))
                size = sum(len(shards.range(shard)) for shard in mine)
                progress = Progress(path, own, len(mine), size, kept)

                def done(record: Record) -> None:
                    progress.shard(record)
                    if tell is not None:
                        tell(progress.numbers())
                    _check_share([*kept, *progress.new], job.source.rows, max_bad_share, path)

                _check_share(kept, job.source.rows, max_bad_share, path)
                if todo and runner == "ray":
                    run_ray(
                        job,
                        path,
                        shards,
                        todo,
                        part=own,
                        workers=workers,
                        gpus=worker_gpus,
                        done=done,
                        stopped=stopping.is_set,
                    )
                    shards.sweep(todo)  # a worker that died left its temporary files; none is alive any more
                elif todo and not stopping.is_set():
                    worker = Worker.of_run(path, manifest, job.model, job.options)
                    run_local(
                        worker,
                        job.source,
                        shards,
                        todo,
                        batch=progress.batch,
                        done=done,
                        stopped=stopping.is_set,
                    )
                return _finish(folder, job, shards, own, [*kept, *progress.new], progress, max_bad_share)
        except StoppedWaiting:  # for another part's set-up
            return _not_begun(folder, job)


def _make(
    folder: JobFolder,
    job: Asked,
    identity: Identity,
    runner: Runner,
    stopped: Callable[[], bool],
    tell: Callable[[dict[str, Any]], None] | None,
) -> tuple[Path, dict[str, Any]] | None:
    """A new run, with what is fixed for all its shards; None where it was stopped before that was all there."""
    key = COLUMNS[job.options.job][2]
    with folder.scratch() as scratch:
        repeated = repeated_rows(job.source, key, scratch)
    took: dict[str, Any] | None = None
    if needs_prior(job.model, job.options):
        took = score_pieces(
            folder.path / SETUP, job.model, job.options, identity, stopped=stopped, tell=tell or (lambda numbers: None)
        )
        close = getattr(job.model.engine, "close", None)
        if runner == "ray" and close is not None:
            close()  # the workers have engines of their own, perhaps on the same GPU
        if took["items_done"] < took["items"]:
            return None

    def fill(stage: Path) -> dict[str, Any]:
        if took is not None:
            write_json(stage / SETUP_NUMBERS, {name: took[name] for name in _SETUP_SUMS})
        return {
            "options": job.options.model_dump(mode="json"),
            "rows": job.source.rows,
            "shard_rows": job.options.rows,
            "threads": threads(),
            "files": save_fixed(stage, repeated, None if took is None else prior_of(job.model, job.options)),
        }

    return folder.create(identity, fill)


def _not_begun(folder: JobFolder, job: Asked) -> dict[str, Any]:
    """The summary of a job that was stopped before its first shard."""
    shards = len(Shards(folder.path, job.source.rows, job.options.rows))
    done, items = pieces_done(folder.path / SETUP) or (0, len(job.model.texts))
    return {
        "state": "stopped",
        "run": str(folder.path),
        "shards": shards,
        "shards_done": 0,
        "shards_left": shards,
        "setup": {"items": items, "items_done": done},
    }


def _finish(
    folder: JobFolder,
    job: Asked,
    shards: Shards,
    own: tuple[int, int],
    mine: list[Record],
    progress: Progress,
    max_bad_share: float,
) -> dict[str, Any]:
    """Check and publish the run if all of it is there; the summary of what is."""
    left = len(shards.of_part(*own)) - len(mine)
    records = {record["shard"]: record for record in mine}
    with folder.setting_up():
        if not left:
            for shard in range(len(shards)):  # other parts of an array job, where they are done
                if shard not in records and (found := shards.whole(shard)) is not None:
                    records[shard] = found
        complete = len(records) == len(shards)
        progress.state = "complete" if complete else "part" if not left else "stopped"
        progress.write(now=True)
        sums = totals(list(records.values()))
        numbers = progress.numbers()
        summary = {
            "state": progress.state,
            "run": str(shards.folder),
            "shards": len(shards),
            "shards_done": len(records),
            "shards_left": len(shards) - len(records),
            **sums,
            "bad_share": round(sums["bad"] / job.source.rows, 6),
            "cached_share": cached_share(sums["tokens_asked"], sums["tokens_run"]),
            "engine_seconds": round(sum(record["seconds"] for record in records.values()), 2),
            "setup": read_json(took) if (took := shards.folder / SETUP_NUMBERS).is_file() else None,
            "this_process": {name: numbers[name] for name in numbers if name.endswith(("_per_s", "seconds"))},
        }
        if complete:
            _check_share(list(records.values()), job.source.rows, max_bad_share, shards.folder)
            job.source.unchanged()
            for shard in range(len(shards)):
                shards.check(shard)
            summary["environment"] = environment()
            write_json(shards.folder / SUMMARY, summary)
            folder.publish(shards.folder)
    return summary


def _check_share(records: list[Record], rows: int, limit: float, path: Path) -> None:
    """DataError as soon as the quarantine is larger than it may be at the end."""
    sums = totals(records)
    if sums["bad"] > limit * rows:
        why = ", ".join(f"{reason} {number:,}" for reason, number in sums["reasons"].items())
        raise DataError(
            f"{sums['bad']:,} of {rows:,} rows are in quarantine ({why}), over the share of {limit:.2%} that may be",
            where=str(path / QUARANTINE),
            remedy="look there; allow more with --max-bad-share, or mend the input and start it with another --out",
        )


@contextmanager
def stop_on_sigterm(stop: threading.Event) -> Iterator[threading.Event]:
    """Let SIGTERM set ``stop`` as long as the block runs; only the main thread can hear it."""
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
