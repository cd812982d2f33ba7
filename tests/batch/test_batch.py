"""What a job makes: the answers of `recommend`, scores of pairs, vectors; its summary, status and dry run."""

from __future__ import annotations

import errno
import fcntl
import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from tests.batch.conftest import USERS, Jobs, made, results
from tests.fake_engine import FakeEngine

from penchant.batch import BatchOptions, dry_run, run, status
from penchant.engine.transformers import TransformersEngine
from penchant.errors import ConfigError, StorageError
from penchant.fusion import Fusion
from penchant.interest.behaviour import History
from penchant.recommend import Recommender

COLUMNS = ["row", "user_id", "item_id", "rank", "score", "stage", "interest", "llm", "fused", "model"]


@pytest.mark.parametrize(
    ("options", "same"),
    [
        ({}, {}),
        ({"method": "retrieve"}, {"method": "retrieve"}),
        ({"method": "generate", "calibration": 0.5}, {"method": "generate", "calibration": 0.5}),
        ({"k": 9, "include_seen": True}, {"k": 9, "include_seen": True}),
        (
            {"deny": ["1", "2"], "where": ["genres~Comedy"]},
            {"deny": ["1", "2"], "where": pl.col("genres").str.contains("Comedy")},
        ),
        ({"diversity": 0.4, "caps": {"genres": 3}}, {"diversity": 0.4, "caps": {"genres": 3}}),
        ({"batch": 3, "shard_rows": 4}, {}),
    ],
)
def test_a_job_answers_as_recommend_does(
    model: Recommender, tmp_path: Path, options: dict[str, Any], same: dict[str, Any]
) -> None:
    names = [f"u{i}" for i in range(9, -1, -1)]
    pl.DataFrame({"user_id": names}).write_parquet(tmp_path / "users.parquet")
    run(model, tmp_path / "recs", tmp_path / "users.parquet", **options)
    found = results(tmp_path / "recs")
    assert found.columns == COLUMNS
    alone = model.recommend(users=names, **({"k": 10} | same))
    keys = ["user_id", "item_id", "rank", "stage"]
    assert found.select(keys).rows() == alone.select(keys).rows(), "in the order of the input"
    assert found["score"].to_list() == pytest.approx(alone["score"].to_list(), abs=1e-4)


@pytest.mark.parametrize(
    "options", [{}, {"k": 30}, {"deny": [str(i) for i in range(5, 17)]}, {"unique_titles": False}, {"k": 1}]
)
def test_lists_of_the_index_alone_keep_to_the_rules(
    model: Recommender, tmp_path: Path, options: dict[str, Any]
) -> None:
    twice = pl.when(pl.col("item_id").cast(pl.Int64) % 3 == 0).then(pl.lit("Again")).otherwise("title")
    model.items = model.items.with_columns(twice.alias("title"))
    model.removed[7] = True
    lists = [["1"], [], ["5", "6", "7"], [str(i) for i in range(1, 13)], ["2", "2"]]
    users = pl.DataFrame({"user_id": list("abcde"), "history": lists}, schema=USERS)
    users.write_parquet(tmp_path / "users.parquet")
    run(model, tmp_path / "recs", tmp_path / "users.parquet", method="retrieve", max_bad_share=1.0, **options)
    found = results(tmp_path / "recs")
    for user, history in users.rows():
        alone = model.recommend(history=history, method="retrieve", **({"k": 10} | options))
        own = found.filter(pl.col("user_id") == user)
        assert own["item_id"].to_list() == alone["item_id"].to_list()
        assert own["rank"].to_list() == list(range(1, len(alone) + 1))
        assert own["score"].to_list() == pytest.approx(alone["score"].to_list(), abs=1e-5)
        from_index = own["stage"] == "interest"
        assert own["interest"].is_not_null().to_list() == from_index.to_list()
        assert from_index.all() == bool(history)
    assert found.select("llm", "fused").null_count().row(0) == (len(found), len(found))


