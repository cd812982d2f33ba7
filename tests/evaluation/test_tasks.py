"""Tasks and the readers of public data sets: tiny files in the real formats, and the real files where they are."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from tests.conftest import SHARED_DATA

from penchant.data.dataset import Dataset
from penchant.errors import ConfigError, DataError
from penchant.evaluation.readers import YesNo, YesNoRow, read_yes_no
from penchant.evaluation.tasks import Task, asked_of, load_task, read_data, split_of
from penchant.resources import shipped

TASKS = sorted(path.stem for path in shipped("tasks").glob("*.yaml"))


def task(**fields: object) -> Task:
    return Task.model_validate({"version": 1, "about": "a test", "split": {"kind": "leave-last-out"}, **fields})


def sequences(dataset: Dataset) -> dict[str, list[str]]:
    """Each user's items in order."""
    groups = dataset.interactions.group_by("user_id", maintain_order=True).agg("item_id")
    return dict(groups.iter_rows())


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


# -- the formats -------------------------------------------------------------------------------


def games(folder: Path) -> Task:
    rows = ["user_id:token\titem_id_list:token_seq\titem_id:token", "0\t0 1 2 3\t4", "1\t10 9 2\t0", "2\t4 3\t10"]
    write(folder / "games/test.inter.gz", "\n".join(rows) + "\n")
    titles = ["item_id:token\ttitle:token_seq", *(f'{i}\tGame "{i}", the\u2028first' for i in range(12))]
    write(folder / "games/Games.item", "\n".join(titles) + "\n")
    write(folder / "games/cand", "2\t5 10 6 7 8\n0\t1 2 5 6 7\n")
    data = {"kind": "llmrank-games", "folder": "games", "sequences": "test.inter.gz", "items": "Games.item"}
    return task(data=data, candidates={"file": "cand", "n": 4})


def test_llmrank_games(tmp_path: Path) -> None:
    made = games(tmp_path)
    dataset = read_data(made, tmp_path)
    assert sequences(dataset) == {"0": ["0", "1", "2", "3", "4"], "1": ["10", "9", "2", "0"], "2": ["4", "3", "10"]}
    assert dataset.items["item_id"].to_list() == [str(i) for i in range(12)]
    assert dataset.items["title"][3].startswith('Game "3", the')
    # The folder itself does as well as the one above it.
    assert read_data(made, tmp_path / "games").content_hash == dataset.content_hash
    split = split_of(made, dataset)
    asked = asked_of(made, split, tmp_path)
    assert [split.log.user_ids[u] for u in asked.targets.user] == ["2", "0"]
    # The target is taken out, three are kept, and the target is put behind them.
    assert asked.candidates is not None
    assert asked.candidates.tolist() == [[5, 6, 7, 10], [1, 2, 5, 4]]
    free = made.model_copy(update={"candidates": made.candidates.model_copy(update={"ground_truth": False})})
    again = asked_of(free, split, tmp_path).candidates
    assert again is not None
    assert again.tolist() == [[5, 10, 6, 7], [1, 2, 5, 6]]
    only = made.model_copy(update={"candidates": made.candidates.model_copy(update={"n": None})})
    assert asked_of(only, split, tmp_path).candidates is None
    assert len(asked_of(only, split, tmp_path).targets) == 2


@pytest.mark.parametrize(
    ("line", "what"),
    [("9\t1 2 5 6", "user '9' has no test target"), ("0\t1 2 77 6", "unknown item '77'"), ("0 1 2", "belong there"),
     ("0\t1 2", "3 candidates where 4 belong")],
)  # fmt: skip
def test_wrong_candidates_name_the_row(tmp_path: Path, line: str, what: str) -> None:
    made = games(tmp_path)
    split = split_of(made, read_data(made, tmp_path))
    write(tmp_path / "games/cand", f"2\t5 10 6 7 8\n{line}\n")
    with pytest.raises(DataError, match=rf"{what}[\s\S]*") as caught:
        asked_of(made, split, tmp_path)
    assert "row 2" in str(caught.value)


def test_sequences_with_and_without_texts(tmp_path: Path) -> None:
    write(tmp_path / "s3/B.txt", "1 1 2 3 2\n2 10 9\n10 4\n")
    write(tmp_path / "s3/names.json.gz", json.dumps({"id2item": {"1": "A", "2": "B", "3": "C", "11": "D"}}))
    write(tmp_path / "s3/texts.txt", "A nail lacquer\nB \nD never bought\n")
    data = {"kind": "sequences", "folder": "s3", "sequences": "B.txt"}
    plain = read_data(task(data=data), tmp_path)
    assert sequences(plain) == {"1": ["1", "2", "3", "2"], "2": ["10", "9"], "10": ["4"]}
    assert plain.items["title"].to_list() == [f"item {i}" for i in (1, 2, 3, 4, 9, 10)]
    named = read_data(task(data={**data, "names": "names.json.gz", "texts": "texts.txt"}), tmp_path)
    titles = dict(named.items.select("item_id", "title").iter_rows())
    assert titles["1"] == "nail lacquer"
    assert titles["2"] == "item 2"  # its text is empty
    assert titles["11"] == "never bought"
    for half in ({"names": "names.json.gz"}, {"texts": "texts.txt"}):
        with pytest.raises(ConfigError, match="give both files"):
            read_data(task(data={**data, **half}), tmp_path)
    assert sequences(named) == sequences(plain)
    write(tmp_path / "s3/B.txt", "1 1 2\n2\n")
    with pytest.raises(DataError, match="row 2"):
        read_data(task(data=data), tmp_path)


