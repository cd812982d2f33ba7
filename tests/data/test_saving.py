"""Dataset.save and load, the content hash, and round trips through every format."""

from __future__ import annotations

import csv
import hashlib
import json
import struct
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penchant.data.dataset import Dataset
from penchant.errors import DataError, StorageError

HEAD = "user_id,item_id,timestamp\n"
ITEMS = "item_id,title\n1,Heat\n2,Alien\n10,Brazil\n"


Put = Callable[[str, str], Path]


@pytest.fixture
def saved(put: Put, tmp_path: Path) -> tuple[Dataset, Path]:
    log = put("log.csv", "user_id,item_id,timestamp,rating,review\nu,1,5,4,fine\nu,2,6,,\n")
    dataset = Dataset.read(log, put("items.csv", ITEMS))
    return dataset, dataset.save(tmp_path / "saved")


def test_saved_and_loaded_are_equal(saved: tuple[Dataset, Path]) -> None:
    dataset, folder = saved
    loaded = Dataset.load(folder)
    assert loaded.interactions.equals(dataset.interactions)
    assert loaded.items.equals(dataset.items)
    assert loaded.report == dataset.report
    assert loaded.content_hash == dataset.content_hash
    assert Dataset(loaded.interactions, loaded.items).content_hash == dataset.content_hash
    assert repr(loaded) == "Dataset(1 users, 3 items, 2 interactions, 1970-01-01 to 1970-01-01)"


def test_the_manifest_says_what_is_in_the_folder(saved: tuple[Dataset, Path]) -> None:
    dataset, folder = saved
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["counts"] == {"users": 1, "items": 3, "interactions": 2}
    assert manifest["time_range"] == ["1970-01-01T00:00:05+00:00", "1970-01-01T00:00:06+00:00"]
    assert manifest["content_hash"] == dataset.content_hash
    assert manifest["report"]["rows"] == {"interactions": 2, "items": 3}
    assert sorted(path.name for path in folder.iterdir()) == ["interactions.parquet", "items.parquet", "manifest.json"]


