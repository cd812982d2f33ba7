"""An index on disk: plain arrays, and a manifest with their checksums and the model that made the vectors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penchant import __version__
from penchant.errors import ConfigError, ModelError, StorageError
from penchant.files import read_json, save_array, sha256_file, staged_folder, write_json

FORMAT = 1
_MANIFEST = "manifest.json"
_LIVE = "live.npy"  # in every index, and in no other folder of ours


@contextmanager
def index_written(folder: Path, kind: str, model: str, facts: dict[str, Any]) -> Iterator[Path]:
    """Yield a folder to write the index's files into; with its manifest it takes the place of ``folder``, whole.

    ConfigError where no ``model`` is named; StorageError where ``folder`` holds something that is no index.
    """
    if not model:
        raise ConfigError(
            "the index does not say which model made its vectors",
            where=str(folder),
            remedy="name the model's hash when the index is made: model=...",
        )
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or _is_index(folder))):
        raise StorageError(
            "holds something that is no index, and saving would replace it",
            where=str(folder),
            remedy="give a new folder",
        )
    with staged_folder(folder) as stage:
        yield stage
        files = {path.name: sha256_file(path) for path in sorted(stage.iterdir())}
        write_json(
            stage / _MANIFEST,
            {"format": FORMAT, "penchant": __version__, "index": kind, "model": model, **facts, "files": files},
        )


def read_index(folder: Path, kind: str, model: str) -> dict[str, Any]:
    """The manifest of a saved index, once its files are whole.

    StorageError where a file is missing, torn or not of this index; ModelError where another model made the
    vectors than ``model``.
    """
    if not folder.is_dir():
        raise StorageError("no such index", where=str(folder), remedy="save one there first")
    manifest = read_json(folder / _MANIFEST)
    if not isinstance(manifest, dict) or "index" not in manifest or not isinstance(manifest.get("files"), dict):
        raise StorageError("is not an index", where=str(folder), remedy="give the folder of a saved index")
    if (manifest["index"], manifest.get("format")) != (kind, FORMAT):
        raise StorageError(
            f"is an index {manifest['index']!r} of format {manifest.get('format')}, not {kind!r} of format {FORMAT}",
            where=str(folder),
            remedy="load it with the class that saved it, or make it again",
        )
    if manifest.get("model") != model:
        raise ModelError(
            f"the index holds vectors of the model {manifest.get('model')}, and the queries come from {model}",
            where=str(folder),
            remedy="load the model that made the index, or make the index again",
        )
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file() or sha256_file(path) != expected:
            state = "is corrupt" if path.is_file() else "is missing"
            raise StorageError(state, where=str(path), remedy="make the index again")
    return manifest


def save_arrays(stage: Path, **arrays: NDArray[Any]) -> None:
    """Write each array as NAME.npy."""
    for name, array in arrays.items():
        save_array(stage / f"{name}.npy", array)


def load_array(path: Path, *, mmap: bool = False) -> NDArray[Any]:
    """An array of a saved index, in memory or read from the file as it is needed."""
    try:
        return np.load(path, mmap_mode="r" if mmap else None, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise StorageError(f"cannot be read ({error})", where=str(path), remedy="make the index again") from error


def _is_index(folder: Path) -> bool:
    return (folder / _MANIFEST).is_file() and (folder / _LIVE).is_file()
