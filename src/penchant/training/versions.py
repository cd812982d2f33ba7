"""The versions of what a run was trained with."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = ("penchant", "torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes", "numpy")


def versions() -> dict[str, str]:
    """Python's and the packages' that are installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