def test_stages_are_told_apart(model: Recommender, users: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "recs", users, k=6, max_bad_share=0.2)
    found = results(tmp_path / "recs")
    fused = found.filter(pl.col("stage") == "llm+interest")
    assert fused["fused"].to_list() == fused["score"].to_list()
    assert fused.select("interest", "llm").null_count().row(0) == (0, 0)
    behind = found.filter(pl.col("stage") == "interest")
    assert behind["interest"].to_list() == behind["score"].to_list()
    assert behind["llm"].null_count() == len(behind) > 0
    # The fused score is what its parts say: z(interest) / 2 + z(llm - prior) / 2 over the four candidates.
    one = fused.filter(pl.col("user_id") == "u3")
    items = [model.item_index[i] for i in one["item_id"]]
    expected = model.fusion.scores(
        one["interest"].to_numpy(), one["llm"].to_numpy(), model.ranker.priors(np.array(items))
    )
    assert one["score"].to_list() == pytest.approx(expected.tolist(), abs=1e-6)
    assert len(set(found["model"])) == 1
    assert len(found["model"][0]) == 16


def test_a_generated_item_has_the_llm_s_own_likelihood_beside_the_calibrated_score(
    model: Recommender, users: Path, tmp_path: Path
) -> None:
    # The cap makes lists be asked again, for more items.
    summary = run(
        model, tmp_path / "recs", users, method="generate", calibration=0.5, caps={"genres": 1}, k=3, max_bad_share=0.2
    )
    found = results(tmp_path / "recs").filter(pl.col("stage") == "llm-generate")
    assert len(found) > 20
    prior = model.ranker.priors(np.array([model.item_index[i] for i in found["item_id"]]))
    assert found["score"].to_numpy() == pytest.approx(found["llm"].to_numpy() - 0.5 * prior)
    one = found.filter(pl.col("user_id") == "u3")
    (alone,) = model.ranker.likelihoods(
        [model.behaviour("u3").item], [np.array([model.item_index[i] for i in one["item_id"]])]
    )
    assert one["llm"].to_list() == pytest.approx(alone.tolist())
    assert found.select("interest", "fused").null_count().row(0) == (len(found), len(found))
    assert summary["tokens_asked"] == 0, "what a search asks is not counted by the item"


def test_a_real_model_gives_the_same_whatever_was_done_before(
    run_folder: Path, byte_engine: TransformersEngine, users: Path, tmp_path: Path
) -> None:
    """With a real LLM last digits depend on what is asked together: a job's do on the shard alone."""
    whole = Recommender.load(run_folder)
    files = []
    for out, part in (("a", None), ("b", "2/2"), ("b", "1/2")):
        model = Recommender(**{name: getattr(whole, name) for name in whole.__dataclass_fields__})
        model.fingerprint, model.fusion, model.prior = byte_engine.fingerprint, Fusion(0.5, 1.0), None
        model.use_engine(byte_engine)
        summary = run(model, tmp_path / out, users, shard_rows=4, part=part, max_bad_share=0.2)
        if summary["state"] == "complete":
            files.append(made(tmp_path / out))
            assert 0 < summary["cached_share"] < 1
            assert summary["tokens_run"] < summary["tokens_asked"]
    assert files[0] == files[1]


def bonus_of(model: Recommender, history: History, item: int) -> float:
    found = model.encoder.bonus([history], model.encoder.encode([history]))
    return 0.0 if found is None else float(found.toarray()[0, item])


def own_score(model: Recommender, history: History, item: int) -> float:
    dot = float(model.encoder.encode([history])[0] @ model.encoder.item_matrix()[item])
    return dot + bonus_of(model, history, item)


def test_pairs_are_scored_each_on_its_own(model: Recommender, tmp_path: Path) -> None:
    pairs = [("u1", "5"), ("u2", "5"), ("u1", "9"), ("guest", "5")]
    frame = pl.DataFrame(pairs, schema=["user_id", "item_id"], orient="row")
    own = pl.Series("history", [None, None, None, ["1", "2"]], dtype=pl.List(pl.String))
    frame.with_columns(own).write_parquet(tmp_path / "pairs.parquet")
    for method in ("rank", "retrieve"):
        run(model, tmp_path / method, tmp_path / "pairs.parquet", job="score", method=method)
    llm, plain = results(tmp_path / "rank"), results(tmp_path / "retrieve")
    assert llm.select("user_id", "item_id").rows() == plain.select("user_id", "item_id").rows() == pairs
    for place, (user, item) in enumerate(pairs):
        history = model.behaviour(user) if user != "guest" else None
        row = np.array([0, 1], dtype=np.int32) if history is None else history.item
        at = np.array([model.item_index[item]])
        interest = own_score(model, history or row, int(at[0]))
        assert plain["score"][place] == pytest.approx(interest, abs=1e-4)
        assert plain["interest"][place] == llm["interest"][place]
        assert plain["llm"][place] is None
        (said,) = model.ranker.likelihoods([row], [at])
        assert llm["llm"][place] == pytest.approx(float(said[0]))
        assert llm["score"][place] == pytest.approx(float(said[0] - model.ranker.priors(at)[0]))
    with pytest.raises(ConfigError, match="not by generate"):
        run(model, tmp_path / "x", tmp_path / "pairs.parquet", job="score", method="generate")
    with pytest.raises(ConfigError, match="no pairs"):
        run(model, tmp_path / "x", job="score")


