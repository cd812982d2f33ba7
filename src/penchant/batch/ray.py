"""The same shards by Ray Data: actors that open the run themselves, and Ray's retries where one dies.

An actor is given a few shards at a time and makes them as ``run_local`` does. Given again after a death, those that
are whole already are left alone. Run, input and output must lie where every machine sees them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from penchant.batch.asked import Asked, asked
from penchant.batch.folder import read_manifest
from penchant.batch.identity import blas_threads, differences, identity_of
from penchant.batch.local import run_local
from penchant.batch.options import BatchOptions
from penchant.batch.shards import Record, Shards
from penchant.batch.worker import Worker
from penchant.errors import ConfigError, DataError, ModelError, NotFiniteError, PenchantError, StorageError

_STOP = "stop.{}-of-{}"  # a part's file: its actors on any machine see it, and begin no other shard
_GROUPS, _SHARDS = 4, 8  # groups of shards an actor gets at least, and shards of a group at most
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def run_ray(
    job: Asked,
    run: Path,
    shards: Shards,
    todo: Sequence[int],
    *,
    part: tuple[int, int],
    workers: int,
    gpus: float,
    done: Callable[[Record], None],
    stopped: Callable[[], bool],
) -> None:
    """As ``run_local``, with ``workers`` actors. ModelError where an actor fails for more than its machine's death;
    ConfigError where no cluster can be had, or one on this machine has too few GPUs.
    """
    try:
        import ray
    except ImportError as error:
        raise ConfigError("Ray is not installed", where="runner", remedy='pip install "penchant[ray]"') from error
    if workers < 1:
        raise ConfigError(f"{workers} workers", where="workers", remedy="give 1 or more")
    stop = run / _STOP.format(*part)
    stop.unlink(missing_ok=True)
    # What Ray would set for an actor decides how sums are taken, and must be as it is here.
    variables = dict.fromkeys(_THREADS, blas_threads())
    size = max(1, min(_SHARDS, len(todo) // (workers * _GROUPS)))
    groups = [{"shards": json.dumps(todo[start : start + size])} for start in range(0, len(todo), size)]
    # What Ray has to say goes to stderr: stdout is for the answer.
    with contextlib.redirect_stdout(sys.stderr), _cluster(workers, gpus), _watching(stop, stopped):
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        # By Ray's defaults a task whose actor died is tried again on a new one, and an error of the engine's is not.
        results = ray.data.from_items(groups, override_num_blocks=len(groups)).map_batches(
            ShardActor,
            # An actor of a cluster that is there works in another folder.
            fn_constructor_args=(_absolute(job.path), _absolute(job.url), _absolute(run), stop.name),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=1,
            num_gpus=gpus or None,
            runtime_env={"env_vars": variables},
        )
        try:
            hear(results.iter_rows(), done)
        except PenchantError:
            stop.touch()  # it stays until this part begins again: actors of a cluster that goes on may see it late
            raise
        except ray.exceptions.RayError as error:
            stop.touch()
            cause = getattr(error, "cause", None) or error
            raise ModelError(
                f"a Ray worker stopped: {cause}".strip(),
                where=str(run),
                remedy="mend the cause and run the same command again: the shards done are kept",
            ) from error
        stop.unlink(missing_ok=True)


def _absolute(path: Path | str | None) -> str | None:
    """A path of this machine from its root; a URL as it is."""
    if path is None:
        return None
    return str(path) if "://" in str(path) else os.path.abspath(path)


def hear(rows: Iterable[Mapping[str, Any]], done: Callable[[Record], None]) -> None:
    """Tell ``done`` of each record that workers give back; raise the first error that one gives back."""
    for row in rows:
        for record in json.loads(str(row["records"])):
            done(record)
        if row["error"]:
            name, what, where, remedy = json.loads(str(row["error"]))
            kinds = {kind.__name__: kind for kind in (ConfigError, DataError, NotFiniteError, StorageError)}
            raise kinds.get(name, ModelError)(what, where=where, remedy=remedy)


class ShardActor:
    """One worker: its own model and engine, for shards as they come.

    An error of ours is given back beside the records: of what is raised Ray keeps the last link of the chain, or less.
    """

    def __init__(self, model: str, rows: str | None, run: str, stop: str) -> None:
        self._error: PenchantError | None = None
        self._stop = Path(run) / stop
        try:
            self._open(model, rows, run)
        except PenchantError as error:
            self._error = error

    def _open(self, model: str, rows: str | None, run: str) -> None:
        self._run = Path(run)
        manifest = read_manifest(self._run)
        job = asked(
            Path(model), rows, BatchOptions.model_validate(manifest["options"]), n_threads=int(manifest["threads"])
        )
        here = identity_of(job.model, job.options)
        then = {name: value for name, value in manifest["identity"].items() if not name.startswith("input ")}
        if here != then:
            raise ConfigError(
                "this worker would give other results: " + "; ".join(differences(then, here)),
                where=os.uname().nodename,
                remedy="give all machines the same versions, threads and files",
            )
        if job.source.rows != manifest["rows"]:
            raise ConfigError(
                f"this worker finds {job.source.rows:,} rows, and the job has {manifest['rows']:,}",
                where=os.uname().nodename,
                remedy="let the input lie where every machine sees the same files",
            )
        self._worker = Worker.of_run(self._run, manifest, job.model, job.options)
        self._source = job.source
        self._shards = Shards(self._run, manifest["rows"], manifest["shard_rows"])

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The records of the shards named in the batch's one row, those that were whole already included; and the
        error that ended them.
        """
        records: dict[int, Record] = {}
        error = self._error
        try:
            if error is None:
                self._make(json.loads(str(batch["shards"][0])), records)
        except PenchantError as raised:
            error = raised
        found = json.dumps([records[shard] for shard in sorted(records)])
        said = "" if error is None else json.dumps([type(error).__name__, error.what, error.where, error.remedy])
        return {"records": np.array([found]), "error": np.array([said])}

    def _make(self, todo: Sequence[int], records: dict[int, Record]) -> None:
        records |= {shard: found for shard in todo if (found := self._shards.whole(shard)) is not None}

        def done(record: Record) -> None:
            records[record["shard"]] = record

        run_local(
            self._worker,
            self._source,
            self._shards,
            [shard for shard in todo if shard not in records],
            batch=lambda n: None,
            done=done,
            stopped=self._stop.exists,
        )


