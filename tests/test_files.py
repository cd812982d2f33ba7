"""Files and folders are written whole or not at all; JSON and hashes say when something is wrong."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penchant import files
from penchant.errors import StorageError
from penchant.files import (
    read_json,
    save_array,
    sha256_file,
    sha256_text,
    staged_file,
    staged_folder,
    write_json,
)

Staging = Callable[[Path], AbstractContextManager[Path]]


def contents(root: Path) -> dict[str, bytes | None]:
    """Every path under ``root`` with its bytes (None for a folder): what must not change."""
    return {str(p.relative_to(root)): p.read_bytes() if p.is_file() else None for p in sorted(root.rglob("*"))}


def fill(staging: Staging, target: Path, text: str) -> None:
    """Write ``text`` as the file, or as a file in the folder, that ``staging`` makes."""
    with staging(target) as stage:
        (stage / "inside" if stage.is_dir() else stage).write_text(text)


def break_off(staging: Staging, target: Path, error: BaseException) -> None:
    with staging(target) as stage:
        (stage / "inside" if stage.is_dir() else stage).write_text("half")
        raise error


def read(target: Path) -> str:
    return (target / "inside" if target.is_dir() else target).read_text()


both = pytest.mark.parametrize("staging", [staged_folder, staged_file])


@both
def test_it_appears_whole_with_nothing_beside_it(staging: Staging, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "er" / "target"
    with staging(target) as stage:
        assert not target.exists()
        assert stage.parent == target.parent, "a sibling, so that the rename stays within one file system"
        (stage / "inside" if stage.is_dir() else stage).write_text("new")
    assert read(target) == "new"
    assert [p.name for p in target.parent.iterdir()] == ["target"]


@both
def test_it_replaces_what_stood_there(staging: Staging, tmp_path: Path) -> None:
    target = tmp_path / "target"
    fill(staging, target, "old")
    fill(staging, target, "new")
    assert read(target) == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["target"]


@both
def test_a_link_is_replaced_and_what_it_points_to_is_left_alone(staging: Staging, tmp_path: Path) -> None:
    fill(staging, tmp_path / "mine", "mine")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    fill(staging, tmp_path / "link", "new")
    assert read(tmp_path / "link") == "new"
    assert read(tmp_path / "mine") == "mine"
    assert not (tmp_path / "link").is_symlink()


def test_a_replaced_folder_keeps_nothing_of_the_old(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "t") as stage:
        (stage / "only old").touch()
    with staged_folder(tmp_path / "t") as stage:
        (stage / "only new").touch()
    assert [p.name for p in (tmp_path / "t").iterdir()] == ["only new"]


@both
@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt(), OSError("no errno"), StorageError("own")])
@pytest.mark.parametrize("stood_there", [False, True])
def test_on_an_error_nothing_changes_and_the_error_is_the_same(
    staging: Staging, error: BaseException, stood_there: bool, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    if stood_there:
        fill(staging, target, "old")
    before = contents(tmp_path)
    with pytest.raises(type(error)) as caught:
        break_off(staging, target, error)
    assert caught.value is error
    assert contents(tmp_path) == before


@pytest.mark.parametrize("error", [OSError("pulled out"), KeyboardInterrupt("pulled out")])
@pytest.mark.parametrize("when", ["before the second move", "after the first"])
def test_the_old_folder_comes_back_when_the_new_one_cannot_move_in(
    error: BaseException, when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    fill(staged_folder, target, "old")
    replace, calls = os.replace, []

    def failing(source: Path, to: Path) -> None:
        calls.append(to)
        if len(calls) == 2 and when == "before the second move":
            raise error
        replace(source, to)  # the first moves the old folder aside, the second the new one in
        if len(calls) == 1 and when == "after the first":
            raise error

    monkeypatch.setattr(files.os, "replace", failing)
    with pytest.raises(type(error), match="pulled out"):
        fill(staged_folder, target, "new")
    assert read(target) == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["target"], "the new one is cleared away"


def test_what_stood_there_is_kept_and_named_where_another_process_was_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    fill(staged_folder, target, "old")
    replace = os.replace

    def overtaken(source: Path, to: Path) -> None:
        replace(source, to)
        if source == target:
            monkeypatch.undo()
            fill(staged_folder, target, "another's")

    monkeypatch.setattr(files.os, "replace", overtaken)
    with pytest.raises(StorageError, match="another process made it meanwhile") as caught:
        fill(staged_folder, target, "new")
    (kept,) = tmp_path.glob(".target.*.old/was")
    assert str(kept) in str(caught.value)
    assert read(kept) == "old"
    assert read(target) == "another's"


def test_files_are_readable_for_others(tmp_path: Path) -> None:
    """The temporary names are for the owner alone; a finished dataset or run may be shared."""
    fill(staged_file, tmp_path / "file", "x")
    fill(staged_folder, tmp_path / "folder", "x")
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o755


@both
@pytest.mark.parametrize("path", ["a file/target", "a file/deep/target", "n" * 300])
def test_a_path_where_nothing_can_stand_is_a_storage_error(staging: Staging, path: str, tmp_path: Path) -> None:
    (tmp_path / "a file").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(StorageError, match="cannot be written there") as caught:
        fill(staging, tmp_path / path, "x")
    assert caught.value.where == str(tmp_path / path)
    assert caught.value.remedy
    assert contents(tmp_path) == before


def test_a_file_does_not_replace_a_folder(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis").write_text("years of work")
    before = contents(tmp_path)
    with pytest.raises(StorageError, match="cannot be written there"):
        fill(staged_file, tmp_path / "folder", "x")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("path", [".", "..", "/"])
def test_the_folder_one_works_in_is_never_replaced(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(StorageError, match="cannot be replaced"):
        fill(staged_folder, Path(path), "x")
    assert contents(tmp_path) == {"here": None}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
@both
def test_a_folder_of_somebody_else_is_a_storage_error(staging: Staging, tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(StorageError, match="permission denied"):
            fill(staging, tmp_path / "target", "x")
    finally:
        tmp_path.chmod(0o755)


@both
def test_permission_denied_inside_the_block_is_a_storage_error(staging: Staging, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="permission denied") as caught, staging(tmp_path / "target"):
        raise PermissionError(13, "Permission denied")
    assert isinstance(caught.value.__cause__, PermissionError)
    assert contents(tmp_path) == {}


# One process, one limit after another: each writer meets its own full disk, in the way it would.
FULL_DISK = """
import json, resource, sys
from pathlib import Path
import numpy as np, polars as pl, torch
from safetensors.torch import save_file
from penchant.errors import StorageError
from penchant.files import save_array, staged_file, staged_folder, write_json

