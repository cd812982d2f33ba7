"""Both scripts for a GPU, with a stub in the programs' place: they end in time, and fail where a result is missing."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[1]
NAMES = {
    "eval/speed/gpu.sh": ["speed-vllm-135m.json", "speed-vllm-0.4b.json", "speed-vllm-1b.json"],
    "finetune/gpu_suite.sh": [
        *("finetuning-next_item.json", "finetuning-preference.json", "finetuning-choose.json"),
        *("tallrec-movie.json", "speed-training.json"),
    ],
}
# Writes what --out names, or, for one that is in $SLOW, takes longer than anybody has.
STUB = """#!/usr/bin/env bash
[[ $1 == *eval/*.py ]] || exit 0
[[ $1 == */random_model.py ]] && exit 0
while [[ $1 != --out ]]; do shift; done
for slow in $SLOW; do [[ $2 == *$slow* ]] && exec sleep 60; done
echo '{}' > "$2"
"""


def call(script: str, tmp_path: Path, slow: str, **environment: str) -> subprocess.CompletedProcess[str]:
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    out = tmp_path / "results"
    given = {"PYTHON": str(stub), "SLOW": slow, "DATA": "data", "TALLREC": "data"}
    return subprocess.run(
        ["bash", str(TOP / script), str(out)],
        env=os.environ | given | environment,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )


@pytest.mark.parametrize("script", NAMES)
def test_every_result_is_there(tmp_path: Path, script: str) -> None:
    ended = call(script, tmp_path, "")
    assert (ended.returncode, ended.stdout) == (0, f"{tmp_path / 'results'}\n")
    assert {path.name for path in (tmp_path / "results").iterdir()} == set(NAMES[script])


@pytest.mark.parametrize(
    ("script", "slow"),
    [
        ("eval/speed/gpu.sh", "135m"),
        ("eval/speed/gpu.sh", "135m 0.4b 1b"),
        ("finetune/gpu_suite.sh", "next_item"),
        ("finetune/gpu_suite.sh", "next_item preference choose tallrec speed"),
    ],
)
def test_it_ends_in_time_and_fails_where_a_result_is_missing(tmp_path: Path, script: str, slow: str) -> None:
    """Results of an earlier run are none of this one's."""
    (tmp_path / "results").mkdir()
    for name in NAMES[script]:
        (tmp_path / "results" / name).write_text("old")
    begun = time.monotonic()
    ended = call(script, tmp_path, slow, LIMIT="16")
    assert time.monotonic() - begun < 16
    assert ended.returncode == 1
    missing = [name for name in NAMES[script] if f"{name} was not written" in ended.stderr]
    assert missing == [name for name in NAMES[script] if any(part in name for part in slow.split())]
    for name in NAMES[script]:
        assert (tmp_path / "results" / name).read_text() == ("old" if name in missing else "{}\n")
