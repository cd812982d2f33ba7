"""eval/speed/gpu.sh, with a stub in the measurements' place: it ends in time, and fails where a result is missing."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "eval" / "speed" / "gpu.sh"
NAMES = {"speed-vllm-135m.json", "speed-vllm-0.4b.json", "speed-vllm-1b.json"}
# Writes what --out names, or, for a model in $SLOW, takes longer than anybody has.
STUB = """#!/usr/bin/env bash
[[ $1 == */vllm_engine.py ]] || exit 0
while [[ $1 != --out ]]; do shift; done
for slow in $SLOW; do [[ $2 == *$slow* ]] && exec sleep 60; done
echo '{}' > "$2"
"""


def call(tmp_path: Path, slow: str, **environment: str) -> subprocess.CompletedProcess[str]:
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    out = tmp_path / "results"
    return subprocess.run(
        ["bash", str(SCRIPT), str(out)],
        env=os.environ | {"PYTHON": str(stub), "SLOW": slow} | environment,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )


def test_every_models_result_is_there(tmp_path: Path) -> None:
    ended = call(tmp_path, "")
    assert (ended.returncode, ended.stdout) == (0, f"{tmp_path / 'results'}\n")
    assert {path.name for path in (tmp_path / "results").iterdir()} == NAMES


@pytest.mark.parametrize("slow", ["135m", "135m 0.4b 1b"])
def test_it_ends_in_time_and_fails_where_a_result_is_missing(tmp_path: Path, slow: str) -> None:
    """Results of an earlier run are none of this one's."""
    (tmp_path / "results").mkdir()
    for name in NAMES:
        (tmp_path / "results" / name).write_text("old")
    begun = time.monotonic()
    ended = call(tmp_path, slow, LIMIT="16")
    assert time.monotonic() - begun < 16
    assert ended.returncode == 1
    missing = [name for name in NAMES if f"{name} was not written" in ended.stderr]
    assert sorted(missing) == sorted(f"speed-vllm-{size}.json" for size in slow.split())
    for name in NAMES:
        assert (tmp_path / "results" / name).read_text() == ("old" if name in missing else "{}\n")