def test_movielens_as_released(tmp_path: Path) -> None:
    write(tmp_path / "ml/u.data", "7\t1\t3\t881250949\n7\t2\t5\t881250948\n")
    flags = "|".join(["0"] * 18)
    (tmp_path / "ml/u.item").write_bytes(
        f"1|Amélie (2001) |01-Jan-2001||x|1|{flags}\n2|B (1990)|||x|0|1|{'|'.join(['0'] * 17)}\n".encode("latin-1")
    )
    dataset = read_data(task(data={"kind": "movielens-100k", "folder": "ml"}), tmp_path)
    assert sequences(dataset) == {"7": ["2", "1"]}
    assert dataset.items.rows() == [("1", "Amélie (2001)", "unknown"), ("2", "B (1990)", "Action")]
    assert sorted(p.name for p in (tmp_path / "ml").iterdir()) == ["u.data", "u.item"]


def test_yes_no_rows(tmp_path: Path) -> None:
    def row(liked: str, disliked: str, target: str, output: str) -> dict[str, str]:
        text = f"User Preference: {liked}\nUser Unpreference: {disliked}\nWhether the user will like the target movie "
        return {"instruction": "x", "input": f'{text}"{target}"?', "output": output}

    rows = [row('"Paris, Texas (1984)", "Dave"', "", "Orlando", "Yes."), row("", '"M"', "Up, The", "No.")]
    write(tmp_path / "t/test.json.gz", json.dumps(rows))
    write(tmp_path / "t/test.csv", "user_id,movie_id\n12,1\n007,2\n")
    reader = YesNo(kind="tallrec", folder="t", train="x", valid="x", test="test.json.gz", users={"test": "test.csv"})
    assert read_yes_no(reader, "test", tmp_path) == [
        YesNoRow(("Paris, Texas (1984)", "Dave"), (), "Orlando", True, "12"),
        YesNoRow((), ("M",), "Up, The", False, "007"),
    ]
    write(tmp_path / "t/test.json.gz", json.dumps([rows[0], row("", "", "X", "Maybe.")]))
    with pytest.raises(DataError, match="row 2"):
        read_yes_no(reader, "test", tmp_path)


# -- the models --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_the_shipped_tasks_say_what_they_are(name: str) -> None:
    found = load_task(name)
    assert found.about
    assert (found.split is None) == (found.data.kind == "tallrec")
    for other in found.published:
        assert other.source
        assert other.protocol
        assert all(0 < value < 1 for value in other.metrics.values())


def test_what_a_hash_depends_on() -> None:
    data = {"kind": "sequences", "folder": "s3", "sequences": "B.txt"}
    base = task(data=data)
    for same in ({"about": "other words"}, {"seeds": [4]}, {"llm_users": 3}, {"baselines": ["popularity"]}):
        assert task(data=data, **same).hash == base.hash
    changes = ({"version": 2}, {"k": 5}, {"seen": "keep"}, {"seen_last": 200}, {"budget": {"trials": 1}})
    for other in (*changes, {"fit": {"encoder": {"epochs": 3}}}, {"split": {"kind": "global-time"}}):
        assert task(data=data, **other).hash != base.hash
    assert task(data={**data, "sequences": "C.txt"}).hash != base.hash
    # What an encoder learns depends on less: whom it is asked for among what is no part of it.
    asks = ({"k": 5}, {"average": "user"}, {"candidates": {"file": "x", "n": 20}}, {"llm_users": 3})
    for same in asks:
        assert task(data=data, **same).training_hash == base.training_hash
    learns = [change for change in changes if change not in asks]
    for other in (*learns, {"fit": {"encoder": {"epochs": 3}}}, {"split": {"kind": "global-time"}}):
        assert task(data=data, **other).training_hash != base.training_hash


def test_the_games_tasks_share_their_encoders() -> None:
    games = {load_task(name).training_hash for name in ("games", "games-6k", "games-20")}
    assert len(games) == 1
    assert load_task("beauty").training_hash not in games


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("version: 1\nnonsense: 1\n", "nonsense"),
        ("- 1\n", "is no task"),
        ("a: [", "is no task"),
        ("version: 1\nabout: x\ndata: {kind: other, folder: x}\n", "other"),
        ("version: 1\nabout: x\nsplit: {kind: global-time, options: {test_from: soon}}\n", "test_from|datetime"),
    ],
)
def test_a_wrong_task_is_one_error(tmp_path: Path, text: str, what: str) -> None:
    (tmp_path / "wrong.yaml").write_text(text)
    with pytest.raises(ConfigError, match=what):
        load_task(str(tmp_path / "wrong.yaml"))


