"""Folders of models and adapters: found by name, looked at before anything is loaded, identified by their contents."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Literal

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from penchant.errors import ModelError
from penchant.fetch import KNOWN, fetch
from penchant.files import sha256_file

_MODELS = sorted(name for name, known in KNOWN.items() if known.kind == "model")

# Files that decide what a model says. No pickled weights: safetensors only.
_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
# Past this size a file is identified by its length and 1 MiB windows spread over it, not by all of it.
_HASH_WHOLE = 64 * 2**20
_WINDOWS = 16


def resolve_model(model: str | Path) -> Path:
    """The local folder of a model: fetched by name, a folder as it is, or a snapshot of a hub id."""
    return fetch(model) if isinstance(model, str) and model in _MODELS else _resolve(model, "model")


def resolve_adapter(adapter: str | Path) -> Path:
    """The local folder of a peft adapter: a folder as it is, or a snapshot of a hub id."""
    return _resolve(adapter, "adapter")


def lasting(given: str | Path, folder: Path) -> str:
    """A name as it is, and a folder by its absolute path: a run is opened from other places than it was fitted at.

    ``folder`` is what the name was resolved to.
    """
    return str(folder.absolute() if Path(given) == folder else given)


def _resolve(name: str | Path, kind: Literal["model", "adapter"]) -> Path:
    if os.path.isdir(name):
        return Path(name)
    try:
        return Path(huggingface_hub.snapshot_download(str(name), allow_patterns=_PATTERNS))
    except HFValidationError as error:
        raise ModelError(
            f"no such {kind} folder", where=str(name), remedy="give an existing folder, or a hub id like owner/name"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise ModelError(
            f"no such {kind} folder, and the hub did not give it: {str(error).splitlines()[0]}",
            where=str(name),
            remedy=f"check the name and the network, or use one of: {', '.join(_MODELS)}",
        ) from error


def require_weights(folder: Path) -> None:
    """ModelError where a folder is no model's, or its weights are not safetensors."""
    if not (folder / "config.json").is_file():
        raise ModelError("has no config.json", where=str(folder), remedy="give a model's folder, not its parent")
    if not any(folder.glob("*.safetensors")):
        others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".gguf"))
        raise ModelError(
            f"has no *.safetensors weights (found {', '.join(others) or 'none in other formats either'})",
            where=str(folder),
            remedy="save the model with save_pretrained; pickled weights are not loaded",
        )


def fingerprint_of(folder: Path) -> str:
    """16 hex digits over the names and contents of the files that decide what a model says."""
    digest = hashlib.sha256()
    files = {p for pattern in _PATTERNS for p in folder.glob(pattern) if p.is_file() and p.name != "manifest.json"}
    for path in sorted(files, key=lambda p: p.name):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        if size <= _HASH_WHOLE:
            digest.update(sha256_file(path).encode())
            continue
        with path.open("rb") as handle:
            for window in range(_WINDOWS):
                handle.seek((size - 2**20) * window // (_WINDOWS - 1))
                digest.update(handle.read(2**20))
    return digest.hexdigest()[:16]
