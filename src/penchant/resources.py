"""Where the files shipped with the package lie: prompts, recipe configurations, evaluation tasks.

They stand at the repository's top level, where people read and change them; the wheel carries a copy
inside the package. An editable install has no copy and reads the originals.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from penchant.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parent
_ORIGINAL = {"prompts": "prompts", "configs": "finetune/configs", "tasks": "eval/tasks"}


def config_file(path: Path) -> Path:
    """The file itself; where there is none of that name, the shipped configuration (`fit-quick`) that it names."""
    if path.is_file() or path.name != str(path):
        return path
    named = {file.stem: file for file in shipped("configs").glob("*.yaml")}
    return named.get(path.name.removesuffix(".yaml"), path)


def config_names(*, fit: bool) -> str:
    """The names that ``config_file`` knows, of `penchant fit` or of the recipes, for an error's remedy."""
    names = sorted(file.stem for file in shipped("configs").glob("*.yaml"))
    return ", ".join(name for name in names if name.startswith("fit-") == fit)


def shipped(kind: Literal["prompts", "configs", "tasks"]) -> Path:
    """The folder of that kind; ConfigError where the installation lacks it."""
    for folder in (_PACKAGE / "_shipped" / kind, _PACKAGE.parents[1] / _ORIGINAL[kind]):
        if folder.is_dir():
            return folder
    raise ConfigError(
        f"the shipped {kind} are missing",
        where=str(_PACKAGE),
        remedy="install penchant again: the wheel carries them",
    )
