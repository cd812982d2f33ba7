"""Reading public sets as their sources publish them."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import pytest

from penchant.data.dataset import Dataset

DATA = Path(__file__).parents[3] / "shared" / "data"


def real(name: str) -> Path:
    folder = DATA / name
    if not folder.is_dir():
        pytest.skip(f"the data set {name} is not at {folder}")
    return folder


def test_movielens_100k() -> None:
    folder = real("ml-100k")
    dataset = Dataset.read(
        folder / "u.data",
        folder / "u.item",
        interactions_table={"separator": "\t", "columns": ["user_id", "item_id", "rating", "timestamp"]},
        items_table={"separator": "|", "encoding": "latin-1", "quote": None, "columns": ["item_id", "title"]},
    )
    assert (dataset.n_users, dataset.n_items, len(dataset.interactions)) == (943, 1682, 100_000)
    titles = dict(dataset.items.select("item_id", "title").iter_rows())
    assert titles["1"] == "Toy Story (1995)"
    assert titles["543"] == "Misérables, Les (1995)"
    # The rows of the files themselves, counted another way.
    rows = [line.split("\t") for line in (folder / "u.data").read_text().splitlines()]
    assert Counter(row[0] for row in rows) == Counter(dataset.interactions["user_id"].to_list())
    first = min((row for row in rows if row[0] == "1"), key=lambda row: (int(row[3]), int(row[1])))
    assert dataset.interactions.row(0) == ("1", first[1], int(first[3]) * 1_000_000, float(first[2]))


def test_movielens_latest_small() -> None:
    folder = real("ml-latest-small")
    mapping = {"user_id": "userId", "item_id": "movieId"}
    dataset = Dataset.read(folder / "ratings.csv", folder / "movies.csv", map=mapping)
    assert (dataset.n_users, dataset.n_items, len(dataset.interactions)) == (610, 9742, 100_836)
    assert dataset.time_range[0] == datetime.fromtimestamp(828124615, UTC).isoformat()
    assert dataset.time_range[1] == datetime.fromtimestamp(1537799250, UTC).isoformat()
    assert dataset.items.columns == ["item_id", "title", "genres"]


def test_mars_elearning() -> None:
    folder = real("mars-elearning")
    mapping = {"timestamp": "created_at", "title": "name"}
    dataset = Dataset.read(folder / "implicit_ratings_en.csv", folder / "items_en.csv.gz", map=mapping)
    assert (dataset.n_users, dataset.n_items, len(dataset.interactions)) == (3007, 1167, 21_908)
    title = dict(dataset.items.select("item_id", "title").iter_rows())["510"]
    assert title == "What is OneDrive for Business?"
    moment = int(datetime(2016, 11, 2, 20, 59, 23, tzinfo=UTC).timestamp()) * 1_000_000
    assert ("4287", "510", moment) in dataset.interactions.rows()
