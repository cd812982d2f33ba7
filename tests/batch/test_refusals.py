"""An unfinished job with another model, adapter, catalogue or version is refused by name; so is what would be ignored,
and a shard that isn't what it must be.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from tests.batch.conftest import Jobs, made, quarantined, results
from tests.fake_engine import FakeEngine

from penchant.batch import dry_run, identity, run
from penchant.batch.shards import Shards
from penchant.errors import ConfigError, DataError, StorageError
from penchant.prompt import Templates
from penchant.recommend import Recommender
from penchant.resources import shipped

HOW: dict[str, Any] = {"shard_rows": 5, "max_bad_share": 0.2, "k": 3}


def other_templates(model: Recommender, folder: Path) -> None:
    shutil.copytree(shipped("prompts"), folder / "prompts")
    path = folder / "prompts" / "next_item.jinja"
    path.write_text(path.read_text(encoding="utf-8").replace("One user's", "A user's"), encoding="utf-8")
    model.templates = Templates(folder / "prompts")


CHANGES: dict[str, Callable[[Recommender, Path], None]] = {
    "model": lambda model, _: setattr(model, "fingerprint", "another"),
    "adapter": lambda model, _: setattr(model, "fingerprint", "fake+adapter"),
    "dtype": lambda model, _: setattr(model, "fingerprint", "fake:float16"),
    "catalogue": lambda model, _: setattr(model, "texts", [*model.texts[:-1], "another title"]),
    "templates": other_templates,
}


def begun(model: Recommender, out: Path, users: Path) -> None:
    stop = threading.Event()
    run(model, out, users, stop=stop, tell=lambda n: stop.set() if "shards_done" in n else None, **HOW)


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_model_is_refused_by_name(
    run_folder: Path, model: Recommender, users: Path, tmp_path: Path, name: str
) -> None:
    begun(model, tmp_path / "recs", users)
    other = Recommender.load(run_folder, FakeEngine())
    CHANGES[name](other, tmp_path)
    with pytest.raises(StorageError) as caught:
        run(other, tmp_path / "recs", users, **HOW)
    assert f"differs in: {name} (" in str(caught.value)
    assert str(caught.value).count(" then, ") == 1


def test_another_version_is_refused_by_name(
    model: Recommender, users: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun(model, tmp_path / "recs", users)
    found = identity.versions()
    monkeypatch.setattr(identity, "versions", lambda: found | {"torch": "0.1"})
    with pytest.raises(StorageError, match=r"differs in: version of torch \([^;]* then, 0\.1 now\)\n"):
        run(model, tmp_path / "recs", users, **HOW)


def test_two_jobs_at_once_the_second_is_refused(jobs: Jobs, model: Recommender, users: Path, tmp_path: Path) -> None:
    out, second = tmp_path / "recs", []

    def tell(numbers: dict[str, Any]) -> None:
        second.append(jobs(out, users))

    summary = run(model, out, users, tell=tell, **HOW)
    assert [ended.status for ended in second] == [2] * 4, "in the set-up and after each shard"
    assert all("another process is at work" in ended.said for ended in second)
    assert summary["state"] == "complete"
    assert jobs(out, users, part="1/2").status == 0


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda frame: frame.filter(pl.col("row") != 6), "rows 5 to 9 of the input are not there exactly once"),
        (lambda frame: pl.concat([frame, frame.filter(pl.col("row") == 6)]), "not there exactly once"),
        (lambda frame: frame.with_columns(pl.col("rank") + 1), "ranks do not run from 1"),
    ],
)
def test_a_shard_is_checked_before_it_is_published(
    model: Recommender, users: Path, tmp_path: Path, harm: Callable[[pl.DataFrame], pl.DataFrame], said: str
) -> None:
    run(model, tmp_path / "recs", users, **HOW)
    shards = Shards(tmp_path / "recs" / "run-0001", 13, 5)
    for shard in range(3):
        shards.check(shard)
    part = tmp_path / "recs" / "run-0001" / "parts" / "part-00001.parquet"
    harm(pl.read_parquet(part)).write_parquet(part)
    with pytest.raises(StorageError, match=said):
        shards.check(1)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"job": "score", "deny": ("1",)}, "deny means nothing to score"),
        ({"job": "score", "where": ("genres~Comedy",)}, "where means nothing to score"),
        ({"job": "score", "diversity": 0.5}, "diversity means nothing to score"),
        ({"job": "embed-items", "deny": ("1",)}, "deny means nothing to embed-items"),
        ({"job": "embed-users", "method": "generate"}, "method means nothing to embed-users"),
        ({"calibration": 1.0}, "calibration is of method generate, and the method is rank"),
        ({"job": "embed-users", "backend": "vllm"}, "this job asks none"),
        ({"method": "retrieve", "backend": "vllm"}, "this job asks none"),
        ({"backend": "guess"}, "backend"),
        ({"backend": "transformers"}, "where the job loads the engine itself"),
    ],
)
def test_what_would_be_ignored_is_refused(
    model: Recommender, users: Path, tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    for call in (lambda: run(model, tmp_path / "recs", users, **settings), lambda: dry_run(model, users, **settings)):
        with pytest.raises(ConfigError) as caught:
            call()
        assert said in str(caught.value)


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here")
def test_vllm_where_it_is_not_installed(run_folder: Path, users: Path, tmp_path: Path) -> None:
    model = Recommender.load(run_folder)
    model.engine_source = {"model": "nowhere", "adapter": None, "dtype": "float32", "device": "cpu"}
    model.save(tmp_path / "run")
    with pytest.raises(ConfigError, match="vLLM is not installed"):
        run(tmp_path / "run", tmp_path / "recs", users, backend="vllm")
    assert not (tmp_path / "recs").exists()


def test_an_empty_path_is_not_every_user(model: Recommender, tmp_path: Path) -> None:
    for path in ("", " "):
        with pytest.raises(ConfigError, match="an empty path"):
            run(model, tmp_path / "recs", path)


def test_results_are_not_written_among_the_rows(model: Recommender, users: Path, tmp_path: Path) -> None:
    for rows, out in (
        (tmp_path, tmp_path / "recs"),
        (tmp_path, tmp_path),
        (f"file://{tmp_path}", tmp_path / "a" / "b"),
        (tmp_path / "**" / "*.parquet", tmp_path / "recs"),
    ):
        with pytest.raises(ConfigError, match="would be read as rows"):
            run(model, out, str(rows), **HOW)
        assert not (tmp_path / "recs").exists()
    run(model, tmp_path / "recs", tmp_path / "*.parquet", **HOW)
    assert made(tmp_path / "recs")


def test_a_column_that_is_there_twice_is_one_error(model: Recommender, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_arrays([pa.array(["u1"]), pa.array(["u2"])], names=["user_id", "user_id"])
    pq.write_table(table, tmp_path / "users.parquet")
    with pytest.raises(DataError, match="several columns user_id"):
        run(model, tmp_path / "recs", tmp_path / "users.parquet")


def test_removed_items_have_no_vector_and_users_who_came_since_are_every_user_too(
    run_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(run_folder, tmp_path / "run")
    model = Recommender.load(tmp_path / "run", FakeEngine())
    model.remove_items(["3"])
    model.update("new", [{"item_id": "5"}])
    model.update("u1", [{"item_id": "5"}])
    run(model, tmp_path / "items", job="embed-items")
    assert results(tmp_path / "items")["item_id"].to_list() == [name for name in model.item_index if name != "3"]
    pl.DataFrame({"item_id": ["3", "4"]}).write_parquet(tmp_path / "items.parquet")
    run(model, tmp_path / "some", tmp_path / "items.parquet", job="embed-items", max_bad_share=0.5)
    assert quarantined(tmp_path / "some").select("item_id", "reason").rows() == [("3", "removed_item")]
    run(model, tmp_path / "users", method="retrieve", k=1)
    assert results(tmp_path / "users")["user_id"].to_list() == [*model.log.user_ids, "new"]
