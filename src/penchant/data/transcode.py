"""Text of any encoding, gzipped or not, as a UTF-8 file that polars can read; made piece by piece."""

from __future__ import annotations

import codecs
import gzip
import zlib
from pathlib import Path
from typing import BinaryIO, cast

from penchant.errors import DataError, StorageError

# What a separator of several characters (MovieLens-1M's '::') becomes in the copy.
UNIT_SEPARATOR = "\x1f"
_CHUNK = 1 << 22
_UTF8 = {"utf-8", "ascii"}


def utf8_copy(path: Path, folder: Path, encoding: str, wide: str | None, where: str, *, unmark: bool) -> Path:
    """The file itself if it can be read as it stands, else a UTF-8 copy of it in ``folder``.

    Copied are gzipped files, those of another encoding, those with a separator ``wide`` of several characters
    (which becomes UNIT_SEPARATOR), and with ``unmark`` those that begin with a byte order mark.

    Raises DataError for a wrong encoding or a torn gzip file, StorageError where the copy finds no room.
    """
    with open(path, "rb") as handle:
        start = handle.read(3)
    gzipped = start[:2] == b"\x1f\x8b"
    utf8 = encoding in _UTF8
    marked = unmark and start == codecs.BOM_UTF8
    if utf8 and not gzipped and not marked and wide is None:
        return path
    target = folder / "text"
    try:
        with open(path, "rb") as raw, open(target, "wb") as out:
            source = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if gzipped else raw
            _transcode(source, out, "utf-8-sig" if utf8 else encoding, wide, where)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"the gzip file is torn ({error})", where=where, remedy="copy it again") from error
    except OSError as error:
        raise StorageError(
            f"cannot make the temporary UTF-8 copy ({error})",
            where=str(folder),
            remedy="free disk space there, or set TMPDIR to a roomier folder",
        ) from error
    return target


def _transcode(source: BinaryIO, out: BinaryIO, encoding: str, wide: str | None, where: str) -> None:
    decoder = codecs.getincrementaldecoder(encoding)()
    offset, line, held = 0, 1, ""
    while True:
        piece = source.read(_CHUNK)
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(piece, final=not piece)
            data = text.encode("utf-8")
        except UnicodeDecodeError as error:
            before = error.object[: error.start]
            raise encoding_error(
                where,
                encoding.removesuffix("-sig"),
                offset - pending + error.start,
                line + before.count(b"\n"),
                error.object[error.start],
            ) from error
        except UnicodeEncodeError as error:
            raise DataError(
                f"holds half a surrogate pair, which is no character, near byte {offset}",
                where=where,
                remedy="check --encoding",
            ) from error
        except UnicodeError as error:
            # UTF-16 and UTF-32 without the byte order mark that says which way round they are.
            raise DataError(
                f"not {encoding} text ({error})", where=where, remedy="name the byte order: --encoding utf-16-le"
            ) from error
        offset += len(piece)
        line += text.count("\n")
        if wide is None:
            out.write(data)
        else:
            # Cut where no separator can straddle two pieces: after the last line break.
            held += text
            cut = len(held) if not piece else held.rfind("\n") + 1
            out.write(held[:cut].replace(wide, UNIT_SEPARATOR).encode("utf-8"))
            held = held[cut:]
        if not piece:
            return


def encoding_error(where: str, encoding: str, offset: int, line: int, value: int) -> DataError:
    """A byte that the encoding doesn't know: its offset from 0, its line from 1, and what to try."""
    other = "latin-1" if encoding == "utf-8" else "utf-8"
    if offset == 0 and value in (0xFE, 0xFF):
        other = "utf-16"
    return DataError(
        f"not {encoding} text: byte 0x{value:02x} at byte offset {offset}, line {line}",
        where=where,
        remedy=f"name the file's encoding, for example --encoding {other} (--items-encoding for the items)",
    )