def test_saving_replaces_a_dataset_and_nothing_else(saved: tuple[Dataset, Path], tmp_path: Path) -> None:
    dataset, folder = saved
    dataset.save(folder)
    assert Dataset.load(folder).content_hash == dataset.content_hash
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="holds other files"):
        dataset.save(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_missing_and_foreign_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such dataset folder"):
        Dataset.load(tmp_path / "nope")
    with pytest.raises(DataError, match="not a dataset folder"):
        Dataset.load(tmp_path)
    (tmp_path / "manifest.json").write_text('{"kind": "something else"}')
    with pytest.raises(DataError, match="not a dataset folder"):
        Dataset.load(tmp_path)
    (tmp_path / "manifest.json").write_text('{"kind": "penchant dataset", "version": 99}')
    with pytest.raises(DataError, match="dataset format 99"):
        Dataset.load(tmp_path)


def test_corrupt_folders(saved: tuple[Dataset, Path]) -> None:
    _, folder = saved
    manifest = (folder / "manifest.json").read_text()
    for broken, said in (
        (manifest.replace('"users": 1', '"users": 2'), "its manifest says"),
        (manifest.replace('"report"', '"rapport"'), "lacks report"),
        (manifest[:50], "not valid JSON"),
    ):
        (folder / "manifest.json").write_text(broken)
        with pytest.raises(StorageError, match=said):
            Dataset.load(folder)
    (folder / "manifest.json").write_text(manifest)
    data = (folder / "items.parquet").read_bytes()
    (folder / "items.parquet").write_bytes(data[:-20] + b"x" + data[-19:])
    with pytest.raises(StorageError, match="SHA-256"):
        Dataset.load(folder)
    (folder / "items.parquet").unlink()
    with pytest.raises(StorageError, match="the file is missing"):
        Dataset.load(folder)


FULL_DISK = """
import resource, sys
import polars as pl
from penchant.data.dataset import Dataset
from penchant.errors import StorageError
ids = [str(n) for n in range(20_000)]
dataset = Dataset(
    pl.DataFrame({"user_id": ids, "item_id": ids, "timestamp": list(range(20_000))}),
    pl.DataFrame({"item_id": ids, "title": ids}),
)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    dataset.save(sys.argv[1])
except StorageError as error:
    sys.exit(0 if "no room" in str(error) and error.remedy else 3)
sys.exit(4)
"""


def test_a_full_disk_leaves_nothing(saved: tuple[Dataset, Path], tmp_path: Path) -> None:
    dataset, folder = saved
    before = sorted(tmp_path.rglob("*"))
    for target in (tmp_path / "new", folder):
        command = [sys.executable, "-c", FULL_DISK, str(target)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert sorted(tmp_path.rglob("*")) == before
    assert Dataset.load(folder).content_hash == dataset.content_hash


# Lone surrogates are no text.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)
TITLE = TEXT.map(lambda text: "t" + text)
AWKWARD = [
    'say "hi", now',
    "two\nlines",
    "tab\there",
    "🎬 café",
    "nul\0byte",
    "<|im_end|>",
    "'",
    '"',
    "a;b|c",
    "\ufeff",
]


def write_delimited(path: Path, frame: pl.DataFrame, mark: str) -> None:
    # csv.writer does not quote a lone carriage return by itself.
    returns = any("\r" in value for row in frame.iter_rows() for value in row if isinstance(value, str))
    with open(path, "w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(
            handle, delimiter=mark, lineterminator="\n", quoting=csv.QUOTE_ALL if returns else csv.QUOTE_MINIMAL
        )
        writer.writerow(frame.columns)
        writer.writerows(["" if value is None else value for value in row] for row in frame.iter_rows())


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(TITLE, min_size=1, max_size=6), st.lists(TEXT | st.none(), min_size=6, max_size=6))
def test_the_same_content_in_any_format_is_the_same_dataset(
    tmp_path: Path, titles: list[str], notes: list[str | None]
) -> None:
    titles = titles + ["t" + text for text in AWKWARD]
    count = len(titles)
    items = pl.DataFrame(
        {
            "item_id": list(range(count)),
            "title": titles,
            "note": [notes[n % 6] for n in range(count)],
            "price": [n / 4 for n in range(count)],
        },
        schema_overrides={"note": pl.String},
    )
    log = pl.DataFrame({"user_id": [7] * count, "item_id": list(range(count)), "timestamp": list(range(count))[::-1]})
    log = log.with_columns(rating=pl.col("item_id") / 2)
    for name, mark in (("csv", ","), ("tsv", "\t")):
        write_delimited(tmp_path / f"log.{name}", log, mark)
        write_delimited(tmp_path / f"items.{name}", items, mark)
    for frame, stem in ((log, "log"), (items, "items")):
        frame.write_ndjson(tmp_path / f"{stem}.jsonl")
        frame.write_parquet(tmp_path / f"{stem}.parquet")
    names = ("csv", "tsv", "jsonl", "parquet")
    read = [Dataset.read(tmp_path / f"log.{name}", tmp_path / f"items.{name}") for name in names]
    assert read[0].items["title"].to_list() == titles
    assert len({dataset.content_hash for dataset in [*read, Dataset.read(log, items)]}) == 1
    loaded = Dataset.load(read[0].save(tmp_path / "saved"))
    assert loaded.items.equals(read[0].items)
    assert loaded.interactions.equals(read[0].interactions)


def changed(frame: pl.DataFrame, column: str, values: list[Any]) -> pl.DataFrame:
    return frame.with_columns(pl.Series(column, values, dtype=frame.schema[column]))


def test_the_hash_sees_every_change_and_only_changes() -> None:
    log = pl.DataFrame({"user_id": ["a", "b"], "item_id": ["1", "1"], "timestamp": [1, 2], "rating": [1.0, None]})
    items = pl.DataFrame({"item_id": ["1", "2"], "title": ["ab", "c"], "note": [None, "x"]})
    base = Dataset(log, items).content_hash
    assert Dataset(log.select(reversed(log.columns)), items).content_hash == base
    assert Dataset(log.with_columns(pl.col("timestamp").cast(pl.Int32)), items).content_hash == base
    others = [
        Dataset(log[::-1], items),
        Dataset(changed(log, "timestamp", [1, 3]), items),
        Dataset(changed(log, "rating", [1.0, 0.0]), items),
        Dataset(log, changed(items, "title", ["a", "bc"])),
        Dataset(log, changed(items, "note", ["", "x"])),
        Dataset(log, changed(items, "note", ["x", None])),
        Dataset(log, items.rename({"note": "text"})),
        Dataset(log.drop("rating"), items),
    ]
    assert len({base, *(other.content_hash for other in others)}) == len(others) + 1


def slow_hash(**frames: pl.DataFrame) -> str:
    """The content hash value by value, without polars' help."""
    sha = hashlib.sha256()

    def text(value: str) -> None:
        sha.update(struct.pack("<q", len(value.encode())) + value.encode())

    for name, frame in sorted(frames.items()):
        text(name)
        text(f"{len(frame)} rows of {frame.width} columns")
        for column in sorted(frame.columns):
            values = frame[column].to_list()
            text(column)
            if frame.schema[column] == pl.String:
                text("text")
                sha.update(b"".join(struct.pack("<q", -1 if v is None else len(v.encode())) for v in values))
                sha.update("".join(v or "" for v in values).encode())
            else:
                kind = "float" if frame.schema[column].is_float() else "int"
                text(kind)
                bits = "".join(str(int(v is None)) for v in values)
                bits += "0" * (-len(bits) % 8)
                sha.update(bytes(int(bits[n : n + 8], 2) for n in range(0, len(bits), 8)))
                sha.update(b"".join(struct.pack("<d" if kind == "float" else "<q", v or 0) for v in values))
    return sha.hexdigest()


def test_the_hash_is_that_of_the_values_and_of_nothing_of_polars() -> None:
    log = pl.DataFrame(
        {"user_id": ["a", "b"] * 6, "item_id": ["1", "1"] * 6, "timestamp": range(12), "rating": [1.5, None, -0.0] * 4}
    )
    items = pl.DataFrame({"item_id": ["1"], "title": ["é\0🎬"], "note": [None]}, schema_overrides={"note": pl.String})
    assert Dataset(log, items).content_hash == slow_hash(interactions=log, items=items)


def test_time_range_is_utc(put: Put) -> None:
    dataset = Dataset.read(put("log.csv", HEAD + "u,1,2020-06-01T00:00:00+02:00\n"), put("items.csv", ITEMS))
    assert dataset.time_range[0] == datetime(2020, 5, 31, 22, tzinfo=UTC).isoformat()