def test_vectors_of_users_and_items_are_the_encoder_s(model: Recommender, users: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "users", users, job="embed-users", max_bad_share=0.2)
    run(model, tmp_path / "items", job="embed-items")
    mine, theirs = results(tmp_path / "users"), results(tmp_path / "items")
    assert theirs["item_id"].to_list() == list(model.item_index)
    assert np.array_equal(theirs["vector"].to_numpy(), model.encoder.item_matrix())
    expected = model.encoder.encode([model.behaviour(f"u{i}") for i in range(11)])
    assert mine["vector"].to_numpy()[:11] == pytest.approx(expected, abs=1e-5)
    # A dot product of the two is the interest score, but for what neighbours add.
    run(model, tmp_path / "recs", users, method="retrieve", k=1, max_bad_share=0.2)
    best = results(tmp_path / "recs").row(0, named=True)
    item = theirs.filter(pl.col("item_id") == best["item_id"])["vector"].to_numpy()[0]
    bonus = bonus_of(model, model.behaviour("u0"), model.item_index[best["item_id"]])
    assert bonus > 0
    assert best["score"] == pytest.approx(float(mine["vector"].to_numpy()[0] @ item) + bonus, abs=1e-4)


def test_every_user_the_run_knows(model: Recommender, tmp_path: Path) -> None:
    summary = run(model, tmp_path / "recs", method="retrieve", k=1)
    assert results(tmp_path / "recs")["user_id"].to_list() == model.log.user_ids
    assert (summary["rows"], summary["good"], summary["results"]) == (30, 30, 30)


