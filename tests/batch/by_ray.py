"""Jobs in processes of their own, and the Ray workers of one."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

RAY = ("--runner", "ray", "--workers", "2")


def begun(run: Path, users: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    """``penchant batch`` in a process of its own: what Ray does to a process is no matter of the tests'."""
    command = [sys.executable, "-m", "penchant", "batch", str(run), "--users", str(users), "--out", str(out)]
    return subprocess.Popen(
        [*command, "--shard-rows", "2", "--threads", "1", *more],
        env=os.environ | {"OMP_NUM_THREADS": "1", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(job: subprocess.Popen[str], out: Path, n: int) -> int:
    """Wait until n shards are there, or the job has ended; how many there are."""
    records = out / "run-0001" / "records"
    while (found := len(list(records.glob("*.json")))) < n and job.poll() is None:
        time.sleep(0.01)
    return found


def actors(of: int) -> list[psutil.Process]:
    """The processes of a job's workers."""
    found = []
    for child in psutil.Process(of).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended while we looked
            if "ShardActor" in " ".join(child.cmdline()):
                found.append(child)
    return found


def alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
