"""A process of vLLM's ends with its owner, however that ends."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import entry_points

import psutil
import pytest

from penchant.engine.vllm_plugin import _OWNER, owned

# The owner starts a child that would sleep for long, as vLLM starts its own, names it, and is killed.
OWNER = """
import multiprocessing, os, sys, time
from penchant.engine.vllm_plugin import _OWNER, end_with_owner, owned

def child(ready, spawned):
    if spawned:
        end_with_owner()  # a plugin of vLLM's; a fork believes it was loaded
    ready.send(os.getpid())
    time.sleep(60)

if __name__ == "__main__":
    how, whose = sys.argv[1:]
    heard, ready = multiprocessing.Pipe(False)
    with owned():
        if whose != "mine":
            os.environ[_OWNER] = whose
        multiprocessing.get_context(how).Process(target=child, args=(ready, how == "spawn")).start()
        print(heard.recv(), flush=True)
    os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("how", ["spawn", "fork"])
@pytest.mark.parametrize("whose", ["mine", "1"])
def test_it_ends_with_its_owner_and_with_nobody_else(
    how: str, whose: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    script = tmp_path_factory.mktemp("owner") / "owner.py"
    script.write_text(OWNER)
    with subprocess.Popen([sys.executable, script, how, whose], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        child = psutil.Process(int(owner.stdout.readline()))
        assert owner.wait() == -9
    _, alive = psutil.wait_procs([child], timeout=20 if whose == "mine" else 2.5)
    for process in alive:
        process.kill()
    assert bool(alive) == (whose != "mine")


def test_what_is_started_later_is_not_owned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(_OWNER, raising=False)
    with owned():
        assert os.environ[_OWNER] == str(os.getpid())
    assert _OWNER not in os.environ
    monkeypatch.setenv(_OWNER, "7")
    with owned():
        pass
    assert os.environ[_OWNER] == "7"


def test_vllm_finds_it() -> None:
    (found,) = (point for point in entry_points(group="vllm.general_plugins") if point.name == "penchant")
    assert found.load().__name__ == "end_with_owner"
