"""Rows that say again what a row before them said, found with memory that doesn't grow with the rows.

A key's 128-bit hash goes to one of many buckets on disk; a bucket is small enough to be sorted.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from penchant.batch.source import Source

# Rows a bucket holds on the average: 6 MB.
_BUCKET = 250_000
_READ = 65_536
_SEEDS = (20261128, 8211620)  # of the two halves of a hash
_RECORD = np.dtype([("hash", "<u8", 2), ("row", "<i8")])


def repeated_rows(source: Source, key: Sequence[str], folder: Path) -> NDArray[np.int64]:
    """Row numbers, ascending, of rows whose ``key`` columns equal an earlier row's; rows with a null or an empty
    text in it are none.

    Reads the whole source once. ``folder`` is for the buckets, which are gone when this returns.
    """
    n_buckets = source.rows // _BUCKET + 1
    paths = [folder / f"bucket-{i}" for i in range(n_buckets)]
    with ExitStack() as opened:
        buckets: list[io.BufferedWriter] = [opened.enter_context(path.open("wb")) for path in paths]
        parts = [range(a, min(a + _READ, source.rows)) for a in range(0, source.rows, _READ)]
        for part, frame in zip(parts, source.read(parts), strict=True):
            records = _records(frame, key, part.start)
            where = records["hash"][:, 0] % n_buckets
            for i in np.unique(where):
                buckets[i].write(records[where == i].tobytes())
    found = [np.zeros(0, dtype=np.int64)]
    for path in paths:
        records = np.frombuffer(path.read_bytes(), dtype=_RECORD)
        path.unlink()
        first, second = records["hash"][:, 0], records["hash"][:, 1]
        order = np.lexsort((records["row"], second, first))
        same = (first[order][1:] == first[order][:-1]) & (second[order][1:] == second[order][:-1])
        found.append(records["row"][order][1:][same])
    return np.sort(np.concatenate(found))


def _records(frame: pl.DataFrame, key: Sequence[str], start: int) -> NDArray[np.void]:
    told = pl.all_horizontal(pl.col(name).str.len_bytes() > 0 for name in key)  # null where the text is
    said = frame.with_row_index("row", start).filter(told)
    whole = pl.struct(*key)
    hashes = said.select(whole.hash(_SEEDS[0]).alias("first"), whole.hash(_SEEDS[1]).alias("second"))
    records = np.zeros(len(said), dtype=_RECORD)
    records["row"] = said["row"].to_numpy()
    records["hash"] = hashes.to_numpy()
    return records
