"""A job in a process of its own, and by Ray Data with two workers on this machine: stopped, killed, the same files."""

from __future__ import annotations

import importlib.util
import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from tests.batch.by_ray import RAY, actors, alive, begun, wait_for
from tests.batch.conftest import USERS, made, results

from penchant.batch import run
from penchant.batch.ray import ShardActor, _cluster, hear
from penchant.engine.transformers import TransformersEngine
from penchant.errors import ConfigError, StorageError
from penchant.fusion import Fusion
from penchant.recommend import Recommender

pytestmark = pytest.mark.timeout(280)
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install 'ray[data]'"
)

SHARDS = 60


def rows_of(batch: dict[str, Any]) -> list[dict[str, Any]]:
    """The one row of a batch, as Ray Data gives it to the driver."""
    return [{name: column[0] for name, column in batch.items()}]


@pytest.fixture(scope="module")
def real(run_folder: Path, byte_engine: TransformersEngine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run whose LLM is a real one that it loads itself, its users, and what one process makes of it."""
    folder = tmp_path_factory.mktemp("real")
    rows = [(f"guest{i}", [str(1 + i % 16), str(1 + i // 16 % 16)]) for i in range(2 * SHARDS)]
    pl.DataFrame(rows, schema=USERS, orient="row").write_parquet(folder / "users.parquet", row_group_size=50)
    model = Recommender.load(run_folder)
    model.fingerprint, model.engine_source = byte_engine.fingerprint, byte_engine.source
    model.fusion, model.prior = Fusion(0.5, 1.0), None
    model.use_engine(byte_engine)
    model.save(folder / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        run(folder / "run", folder / "local", folder / "users.parquet", shard_rows=2, n_threads=1)
    return folder


@needs_ray
def test_two_workers_one_of_them_killed(real: Path, tmp_path: Path) -> None:
    """With the transformers engine in the workers."""
    job = begun(real / "run", real / "users.parquet", tmp_path / "ray", *RAY)
    there = wait_for(job, tmp_path / "ray", 3)
    actors(job.pid)[0].kill()
    out, err = job.communicate()
    assert job.returncode == 0, err
    assert 3 <= there < SHARDS, "it was killed in mid-job"
    assert len(list((tmp_path / "ray" / "run-0001" / "records").glob("*.json"))) == SHARDS
    assert json.loads(out.splitlines()[0])["state"] == "complete"
    assert out.splitlines()[-1] == str(tmp_path / "ray" / "latest")

    assert made(tmp_path / "ray") == made(real / "local")
    assert set(results(tmp_path / "ray")["stage"]) == {"llm+interest", "interest"}
    manifests = [json.loads((o / "run-0001" / "manifest.json").read_text()) for o in (tmp_path / "ray", real / "local")]
    assert manifests[0] == manifests[1]


@needs_ray
def test_the_driver_stopped(real: Path, tmp_path: Path) -> None:
    out = tmp_path / "ray"
    job = begun(real / "run", real / "users.parquet", out, *RAY)
    wait_for(job, out, 3)
    job.send_signal(signal.SIGTERM)
    said, err = job.communicate(timeout=120)
    assert job.returncode == 0, err
    summary = json.loads(said.splitlines()[0])
    assert summary["state"] == "stopped"
    assert 3 <= summary["shards_done"] < SHARDS
    there = len(list((out / "run-0001" / "records").glob("*.json")))
    assert there == summary["shards_done"], "nobody is at work any more"


@needs_ray
def test_the_driver_killed(real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "ray"
    job = begun(real / "run", real / "users.parquet", out, *RAY)
    wait_for(job, out, 3)
    workers = actors(job.pid)
    assert workers
    job.kill()
    job.communicate()
    until = time.monotonic() + 60
    while any(map(alive, workers)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(map(alive, workers)), "they go with the driver"
    assert 3 <= len(list((out / "run-0001" / "records").glob("*.json"))) < SHARDS
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # Anybody may go on: the shards are the same.
    run(real / "run", out, real / "users.parquet", shard_rows=2, n_threads=1)
    assert made(out) == made(real / "local")


def test_sigterm_by_the_command_line(real: Path, tmp_path: Path) -> None:
    out = tmp_path / "recs"
    job = begun(real / "run", real / "users.parquet", out)
    wait_for(job, out, 2)
    job.send_signal(signal.SIGTERM)
    said, err = job.communicate(timeout=60)
    assert job.returncode == 0, err
    summary = json.loads(said.splitlines()[0])
    assert summary["state"] == "stopped"
    assert 2 <= summary["shards_done"] < SHARDS
    assert f"{summary['shards_left']} of {SHARDS} shards are left" in err
    assert said.splitlines()[-1] == str(out / "run-0001")
    assert not (out / "latest").exists()


def test_a_worker_s_error_arrives_whole(real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both of opening and of work; given back as a row, for Ray keeps no chain of causes."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    users = tmp_path / "users.parquet"
    users.write_bytes((real / "users.parquet").read_bytes())
    place = str(real / "local" / "run-0001")
    actor = ShardActor(str(real / "run"), str(users), place, "stop")
    asked = {"shards": np.array(["[0, 1]"])}
    records: list[dict[str, Any]] = []
    hear(rows_of(actor(asked)), records.append)
    assert [record["shard"] for record in records] == [0, 1]

    shutil.copytree(real / "local" / "run-0001", tmp_path / "run-0001")
    (tmp_path / "run-0001" / "records" / "part-00001.json").unlink()
    actor = ShardActor(str(real / "run"), str(users), str(tmp_path / "run-0001"), "stop")
    pl.read_parquet(users).reverse().write_parquet(users)
    with pytest.raises(StorageError) as caught:
        hear(rows_of(actor(asked)), records.append)
    assert caught.value.what == "was changed or replaced while the job read it"
    assert caught.value.where == str(users)
    assert "put the old file back" in str(caught.value.remedy)
    assert [record["shard"] for record in records] == [0, 1, 0], "what was done before it counts"

    pl.read_parquet(users)[1:].write_parquet(users)
    with pytest.raises(ConfigError, match=r"this worker finds .* rows, and the job has"):
        hear(rows_of(ShardActor(str(real / "run"), str(users), place, "stop")(asked)), records.append)

    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    with pytest.raises(ConfigError, match="this worker would give other results: BLAS threads"):
        hear(rows_of(ShardActor(str(real / "run"), str(users), place, "stop")(asked)), records.append)


@needs_ray
def test_a_cluster_is_begun_here_or_refused_in_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    begun: dict[str, Any] = {}
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **how: begun.update(how))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 1.0})
    with _cluster(2, 0.5):
        assert (begun["address"], begun["num_cpus"]) == ("local", 2), "whatever was ever begun on this machine"
    with pytest.raises(ConfigError, match="2 workers with 1 GPUs each need more than the 1"), _cluster(2, 1):
        pass

    def unreachable(**how: Any) -> None:
        raise ConnectionError("nobody there")

    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(ray, "init", unreachable)
    with pytest.raises(ConfigError, match="Ray cannot be begun: nobody there"), _cluster(2, 0):
        pass
