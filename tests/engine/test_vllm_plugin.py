"""A process of vLLM's ends with its owner, however that ends."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points

import psutil
import pytest

# The owner starts a child that would sleep for ever, names it, and is killed, or lets it be.
OWNER = """
import os, subprocess, sys
from penchant.engine.vllm_plugin import OWNER
os.environ[OWNER] = sys.argv[1] or str(os.getpid())
run = "end_with_owner(); print(flush=True); time.sleep(60)"
child = "import time; from penchant.engine.vllm_plugin import end_with_owner; " + run
process = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE)
process.stdout.readline()  # it has looked
print(process.pid, flush=True)
os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("owner", ["", "1", "none"])
def test_it_ends_with_its_owner_and_with_nobody_else(owner: str) -> None:
    told = subprocess.run([sys.executable, "-c", OWNER, owner], check=False, stdout=subprocess.PIPE, text=True)
    assert told.returncode == -9
    child = psutil.Process(int(told.stdout))
    _, alive = psutil.wait_procs([child], timeout=10 if not owner else 2.5)
    for process in alive:
        process.kill()
    assert bool(alive) == bool(owner)


def test_vllm_finds_it() -> None:
    (found,) = (point for point in entry_points(group="vllm.general_plugins") if point.name == "penchant")
    assert found.load().__name__ == "end_with_owner"
