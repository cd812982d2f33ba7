"""Arrays that are dear to compute and depend on nothing but their key, kept in the cache folder."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penchant.errors import StorageError
from penchant.fetch import cache_folder
from penchant.files import save_array, sha256_file, sha256_text, staged_file


def cached_array(
    kind: str, key: tuple[str, ...], compute: Callable[[], NDArray[Any]], *, folder: Path | None = None
) -> NDArray[Any]:
    """The array of that kind and key: from the cache, or computed and kept there.

    The file's name carries the hash of its bytes, so a torn or altered file is found: StorageError.
    """
    root = (cache_folder() if folder is None else folder) / kind
    name = sha256_text(*key)[:32]
    for path in sorted(root.glob(f"{name}-*.npy")):
        if sha256_file(path)[:16] != path.stem.partition("-")[2]:
            raise StorageError("is corrupt: its content is not what was written", where=str(path), remedy="delete it")
        return np.load(path, allow_pickle=False)
    array = compute()
    # A name of its own until the hash is known: another process may be at the same array.
    whole = root / f"{name}.{secrets.token_hex(4)}.npy"
    with staged_file(whole) as stage:
        save_array(stage, array)
        digest = sha256_file(stage)[:16]
    whole.replace(root / f"{name}-{digest}.npy")
    return array
