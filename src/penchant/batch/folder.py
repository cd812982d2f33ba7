"""A job's folder: its runs, the lock, and which run is published.

recs/lock                   one process at a time, or the parts of one array job
recs/setup/                 what a run that is being made needs (setup.py)
recs/run-0001/              a job: manifest.json and what shards.py keeps
recs/latest -> run-0001     the newest complete run, and never another
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import IO, Any

from penchant.batch.identity import Identity, differences
from penchant.errors import ConfigError, StorageError
from penchant.files import disk_full, read_json, staged_folder, write_json

LATEST, MANIFEST, SUMMARY = "latest", "manifest.json", "summary.json"
FORMAT = 1
_TRIES = 4
_RUN = re.compile(r"run-(\d{4,})")
_PART = re.compile(r"lock\.(\d+)-of-(\d+)")


def part_of(text: str | None) -> tuple[int, int]:
    """The part and the number of parts of ``--shard i/n``, i from 1; all of it where nothing is said."""
    if text is None:
        return 1, 1
    found = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise ConfigError(f"cannot read {text!r}", where="shard", remedy="give i/n with i from 1 to n, such as 1/4")
    return int(found[1]), int(found[2])


class StoppedWaiting(Exception):
    """A stop came while another part of the array job was at its set-up."""


def _never() -> bool:
    return False


class JobFolder:
    """The folder of ``--out``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    # -- locks ---------------------------------------------------------------------------------

    @contextmanager
    def locked(self, part: tuple[int, int], stopped: Callable[[], bool] = _never) -> Iterator[None]:
        """Keep every other process off this folder, or off this part of it. StorageError where one is at work;
        StoppedWaiting as of ``setting_up``.

        The locks are the kernel's and go with the process, so none is left behind by a crash.
        """
        index, parts = part
        whole = parts == 1
        with ExitStack() as held:
            with _making(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
                held.enter_context(_flock(self.path / "lock", shared=not whole))
            if not whole:
                with self.setting_up(stopped):  # two array jobs of other numbers of parts must not pass each other here
                    for other in self.path.glob("lock.*-of-*"):
                        found = _PART.fullmatch(other.name)
                        if found and int(found[2]) != parts:
                            with _flock(other):
                                pass
                    held.enter_context(_flock(self.path / f"lock.{index}-of-{parts}"))
            yield

    @contextmanager
    def setting_up(self, stopped: Callable[[], bool] = _never) -> Iterator[None]:
        """Only one part of an array job at a time makes, checks or publishes a run; the others wait.

        StoppedWaiting once ``stopped`` says so: another part's set-up may take hours.
        """
        with ExitStack() as held:
            with _making(self.path):
                held.enter_context(_flock(self.path / "lock.setup", wait=stopped))
            yield

    # -- runs ----------------------------------------------------------------------------------

    def runs(self) -> list[Path]:
        """The runs that have a manifest, oldest first."""
        if not self.path.is_dir():
            return []
        found = [p for p in self.path.iterdir() if _RUN.fullmatch(p.name) and (p / MANIFEST).is_file()]
        return sorted(found, key=lambda p: int(p.name[4:]))

    def find(self, identity: Identity) -> tuple[Path, dict[str, Any]] | None:
        """The run of this identity and its manifest: the unfinished one, or the newest complete one where it is the
        same; None where a new one has to be made. What a kill left half made is removed.

        StorageError, naming what differs, where the unfinished one is another job's.
        """
        runs = self.runs()
        for debris in self.path.glob(".run-*"):
            shutil.rmtree(debris, ignore_errors=True)
        for debris in self.path.glob(f"run-*/.{SUMMARY}.*"):
            debris.unlink()
        if runs:
            manifest = read_manifest(runs[-1])
            if manifest["identity"] == identity:
                return runs[-1], manifest
            if not (runs[-1] / SUMMARY).is_file():
                raise StorageError(
                    "holds an unfinished job that differs in: "
                    + "; ".join(differences(manifest["identity"], identity)),
                    where=str(runs[-1]),
                    remedy="run it as it was started, or give another --out, or delete that folder to give it up",
                )
        return None

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder for the block alone."""
        with _making(self.path), tempfile.TemporaryDirectory(prefix=".run-", dir=self.path) as folder:
            yield Path(folder)

    def create(self, identity: Identity, make: Callable[[Path], dict[str, Any]]) -> tuple[Path, dict[str, Any]]:
        """A new run and its manifest; ``make`` fills it and returns what goes into the manifest beside the identity."""
        runs = self.runs()
        number = int(runs[-1].name[4:]) + 1 if runs else 1
        target = self.path / f"run-{number:04d}"
        if target.exists():
            raise StorageError("stands there without a manifest", where=str(target), remedy="move it away")
        with staged_folder(target) as stage:
            manifest = {"format": FORMAT, "identity": identity, **make(stage)}
            write_json(stage / MANIFEST, manifest)
        return target, manifest

    def publish(self, run: Path) -> None:
        """Let ``latest`` point to this complete run, in one step; it never goes back to an older one."""
        link = self.path / LATEST
        if link.is_symlink():
            now = _RUN.fullmatch(os.readlink(link))
            if now and int(now[1]) >= int(run.name[4:]):
                return
        elif link.exists():
            raise StorageError("is no link of ours", where=str(link), remedy="move it away")
        with _making(link):
            for debris in self.path.glob(f".{LATEST}.*"):
                debris.unlink()
            stage = self.path / f".{LATEST}.{secrets.token_hex(4)}"
            stage.symlink_to(run.name)
            os.replace(stage, link)
            sync_folder(self.path)


def read_manifest(run: Path) -> dict[str, Any]:
    """The manifest of a run, checked to be one of ours."""
    manifest = read_json(run / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or "identity" not in manifest:
        raise StorageError(
            "is no manifest of this version", where=str(run / MANIFEST), remedy="move the folder away and start anew"
        )
    return manifest


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on disk: a rename is durable only then."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _flock(
    path: Path, *, shared: bool = False, wait: Callable[[], bool] | None = None, mode: str = "a+"
) -> Iterator[IO[str]]:
    """The lock, waited for where ``wait`` is given, until that says to stop.

    NFS makes it one of byte ranges: a shared one then needs a file open for reading, an exclusive one for writing.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    with path.open(mode, encoding="utf-8") as handle:
        for tries in count():
            try:
                fcntl.flock(handle, kind | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if wait is not None and wait():
                    raise StoppedWaiting from error
                if wait is not None or tries < _TRIES:
                    time.sleep(0.05)  # --status holds a lock for a moment, to see whether it is free
                    continue
                raise StorageError(
                    "another process is at work on this job",
                    where=str(path),
                    remedy="wait for it, look at it with --status, or give another --out",
                ) from error
        yield handle


def held(path: Path) -> bool:
    """Whether a process holds any lock of the folder."""
    for lock in [path / "lock", *path.glob("lock.*-of-*")]:
        if lock.is_file():
            try:
                # Who may not write there may still ask; what is at work holds one of these exclusively.
                with _flock(lock, shared=True, mode="r"):
                    pass
            except StorageError:
                return True
            except OSError as error:
                raise StorageError(
                    f"cannot tell whether a process is at work there ({error})",
                    where=str(lock),
                    remedy="ask on a file system that has locks, or look at progress.json in the newest run",
                ) from error
    return False


@contextmanager
def _making(path: Path) -> Iterator[None]:
    """What the system says of a folder that can't be written, as one StorageError."""
    try:
        yield
    except OSError as error:
        what = "no room to write it" if disk_full(error) else "cannot be written there"
        raise StorageError(
            f"{what} ({error})", where=str(path), remedy="free disk space, or give another --out"
        ) from error
