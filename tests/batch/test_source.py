"""Rows from files, folders, globs and URLs: numbered alike however they are cut, and read a few at a time."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from fsspec.implementations.local import LocalFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from penchant.batch.columns import NOT_TEXT
from penchant.batch.duplicates import repeated_rows
from penchant.batch.source import NamesSource, ParquetSource
from penchant.errors import DataError, StorageError

N = 50


def frame(n: int = N) -> pl.DataFrame:
    return pl.DataFrame({"user_id": [f"u{i}" for i in range(n)], "history": [[str(i)] * (i % 3) for i in range(n)]})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three files of 20, 7 and 23 rows, in row groups of 6; the second one deeper, and one that is no Parquet."""
    root = tmp_path / "users"
    (root / "b").mkdir(parents=True)
    for name, start, stop in (("a.parquet", 0, 20), ("b/b.parquet", 20, 27), ("c.parquet", 27, 50)):
        frame()[start:stop].write_parquet(root / name, row_group_size=6)
    (root / "_SUCCESS").touch()
    return root


def rows(source: ParquetSource, *ranges: range) -> list[list[str]]:
    return [part["user_id"].to_list() for part in source.read(ranges)]


class Remembering(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """Local files behind a cache of listings, as many remote file systems keep one."""

    protocol = "remembering"
    local = LocalFileSystem()

    def ls(self, path: str, detail: bool = True, **more: Any) -> list[Any]:
        if path not in self.dircache:
            self.dircache[path] = self.local.ls(path, detail=True)
        return self.dircache[path] if detail else [one["name"] for one in self.dircache[path]]

    def info(self, path: str, **more: Any) -> Any:
        known = [one for one in self._ls_from_cache(path) or [] if one["name"] == path]
        return known[0] if known else self.local.info(path)

    def _open(self, path: str, mode: str = "rb", **more: Any) -> Any:
        return self.local.open(path, mode)

    def invalidate_cache(self, path: str | None = None) -> None:
        self.dircache.clear()


def test_a_file_system_that_remembers_is_asked_anew(folder: Path) -> None:
    fsspec.register_implementation("remembering", Remembering, clobber=True)
    url = f"remembering://{folder}"
    source = ParquetSource(url, ["user_id"])
    assert source.rows == N
    source.unchanged()
    frame(20).reverse().write_parquet(folder / "a.parquet")
    with pytest.raises(StorageError, match="changed or replaced"):
        source.unchanged()
    frame(3).write_parquet(folder / "d.parquet")
    assert ParquetSource(url, ["user_id"]).rows == N + 3


@settings(max_examples=60)
@given(st.lists(st.integers(0, N), min_size=2, max_size=12, unique=True))
def test_any_ranges_hold_their_rows(shared: Path, cuts: list[int]) -> None:
    source = ParquetSource(str(shared), ["user_id"], ["history"])
    edges = sorted(cuts)
    ranges = [range(a, b) for a, b in itertools.pairwise(edges)][::2]
    assert rows(source, *ranges) == [[f"u{i}" for i in part] for part in ranges]
    for part, found in zip(ranges, source.read(ranges), strict=True):
        assert found["history"].to_list() == [[str(i)] * (i % 3) for i in part]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shared")
    for name, start, stop in (("a.parquet", 0, 20), ("b.parquet", 20, 27), ("c.parquet", 27, 50)):
        frame()[start:stop].write_parquet(root / name, row_group_size=6)
    return root


@pytest.fixture
def in_memory(folder: Path) -> Iterator[str]:
    files = fsspec.filesystem("memory")
    for path in folder.rglob("*.parquet"):
        files.pipe(f"/users/{path.relative_to(folder)}", path.read_bytes())
    yield "memory://users"
    files.rm("/users", recursive=True)


def test_files_folders_globs_and_urls(folder: Path, in_memory: str) -> None:
    for url, n in ((folder, 50), (folder / "a.parquet", 20), (folder / "*.parquet", 43), (in_memory, 50)):
        source = ParquetSource(str(url), ["user_id"])
        assert source.rows == n
        assert len(rows(source, range(n))[0]) == n
    names = list(ParquetSource(str(folder), ["user_id"]).hashes())
    assert names == ["a.parquet", "b/b.parquet", "c.parquet"]
    assert ParquetSource(in_memory, ["user_id"]).hashes() == ParquetSource(str(folder), ["user_id"]).hashes()
    assert list(ParquetSource(str(folder / "*.parquet"), ["user_id"]).hashes()) == ["a.parquet", "c.parquet"]


def test_only_what_is_hidden_below_the_folder_is_passed_over(tmp_path: Path) -> None:
    root = tmp_path / ".hidden" / "users"
    (root / ".tmp").mkdir(parents=True)
    frame(5).write_parquet(root / "a.parquet")
    frame(5).write_parquet(root / ".a.parquet")
    frame(5).write_parquet(root / ".tmp" / "a.parquet")
    assert list(ParquetSource(str(root), ["user_id"]).hashes()) == ["a.parquet"]


@pytest.mark.parametrize("url", ["nothing", "nothing/*.parquet", "nowhere://users", "memory://no-such-folder"])
def test_what_is_not_there_is_one_error(tmp_path: Path, url: str) -> None:
    where = url if "://" in url else str(tmp_path / url)
    with pytest.raises(DataError) as caught:
        ParquetSource(where, ["user_id"])
    assert where in str(caught.value)


def test_a_file_changed_while_it_is_read_is_an_error(folder: Path) -> None:
    source = ParquetSource(str(folder), ["user_id"])
    reading = source.read([range(5), range(5, 10), range(40, 45)])
    next(reading)
    frame()[:20].reverse().write_parquet(folder / "a.parquet")
    with pytest.raises(StorageError, match=r"a\.parquet: was changed or replaced"):
        list(reading)
    with pytest.raises(StorageError, match="was changed or replaced"):
        source.unchanged()


def test_a_page_that_is_torn_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "users.parquet"
    frame(5000).write_parquet(path, compression="zstd")
    data = bytearray(path.read_bytes())
    data[200:2000] = bytes(1800)
    path.write_bytes(data)
    source = ParquetSource(str(path), ["user_id"], ["history"])
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        list(source.read([range(5000)]))


def test_reading_holds_a_few_rows_of_a_row_group_however_large_it_is(tmp_path: Path) -> None:
    peaks = []
    for n in (20_000, 200_000):
        path = tmp_path / f"{n}.parquet"
        pl.DataFrame({"user_id": [f"a-user-with-a-long-name-{i}" for i in range(n)]}).write_parquet(
            path, row_group_size=n
        )
        source = ParquetSource(str(path), ["user_id"])
        before, most = pa.total_allocated_bytes(), 0
        for _ in source.read(range(a, a + 1000) for a in range(0, n, 1000)):
            most = max(most, pa.total_allocated_bytes() - before)
        peaks.append(most)
    assert peaks[1] < peaks[0] + 2**21


# Threads that bear the process's own name are C++'s: those of Python's, polars and jemalloc have names of their own, a
# moment after they start. Those of a pool stay as they are.
COUNT_WORKERS = """
import sys, time
from pathlib import Path
from penchant.batch.source import ParquetSource
source = ParquetSource(sys.argv[1], ["user_id"], ["history"])
assert sum(len(part) for part in source.read([range(source.rows)])) == source.rows > 0
for _ in range(40):
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    found = names.count(Path("/proc/self/comm").read_text())
    if found == 1:
        break
    time.sleep(0.05)
print(found)
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
def test_reading_starts_no_thread_that_an_exit_would_find_at_work(folder: Path) -> None:
    command = [sys.executable, "-c", COUNT_WORKERS, str(folder)]
    alone = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # BLAS has a pool too
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=alone)
    assert found.stdout.strip() == "1"


def test_repeated_rows_are_found_however_many_buckets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"u{i * 7 % 400}" for i in range(1000)]
    pairs = pl.DataFrame({"user_id": names, "item_id": [str(i % 5) for i in range(1000)]})
    pairs = pairs.with_columns(
        pl.when(pl.int_range(pl.len()) % 10 == 0).then(None).otherwise("user_id").alias("user_id")
    )
    pairs.write_parquet(tmp_path / "pairs.parquet", row_group_size=64)
    source = ParquetSource(str(tmp_path / "pairs.parquet"), ["user_id", "item_id"])
    for key in (["user_id"], ["user_id", "item_id"]):
        seen: set[tuple[str, ...]] = set()
        expected = []
        for row, values in enumerate(pairs.select(key).iter_rows()):
            if None in values:
                continue
            if values in seen:
                expected.append(row)
            seen.add(values)
        for size in (250_000, 100, 7):
            monkeypatch.setattr("penchant.batch.duplicates._BUCKET", size)
            assert repeated_rows(source, key, tmp_path).tolist() == expected
    assert [p.name for p in tmp_path.iterdir()] == ["pairs.parquet"]


def test_two_columns_are_no_one_text(tmp_path: Path) -> None:
    pl.DataFrame({"user_id": ["ab", "a"], "item_id": ["c", "bc"]}).write_parquet(tmp_path / "p.parquet")
    source = ParquetSource(str(tmp_path / "p.parquet"), ["user_id", "item_id"])
    assert repeated_rows(source, ["user_id", "item_id"], tmp_path).tolist() == []


def test_names_at_hand_are_a_source(tmp_path: Path) -> None:
    source = NamesSource("user_id", ["a", "b", "a"])
    assert [f["user_id"].to_list() for f in source.read([range(0, 2), range(2, 3)])] == [["a", "b"], ["a"]]
    assert repeated_rows(source, ["user_id"], tmp_path).tolist() == [2]
    source.unchanged()


def test_files_of_unlike_types_are_one_column(tmp_path: Path) -> None:
    pl.DataFrame({"user_id": [1, 2]}).write_parquet(tmp_path / "a.parquet")
    pl.DataFrame({"user_id": ["3"], "history": [["4"]]}).write_parquet(tmp_path / "b.parquet")
    (found,) = ParquetSource(str(tmp_path), [], ["user_id", "history"]).read([range(3)])
    assert found.rows() == [("1", None, False), ("2", None, False), ("3", ["4"], False)]
    assert found.schema == {"user_id": pl.String, "history": pl.List(pl.String), NOT_TEXT: pl.Boolean}
    assert np.array_equal(found[NOT_TEXT].to_numpy(), [False] * 3)
