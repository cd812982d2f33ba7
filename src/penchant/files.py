"""Files written whole or not at all, and hashes of what they hold."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penchant.errors import StorageError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# What says that no file or folder can stand at that path.
_UNFIT = {errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EROFS, errno.EBUSY}
# polars and safetensors write in Rust: their errors carry the number in the text alone.
_RUST_OS_ERROR = re.compile(r"\(os error (\d+)\)")
# All that polars says where a Parquet file's last bytes cannot be written.
_PARQUET_TORN = "thrift: transport error"


def disk_full(error: BaseException) -> bool:
    """Whether an error, of Python's or of a library in Rust, says that there was no room to write."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    if _PARQUET_TORN in str(error):
        return True
    found = _RUST_OS_ERROR.search(str(error))
    return found is not None and int(found.group(1)) in _FULL


@contextmanager
def _as_storage_error(target: Path) -> Iterator[None]:
    try:
        yield
    except Exception as raised:
        # Staged in a stage: the outer target is the one that the user knows.
        inner = raised.__cause__ if isinstance(raised, StorageError) else None
        error = inner if isinstance(inner, Exception) else raised
        if disk_full(error):
            raise StorageError(
                f"no room to write it ({error}); nothing was left behind",
                where=str(target),
                remedy="free disk space (or raise the file-size limit) and run the same command again",
            ) from error
        if isinstance(error, OSError) and error.errno in _UNFIT:
            raise StorageError(
                f"cannot be written there ({error})", where=str(target), remedy="give another path"
            ) from error
        if isinstance(error, PermissionError):
            raise StorageError(
                f"permission denied ({error})", where=str(target), remedy="write to a folder you own"
            ) from error
        raise


def _make_parent(target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise StorageError(
            f"cannot be written there: {error.filename} is a file", where=str(target), remedy="give another path"
        ) from error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary sibling folder that becomes ``target`` if the block ends well.

    On any error the temporary folder is removed and ``target`` stays as it was. A full disk
    becomes a StorageError.
    """
    target = Path(target)
    if target.name in ("", ".."):
        raise StorageError(
            "cannot be replaced while one works in it", where=str(target), remedy="give the path of a folder in it"
        )
    with _as_storage_error(target):
        _make_parent(target)
        stage = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
        try:
            yield stage
            for path in sorted(stage.rglob("*")):
                if path.is_file():
                    _sync(path)
            stage.chmod(0o777 & ~_umask())
            if target.exists():
                _replace_folder(target, stage)
            else:
                os.replace(stage, target)
            _sync(target.parent)
        except BaseException:  # Ctrl-C too leaves nothing half written; it goes on its way
            shutil.rmtree(stage, ignore_errors=True)
            raise


def _replace_folder(target: Path, stage: Path) -> None:
    """A folder cannot be replaced in one step: the old one is moved aside, then the new one in."""
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
    old = aside / "was"
    try:
        os.replace(target, old)
        os.replace(stage, target)
    except BaseException:  # Ctrl-C too, whenever it comes
        if old.exists() and stage.exists():
            try:
                os.replace(old, target)
            except OSError as error:
                raise StorageError(
                    f"another process made it meanwhile; what stood there before is {old}",
                    where=str(target),
                    remedy="move aside one of the two",
                ) from error
        shutil.rmtree(aside)
        raise
    shutil.rmtree(aside)


def _umask() -> int:
    """What the user keeps from others: temporary files and folders are their owner's alone, whatever it says."""
    mask = os.umask(0o077)  # it cannot be read without being set
    os.umask(mask)
    return mask


@contextmanager
def staged_file(target: Path) -> Iterator[Path]:
    """Yield a temporary sibling path that becomes the file ``target`` if the block ends well."""
    target = Path(target)
    with _as_storage_error(target):
        _make_parent(target)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
        os.close(handle)
        stage = Path(name)
        try:
            yield stage
            stage.chmod(0o666 & ~_umask())
            _sync(stage)
            os.replace(stage, target)
        except BaseException:  # as above
            stage.unlink(missing_ok=True)
            raise


def save_array(path: Path, array: NDArray[Any]) -> None:
    """Write a .npy file without pickles, through Python's own file.

    np.save goes by C's stdio: what its last flush cannot write is lost without a word.
    """

    class Writer:
        def __init__(self) -> None:
            self.write = handle.write

    with path.open("wb") as handle:
        np.lib.format.write_array(Writer(), array, allow_pickle=False)


def without_nan(value: Any) -> Any:
    """NaN and infinities, which JSON has no word for, as None, at any depth."""
    if isinstance(value, dict):
        return {name: without_nan(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented UTF-8 JSON, atomically; what is no finite number becomes null."""
    text = json.dumps(without_nan(value), indent=2, ensure_ascii=False, sort_keys=False, allow_nan=False)
    with staged_file(path) as stage:
        stage.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file of ours; a missing or torn one is a StorageError."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StorageError(
            "no such file", where=str(path), remedy="check the path; the folder may not be one of ours"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StorageError(
            f"not valid JSON ({error})", where=str(path), remedy="the file is corrupt: make the folder again"
        ) from error
    except OSError as error:
        raise StorageError(
            f"cannot be read ({error})", where=str(path), remedy="check the path and your rights"
        ) from error


def is_text(text: str) -> bool:
    """Whether a file can hold it: Python's texts may have half a surrogate pair, from bytes that were no UTF-8."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in pieces."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sha256_text(*parts: str) -> str:
    """Hex SHA-256 over parts, each length-prefixed so that ("ab", "c") and ("a", "bc") differ."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()
