"""Modules of the extra `eval`, imported when a baseline needs them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from penchant.errors import ConfigError


def needed(module: str, baseline: str) -> Any:
    """The module, or ConfigError that says how to install it."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the baseline {baseline} needs {module.partition('.')[0]}, which is not installed",
            where="baselines",
            remedy="pip install 'penchant[eval]'",
        ) from error
