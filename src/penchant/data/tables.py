"""Read one table from a file: CSV, TSV, Parquet or JSON lines, plain or gzipped, lazily with polars.

Polars does the reading; this module decides what a file is, gives every row its number, and turns
whatever goes wrong into one DataError that names the file, the row and the remedy.
"""

from __future__ import annotations

import codecs
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import polars as pl
from polars.exceptions import NoDataError, PolarsError
from pydantic import BaseModel, ConfigDict, Field, field_validator

from penchant.data.diagnose import find_bad_byte, find_bad_json, first_field_count, leading_blanks, scan_records
from penchant.data.transcode import UNIT_SEPARATOR, encoding_error, utf8_copy
from penchant.errors import DataError, StorageError

Format = Literal["csv", "tsv", "parquet", "jsonl"]

# The row number of every table: for text the record's number in the file with the header counted as
# row 1 (the line number, unless quoted fields hold line breaks), for Parquet and frames the 1-based row.
ROW = "__row__"

_SUFFIXES: dict[str, Format] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
}
_NAMED_SEPARATORS = {"\\t": "\t", "tab": "\t", "comma": ",", "space": " ", "pipe": "|"}
_DUPLICATED = re.compile(r"^(.*)_duplicated_\d+$", re.DOTALL)


class TableOptions(BaseModel):
    """How one table is laid out in its file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Format | None = Field(
        default=None,
        description="csv, tsv, parquet or jsonl; without it the suffix decides (and a separator means csv)",
    )
    separator: str | None = Field(
        default=None,
        description="what separates the fields of a text file ('\\t' and 'tab' are a tab); default ',' or tab",
    )
    quote: str | None = Field(
        default='"', description="the character around quoted fields; None when quotes are plain text"
    )
    encoding: str = Field(default="utf-8", description="the text's encoding, any that Python knows, such as latin-1")
    columns: list[str] | None = Field(
        default=None,
        description="the column names of a file without a header line; columns beyond the last name are ignored",
    )
    null_values: list[str] = Field(
        default_factory=list, description="texts that stand for a missing value, besides the empty field"
    )

    @property
    def wide(self) -> str | None:
        """The separator where it is of several characters, which polars cannot split at."""
        return self.separator if self.separator is not None and len(self.separator) > 1 else None

    @field_validator("separator")
    @classmethod
    def _separator(cls, value: str | None) -> str | None:
        if value is None:
            return None
        value = _NAMED_SEPARATORS.get(value, value)
        if not value or any(char in value for char in "\r\n") or not value.isascii():
            raise ValueError("a separator is one or more ASCII characters and not a line break")
        return value

    @field_validator("quote")
    @classmethod
    def _quote(cls, value: str | None) -> str | None:
        if value is not None and (len(value) != 1 or not value.isascii()):
            raise ValueError("a quote is one ASCII character, or None for a file without quoted fields")
        return value

    @field_validator("encoding")
    @classmethod
    def _encoding(cls, value: str) -> str:
        try:
            "".encode(value)  # unlike codecs.lookup, this refuses codecs that are not text encodings
            codecs.getincrementaldecoder(value)
            return codecs.lookup(value).name
        except LookupError as error:
            raise ValueError(f"no text encoding is called {value!r}; try utf-8, latin-1 or cp1252") from error

    @field_validator("columns")
    @classmethod
    def _columns(cls, value: list[str] | None) -> list[str] | None:
        if value is not None and (not value or len(set(value)) != len(value) or "" in value):
            raise ValueError("columns must be given, each with a name of its own")
        return value


@dataclass(frozen=True)
class Table:
    """An opened table: what it is called in errors, its columns, and its lazy rows with ``ROW``."""

    where: str
    columns: list[str]
    rows: pl.LazyFrame
    format: Format | None = None
    text: Path | None = None
    separator: str = ","
    quote: str | None = None
    last: str | None = None
    wide: str | None = None

    def collect(self, chosen: Mapping[str, str]) -> pl.DataFrame:
        """Read the columns ``chosen`` (new name -> column in the file), and ``ROW`` (UInt32).

        Raises DataError where the file cannot be decoded or parsed, or a row has too few or too many fields.
        """
        wanted = [pl.col(ROW), *(self._as_written(source).alias(name) for name, source in chosen.items())]
        if self.last is None:
            return self._run(self.rows.select(wanted))
        # Polars fills a short row up with nulls; only where the last field is empty can a row be short.
        marked = self._run(self.rows.select(*wanted, pl.col(self.last).is_null().alias("__last_is_null__")))
        if not marked["__last_is_null__"].any():
            return marked.drop("__last_is_null__")
        return marked.drop("__last_is_null__").filter(~pl.col(ROW).is_in(self._blank_rows().implode()))

    def _as_written(self, column: str) -> pl.Expr:
        """A column; what stands for a ``wide`` separator in its quoted fields is text again."""
        if self.wide is None:
            return pl.col(column)
        return pl.col(column).str.replace_all(UNIT_SEPARATOR, self.wide, literal=True)

    def _run(self, query: pl.LazyFrame) -> pl.DataFrame:
        try:
            return query.collect(engine="streaming")
        except (PolarsError, UnicodeError, OSError) as error:
            raise self._diagnosed(error) from error

    def _blank_rows(self) -> pl.Series:
        """The numbers of the lines without anything on them; a row that is short instead is an error."""
        blank: list[int] = []
        for row in scan_records(_the(self.text), self.separator, self.quote):
            if row.blank:
                blank.append(row.number)
            else:
                self._check_fields(row.number, row.line, row.fields, row.open_quote)
        return pl.Series(blank, dtype=pl.UInt32)

    def _check_fields(self, number: int, line: int, fields: int, open_quote: bool) -> None:
        place = f"row {number}" if line == number else f"row {number} (line {line})"
        if open_quote:
            raise DataError(
                "a quote is opened and never closed",
                where=f"{self.where}, {place}",
                remedy="close the quote, or read the file with --no-quote if quotes are plain text in it",
            )
        expected = len(self.rows.collect_schema().names()) - 1
        if fields != expected:
            raise DataError(
                f"{fields} field{'s' * (fields != 1)} where the table has {expected} columns",
                where=f"{self.where}, {place}, column {min(fields, expected) + 1}",
                remedy=f"give every row {expected} fields; check the separator (--sep) and that text holding "
                "it is quoted (or --no-quote if quotes are plain text)",
            )

    def _diagnosed(self, error: Exception) -> DataError:
        """The DataError for what polars could not read: look for the reason where it can be found."""
        if isinstance(error, NoDataError):
            return _empty(self.where)
        bad = find_bad_byte(self.text) if self.text is not None else None
        if bad is not None:
            return encoding_error(self.where, "utf-8", bad.offset, bad.line, bad.value)
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if self.format == "jsonl":
            return self._json_error(reason)
        if self.format in ("csv", "tsv"):
            return self._csv_error(reason)
        return DataError(
            f"not a readable Parquet file ({reason})",
            where=self.where,
            remedy="write the file again, or name its real format (format=...)",
        )

    def _csv_error(self, reason: str) -> DataError:
        try:
            self._blank_rows()
        except DataError as found:
            return found
        except PolarsError as error:  # not even the columns can be told
            reason = str(error).splitlines()[0]
        return DataError(
            f"cannot be parsed ({reason})",
            where=self.where,
            remedy="check --sep and the quotes (--no-quote if quotes are plain text in it)",
        )

    def _json_error(self, reason: str) -> DataError:
        broken = find_bad_json(_the(self.text))
        if broken is None:
            return DataError(
                f"the JSON lines do not fit together ({reason})",
                where=self.where,
                remedy="give each key values of one kind in all lines",
            )
        return DataError(
            f"not a JSON object ({broken.reason})",
            where=f"{self.where}, row {broken.line}",
            remedy="write one JSON object a line",
        )


def table_of_frame(frame: pl.DataFrame, where: str) -> Table:
    """A table over rows that are in memory already; ``where`` stands for the file's name in errors."""
    if frame.width == 0 or frame.height == 0:
        raise DataError("the frame has no rows", where=where, remedy="give at least one row")
    return Table(where, frame.columns, frame.lazy().with_row_index(ROW, offset=1))


