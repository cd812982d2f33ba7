"""``penchant batch``: a job, its resume, its status and its output from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

# penchant, ready and Outcome are of conftest.py beside this file.
Call = Callable[..., Any]


@pytest.fixture
def users(tmp_path: Path) -> Path:
    path = tmp_path / "users.parquet"
    pl.DataFrame({"user_id": [f"u{i}" for i in range(12)]}).write_parquet(path)
    return path


def test_a_job_its_output_and_its_resume(penchant: Call, ready: Any, users: Path, tmp_path: Path) -> None:
    command = ["batch", ready.llm, "--users", users, "--out", tmp_path / "recs", "-k", "3", "--shard-rows", "5"]
    ended = penchant(*command)
    assert ended.code == 0, ended.err
    summary, folder = ended.out.splitlines()
    assert folder == str(tmp_path / "recs" / "latest")
    assert json.loads(summary)["state"] == "complete"
    assert json.loads(summary)["cached_share"] > 0
    found = pl.read_parquet(f"{folder}/parts/*.parquet")
    assert found.group_by("user_id", maintain_order=True).len().rows() == [(f"u{i}", 3) for i in range(12)]
    assert "shard 3 of 3, 12 of 12 rows" in ended.err
    told = penchant("batch", "--status", tmp_path / "recs")
    assert told.code == 0, told.err
    assert "run-0001: complete; 3 of 3 shards, 12 of 12 rows, 36 results" in told.out
    assert "published: run-0001" in told.out
    (tmp_path / "recs" / "run-0001" / "parts" / "part-00001.parquet").unlink()
    again = penchant(*command)
    assert again.code == 0
    assert next(line for line in again.err.splitlines() if "shard" in line).startswith("shard 3 of 3"), "one was made"
    assert pl.read_parquet(f"{folder}/parts/*.parquet").equals(found)


def test_a_dry_run_writes_nothing(penchant: Call, ready: Any, users: Path, tmp_path: Path) -> None:
    ended = penchant("batch", ready.llm, "--users", users, "--dry-run", "--out", tmp_path / "recs")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert (found["rows"], found["shards"]) == (12, 1)
    assert found["tokens"] > 0
    assert not (tmp_path / "recs").exists()


def test_vectors_and_pairs(penchant: Call, ready: Any, users: Path, tmp_path: Path) -> None:
    pl.DataFrame({"user_id": ["u1", "u2"], "item_id": ["3", "4"]}).write_parquet(tmp_path / "pairs.parquet")
    for options, columns, rows in (
        (["--embed", "items"], ["row", "item_id", "vector", "model"], 16),
        (["--embed", "users", "--users", users], ["row", "user_id", "interest", "vector", "model"], 12),
        (["--embed", "users", "--every-user"], ["row", "user_id", "interest", "vector", "model"], 30),
        (
            ["--pairs", tmp_path / "pairs.parquet", "--method", "retrieve"],
            ["row", "user_id", "item_id", "score", "interest", "llm", "model"],
            2,
        ),
    ):
        out = tmp_path / "-".join(str(o).strip("-").replace("/", "") for o in options[:3:2])
        ended = penchant("batch", ready.run, *options, "--out", out / str(rows))
        assert ended.code == 0, ended.err
        found = pl.read_parquet(out / str(rows) / "latest" / "parts" / "*.parquet")
        assert (found.columns, len(found)) == (columns, rows)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["RUN"], "give one of --users, --pairs"),
        (["RUN", "--users", "USERS", "--pairs", "USERS", "--out", "OUT"], "give one of --users"),
        (["RUN", "--users", "USERS"], "no folder to write to"),
        (["--users", "USERS", "--out", "OUT"], "no run"),
        (["RUN", "--embed", "words", "--out", "OUT"], "cannot embed 'words'"),
        (["RUN", "--users", "nothing.parquet", "--out", "OUT"], "no Parquet file there"),
        (["RUN", "--users", "USERS", "--out", "OUT", "--shard", "0/2"], "give i/n"),
        (["RUN", "--users", "USERS", "--out", "OUT", "-k", "0"], "greater than or equal to 1"),
        (["RUN", "--users", "USERS", "--out", "USERS"], "cannot be written there"),
        (["RUN", "--users", "", "--out", "OUT"], "an empty path"),
        (["RUN", "--embed", "items", "--items", "", "--out", "OUT"], "an empty path"),
        (["RUN", "--users", "USERS", "--out", "OUT", "--workers", "2"], "--workers means nothing beside the local"),
        (["RUN", "--users", "USERS", "--dry-run", "--shard", "1/2"], "--shard means nothing beside --dry-run"),
        (["RUN", "--users", "USERS", "--dry-run", "--runner", "ray"], "--runner means nothing beside --dry-run"),
        (["RUN", "--users", "USERS", "--dry-run", "--workers", "2"], "--workers means nothing beside --dry-run"),
        (["RUN", "--pairs", "USERS", "--out", "OUT", "--deny", "1"], "deny means nothing to score"),
        (["RUN", "--embed", "users", "--users", "USERS", "--out", "OUT", "-k", "3"], "k means nothing to embed-users"),
        (["RUN", "--users", "USERS", "--out", "OUT", "--backend", "guess"], "backend"),
        (["--status", "OUT"], "holds no job"),
        (["OUT", "--users", "USERS", "--out", "OUT"], "no such run"),
    ],
)
def test_bad_input_is_one_block_and_code_2(
    penchant: Call, ready: Any, users: Path, tmp_path: Path, arguments: list[str], said: str
) -> None:
    names = {"RUN": ready.run, "USERS": users, "OUT": tmp_path / "out"}
    ended = penchant("batch", *[names.get(one, one) for one in arguments])
    assert ended.code == 2
    assert said in ended.err
    assert "remedy:" in ended.err
