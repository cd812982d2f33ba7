"""Batch jobs in forked processes, each killed or hindered as asked; one JSON line in, one out.

    {"out": ..., "rows": ..., "kill_at": 7, "when": "before"}   SIGKILL (or "kill_with") at the 7th rename or sync
    {"out": ..., "rows": ..., "signal": 9, "after": 0.1}        a signal after so many seconds
    {"out": ..., "rows": ..., "fsize": 2000}                    no file may grow over so many bytes
    {"out": ..., "rows": ..., "slow": 0.2}                      the engine takes so many seconds more a call

Anything else is passed on to ``run``. The libraries are imported here and used in the forked processes only, since
their threads don't survive a fork.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from tests.fake_engine import FakeEngine

from penchant.batch import run
from penchant.errors import PenchantError
from penchant.recommend import Recommender


def watched(calls: list[str], kill_at: int | None, when: str, number: int) -> None:
    """Count every rename and sync from here on, and send this process a signal at one of them."""

    def wrap(name: str) -> None:
        real: Callable[..., Any] = getattr(os, name)

        def call(*arguments: Any, **more: Any) -> Any:
            calls.append(name)
            mine = len(calls) == kill_at
            if mine and when == "before":
                os.kill(os.getpid(), number)
            found = real(*arguments, **more)
            if mine:
                os.kill(os.getpid(), number)
            return found

        setattr(os, name, call)

    for name in ("fsync", "replace", "rename"):
        wrap(name)


def child(folder: Path, engine: FakeEngine, asked: dict[str, Any], answer: int) -> None:
    calls: list[str] = []
    watched(calls, asked.pop("kill_at", None), asked.pop("when", "before"), asked.pop("kill_with", signal.SIGKILL))
    if (limit := asked.pop("fsize", None)) is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    if (slow := asked.pop("slow", None)) is not None:
        fast = engine.score
        engine.score = lambda *a, **kw: (time.sleep(slow), fast(*a, **kw))[1]  # type: ignore[method-assign]
    code = 0
    try:
        model = Recommender.load(folder, engine)
        asked = {"shard_rows": 5, "k": 3, "max_bad_share": 0.2} | asked
        said = json.dumps(run(model, asked.pop("out"), asked.pop("rows"), **asked))
    except PenchantError as error:
        said, code = str(error), 2
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    os.write(answer, json.dumps({"said": said, "calls": len(calls)}).encode())
    os._exit(code)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    engine = FakeEngine()
    for line in sys.stdin:
        asked = json.loads(line)
        number, after = asked.pop("signal", None), asked.pop("after", 0.0)
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            try:
                child(folder, engine, asked, writing)
            except BaseException:
                traceback.print_exc()
                raise
            finally:
                os._exit(70)  # a bug: the child must not go on as its parent
        os.close(writing)
        if number is not None:
            time.sleep(after)
            os.kill(pid, number)
        with os.fdopen(reading, "rb") as pipe:
            said = pipe.read()
        _, status = os.waitpid(pid, 0)
        ended = json.loads(said) if said else {"said": "", "calls": 0}
        print(json.dumps({"status": os.waitstatus_to_exitcode(status), **ended}), flush=True)  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]))
