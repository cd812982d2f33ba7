"""A file of records that only grows: what was appended is there after a crash, whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import weakref
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from penchant.errors import StorageError

# The key of the first line, which says of which run the others are.
_RUN = "run"
# The journals of this process that have the lock of their file.
_HOLDERS: weakref.WeakSet[Journal] = weakref.WeakSet()


class Journal:
    """One JSON record a line, each with its checksum, synced to disk before ``append`` returns.

    A last line that a crash cut off is dropped and counted in ``torn``; a bad line before the last is a StorageError.
    One process at a time may append: the file is locked from the first append on, and the lock goes with the process.
    ``follows`` is how many records its owner knows: appending to a file that holds others, or that was replaced since,
    is a StorageError, for what is appended means nothing there. ``run`` says what the records are of: it stands in the
    first line, and a file of another is refused.
    """

    def __init__(self, path: Path, follows: int | None = None, run: str = "") -> None:
        self.path = path
        self.torn = 0
        self._run = run
        self._follows = follows
        self._is = None if follows is None else _identity(path)
        self._handle: io.FileIO | None = None
        self._end = 0  # bytes of the file, once it is open

    def read(self) -> list[dict[str, Any]]:
        """All records, oldest first; none where there is no file. StorageError where they are another run's."""
        run, records, _ = self._read()
        if self._not_ours(run):
            raise StorageError(
                "holds the updates of another run",
                where=str(self.path),
                remedy="put back this run's own, or make an empty file of that name to go on without updates",
            )
        return records

    def append(self, record: dict[str, Any]) -> None:
        """Write one record and wait until it is on disk; StorageError where it can't be, or another process writes."""
        handle = self._open()
        if _identity(self.path) != _identity(handle.fileno()):
            raise self._changed("was replaced")
        if os.fstat(handle.fileno()).st_size != self._end:  # a fork has the same lock
            raise self._changed("was written to")
        start, line = self._end, _line(record)
        if not start and self._run:
            line = _line({_RUN: self._run}) + line
        try:
            # No buffer: what could not be written must not be written later.
            if handle.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(handle.fileno())
            self._end += len(line)
        except OSError as error:
            # What was written of it would stand before later records, where nothing may be torn.
            handle.truncate(start)
            handle.seek(start)
            raise StorageError(
                f"cannot be written: {error}", where=str(self.path), remedy="make room, or save the run elsewhere"
            ) from error

    def close(self) -> None:
        if self._handle is not None:
            self._handle.close()
            self._handle = None

    def holds(self, path: Path) -> bool:
        """Whether this journal has the lock of the file at ``path``."""
        return self._handle is not None and _identity(self._handle.fileno()) == _identity(path)

    def _not_ours(self, run: str) -> bool:
        """Whether a file says that it is another run's; one of before says nothing, and so does an empty one."""
        return bool(run and self._run) and run != self._run

    def _changed(self, how: str) -> StorageError:
        return StorageError(
            f"{how} by another process since this one opened the run",
            where=str(self.path),
            remedy="open the run again, and update it there",
        )

    def _open(self) -> io.FileIO:
        if self._handle is not None:
            return self._handle
        try:
            handle = self.path.open("ab", buffering=0)
        except OSError as error:
            raise StorageError(
                f"cannot be written: {error}", where=str(self.path), remedy="check the folder's permissions"
            ) from error
        with ExitStack() as stack:
            stack.callback(handle.close)
            try:
                free = _lock(handle)
            except OSError as error:
                raise StorageError(
                    f"cannot be locked: {error}",
                    where=str(self.path),
                    remedy="keep a run that is updated on a file system that has locks",
                ) from error
            if not free:
                raise _busy(self.path)
            run, records, self._end = self._read()
            if self._not_ours(run) or (self._is is not None and self._is != _identity(handle.fileno())):
                raise self._changed("was replaced")
            if self._follows is not None and self._follows != len(records):
                raise self._changed("was written to")
            handle.truncate(self._end)  # a line cut off by a crash
            handle.seek(self._end)
            stack.pop_all()
        weakref.finalize(self, handle.close)
        self._handle = handle
        _HOLDERS.add(self)
        return handle

    def _read(self) -> tuple[str, list[dict[str, Any]], int]:
        """Of which run the records are (an empty text where that isn't said), the records, and how many bytes of the
        file they take.
        """
        if not self.path.is_file():
            return "", [], 0
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise StorageError(f"cannot be read: {error}", where=str(self.path)) from error
        records, whole = [], 0
        lines = data.splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            record = _record(line)
            if record is None:
                if number < len(lines):
                    raise StorageError(
                        "is corrupt: a line is not what was written",
                        where=f"{self.path}, line {number}",
                        remedy="put the file back from a copy, or remove it to lose all updates since the fit",
                    )
                self.torn = 1
                break
            records.append(record)
            whole += len(line)
        if records and list(records[0]) == [_RUN]:
            return str(records[0][_RUN]), records[1:], whole
        return "", records, whole


@contextmanager
def unchanging(path: Path) -> Iterator[None]:
    """No other process appends to the journal at ``path`` meanwhile; StorageError where one has its lock.

    Where there is no file, or where the file system has no locks, nothing is held.
    """
    if any(journal.holds(path) for journal in list(_HOLDERS)):
        yield  # this process has the lock, and a second handle wouldn't get it
        return
    with ExitStack() as stack:
        while path.is_file():
            try:
                handle = stack.enter_context(path.open("r+b", buffering=0))
            except OSError as error:
                raise StorageError(
                    f"cannot be written: {error}", where=str(path), remedy="check the folder's permissions"
                ) from error
            try:
                free = _lock(handle)
            except OSError:
                break
            if not free:
                raise _busy(path)
            if _identity(handle.fileno()) == _identity(path):  # and not one that was replaced a moment ago
                break
        yield


def _lock(handle: io.FileIO) -> bool:
    """Lock the file until it is closed; False where another handle has it, OSError where there are no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _busy(path: Path) -> StorageError:
    return StorageError(
        "another process is updating this run",
        where=str(path),
        remedy="send updates to that process, or work on a copy (save)",
    )


def _identity(file: Path | int) -> tuple[int, int] | None:
    """Which file that is, whatever its name; None where there is none."""
    try:
        found = os.stat(file)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def write_journal(path: Path, records: Sequence[dict[str, Any]], run: str) -> None:
    """A journal of these records of a run, in a folder that is being made."""
    path.write_bytes(b"".join(map(_line, [{_RUN: run}, *records])))


def same_records(one: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> bool:
    """Whether a journal of the one would be a journal of the other."""
    return len(one) == len(other) and all(_line(a) == _line(b) for a, b in zip(one, other, strict=True))


def _line(record: dict[str, Any]) -> bytes:
    text = json.dumps(record, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return f"{zlib.crc32(text.encode()):08x} {text}\n".encode()


def _record(line: bytes) -> dict[str, Any] | None:
    """What a whole line holds, None where it is torn."""
    head, _, text = line.partition(b" ")
    if not line.endswith(b"\n") or head != f"{zlib.crc32(text[:-1]):08x}".encode():
        return None
    found = json.loads(text)
    return found if isinstance(found, dict) else None