@contextmanager
def open_table(path: str | Path, options: TableOptions | None = None) -> Iterator[Table]:
    """Open the table at ``path``; a temporary UTF-8 copy, where one is needed, lives as long as the block.

    Raises DataError for a missing or empty file, an unknown format, a wrong encoding, a torn gzip file and
    headers with one name twice.
    """
    options = options or TableOptions()
    path = Path(path)
    where = str(path)
    _check_exists(path, where)
    kind = _format_of(path, options, where)
    with ExitStack() as stack:
        if kind == "parquet":
            table = _scan_parquet(path, where)
        else:
            folder = Path(stack.enter_context(_temporary_folder()))
            wide = None if kind == "jsonl" else options.wide
            # Polars' JSON reader, unlike its CSV reader, stumbles over a byte order mark.
            text = utf8_copy(path, folder, options.encoding, wide, where, unmark=kind == "jsonl")
            if not text.stat().st_size:
                raise _empty(where)
            table = _scan_json(text, where) if kind == "jsonl" else _scan_csv(text, options, kind, where)
        _check_names(table)
        yield table


def _temporary_folder() -> tempfile.TemporaryDirectory[str]:
    try:
        return tempfile.TemporaryDirectory(prefix="penchant-")
    except OSError as error:
        raise StorageError(
            f"there is no room for a temporary folder ({error})",
            where=os.environ.get("TMPDIR", "/tmp"),
            remedy="free disk space there, or set TMPDIR to a roomier folder",
        ) from error


