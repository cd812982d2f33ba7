"""The same job by Ray Data: two workers on this machine, one of them killed in mid-job, and the same files."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import psutil
import pytest
from tests.batch.conftest import USERS, made, results

from penchant.batch import run
from penchant.engine.transformers import TransformersEngine
from penchant.rank import Fusion
from penchant.recommend import Recommender

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install 'ray[data]'"),
    pytest.mark.timeout(280),
]

SHARDS = 60


def two_workers(run: Path, users: Path, out: Path) -> subprocess.Popen[str]:
    """``penchant batch`` in a process of its own: what Ray does to a process is no matter of the tests'."""
    command = [sys.executable, "-m", "penchant", "batch", str(run), "--users", str(users), "--out", str(out)]
    return subprocess.Popen(
        [*command, "--shard-rows", "2", "--threads", "1", "--runner", "ray", "--workers", "2"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def actors(of: int) -> list[psutil.Process]:
    """The processes of a job's workers."""
    children = psutil.Process(of).children(recursive=True)
    return [child for child in children if "ShardActor" in " ".join(child.cmdline())]


def test_two_workers_one_of_them_killed(
    run_folder: Path, byte_engine: TransformersEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the transformers engine in the workers."""
    users = tmp_path / "users.parquet"
    rows = [(f"guest{i}", [str(1 + i % 16), str(1 + i // 16 % 16)]) for i in range(2 * SHARDS)]
    pl.DataFrame(rows, schema=USERS, orient="row").write_parquet(users, row_group_size=50)
    model = Recommender.load(run_folder)
    model.fingerprint, model.engine_source = byte_engine.fingerprint, byte_engine.source
    model.fusion, model.prior = Fusion(0.5, 1.0), None
    model.use_engine(byte_engine)
    model.save(tmp_path / "run")

    job = two_workers(tmp_path / "run", users, tmp_path / "ray")
    there = 0
    records = tmp_path / "ray" / "run-0001" / "records"
    while job.poll() is None:
        if not there and (done := len(list(records.glob("*.json")))) >= 3:
            there = done
            actors(job.pid)[0].kill()
        time.sleep(0.01)
    out, err = job.communicate()
    assert job.returncode == 0, err
    assert 3 <= there < SHARDS, "it was killed in mid-job"
    assert len(list(records.glob("*.json"))) == SHARDS
    assert json.loads(out.splitlines()[0])["state"] == "complete"
    assert out.splitlines()[-1] == str(tmp_path / "ray" / "latest")

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run(tmp_path / "run", tmp_path / "local", users, shard_rows=2, n_threads=1)
    assert made(tmp_path / "ray") == made(tmp_path / "local")
    assert set(results(tmp_path / "ray")["stage"]) == {"llm+interest", "interest"}
    manifests = [json.loads((tmp_path / o / "run-0001" / "manifest.json").read_text()) for o in ("ray", "local")]
    assert manifests[0] == manifests[1]
