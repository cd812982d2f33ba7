"""A hash of what frames hold, the same on every machine, polars version and file format."""

from __future__ import annotations

import hashlib

import numpy as np
import polars as pl

# Texts are joined this many rows at a time, so that a long column is never one huge string.
_ROWS = 1 << 18


class _Digest:
    def __init__(self) -> None:
        self.sha = hashlib.sha256()

    def text(self, value: str) -> None:
        data = value.encode("utf-8")
        self.sha.update(len(data).to_bytes(8, "little"))
        self.sha.update(data)

    def column(self, values: pl.Series) -> None:
        """Texts as their byte lengths (-1: null) and bytes; numbers as little-endian 8-byte words and a null mask."""
        self.text(values.name)
        self.text("text" if values.dtype == pl.String else "float" if values.dtype.is_float() else "int")
        for start in range(0, len(values), _ROWS):
            piece = values.slice(start, _ROWS)
            if values.dtype == pl.String:
                lengths = piece.str.len_bytes().cast(pl.Int64).fill_null(-1)
                self.sha.update(lengths.to_numpy().astype("<i8").tobytes())
                self.sha.update(str(piece.str.join("", ignore_nulls=True).item()).encode("utf-8"))
            else:
                self.sha.update(np.packbits(piece.is_null().to_numpy()).tobytes())
                kind = "<f8" if values.dtype.is_float() else "<i8"
                # Adding 0.0 makes one zero of the two.
                self.sha.update((piece.fill_null(0).to_numpy().astype(kind) + 0).tobytes())


def content_hash(**frames: pl.DataFrame) -> str:
    """Hex SHA-256 over the frames' rows as they stand, their columns by name.

    String, integer and float columns; the order of columns doesn't count, that of rows does.
    """
    digest = _Digest()
    for name, frame in sorted(frames.items()):
        digest.text(name)
        digest.text(f"{len(frame)} rows of {frame.width} columns")
        for column in sorted(frame.columns):
            digest.column(frame[column])
    return digest.sha.hexdigest()