def _the(path: Path | None) -> Path:
    if path is None:
        raise TypeError("a text table without its text file")
    return path


def _check_exists(path: Path, where: str) -> None:
    if not os.path.exists(path):
        raise DataError("no such file", where=where, remedy="check the path")
    if not path.is_file():
        raise DataError("not a file", where=where, remedy="give one CSV, TSV, Parquet or JSONL file")
    if not os.access(path, os.R_OK):
        raise DataError("no permission to read it", where=where, remedy="give yourself the right to read it")
    if not path.stat().st_size:
        raise _empty(where)


def _empty(where: str) -> DataError:
    return DataError("the file is empty", where=where, remedy="give a file with a header and rows")


def _format_of(path: Path, options: TableOptions, where: str) -> Format:
    if options.format is not None:
        return options.format
    name = path.name.lower().removesuffix(".gz")
    found = _SUFFIXES.get(Path(name).suffix)
    if found is not None:
        return found
    if options.separator is not None:
        return "csv"
    raise DataError(
        f"cannot tell the format from the name ({path.name})",
        where=where,
        remedy="give the separator of a text file (--sep '\\t', --items-sep '|'), or rename it to "
        "end in .csv, .tsv, .parquet or .jsonl (also .gz)",
    )


def _scan_parquet(path: Path, where: str) -> Table:
    rows = pl.scan_parquet(path, glob=False, row_index_name=ROW, row_index_offset=1)
    return _described(Table(where, [], rows, format="parquet"))


def _scan_json(text: Path, where: str) -> Table:
    # Keys may appear late and kinds may differ between lines, so the types come from all of them.
    rows = pl.scan_ndjson(text, infer_schema_length=None, row_index_name=ROW, row_index_offset=1)
    return _described(Table(where, [], rows, format="jsonl", text=text))


def _scan_csv(text: Path, options: TableOptions, kind: Format, where: str) -> Table:
    separator = UNIT_SEPARATOR if options.wide else options.separator or ("\t" if kind == "tsv" else ",")
    skipped, _ = leading_blanks(text)
    names = _padded_names(text, options.columns, separator, options.quote, where)
    rows = pl.scan_csv(
        text,
        has_header=names is None,
        new_columns=names,
        separator=separator,
        quote_char=options.quote,
        null_values=options.null_values or None,
        infer_schema=False,
        row_index_name=ROW,
        row_index_offset=skipped + (2 if names is None else 1),
        skip_lines=skipped,
        glob=False,
    )
    table = _described(
        Table(where, [], rows, format=kind, text=text, separator=separator, quote=options.quote), options.columns
    )
    width = len(names) if names is not None else len(table.columns)
    last = (names or table.columns)[-1] if width > 1 else None
    return Table(where, table.columns, rows, kind, text, separator, options.quote, last, options.wide)


def _padded_names(
    text: Path, columns: list[str] | None, separator: str, quote: str | None, where: str
) -> list[str] | None:
    """Names for all columns of a header-less file: those given, then placeholders nobody reads."""
    if columns is None:
        return None
    found = first_field_count(text, separator, quote)
    if found < len(columns):
        raise DataError(
            f"{len(columns)} column names are given and the first row has {found} field{'s' * (found != 1)}",
            where=f"{where}, row 1",
            remedy="give as many names as there are columns (--columns), and check the separator (--sep)",
        )
    return [*columns, *(f"__unnamed_{index}__" for index in range(len(columns), found))]


def _described(table: Table, columns: list[str] | None = None) -> Table:
    """The table with its column names, which polars reads from the file's beginning."""
    try:
        names = table.rows.collect_schema().names()
    except (PolarsError, UnicodeError, OSError) as error:
        raise table._diagnosed(error) from error
    found = columns if columns is not None else [name for name in names if name != ROW]
    return Table(table.where, found, table.rows, table.format, table.text, table.separator, table.quote)


def _check_names(table: Table) -> None:
    if table.text is None or table.format == "jsonl":
        return
    # Polars replaces the header's bytes that are no UTF-8 without a word.
    if any("\ufffd" in name for name in table.columns):
        bad = find_bad_byte(table.text)
        if bad is not None:
            raise encoding_error(table.where, "utf-8", bad.offset, bad.line, bad.value)
    if any("\r" in name for name in table.columns):
        raise DataError(
            "the lines end in a lone carriage return",
            where=f"{table.where}, row 1",
            remedy="write lines that end in \\n",
        )
    for name in table.columns:
        match = _DUPLICATED.match(name)
        if match and match.group(1) in table.columns:
            raise DataError(
                f"two columns are called {match.group(1)!r}",
                where=f"{table.where}, row 1, column {match.group(1)!r}",
                remedy="give each column a name of its own",
            )
