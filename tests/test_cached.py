"""Cached arrays: computed once for a key, told apart by it, and never served torn."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from penchant.cached import cached_array
from penchant.errors import StorageError

Array = NDArray[Any]


class Computing:
    """Something dear to compute that counts how often it was."""

    def __init__(self, array: Array) -> None:
        self.array = array
        self.times = 0

    def __call__(self) -> Array:
        self.times += 1
        return self.array


def never() -> Array:
    raise AssertionError("it is in the cache")


def files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.zeros((0, 5), dtype=np.float32),
        np.zeros(0),
        np.array([np.nan, -np.inf, -0.0]),
        np.array(7),
    ],
    ids=["matrix", "no rows", "nothing", "odd numbers", "a number"],
)
def test_it_is_computed_once_and_comes_back_the_same(array: Array, tmp_path: Path) -> None:
    compute = Computing(array)
    first = cached_array("kind", ("key",), compute, folder=tmp_path)
    again = cached_array("kind", ("key",), compute, folder=tmp_path)
    assert compute.times == 1
    for found in (first, again):
        np.testing.assert_array_equal(found, array)
        assert found.dtype == array.dtype
        assert found.shape == array.shape
    assert len(files(tmp_path)) == 1, "one file and nothing temporary beside it"


def test_what_the_key_says_apart_is_kept_apart(tmp_path: Path) -> None:
    keys = [("a",), ("b",), ("ab", "c"), ("a", "bc"), ("abc",), ("a", ""), ("", "a"), ()]
    places = [(kind, key) for kind in ("vectors", "priors") for key in keys]
    for n, (kind, key) in enumerate(places):
        cached_array(kind, key, Computing(np.array([n])), folder=tmp_path)
    for n, (kind, key) in enumerate(places):
        assert cached_array(kind, key, never, folder=tmp_path).tolist() == [n]


def test_it_lies_in_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENCHANT_CACHE", str(tmp_path / "mine"))
    cached_array("vectors", ("key",), Computing(np.ones(3)))
    (found,) = files(tmp_path / "mine")
    assert found.parent == tmp_path / "mine" / "vectors"
    assert np.load(found, allow_pickle=False).tolist() == [1, 1, 1], "any tool opens it"


@pytest.mark.parametrize("way", ["empty", "cut", "longer", "one bit"])
def test_a_corrupt_file_is_an_error_that_names_it(way: str, tmp_path: Path) -> None:
    cached_array("kind", ("key",), Computing(np.arange(100.0)), folder=tmp_path)
    (path,) = files(tmp_path)
    data = path.read_bytes()
    flipped = bytes([*data[:-1], data[-1] ^ 1])
    path.write_bytes({"empty": b"", "cut": data[:-8], "longer": data + b"\0", "one bit": flipped}[way])
    with pytest.raises(StorageError, match="corrupt") as caught:
        cached_array("kind", ("key",), never, folder=tmp_path)
    assert caught.value.where == str(path)
    assert caught.value.remedy == "delete it"
    path.unlink()
    assert cached_array("kind", ("key",), Computing(np.ones(1)), folder=tmp_path).tolist() == [1], "the remedy works"


def fails() -> Array:
    raise ValueError("the model ran away")


def test_a_computation_that_fails_leaves_nothing_and_may_be_tried_again(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ran away"):
        cached_array("kind", ("key",), fails, folder=tmp_path)
    assert files(tmp_path) == []
    assert cached_array("kind", ("key",), Computing(np.ones(1)), folder=tmp_path).tolist() == [1]


def test_objects_are_not_kept(tmp_path: Path) -> None:
    """They could only be pickled, and a cache must never be a program."""
    with pytest.raises(ValueError, match="allow_pickle"):
        cached_array("kind", ("key",), Computing(np.array([object()])), folder=tmp_path)
    assert files(tmp_path) == []


def test_two_that_compute_the_same_at_once_do_not_trip_over_each_other(tmp_path: Path) -> None:
    """Two fits with the same model and data, started together: each has its array, and one file is kept."""
    together = threading.Barrier(8)

    def compute() -> Array:
        together.wait(timeout=60)
        return np.arange(1000.0)

    with ThreadPoolExecutor(8) as pool:
        for n in range(10):
            calls = [pool.submit(cached_array, "kind", (str(n),), compute, folder=tmp_path) for _ in range(8)]
            for call in calls:
                assert call.result().tolist() == list(range(1000))
    assert len(files(tmp_path)) == 10


def in_place_of_a_file(folder: Path) -> Path:
    (folder / "cache").write_text("a file of the user's")
    return folder / "cache"


def under_a_file(folder: Path) -> Path:
    return in_place_of_a_file(folder) / "deeper"


@pytest.mark.parametrize("place", [in_place_of_a_file, under_a_file])
def test_a_cache_that_cannot_be_a_folder_is_an_error(place: Callable[[Path], Path], tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be written there"):
        cached_array("kind", ("key",), Computing(np.ones(1)), folder=place(tmp_path))
    assert (tmp_path / "cache").read_text() == "a file of the user's"


FULL_DISK = """
import resource, sys
from pathlib import Path
import numpy as np
from penchant.cached import cached_array
from penchant.errors import StorageError

hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
for limit in (0, 1, 128, 200, 1000, 2175):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        cached_array("kind", ("key",), lambda: np.zeros((16, 32), dtype=np.float32), folder=Path(sys.argv[1]))
        sys.exit(f"{limit} bytes held an array of 2176")
    except StorageError as error:
        if "no room" not in str(error):
            raise
"""


def test_a_full_disk_never_leaves_a_torn_array_to_be_found(tmp_path: Path) -> None:
    """Written by np.save, the last few kilobytes would be lost silently and the torn file kept as good."""
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert files(tmp_path) == []