@contextlib.contextmanager
def _cluster(workers: int, gpus: float) -> Iterator[None]:
    """The cluster that is there (RAY_ADDRESS, or begun by the caller), or one on this machine while the job runs."""
    import ray

    if ray.is_initialized():
        yield
        return
    heard = signal.getsignal(signal.SIGTERM)
    address = os.environ.get("RAY_ADDRESS")
    # Without "local", Ray would take a cluster that was ever begun on this machine, and refuse the number of CPUs.
    there = {} if address else {"address": "local", "num_cpus": workers}
    try:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR", **there)
    except (ConnectionError, ValueError) as error:
        raise ConfigError(
            f"Ray cannot be begun: {error}",
            where=f"RAY_ADDRESS {address}" if address else "runner",
            remedy="start the cluster, or unset RAY_ADDRESS for one on this machine",
        ) from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, heard)  # Ray sets a handler that ends the process at once
    try:
        found = float(ray.cluster_resources().get("GPU", 0))
        if not address and gpus * workers > found:  # the actors would wait for ever
            raise ConfigError(
                f"{workers} workers with {gpus:g} GPUs each need more than the {found:g} of this machine",
                where="worker_gpus",
                remedy="give fewer workers, a part of a GPU each, or none",
            )
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _watching(stop: Path, stopped: Callable[[], bool]) -> Iterator[None]:
    """Tell the actors, by the file ``stop``, once ``stopped`` says so."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.2):
            if stopped():
                stop.touch()
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
