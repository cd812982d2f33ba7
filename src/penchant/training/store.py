"""Training rows on disk, memory-mapped: made once for what decides them, and kept under a hash of our own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray

from penchant.data.provenance import NONE, Rows
from penchant.errors import DataError, StorageError
from penchant.fetch import cache_folder
from penchant.files import read_json, sha256_file, sha256_text, staged_folder, write_json
from penchant.training.rows import ARRAYS, FLOATS, Row

_PROVENANCE = ("inputs", "targets")


class RowStore:
    """Rows as an Arrow file; ``lengths`` (n,) tokens and ``n_targets`` (n,) are in memory, the rest is mapped.

    ``dropped`` counts the oldest events that fitted into no prompt; ``content`` is the file's SHA-256.
    """

    def __init__(self, table: Any, dropped: int = 0, content: str = "") -> None:
        self.dropped, self.content = dropped, content
        self._table = table.with_format("numpy")
        whole = table.with_format("arrow")[:] if len(table) else None
        self.lengths: NDArray[np.int64] = np.asarray(whole["length"] if whole else [], dtype=np.int64)
        self.n_targets: NDArray[np.int64] = np.asarray(whole["n_targets"] if whole else [], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: int) -> Row:
        row = self._table[int(number)]
        arrays: dict[str, Any] = {
            name: np.asarray(row[name], np.float32 if name in FLOATS else np.int32) for name in ARRAYS
        }
        provenance: dict[str, Any] = {name: np.asarray(row[name], np.int64) for name in _PROVENANCE}
        return Row(user=int(row["user"]), **arrays, **provenance)

    def provenance(self, part: slice) -> Rows:
        """Whose events some of the rows were made of, and which."""
        table = self._table.with_format("arrow")[part]

        def lists(name: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
            column = table[name].combine_chunks()
            offsets = np.asarray(column.offsets, np.int64)
            return np.asarray(column.flatten(), np.int64), offsets - offsets[0]

        (inputs, input_start), (targets, target_start) = lists("inputs"), lists("targets")
        no_text = np.zeros(len(table) + 1, dtype=np.int64)
        user = np.asarray(table["user"], np.int64)
        return Rows(user, inputs, input_start, targets, target_start, NONE, no_text)

    def __iter__(self) -> Iterator[Row]:
        return (self[i] for i in range(len(self)))


def stored_rows(
    key: tuple[str, ...],
    make: Callable[[], Iterator[Row]],
    dropped: Callable[[], int] = lambda: 0,
    folder: Path | None = None,
) -> RowStore:
    """The rows of that key: from the cache, or made and kept there. A torn store is found by its hash: StorageError.

    ``dropped`` counts, while rows are made, the events that fitted into no prompt.
    datasets' own caching is not used: its fingerprints hash code by pickling it.
    """
    name = sha256_text("training rows 5", *key)[:32]
    at = (cache_folder() if folder is None else folder) / "rows" / name
    if not at.is_dir():
        with staged_folder(at) as stage:
            before = dropped()
            _write(make, stage)
            write_json(stage / "dropped.json", dropped() - before)
    arrow = at / "rows.arrow"
    try:
        content = sha256_file(arrow)
        if (at / "sha256").read_text(encoding="utf-8") != content:
            raise StorageError("is corrupt: its content is not what was written", where=str(at), remedy="delete it")
    except OSError as error:
        raise StorageError(f"cannot be read ({error})", where=str(at), remedy="delete it") from error
    store = RowStore(datasets.Dataset.from_file(str(arrow)), int(read_json(at / "dropped.json")), content)
    if not len(store):
        raise DataError(
            "not one training row: nothing could be learnt",
            where="training",
            remedy="give longer histories, or loosen the recipe's settings",
        )
    return store


def _write(make: Callable[[], Iterator[Row]], stage: Path) -> None:
    def records() -> Iterator[dict[str, Any]]:
        for row in make():
            yield {
                **{name: getattr(row, name) for name in (*ARRAYS, *_PROVENANCE)},
                "user": row.user,
                "length": len(row),
                "n_targets": row.n_targets,
            }

    features = datasets.Features(
        {
            **{n: datasets.List(datasets.Value("float32" if n in FLOATS else "int32")) for n in ARRAYS},
            **{n: datasets.List(datasets.Value("int64")) for n in _PROVENANCE},
            **{n: datasets.Value("int64") for n in ("user", "length", "n_targets")},
        }
    )
    writer = datasets.arrow_writer.ArrowWriter(features=features, path=str(stage / "rows.arrow"))
    try:
        for record in records():
            writer.write(record)
        writer.finalize()
    finally:
        writer.close()
    (stage / "sha256").write_text(sha256_file(stage / "rows.arrow"), encoding="utf-8")


__all__ = ["RowStore", "stored_rows"]