@pytest.mark.parametrize("moment", ["2024-05-01", "2024-05-01 00:00:00", "'2024-05-01T00:00:00Z'"])
def test_moments_of_a_split_may_be_dates_or_texts(tmp_path: Path, moment: str) -> None:
    (tmp_path / "t").mkdir()
    rows = "".join(f"{user},{item},2024-0{4 + at}-30\n" for user in "ab" for at, item in enumerate("xyx"))
    (tmp_path / "t/a.csv").write_text("user_id,item_id,timestamp\n" + rows)
    (tmp_path / "t/b.csv").write_text("item_id,title\nx,X\ny,Y\n")
    (tmp_path / "task.yaml").write_text(
        "version: 1\nabout: x\ndata: {kind: tables, folder: t, interactions: a.csv, items: b.csv}\n"
        f"split: {{kind: global-time, options: {{valid_from: {moment}, test_from: 2024-06-01}}}}\n"
    )
    made = load_task(str(tmp_path / "task.yaml"))
    split = split_of(made, read_data(made, tmp_path))
    assert (split.train.sum(), len(split.valid), len(split.test)) == (2, 2, 2)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such task[\s\S]*ml-100k"):
        load_task("ml-1b")
    with pytest.raises(ConfigError, match="--data-dir"):
        read_data(load_task("beauty"))
    with pytest.raises(DataError, match=r"Beauty\.txt: no such file"):
        read_data(load_task("beauty"), tmp_path)
    with pytest.raises(ConfigError, match="eval/tallrec"):
        read_data(load_task("tallrec-movie"), tmp_path)


# -- the real files ----------------------------------------------------------------------------


def real(name: str) -> Task:
    found = load_task(name)
    path = SHARED_DATA / found.data.folder / getattr(found.data, "sequences", "")
    if not path.exists():
        pytest.skip(f"{path.relative_to(SHARED_DATA)} is not at {SHARED_DATA}")
    return found


@pytest.mark.parametrize(
    ("name", "users", "items", "events", "targets"),
    [
        ("ml-100k", 943, 1_682, 100_000, 943),
        ("ml-latest-small-5core", 610, 3_650, 90_274, 610),
        ("beauty", 22_363, 12_101, 198_502, 22_363),
        ("toys", 19_412, 11_924, 167_597, 19_412),
        ("sports", 35_598, 18_357, 296_337, 35_598),
        ("games-6k", 50_546, 16_859, 440_264, 6_000),
        ("mars-elearning-time", 3_007, 1_167, 21_908, None),
    ],
)
def test_real_files(name: str, users: int, items: int, events: int, targets: int | None) -> None:
    found = real(name)
    dataset = read_data(found, SHARED_DATA)
    assert (dataset.n_users, dataset.n_items, len(dataset.interactions)) == (users, items, events)
    asked = asked_of(found, split_of(found, dataset), SHARED_DATA)
    assert targets is None or len(asked.targets) == targets


def test_real_candidates_hold_the_target_once() -> None:
    found = real("games-20")
    asked = asked_of(found, split_of(found, read_data(found, SHARED_DATA)), SHARED_DATA)
    assert asked.candidates is not None
    assert asked.candidates.shape == (6_000, 20)
    assert ((asked.candidates == asked.targets.item[:, None]).sum(axis=1) == 1).all()
    assert all(len(np.unique(row)) == 20 for row in asked.candidates)


def test_real_core_is_stable_and_ordered_by_time_and_item() -> None:
    dataset = read_data(real("ml-latest-small-5core"), SHARED_DATA)
    for column in ("user_id", "item_id"):
        assert dataset.interactions[column].value_counts()["count"].min() >= 5
    rows = [(int(u), t, int(i)) for u, i, t in dataset.interactions.select("user_id", "item_id", "timestamp").rows()]
    assert rows == sorted(rows)


def test_real_yes_no_rows() -> None:
    found = real("tallrec-movie")
    assert isinstance(found.data, YesNo)
    for part, n, positive in (("train", 8_000, None), ("valid", 1_000, None), ("test", 1_000, 528)):
        rows = read_yes_no(found.data, part, SHARED_DATA)  # type: ignore[arg-type]
        assert len(rows) == n
        assert {len(row.liked) + len(row.disliked) for row in rows} == {10}
        assert positive is None or sum(row.label for row in rows) == positive


def test_a_seed_counts_once() -> None:
    data = {"kind": "tables", "folder": "t", "interactions": "a.csv", "items": "b.csv"}
    with pytest.raises(ValueError, match="a seed is named twice"):
        task(data=data, seeds=[0, 1, 0])
    assert task(data=data, seeds=[0, 1]).seeds == [0, 1]
