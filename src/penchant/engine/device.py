"""What computes, and in which numbers."""

from __future__ import annotations

import warnings
from typing import Literal

import torch

from penchant.errors import ConfigError, PenchantWarning

DType = Literal["auto", "bfloat16", "float16", "float32"]

# What torch.cpu.get_capabilities calls products of bfloat16 (the last: ARM's). Without one of them they are emulated,
# which takes many times as long as float32's (eval/speed/dtype.py).
_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")


def resolve_device(device: str) -> torch.device:
    """The torch device of that name; "auto" is CUDA where there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"unknown device {device!r}", remedy="use auto, cpu or cuda") from error
    if found.type == "meta":
        raise ConfigError("device meta holds shapes and no numbers", remedy="use auto, cpu or cuda")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda asked for, and torch sees none", remedy="use device='cpu' or 'auto'")
    return found


def computes_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 itself, and doesn't emulate it."""
    if device.type == "cpu":
        return any(torch.cpu.get_capabilities().get(name, False) for name in _BFLOAT16)
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def resolve_dtype(dtype: DType, device: torch.device) -> str:
    """The numbers that the name stands for there; "auto" is bfloat16 where the device computes it, else float32."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if computes_bfloat16(device) else "float32"


def warn_of_emulation(dtype: str, device: torch.device) -> None:
    """Say so where bfloat16 was asked for, such as by a run that was fitted elsewhere, and will be emulated."""
    if dtype == "bfloat16" and not computes_bfloat16(device):
        what = f"{device.type} only emulates bfloat16, many times slower than float32 (dtype auto chooses)"
        warnings.warn(what, PenchantWarning, stacklevel=3)


def describe_device() -> str:
    """One line on what "auto" would run on: free memory in GiB, and the numbers."""
    numbers = f"dtype auto is {resolve_dtype('auto', resolve_device('auto'))}"
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return f"{torch.cuda.get_device_name()}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free; {numbers}"
    return f"CPU, {torch.get_num_threads()} threads (torch sees no CUDA device); {numbers}"
