"""A job by two Ray workers, each with a vLLM of its own, one of which is killed: what one vLLM makes alone."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import polars as pl
import psutil
import pytest
from tests import tiny
from tests.batch.by_ray import RAY, actors, begun, wait_for
from tests.conftest import toy_frames

from penchant.data.dataset import Dataset
from penchant.data.split import leave_last_out
from penchant.engine.loading import load_engine
from penchant.fusion import Fusion
from penchant.interest.config import EncoderConfig
from penchant.recommend import Recommender
from penchant.run_folder import FitConfig

pytestmark = [
    pytest.mark.skipif(
        find_spec("vllm") is None or find_spec("ray") is None, reason="both have an environment: make test-vllm"
    ),
    pytest.mark.timeout(600),
]

SHARDS = 40


def test_two_workers_one_of_them_killed(tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "model", "byte", head=32, spread=0.2)
    encoder = EncoderConfig(dim=16, blocks=1, heads=2, max_length=12, epochs=3, batch_rows=8)
    model = Recommender.fit(
        leave_last_out(Dataset.read(*toy_frames())),
        load_engine(folder, dtype="float32", device="cpu"),
        FitConfig(encoder=encoder, candidates=6, validation_users=8),
    )
    model.fusion = Fusion(0.7, 0.5)
    model.save(tmp_path / "run")
    rows = [(f"guest{i}", [str(1 + i % 16), str(1 + i // 16)]) for i in range(2 * SHARDS)]
    kind = {"user_id": pl.String, "history": pl.List(pl.String)}
    pl.DataFrame(rows, schema=kind, orient="row").write_parquet(tmp_path / "users.parquet")

    job = begun(tmp_path / "run", tmp_path / "users.parquet", tmp_path / "ray", "--backend", "vllm", *RAY)
    there = wait_for(job, tmp_path / "ray", 2)
    killed = actors(job.pid)[0]
    engines = killed.children(recursive=True)
    assert engines
    killed.kill()
    out, err = job.communicate()
    assert job.returncode == 0, err
    assert 2 <= there < SHARDS, "it was killed in mid-job"
    assert psutil.wait_procs(engines, timeout=60)[1] == [], "vLLM's processes end with the one that started them"
    assert json.loads(out.splitlines()[0])["state"] == "complete"

    alone = begun(tmp_path / "run", tmp_path / "users.parquet", tmp_path / "local", "--backend", "vllm")
    _, err = alone.communicate()
    assert alone.returncode == 0, err
    by_ray, local = (pl.read_parquet(tmp_path / name / "latest" / "parts" / "*.parquet") for name in ("ray", "local"))
    numbers = ["score", "interest", "llm", "fused"]
    assert by_ray.drop(numbers).equals(local.drop(numbers))
    np.testing.assert_allclose(by_ray["llm"], local["llm"], atol=1e-3)
    assert by_ray["llm"].null_count() < len(by_ray)
