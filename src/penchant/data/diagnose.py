"""Find the place in a text file that a fast reader refused: its byte, its line, its row.

These run only after something looked wrong (or might be), so that the good path reads a file once.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

_CHUNK = 1 << 22
_NEWLINE, _RETURN = 10, 13


@dataclass(frozen=True)
class BadByte:
    """The first byte that isn't UTF-8: its offset from 0, its line from 1, its value."""

    offset: int
    line: int
    value: int


@dataclass(frozen=True)
class BadJson:
    """The first line that isn't a JSON object, from 1, and why."""

    line: int
    reason: str


@dataclass(frozen=True)
class Record:
    """One record of a delimited file: its number and first line (from 1), its fields, whether it is all blank."""

    number: int
    line: int
    fields: int
    blank: bool
    open_quote: bool = False


def find_bad_byte(path: Path) -> BadByte | None:
    """The first byte of the file that isn't UTF-8, or None."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, line = 0, 1
    with open(path, "rb") as handle:
        while True:
            piece = handle.read(_CHUNK)
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(piece, final=not piece)
            except UnicodeDecodeError as error:
                before = error.object[: error.start].count(b"\n")
                return BadByte(offset - pending + error.start, line + before, error.object[error.start])
            if not piece:
                return None
            offset += len(piece)
            line += piece.count(b"\n")


def find_bad_json(path: Path) -> BadJson | None:
    """The first line of the file that isn't a JSON object, or None; blank lines are none."""
    with open(path, encoding="utf-8") as handle:
        for number, text in enumerate(handle, start=1):
            if not text.strip():
                continue
            try:
                value = json.loads(text)
            except json.JSONDecodeError as error:
                return BadJson(number, error.msg)
            if not isinstance(value, dict):
                return BadJson(number, f"it is a {type(value).__name__}")
    return None


def first_field_count(path: Path, separator: str, quote: str | None) -> int:
    """The number of fields of the first record that isn't blank; 0 where there is none."""
    return next((record.fields for record in scan_records(path, separator, quote) if not record.blank), 0)


def leading_blanks(path: Path) -> tuple[int, int]:
    """How many lines of the file's beginning are blank, and how many bytes they take (with a byte order mark)."""
    lines, size = 0, 0
    with open(path, "rb") as handle:
        for line in handle:
            if line.removeprefix(codecs.BOM_UTF8).strip(b"\r\n"):
                break
            lines, size = lines + 1, size + len(line)
    return lines, size


def scan_records(path: Path, separator: str, quote: str | None) -> Iterator[Record]:
    """Go through the records of a delimited file in the way of RFC 4180: a line break in quotes is text.

    Blank lines at the beginning are left out, but counted. Only the first record, the blank ones, those whose
    number of fields differs from the first's and an unclosed last one are yielded: the rest hold nothing to say.
    """
    skipped, size = leading_blanks(path)
    scanner = _Scanner(separator, quote, skipped + 1, size)
    expected = None
    with open(path, "rb") as handle:
        handle.seek(size)
        while piece := handle.read(_CHUNK):
            ended = scanner.feed(piece)
            if not ended.fields.size:
                continue
            odd = ended.blank | (ended.fields != (ended.fields[0] if expected is None else expected))
            if expected is None:
                expected = int(ended.fields[0])
                odd[0] = True
            for index in np.flatnonzero(odd):
                line, fields, blank = ended.line[index], ended.fields[index], ended.blank[index]
                yield Record(ended.first + int(index), int(line), int(fields), bool(blank))
    last = scanner.unfinished()
    if last is not None and (last.fields != expected or last.open_quote):
        yield last


class _Ended(NamedTuple):
    """The records that end in one piece: the number of the first, and each one's first line, fields, blankness."""

    first: int
    line: npt.NDArray[np.int64]
    fields: npt.NDArray[np.int64]
    blank: npt.NDArray[np.bool_]


class _Scanner:
    """Counts the fields of records over the pieces of a file; what a piece leaves open waits for the next.

    Only the bytes that mean something (separators, quotes, line breaks) are looked at, all of a piece at once.
    """

    def __init__(self, separator: str, quote: str | None, line: int, position: int) -> None:
        self.separator = ord(separator)
        self.quote = -1 if quote is None else ord(quote)
        self.means = np.zeros(256, dtype=np.bool_)
        self.means[[_NEWLINE, self.separator, *([self.quote] if quote is not None else [])]] = True
        self.position = position  # in the file, of the next piece
        self.line = line  # of the next piece's beginning
        self.in_quote = 0
        self.previous = 0  # the last byte of the piece before
        # The record that hasn't ended yet.
        self.number, self.begin, self.first_line, self.fields = line, position, line, 1

    def feed(self, piece: bytes) -> _Ended:
        data = np.frombuffer(piece, dtype=np.uint8)
        places = np.flatnonzero(self.means[data])
        kinds = data[places]
        inside = (np.cumsum(kinds == self.quote) + self.in_quote) & 1
        ends = np.flatnonzero((kinds == _NEWLINE) & (inside == 0))
        splits = np.concatenate(([0], np.cumsum((kinds == self.separator) & (inside == 0))))
        lines = np.concatenate(([0], np.cumsum(kinds == _NEWLINE))) + self.line
        ended = self._ended(data, places[ends], splits[ends + 1], lines[ends + 1])
        split_until = splits[ends[-1] + 1] if ends.size else 0
        self.fields += int(splits[-1] - split_until)
        self.line = int(lines[-1])
        self.in_quote = int(inside[-1]) if inside.size else self.in_quote
        self.position += len(piece)
        self.previous = int(data[-1])
        return ended

    def _ended(
        self,
        data: npt.NDArray[np.uint8],
        at: npt.NDArray[np.int64],
        splits: npt.NDArray[np.int64],
        lines: npt.NDArray[np.int64],
    ) -> _Ended:
        """The records that end at the line breaks ``at``, given the separators and lines up to each."""
        fields = np.diff(splits, prepend=0) + 1
        first_lines = np.concatenate(([self.first_line], lines[:-1]))[: at.size]
        starts = np.concatenate(([self.begin], at[:-1] + 1 + self.position))[: at.size]
        length = at + self.position - starts
        before = np.where(at > 0, data[np.maximum(at - 1, 0)], self.previous)
        blank = (length == 0) | ((length == 1) & (before == _RETURN))
        first = self.number
        if at.size:
            fields[0] += self.fields - 1
            self.number += int(at.size)
            self.begin, self.first_line, self.fields = int(at[-1]) + 1 + self.position, int(lines[-1]), 1
        return _Ended(first, first_lines, fields, blank)

    def unfinished(self) -> Record | None:
        """The record after the last line break, if there is one."""
        if self.position == self.begin:
            return None
        return Record(self.number, self.first_line, self.fields, False, bool(self.in_quote))
