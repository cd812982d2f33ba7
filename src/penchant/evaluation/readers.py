"""Public data sets in their own files' formats: each becomes a Dataset, or rows of likes and dislikes.

One pydantic model a format; its fields are the files' names, relative to the data set's folder. Sequences without
times are ordered as they stand; their only time is the place in the list, so nothing but leave-last-out fits them.
"""

from __future__ import annotations

import gzip
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Literal

import polars as pl
from pydantic import BaseModel, ConfigDict, Field

from penchant.data.dataset import Dataset
from penchant.data.options import ReadOptions
from penchant.errors import ConfigError, DataError
from penchant.fetch import fetch
from penchant.fetch.movielens import normalise
from penchant.schema import ITEM, TITLE, USER


class _Reader(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: str = Field(description="the data set's folder under --data-dir (which may be that folder itself)")


class MovieLens100K(_Reader):
    """GroupLens' u.data and u.item, or what `penchant fetch movielens-100k` brings: equal content either way."""

    kind: Literal["movielens-100k"]

    def read(self, folder: Path | None) -> Dataset:
        if folder is None:
            found = fetch("movielens-100k")
            return Dataset.read(found / "interactions.csv", found / "items.csv")
        with tempfile.TemporaryDirectory(prefix="penchant-") as temporary:
            copy = Path(temporary)
            for name in ("u.data", "u.item"):
                shutil.copyfile(_there(folder / name), copy / name)
            try:
                normalise(copy)
            except ValueError as error:
                raise DataError(f"not MovieLens-100K as released ({error})", where=str(folder)) from error
            return Dataset.read(copy / "interactions.csv", copy / "items.csv")


class Tables(_Reader):
    """Two tables, as `penchant prepare` reads them."""

    kind: Literal["tables"]
    interactions: str = Field(description="file of the events")
    items: str = Field(description="file of the items")
    read_as: ReadOptions = Field(default_factory=ReadOptions, description="how to read and filter them")

    def read(self, folder: Path | None) -> Dataset:
        folder = _given(folder, self.folder)
        return Dataset.read(folder / self.interactions, folder / self.items, options=self.read_as)


class Sequences(_Reader):
    """S3-Rec's files: one user a line, "user item item ...", oldest first. No titles come with them.

    ``names`` maps the file's item ids to catalogue ids (a JSON of `id2item`), ``texts`` these to a short text each
    ("catalogue-id some text"); an item without one is called "item 12".
    """

    kind: Literal["sequences"]
    sequences: str = Field(description="file of the sequences, plain or gzipped")
    names: str | None = Field(default=None, description="JSON file with id2item")
    texts: str | None = Field(default=None, description="file of catalogue ids and texts")

    def read(self, folder: Path | None) -> Dataset:
        folder = _given(folder, self.folder)
        path = _there(folder / self.sequences)
        rows = [line.split() for line in _lines(path)]
        short = next((number for number, row in enumerate(rows, 1) if len(row) < 2), None)
        if short is not None:
            raise DataError("a user and at least one item belong there", where=f"{path}, row {short}")
        texts = self._texts(folder)
        ids = sorted({item for row in rows for item in row[1:]} | texts.keys(), key=_numeric)
        items = pl.DataFrame({ITEM: ids, TITLE: [texts.get(i, f"item {i}") for i in ids]})
        return _from_lists([row[0] for row in rows], [row[1:] for row in rows], items)

    def _texts(self, folder: Path) -> dict[str, str]:
        """Item id -> text; none where the files are not named."""
        if self.names is None and self.texts is None:
            return {}
        if self.names is None or self.texts is None:
            raise ConfigError(
                "texts are found by the catalogue ids that names has",
                where="data",
                remedy="give both files, names and texts, or neither",
            )
        path = _there(folder / self.names)
        try:
            with _open(path) as handle:
                names = json.load(handle)["id2item"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"holds no id2item ({error})", where=str(path)) from error
        found = dict(line.split(" ", 1) for line in _lines(_there(folder / self.texts)) if " " in line)
        return {str(item): found[name] for item, name in names.items() if found.get(name, "").strip()}


class LLMRankGames(_Reader):
    """LLMRank's Amazon Games: `user <TAB> item item ... <TAB> target`, tab-separated, and a table of titles."""

    kind: Literal["llmrank-games"]
    sequences: str = Field(description="the test file: its histories hold the validation target, and all before")
    items: str = Field(description="item_id and title, tab-separated, quotes being plain text")

    def read(self, folder: Path | None) -> Dataset:
        folder = _given(folder, self.folder)
        path = _there(folder / self.sequences)
        rows = [line.split("\t") for line in _lines(path)][1:]
        wrong = next((number for number, row in enumerate(rows, 2) if len(row) != 3), None)
        if wrong is not None:
            raise DataError("a user, a list of items and a target belong there", where=f"{path}, row {wrong}")
        path = _there(folder / self.items)
        titles = [line.split("\t", 1) for line in _lines(path)][1:]
        wrong = next((number for number, row in enumerate(titles, 2) if len(row) != 2), None)
        if wrong is not None:
            raise DataError("an item and its title belong there", where=f"{path}, row {wrong}")
        items = pl.DataFrame(titles, schema=[ITEM, TITLE], orient="row")
        return _from_lists([row[0] for row in rows], [[*row[1].split(), row[2]] for row in rows], items)


class YesNo(_Reader):
    """TALLRec's instruction files: likes, dislikes and one target a row. Not a ranking: `read_yes_no` reads it."""

    kind: Literal["tallrec"]
    train: str
    valid: str
    test: str
    users: dict[str, str] = Field(
        default_factory=dict, description="part -> CSV of the same rows, whose user_id the rows are given"
    )

    def read(self, folder: Path | None) -> Dataset:
        raise ConfigError(
            "a yes/no task has no catalogue to rank",
            where=f"task data {self.folder}",
            remedy="train and score it with eval/tallrec.py, or score a run with penchant evaluate RUN --task",
        )


Reader = Annotated[MovieLens100K | Tables | Sequences | LLMRankGames | YesNo, Field(discriminator="kind")]


# -- likes and dislikes ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class YesNoRow:
    """Titles the user liked and disliked, in the file's order, the target's, and whether it was liked.

    ``user`` is None where the files don't say.
    """

    liked: tuple[str, ...]
    disliked: tuple[str, ...]
    target: str
    label: bool
    user: str | None = None


_ROW = re.compile(
    r'User Preference: (?P<liked>.*)\nUser Unpreference: (?P<disliked>.*)\n.*?the target \w+ "(?P<target>.*)"\?$',
    re.DOTALL,
)
_LABELS = {"Yes.": True, "No.": False}


def read_yes_no(reader: YesNo, part: Literal["train", "valid", "test"], data_dir: Path) -> list[YesNoRow]:
    """The rows of one part, in the file's order; DataError naming the first that has another form."""
    folder = _given(folder_of(reader, data_dir), reader.folder)
    path = _there(folder / getattr(reader, part))
    with _open(path) as handle:
        try:
            rows = json.load(handle)
        except (ValueError, OSError, EOFError) as error:  # a torn gzip file too
            raise DataError(f"not JSON ({error})", where=str(path)) from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError("not a list of rows", where=str(path))
    users: list[str | None] = [None] * len(rows)
    if part in reader.users:
        table = _there(folder / reader.users[part])
        try:
            users = pl.read_csv(table, columns=[USER], schema_overrides={USER: pl.String})[USER].to_list()
        except pl.exceptions.PolarsError as error:
            raise DataError(f"no table with {USER} ({error})", where=str(table)) from error
        if len(users) != len(rows):
            raise DataError(f"{len(users)} users for {len(rows)} rows", where=str(table))
    return [
        _yes_no(row, user, f"{path}, row {number}")
        for number, (row, user) in enumerate(zip(rows, users, strict=True), 1)
    ]


def _yes_no(row: dict[str, str], user: str | None, where: str) -> YesNoRow:
    found = _ROW.match(row.get("input", ""))
    label = _LABELS.get(row.get("output", ""))
    if found is None or label is None:
        raise DataError("not a row of likes, dislikes, a target and Yes. or No.", where=where)
    return YesNoRow(_titles(found["liked"]), _titles(found["disliked"]), found["target"], label, user)


def _titles(text: str) -> tuple[str, ...]:
    """`"A, The (1990)", "B"` -> the titles; a book's author stays behind its title."""
    text = text.strip()
    return tuple(part.strip('"') for part in re.split(r', (?=")', text)) if text else ()


# -- candidates --------------------------------------------------------------------------------


def read_candidates(path: Path) -> list[tuple[str, list[str]]]:
    """LLMRank's candidate files: `user <TAB> item item ...` a line, in the file's order."""
    rows = [line.split("\t") for line in _lines(_there(path))]
    wrong = next((number for number, row in enumerate(rows, 1) if len(row) != 2), None)
    if wrong is not None:
        raise DataError("a user and a list of items belong there", where=f"{path}, row {wrong}")
    return [(user, items.split()) for user, items in rows]


# -- in common ---------------------------------------------------------------------------------


def folder_of(reader: Reader, data_dir: Path | None) -> Path | None:
    """The data set's own folder: the one of its name under ``data_dir``, or ``data_dir`` itself."""
    if data_dir is None:
        return None
    inner = data_dir / reader.folder
    return inner if inner.is_dir() else data_dir


def _given(folder: Path | None, name: str) -> Path:
    if folder is None:
        raise ConfigError("the task reads files", where=name, remedy=f"give --data-dir, the folder that holds {name}")
    return folder


def _there(path: Path) -> Path:
    if not path.is_file():
        raise DataError("no such file", where=str(path), remedy="check --data-dir")
    return path


@contextmanager
def _open(path: Path) -> Iterator[IO[str]]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as handle:
        yield handle


def _lines(path: Path) -> list[str]:
    """The lines that are not empty; only a line feed ends one, for titles hold other separators."""
    try:
        with _open(path) as handle:
            return [line for line in handle.read().split("\n") if line]
    except (UnicodeDecodeError, OSError, EOFError) as error:
        raise DataError(f"cannot be read ({error})", where=str(path)) from error


def _from_lists(users: list[str], lists: list[list[str]], items: pl.DataFrame) -> Dataset:
    events = pl.DataFrame({USER: users, ITEM: lists}, schema={USER: pl.String, ITEM: pl.List(pl.String)})
    return Dataset.read(events, items)


def _numeric(item: str) -> tuple[int, str]:
    return (int(item) if item.isdecimal() else -1, item)