folder = Path(sys.argv[1])
frame = pl.DataFrame({"x": [str(n * 7919) for n in range(3000)]})

def nested(stage):
    with staged_folder(stage / "inner") as inner:
        frame.write_parquet(inner / "x")

def through_a_handle(stage):
    with (stage / "x").open("wb") as handle:
        frame.write_csv(handle)

WAYS = {
    "text": lambda stage: (stage / "x").write_text("x" * 5000),
    "bytes": lambda stage: (stage / "x").write_bytes(b"x" * 5000),
    "array": lambda stage: save_array(stage / "x", np.arange(700.0)),
    "short array": lambda stage: save_array(stage / "x", np.arange(500.0)),
    "archive": lambda stage: np.savez(stage / "x", a=np.arange(700.0)),
    "polars": lambda stage: frame.write_parquet(stage / "x"),
    "polars through a handle": through_a_handle,
    "safetensors": lambda stage: save_file({"a": torch.zeros(5000)}, stage / "x"),
    "json": lambda stage: write_json(stage / "x", ["x"] * 2000),
    "nested": nested,
}
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
said = {}
for name, write in WAYS.items():
    for limit in (0, 1, 100, 4000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with staged_folder(folder / "target") as stage:
                write(stage)
            said[f"{name}, {limit}"] = ["written"]
        except StorageError as error:
            said[f"{name}, {limit}"] = [error.what, error.where, error.remedy, str(error).count("remedy:")]
        except BaseException as error:
            said[f"{name}, {limit}"] = [repr(error)]
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
print(json.dumps(said))
"""


def test_a_full_disk_is_one_storage_error_whoever_writes(tmp_path: Path) -> None:
    fill(staged_folder, tmp_path / "target", "old")
    before = contents(tmp_path)
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert len(said) == 40
    for way, answer in said.items():
        assert len(answer) == 4, f"{way}: {answer}"
        what, where, remedy, remedies = answer
        assert "no room" in what, way
        assert where == str(tmp_path / "target"), way
        assert "free disk space" in remedy, way
        assert remedies == 1, f"{way} says it twice: {what}"
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "array",
    [
        np.arange(12, dtype=np.float32).reshape(3, 4),
        np.asfortranarray(np.arange(12.0).reshape(3, 4)),
        np.zeros((0, 7), dtype=np.float32),
        np.array([True, False]),
        np.array(3.5),
        np.arange(20)[::3],
    ],
    ids=["matrix", "fortran", "empty", "bools", "scalar", "strided"],
)
def test_an_array_is_saved_as_numpy_would(array: np.ndarray, tmp_path: Path) -> None:
    save_array(tmp_path / "ours.npy", array)
    np.save(tmp_path / "numpys.npy", array)
    assert (tmp_path / "ours.npy").read_bytes() == (tmp_path / "numpys.npy").read_bytes()


def test_an_array_of_objects_is_not_pickled(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="allow_pickle"):
        save_array(tmp_path / "x.npy", np.array([object()]))


# -- JSON --------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=10,
)


@given(value=JSON)
def test_json_comes_back_as_it_was(value: object, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "round trip.json"
    write_json(path, value)
    assert read_json(path) == value


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_is_no_finite_number_is_null(number: float, tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": [number, 1.5]})
    assert read_json(tmp_path / "x.json") == {"a": [None, 1.5]}


def test_json_is_written_for_people(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"title": "七人の侍", "a": 1})
    assert (tmp_path / "x.json").read_text(encoding="utf-8") == '{\n  "title": "七人の侍",\n  "a": 1\n}\n'


def test_what_json_cannot_hold_leaves_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": 1})
    before = contents(tmp_path)
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"a": object()})
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "not valid JSON"),
        (b'{"a": 1, "b"', "not valid JSON"),
        (b'{"a": 1}\n{"a": 2}\n', "not valid JSON"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b"\x00\x00\x00", "not valid JSON"),
    ],
    ids=["empty", "torn", "twice", "not UTF-8", "zeros"],
)
def test_torn_json_names_the_file_and_what_to_do(data: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_bytes(data)
    with pytest.raises(StorageError, match=said) as caught:
        read_json(path)
    assert caught.value.where == str(path)
    assert "corrupt" in (caught.value.remedy or "")


def test_missing_json_and_a_folder_in_its_place(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no such file"):
        read_json(tmp_path / "nope.json")
    with pytest.raises(StorageError, match="cannot be read"):
        read_json(tmp_path)


@given(cut=st.integers(0, 200))
def test_json_cut_anywhere_is_a_storage_error(cut: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    whole = json.dumps({"fingerprint": "é" * 20, "files": {"a": [1, 2.5, None, True]}, "n": {"m": {}}}).encode()
    path = tmp_path_factory.getbasetemp() / "cut.json"
    path.write_bytes(whole[: min(cut, len(whole) - 1)])
    with pytest.raises(StorageError):
        read_json(path)


# -- hashes ------------------------------------------------------------------------------------


def test_the_hash_of_texts_knows_where_one_ends() -> None:
    ways = [("ab", "c"), ("a", "bc"), ("abc",), ("abc", ""), ("", "abc"), ("a", "b", "c"), ("",), (), ("c", "ab")]
    assert len({sha256_text(*parts) for parts in ways}) == len(ways)


@given(st.lists(st.text(), max_size=4), st.lists(st.text(), max_size=4))
def test_the_hash_of_texts_is_equal_exactly_for_equal_texts(a: list[str], b: list[str]) -> None:
    assert (sha256_text(*a) == sha256_text(*b)) == (a == b)


def test_the_hash_of_texts_takes_half_a_surrogate_pair() -> None:
    """A file name from an odd file system may hold one; it must not stop a hash, nor be taken for another."""
    assert sha256_text("\ud800") != sha256_text("\ud801")


def test_the_hash_of_texts_stays_what_it_was() -> None:
    """Caches and saved runs are named by it: 8 bytes of length, little-endian, then UTF-8, for each part."""
    data = b"\x02" + bytes(7) + "é".encode() + b"\x01" + bytes(7) + b"x"
    assert sha256_text("é", "x") == hashlib.sha256(data).hexdigest()


def test_the_hash_of_a_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(range(256)) * 5000)
    assert sha256_file(tmp_path / "x") == hashlib.sha256(bytes(range(256)) * 5000).hexdigest()


def test_json_has_no_word_for_what_is_no_finite_number(tmp_path: Path) -> None:
    value = {"a": [1.5, math.nan, (np.float64("inf"), "NaN")], "b": {"c": -math.inf, "d": True}}
    write_json(tmp_path / "x.json", value)
    text = (tmp_path / "x.json").read_text()
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found == {"a": [1.5, None, [None, "NaN"]], "b": {"c": None, "d": True}}


@pytest.mark.parametrize(
    ("mask", "file", "folder"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700), (0o027, 0o640, 0o750)]
)
def test_what_is_written_is_as_open_as_the_user_wants(tmp_path: Path, mask: int, file: int, folder: int) -> None:
    was = os.umask(mask)
    try:
        write_json(tmp_path / "a.json", {})
        with staged_folder(tmp_path / "run") as stage:
            write_json(stage / "b.json", {})
        assert os.umask(mask) == mask
    finally:
        os.umask(was)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == file
    assert (tmp_path / "run").stat().st_mode & 0o777 == folder
