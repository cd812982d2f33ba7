"""What a result says of the machine it was made on."""

from __future__ import annotations

import builtins
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penchant.environment import made_by, process_mib


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what a process holds now")
def test_memory_now_rises_and_falls_and_the_peak_stays() -> None:
    before, peak = process_mib(peak=False), process_mib(peak=True)
    held = np.ones((256, 2**18), dtype=np.float32)  # 256 MiB, every page touched
    assert process_mib(peak=False) > before + 200
    risen = process_mib(peak=True)
    assert risen > max(peak, before + 200) - 10
    del held
    assert process_mib(peak=False) < before + 100
    assert process_mib(peak=True) > risen - 10  # the kernel counts pages in batches


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process's own peak")
def test_the_peak_is_of_the_process_alone() -> None:
    held = np.ones((256, 2**18), dtype=np.float32)
    code = "from penchant.environment import process_mib; print(process_mib(peak=True))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(ended.stdout) < held.nbytes / 2**20


def test_where_there_is_no_status_the_peak_is_getrusages(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = process_mib(peak=True)

    def missing(*_: Any, **__: Any) -> Any:
        raise FileNotFoundError

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", missing)
        found = process_mib(peak=True)
    assert found >= 0.9 * wanted


def test_a_result_tells_its_command_without_the_paths_of_one_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "eval" / "speed" / "x.py"
    program.parent.mkdir(parents=True)
    program.touch()
    (tmp_path / "pyproject.toml").touch()
    given = ["--data-dir", "/home/me/data", "--out=/tmp/x/out.json", "../../mine", "~/mine", "data/a b"]
    monkeypatch.setattr(sys, "argv", [str(program), *given, "--where", "year>=1990 and/or"])
    found = made_by(str(program))
    wanted = "python eval/speed/x.py --data-dir data --out=out.json mine mine 'data/a b'"
    assert found["command"] == wanted + " --where 'year>=1990 and/or'"
    assert found["commit"] is None  # this folder is no repository
    assert found["environment"]["versions"]["penchant"]
