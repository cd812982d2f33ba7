"""The columns a job reads, of any type that can be read as ids without guessing, made one type."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl
import pyarrow as pa

from penchant.errors import DataError

HISTORY = "history"
# Rows with bytes that are no UTF-8: their texts are null, and this column says why.
NOT_TEXT = "_not_text"


def checked_types(schema: pa.Schema, columns: Sequence[str], optional: Sequence[str], where: str) -> None:
    """DataError where a column is missing, there twice, or of a type that is no id: ids are text or integers, a history
    is a list of ids.
    """
    if not any(name in schema.names for name in (*columns, *optional)):
        raise DataError(
            f"has no column {' or '.join((*columns, *optional))}",
            where=where,
            remedy=f"name its columns so (it has {', '.join(schema.names) or 'none'})",
        )
    for name in (*columns, *optional):
        if schema.names.count(name) > 1:
            raise DataError(f"has several columns {name}", where=where, remedy="leave one of them")
        if name not in schema.names:
            if name in columns:
                raise DataError(
                    f"has no column {name}", where=where, remedy=f"add it (there are {', '.join(schema.names)})"
                )
            continue
        kind = schema.field(name).type
        if name == HISTORY:
            if pa.types.is_null(kind) or (_is_list(kind) and _is_id(kind.value_type)):
                continue
            raise DataError(f"column {name} is {kind}", where=where, remedy="make it a list of item ids, oldest first")
        if not _is_id(kind):
            raise DataError(f"column {name} is {kind}", where=where, remedy="make it text (or integers)")


def normalised(batch: pa.RecordBatch, columns: Sequence[str]) -> pl.DataFrame:
    """The columns as String, the history as a list of them, absent columns null; one row an input row.

    A row with text that is not UTF-8 has null there and true in ``NOT_TEXT``.
    """
    bad = [False] * batch.num_rows
    out = {}
    for name in columns:
        kind = pl.List(pl.String) if name == HISTORY else pl.String
        if name not in batch.schema.names or pa.types.is_null(batch.schema.field(name).type):
            out[name] = pl.Series(name, [None] * batch.num_rows, dtype=kind)
            continue
        array = _as_text(batch.column(name))
        try:
            array.validate(full=True)
            found = pl.from_arrow(array)
        except pa.ArrowInvalid:
            found = pl.Series(name, _decoded(array, bad), dtype=kind)
        out[name] = pl.Series(name, found, dtype=kind)
    return pl.DataFrame(out).with_columns(pl.Series(NOT_TEXT, bad, dtype=pl.Boolean))


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _is_id(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    return text or pa.types.is_integer(kind) or pa.types.is_null(kind)


def _as_text(array: pa.Array) -> pa.Array:
    if _is_list(array.type):
        if pa.types.is_large_string(array.type.value_type):
            return array
        return array.cast(pa.large_list(pa.large_string()))
    return array if pa.types.is_large_string(array.type) else array.cast(pa.large_string())


def _decoded(array: pa.Array, bad: list[bool]) -> list[object]:
    """Texts, or lists of them, one value after the other; ``bad`` is set for rows that are no UTF-8."""
    kind = pa.large_list(pa.large_binary()) if _is_list(array.type) else pa.large_binary()
    out: list[object] = []
    for row, value in enumerate(array.cast(kind).to_pylist()):
        try:
            if isinstance(value, list):
                out.append([None if part is None else part.decode("utf-8") for part in value])
            else:
                out.append(None if value is None else value.decode("utf-8"))
        except UnicodeDecodeError:
            bad[row] = True
            out.append(None)
    return out