def test_the_summary_and_the_progress_add_up(model: Recommender, users: Path, tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    out = tmp_path / "recs"
    summary = run(model, out, users, shard_rows=5, k=3, max_bad_share=0.2, tell=told.append)
    assert json.loads((out / "latest" / "summary.json").read_text()) == summary
    assert (summary["rows"], summary["good"], summary["bad"], summary["results"]) == (13, 12, 1, 36)
    assert summary["reasons"] == {"unknown_user": 1}
    assert summary["histories_cut"] == 11
    assert (told[0]["state"], told[0]["items_done"]) == ("setting up", 16)
    assert [one["shards_done"] for one in told[1:]] == [1, 2, 3]
    assert told[-1]["users_done"] == 13
    assert told[-1]["seconds_left"] == 0
    now = status(out)
    assert (now["state"], now["published"], now["shards_done"], now["rows_done"]) == ("complete", "run-0001", 3, 13)
    assert now["totals"]["results"] == 36
    assert now["processes"][0]["users_per_s"] > 0
    with pytest.raises(StorageError, match="holds no job"):
        status(tmp_path)


def test_the_status_of_a_job_at_work(jobs: Jobs, users: Path, tmp_path: Path) -> None:
    out = tmp_path / "recs"
    at_work = threading.Thread(target=jobs, args=(out, users), kwargs={"slow": 0.4})
    at_work.start()
    seen = []
    while at_work.is_alive():
        if (out / "run-0001").is_dir():
            seen.append(status(out))
        time.sleep(0.05)
    at_work.join()
    running = [one for one in seen if one["state"] == "running" and one["shards_done"]]
    assert running
    assert running[0]["published"] is None
    assert running[0]["shards_done"] < 3
    assert running[0]["processes"][0]["seconds_left"] > 0
    assert status(out)["state"] == "complete"


def test_a_stop_leaves_a_job_that_goes_on(model: Recommender, users: Path, tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    summary = run(model, tmp_path / "recs", users, shard_rows=5, max_bad_share=0.2, stop=stop)
    assert (summary["state"], summary["shards_left"]) == ("stopped", 3)
    again = threading.Event()
    summary = run(
        model,
        tmp_path / "recs",
        users,
        shard_rows=5,
        max_bad_share=0.2,
        stop=again,
        tell=lambda n: again.set() if "shards_done" in n else None,
    )
    assert (summary["state"], summary["shards_done"]) == ("stopped", 2), "one was in hand when it was stopped"
    assert status(tmp_path / "recs")["state"] == "stopped"


def test_a_dry_run_measures_and_writes_nothing(model: Recommender, users: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    found = dry_run(model, users, shard_rows=5)
    assert (found["rows"], found["shards"], found["sample_rows"]) == (13, 3, 13)
    assert found["bad_in_sample"] == 1
    assert found["tokens"] > 0
    assert found["users_per_s"] > 0
    assert found["seconds"] >= 0
    assert sorted(tmp_path.rglob("*")) == before
    assert dry_run(model, users, method="retrieve")["tokens"] == 0


def test_a_published_folder_can_be_read_while_the_next_is_made(model: Recommender, users: Path, tmp_path: Path) -> None:
    out = tmp_path / "recs"
    run(model, out, users, max_bad_share=0.2, k=2)
    handle = pl.scan_parquet(out / "latest" / "parts" / "*.parquet")
    model.fusion = Fusion(1.0, 0.0)
    run(model, out, users, max_bad_share=0.2, k=2)
    assert (out / "latest").readlink() == Path("run-0002")
    assert set(results(out)["stage"]) == {"llm"}
    assert handle.collect()["rank"].max() == 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"k": 0}, "greater than or equal to 1"),
        ({"method": "guess"}, "method"),
        ({"nonsense": 1}, "nonsense"),
        ({"runner": "spark"}, "unknown runner 'spark'"),
        ({"max_bad_share": 2}, "max_bad_share is 2"),
        ({"part": "5/4"}, "cannot read '5/4'"),
        ({"n_threads": 0}, "0 threads"),
        ({"where": ["nonsense"]}, "cannot read the condition"),
        ({"runner": "ray"}, "give the run's folder"),
    ],
)
def test_wrong_options_are_one_error(
    model: Recommender, users: Path, tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        run(model, tmp_path / "recs", users, **settings)
    assert said in str(caught.value)


def test_options_can_be_given_as_one(model: Recommender, users: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "recs", users, BatchOptions(k=2, method="retrieve"), max_bad_share=0.2)
    assert results(tmp_path / "recs")["rank"].max() == 2


def test_live_events_count_and_make_another_job(run_folder: Path, users: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(run_folder, tmp_path / "run")
    out = tmp_path / "recs"
    run(Recommender.load(tmp_path / "run", FakeEngine()), out, users, max_bad_share=0.2)
    model = Recommender.load(tmp_path / "run", FakeEngine())
    model.update("u1", [{"item_id": "16"}])
    model.update("nobody", [{"item_id": "3"}])
    summary = run(model, out, users, max_bad_share=0.2)
    assert summary["run"].endswith("run-0002")
    assert summary["bad"] == 0, "whom an event made known is answered"
    assert "16" not in results(out).filter(pl.col("user_id") == "u1")["item_id"].to_list()


def as_nfs(handle: Any, operation: int) -> None:
    """flock as NFS has it: a shared lock needs a file open for reading, an exclusive one a file open for writing."""
    if not (handle.readable() if operation & fcntl.LOCK_SH else handle.writable()):
        raise OSError(errno.EBADF, "Bad file descriptor")


def test_parts_and_status_hold_locks_as_nfs_has_them(
    model: Recommender, users: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penchant.batch.folder.fcntl.flock", as_nfs)
    for part in ("1/2", "2/2"):
        run(model, tmp_path / "recs", users, part=part, shard_rows=5, max_bad_share=0.2)
    assert status(tmp_path / "recs")["state"] == "complete"


def test_status_says_where_a_file_system_has_no_locks(
    model: Recommender, users: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(model, tmp_path / "recs", users, part="1/2", shard_rows=5, max_bad_share=0.2)

    def without(handle: Any, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("penchant.batch.folder.fcntl.flock", without)
    with pytest.raises(StorageError, match="cannot tell whether a process is at work"):
        status(tmp_path / "recs")
