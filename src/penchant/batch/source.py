"""Where a job's rows come from: Parquet in files, folders, globs or fsspec URLs, read as a stream; or names at hand.

A source numbers its rows from 0 over all files in the order of their paths. Nothing here holds more than the rows
asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import fsspec
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from penchant.batch.columns import checked_types, normalised
from penchant.errors import DataError, PenchantError, StorageError
from penchant.files import sha256_text

# Rows decoded at a time: what is held of a row group, however large it is.
_DECODED = 4096
_PIECE = 1 << 20  # bytes hashed, or buffered, at a time


class Source(Protocol):
    """Rows in a fixed order, in columns that ``columns.py`` checks."""

    @property
    def rows(self) -> int:
        """How many there are."""
        ...

    def hashes(self) -> dict[str, str]:
        """What identifies the rows: a hash of each file's bytes, by its name."""
        ...

    def read(self, wanted: Iterable[range]) -> Iterator[pl.DataFrame]:
        """A frame for each range of row numbers; the ranges ascend and don't overlap."""
        ...

    def searches(self, folder: Path) -> bool:
        """Whether files that come to lie in this folder would be taken for the source's own."""
        ...

    def unchanged(self) -> None:
        """StorageError where a file is not what it was when the source was opened."""
        ...


@dataclass(frozen=True, eq=False)
class NamesSource:
    """Names that are at hand, such as all users of a run, as the one column of a source."""

    column: str
    names: Sequence[str]

    @property
    def rows(self) -> int:
        return len(self.names)

    def hashes(self) -> dict[str, str]:
        return {f"every {self.column}": sha256_text(*self.names)}

    def read(self, wanted: Iterable[range]) -> Iterator[pl.DataFrame]:
        for part in wanted:
            yield pl.DataFrame({self.column: list(self.names[part.start : part.stop])}, schema={self.column: pl.String})

    def searches(self, folder: Path) -> bool:
        return False

    def unchanged(self) -> None:
        return


@dataclass(frozen=True, slots=True)
class _File:
    name: str
    path: str
    rows: int
    stamp: tuple[object, ...]  # what changes when the file is replaced


class ParquetSource:
    """Parquet files by a path, a folder (all *.parquet under it), a glob, or an fsspec URL of any of them."""

    def __init__(self, url: str, columns: Sequence[str], optional: Sequence[str] = ()) -> None:
        """Read the files' footers. DataError where there is no such file, one is torn, or a column is missing or of a
        type that can't be read as asked; ``optional`` columns may be missing.
        """
        self.url = url
        self._columns = (*columns, *optional)
        with _readable(url):
            self._fs, self._root = fsspec.core.url_to_fs(url)
            self._fs.invalidate_cache()  # an instance is shared, and may keep an older listing
            self._files = [self._open_file(path, self._root, columns, optional) for path in self._paths(self._root)]
        if not self._files:
            raise DataError("no Parquet file there", where=url, remedy="give a .parquet file, a folder or a glob")

    @property
    def rows(self) -> int:
        return sum(file.rows for file in self._files)

    def _paths(self, root: str) -> list[str]:
        if self._fs.isfile(root):
            return [root]
        if self._fs.isdir(root):
            found = self._fs.find(root)
            return sorted(p for p in found if p.endswith(".parquet") and "/." not in p.removeprefix(root))
        return sorted(p for p in self._fs.glob(root) if self._fs.isfile(p))

    def _open_file(self, path: str, root: str, columns: Sequence[str], optional: Sequence[str]) -> _File:
        with _readable(path), self._fs.open(path, "rb") as handle:
            file = pq.ParquetFile(handle)
            checked_types(file.schema_arrow, columns, optional, path)
            name = path.removeprefix(_base(root)).lstrip("/") or path.rsplit("/", 1)[-1]
            return _File(name, path, file.metadata.num_rows, self._stamp(path))

    def searches(self, folder: Path) -> bool:
        """Whether files that come to lie in this folder would be taken for the source's own."""
        if "file" not in self._fs.protocol:
            return False
        if "**" not in self._root and not self._fs.isdir(self._root):
            return False
        return folder.resolve().is_relative_to(Path(_base(self._root)).resolve())

    def _stamp(self, path: str) -> tuple[object, ...]:
        self._fs.invalidate_cache(path)
        info = self._fs.info(path)
        return tuple(info.get(key) for key in ("size", "mtime", "ino", "ETag", "etag", "LastModified", "updated"))

    def hashes(self) -> dict[str, str]:
        """Hex SHA-256 of each file's bytes: the files are read once for it."""
        found = {}
        for file in self._files:
            digest = hashlib.sha256()
            with _readable(file.path), self._fs.open(file.path, "rb") as handle:
                while piece := handle.read(_PIECE):
                    digest.update(piece)
            found[file.name] = digest.hexdigest()
        return found

    def unchanged(self) -> None:
        for file in self._files:
            self._check(file)

    def _check(self, file: _File) -> None:
        with _readable(file.path):
            stamp = self._stamp(file.path)
        if stamp != file.stamp:
            raise StorageError(
                "was changed or replaced while the job read it",
                where=file.path,
                remedy="put the old file back and run the job again, or start a new job with another --out",
            )

    def read(self, wanted: Iterable[range]) -> Iterator[pl.DataFrame]:
        todo = list(wanted)
        at, parts = 0, []
        for file, start, batch in self._batches(todo):
            while at < len(todo) and todo[at].start < start + batch.num_rows:
                low, high = max(todo[at].start, start) - start, min(todo[at].stop - start, batch.num_rows)
                parts.append(normalised(batch.slice(low, high - low), self._columns))
                if todo[at].stop > start + batch.num_rows:
                    break  # the rest of it is in the next batch
                self._check(file)
                yield pl.concat(parts)
                at, parts = at + 1, []

    def _batches(self, todo: Sequence[range]) -> Iterator[tuple[_File, int, pa.RecordBatch]]:
        """Row groups that hold anything of ``todo``, a few rows at a time, each with the number of its first row."""
        start, first = 0, 0

        def wanted(rows: int) -> bool:
            nonlocal first
            while first < len(todo) and todo[first].stop <= start:
                first += 1
            return first < len(todo) and todo[first].start < start + rows

        for file in self._files:
            if not wanted(file.rows):
                start += file.rows
                continue
            with _readable(file.path), self._fs.open(file.path, "rb") as handle:
                parquet = pq.ParquetFile(handle, buffer_size=_PIECE, pre_buffer=False)
                columns = [name for name in self._columns if name in parquet.schema_arrow.names]
                for group in range(parquet.num_row_groups):
                    rows = parquet.metadata.row_group(group).num_rows
                    if wanted(rows):
                        done = 0
                        # Arrow's pool stays empty: a thread of it can abort the process at exit (Arrow issue 34314).
                        batches = parquet.iter_batches(_DECODED, [group], columns, use_threads=False)
                        for batch in batches:
                            yield file, start + done, batch
                            done += batch.num_rows
                    start += rows
            self._check(file)


def _base(root: str) -> str:
    """The path itself, or of a glob the folder that all it finds is in."""
    return root.split("*", 1)[0].rsplit("/", 1)[0] if "*" in root else root


@contextmanager
def _readable(path: str) -> Iterator[None]:
    """What libraries say of a file that is missing, torn or no Parquet, as one DataError."""
    try:
        yield
    except PenchantError:
        raise
    except (OSError, ValueError, pa.ArrowException, ImportError) as error:
        first: Any = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(
            f"cannot be read as Parquet: {first}",
            where=path,
            remedy="check the path and its rights, and whether the file was written to its end",
        ) from error
