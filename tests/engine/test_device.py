"""Which numbers "auto" stands for, on processors and GPUs that are not this one."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from penchant.engine.device import computes_bfloat16, describe_device, resolve_dtype, warn_of_emulation
from penchant.engine.loading import load_engine

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("has", "dtype"),
    [
        ({"avx2": True, "avx512_f": False, "avx512_bf16": False, "amx_bf16": False}, "float32"),
        ({"avx512_f": True, "avx512_bf16": False}, "float32"),
        ({"avx512_f": True, "avx512_bf16": True}, "bfloat16"),
        ({"avx512_bf16": False, "amx_bf16": True}, "bfloat16"),
        ({"architecture": "arm64", "bf16": True}, "bfloat16"),
        ({"architecture": "arm64", "bf16": False}, "float32"),
        ({}, "float32"),
    ],
)
def test_auto_is_bfloat16_where_the_processor_multiplies_it(
    has: dict[str, Any], dtype: str, byte_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    assert resolve_dtype("auto", CPU) == dtype
    assert f"dtype auto is {dtype}" in describe_device()
    engine = load_engine(byte_folder, device="cpu")
    assert engine._tree.model.dtype == getattr(torch, dtype)
    assert engine.fingerprint.endswith(f":{dtype}")
    # A run remembers the numbers and not "auto": elsewhere it is loaded as it was fitted.
    assert engine.source["dtype"] == dtype


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("computes", [True, False])
def test_numbers_that_are_asked_for_are_taken(dtype: Any, computes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": computes})
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert resolve_dtype(dtype, CPU) == dtype
        warn_of_emulation(dtype, CPU)
    slow = dtype == "bfloat16" and not computes
    assert [str(w.message) for w in warned] == slow * [
        "cpu only emulates bfloat16, many times slower than float32 (dtype auto chooses)"
    ]


@pytest.mark.parametrize("itself", [True, False])
def test_a_gpu_is_asked_what_it_computes_itself(itself: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or itself)
    assert computes_bfloat16(torch.device("cuda")) is itself


def test_a_folder_is_named_so_that_it_is_found_from_anywhere(
    byte_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").symlink_to(byte_folder)
    monkeypatch.chdir(tmp_path)
    engine = load_engine("models", device="cpu")
    assert engine.source is not None
    assert engine.source["model"] == str(tmp_path / "models")  # the name that was given: a link may move on
    monkeypatch.chdir("/")
    assert load_engine(**engine.source).fingerprint == engine.fingerprint  # type: ignore[arg-type]
