"""Penchant: a causal language model as a recommender that people can run.

Names are imported when first used, so that ``import penchant`` and ``penchant --help`` load no torch.
"""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

__version__ = version("penchant")

_HOMES = {
    "Dataset": "penchant.data.dataset",
    "Split": "penchant.data.split",
    "leave_last_out": "penchant.data.split",
    "global_time": "penchant.data.split",
    "load_engine": "penchant.engine.loading",
    "Recommender": "penchant.recommend",
    "FitConfig": "penchant.run_folder",
    "Templates": "penchant.prompt",
    "CatalogTrie": "penchant.catalog_trie",
    "evaluate": "penchant.evaluation.evaluate",
    "PenchantError": "penchant.errors",
}

__all__ = ["__version__", *_HOMES]  # noqa: PLE0604 - they are strings

if TYPE_CHECKING:
    from penchant.catalog_trie import CatalogTrie as CatalogTrie
    from penchant.data.dataset import Dataset as Dataset
    from penchant.data.split import Split as Split
    from penchant.data.split import global_time as global_time
    from penchant.data.split import leave_last_out as leave_last_out
    from penchant.engine.loading import load_engine as load_engine
    from penchant.errors import PenchantError as PenchantError
    from penchant.evaluation.evaluate import evaluate as evaluate
    from penchant.prompt import Templates as Templates
    from penchant.recommend import Recommender as Recommender
    from penchant.run_folder import FitConfig as FitConfig


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'penchant' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
