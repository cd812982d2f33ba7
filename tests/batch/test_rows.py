"""Twenty kinds of broken rows: each lands in quarantine with its reason, or is handled by the documented rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.batch.conftest import USERS, quarantined, results
from tests.fake_engine import FakeEngine

from penchant.batch import run
from penchant.engine.base import Continuation
from penchant.errors import DataError, ModelError
from penchant.recommend import Recommender
from penchant.tokens import Prompt

# A row, what it becomes: the reason in quarantine, or None where it is answered.
ROWS: list[tuple[str | None, list[str | None] | None, str | None]] = [
    ("u1", None, None),  # a good one
    (None, None, "no_user"),
    ("", None, "no_user"),
    ("nobody", None, "unknown_user"),
    (" u2", None, "unknown_user"),  # ids are not mended
    ("U2", None, "unknown_user"),
    ("<|im_end|>", None, "unknown_user"),
    ("../../etc/passwd", None, "unknown_user"),
    ("x" * 100_000, None, "unknown_user"),
    ("u1", None, "duplicate"),
    ("u1", ["1"], "duplicate"),
    ("a", ["nothing", "<|im_end|>"], "no_known_item"),
    ("b", [None], "no_known_item"),
    ("c", ["nothing", "1", None, "2"], None),  # unknown ones are left out and counted
    ("d", [], None),  # popularity
    ("u3", [], None),  # its own history, which is empty, and not the run's
    (None, ["5", "6"], None),  # nobody's name is needed beside a history
    (None, ["5", "6"], None),  # and what has none is no duplicate
    ("", ["5", "6"], None),  # an empty name is none
    ("", ["5", "6"], None),
    ("e", ["7"] * 100_000, None),  # cut to the newest
    ("f", [str(i + 1) for i in range(16)], "nothing_left"),  # every item is seen
    ("g", ["8", "8", "8"], None),
    ("\x00\u202e", ["9"], None),
]


def frame_of(rows: list[tuple[Any, ...]]) -> pl.DataFrame:
    return pl.DataFrame([row[:2] for row in rows], schema=USERS, orient="row")


@pytest.mark.parametrize("method", ["rank", "retrieve", "generate"])
def test_every_kind_of_row(model: Recommender, tmp_path: Path, method: Any) -> None:
    frame_of(ROWS).write_parquet(tmp_path / "users.parquet")
    summary = run(model, tmp_path / "recs", tmp_path / "users.parquet", method=method, k=3, max_bad_share=0.6)
    bad = quarantined(tmp_path / "recs")
    expected = {row: reason for row, (_, _, reason) in enumerate(ROWS) if reason is not None}
    assert dict(bad.select("row", "reason").iter_rows()) == expected
    assert bad["user_id"].to_list() == [ROWS[row][0] for row in expected], "ids as they stood"
    found = results(tmp_path / "recs")
    assert found["row"].unique().sort().to_list() == [row for row in range(len(ROWS)) if row not in expected]
    assert summary["bad"] == len(expected) - 1, "nothing_left is no fault of the row"
    assert summary["good"] + len(expected) == summary["rows"] == len(ROWS)
    assert summary["unknown_items"] == 2
    assert summary["histories_cut"] == (2 if method == "retrieve" else 3)  # "e", "f"; a prompt takes six of u1's nine
    popular = found.filter(pl.col("row").is_in([14, 15]))
    assert set(popular["stage"]) == {"popularity"}
    same = [found.filter(pl.col("row") == row).drop("row", "user_id").rows() for row in (16, 17, 18, 19)]
    assert same == [same[0]] * 4


def test_a_history_is_answered_as_recommend_does_and_its_newest_events_count(
    model: Recommender, tmp_path: Path
) -> None:
    long = [str(i % 4 + 1) for i in range(100_000)] + ["9", "10"]
    rows = [("a", ["nothing", "1", "2"]), ("b", long)]
    frame_of(rows).write_parquet(tmp_path / "users.parquet")
    run(model, tmp_path / "recs", tmp_path / "users.parquet", k=4)
    found = results(tmp_path / "recs")
    for row, history in ((0, ["1", "2"]), (1, long)):
        alone = model.recommend(history=history, k=4)
        mine = found.filter(pl.col("row") == row)
        assert mine["item_id"].to_list() == alone["item_id"].to_list()
        assert mine["score"].to_list() == pytest.approx(alone["score"].to_list(), abs=1e-5)


def test_bytes_that_are_no_text_are_one_bad_row_each(model: Recommender, tmp_path: Path) -> None:
    bad = pa.array([b"u1", b"\xff\xfe", b"u2", b"x"])
    names = pa.Array.from_buffers(pa.string(), 4, bad.buffers())
    histories = pa.array([None, None, None, [b"1", b"\xc3\x28"]], type=pa.list_(pa.binary()))
    texts = pa.ListArray.from_buffers(
        pa.list_(pa.string()),
        4,
        histories.buffers()[:2],
        children=[pa.Array.from_buffers(pa.string(), 2, histories.values.buffers())],
    )
    pq.write_table(pa.table({"user_id": names, "history": texts}), tmp_path / "users.parquet")
    run(model, tmp_path / "recs", tmp_path / "users.parquet", max_bad_share=0.5, method="retrieve")
    assert quarantined(tmp_path / "recs").select("row", "user_id", "reason").rows() == [
        (1, None, "not_text"),
        (3, "x", "not_text"),
    ]
    assert results(tmp_path / "recs")["user_id"].unique().sort().to_list() == ["u1", "u2"]


@pytest.mark.parametrize(
    ("frame", "said"),
    [
        ({"user_id": [1.5]}, "column user_id is double"),
        ({"user_id": [True]}, "column user_id is bool"),
        ({"user_id": [b"a"]}, "column user_id is large_binary"),
        ({"user_id": ["u1"], "history": ["1,2"]}, "column history is large_string"),
        ({"user_id": ["u1"], "history": [[1.0]]}, "column history is large_list<"),
        ({"user": ["u1"]}, "has no column user_id or history"),
        ({"user_id": pl.Series([], dtype=pl.String)}, "has no rows"),
    ],
)
def test_columns_of_a_wrong_type_are_an_error_before_any_work(
    model: Recommender, tmp_path: Path, frame: dict[str, Any], said: str
) -> None:
    pl.DataFrame(frame).write_parquet(tmp_path / "users.parquet")
    with pytest.raises(DataError) as caught:
        run(model, tmp_path / "recs", tmp_path / "users.parquet")
    assert said in str(caught.value)
    assert str(tmp_path / "users.parquet") in str(caught.value)
    assert not (tmp_path / "recs" / "run-0001").exists()


def test_integer_and_categorical_ids_are_text(model: Recommender, tmp_path: Path) -> None:
    frame = pl.DataFrame({"user_id": ["u1", "a"], "history": [None, [3, 4]]})
    frame.with_columns(pl.col("user_id").cast(pl.Categorical)).write_parquet(tmp_path / "users.parquet")
    run(model, tmp_path / "recs", tmp_path / "users.parquet", method="retrieve")
    mine = results(tmp_path / "recs").filter(pl.col("user_id") == "a")["item_id"].to_list()
    assert mine == model.recommend(history=["3", "4"], method="retrieve")["item_id"].to_list()


def test_pairs_and_items_have_reasons_of_their_own(model: Recommender, tmp_path: Path) -> None:
    pairs = pl.DataFrame(
        {
            "user_id": ["u1", "u1", "u1", "nobody", "u2", "e", "u1"],
            "item_id": ["1", "1", "2", "1", "nothing", "1", None],
            "history": [None, None, None, None, None, [], None],
        },
        schema_overrides={"history": pl.List(pl.String)},
    )
    pairs.write_parquet(tmp_path / "pairs.parquet")
    run(model, tmp_path / "recs", tmp_path / "pairs.parquet", job="score", max_bad_share=0.8)
    assert quarantined(tmp_path / "recs").select("row", "item_id", "reason").rows() == [
        (1, "1", "duplicate"),
        (3, "1", "unknown_user"),
        (4, "nothing", "unknown_item"),
        (5, "1", "empty_history"),
        (6, None, "no_item"),
    ]
    assert results(tmp_path / "recs")["row"].to_list() == [0, 2]
    pl.DataFrame({"item_id": [1, 99, 1]}).write_parquet(tmp_path / "items.parquet")
    run(model, tmp_path / "items", tmp_path / "items.parquet", job="embed-items", max_bad_share=0.8)
    assert quarantined(tmp_path / "items")["reason"].to_list() == ["unknown_item", "duplicate"]


@pytest.mark.parametrize("job", ["recommend", "score", "embed-users", "embed-items"])
def test_a_shard_without_a_good_row(model: Recommender, tmp_path: Path, job: Any) -> None:
    wrong = {"user_id": ["nobody1", "nobody2"], "item_id": ["none1", "none2"]}
    right = {"user_id": ["u1", "u2"], "item_id": ["1", "2"]}
    pl.concat([pl.DataFrame(wrong), pl.DataFrame(right)]).write_parquet(tmp_path / "rows.parquet")
    out = tmp_path / "recs"
    summary = run(model, out, tmp_path / "rows.parquet", job=job, shard_rows=2, max_bad_share=0.5)
    assert (summary["state"], summary["good"], summary["bad"]) == ("complete", 2, 2)
    assert results(out)["row"].unique().sort().to_list() == [2, 3]
    with pytest.raises(DataError, match="over the share of"):
        run(model, tmp_path / "again", tmp_path / "rows.parquet", job=job, shard_rows=2)


class Failing(FakeEngine):
    """Scores prompts that hold ``word`` as NaN, and answers no more after ``dies`` calls."""

    def __init__(self, word: str = "never", dies: int = 10**9) -> None:
        super().__init__()
        self.word = self.codec.encode_data(word)
        self.left = dies

    def _logprob(self, prompt: Any, tokens: Any) -> float:
        ids = tuple(prompt)
        hit = any(ids[i : i + len(self.word)] == self.word for i in range(len(ids)))
        return float("nan") if hit else super()._logprob(prompt, tokens)

    def score(
        self, prompts: Any, continuations: Any, *, progress: Any = None
    ) -> list[np.ndarray[Any, np.dtype[np.float64]]]:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return super().score(prompts, continuations, progress=progress)


def test_a_score_that_is_no_number_is_a_bad_row_and_never_ranked(run_folder: Path, tmp_path: Path) -> None:
    rows = [("a", ["1", "2"]), ("b", ["7", "1"]), ("c", ["3"])]  # 7 is Amélie
    frame_of(rows).write_parquet(tmp_path / "users.parquet")
    broken = Recommender.load(run_folder, Failing("Amélie"))
    run(broken, tmp_path / "recs", tmp_path / "users.parquet", max_bad_share=0.5, k=2)
    assert quarantined(tmp_path / "recs").select("user_id", "reason").rows() == [("b", "not_a_number")]
    assert "not a number" in quarantined(tmp_path / "recs")["detail"][0]
    sound = Recommender.load(run_folder, FakeEngine())
    found = results(tmp_path / "recs")
    assert found["user_id"].unique(maintain_order=True).to_list() == ["a", "c"]
    for name, history in (("a", ["1", "2"]), ("c", ["3"])):
        mine = found.filter(pl.col("user_id") == name)["item_id"].to_list()
        assert mine == sound.recommend(history=history, k=2)["item_id"].to_list()


def test_an_encoder_that_gives_no_number_is_a_bad_row_too(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame_of([("a", ["1"]), ("b", ["2"])]).write_parquet(tmp_path / "users.parquet")
    model = Recommender.load(run_folder)
    real = model.encoder.encode

    def encode(histories: Any, *rest: Any) -> Any:
        found = real(histories, *rest)
        for i, history in enumerate(histories):
            if history.item[-1] == 1:
                found[i] = np.nan
        return found

    monkeypatch.setattr(model.encoder, "encode", encode)
    for job in ("recommend", "embed-users"):
        out = tmp_path / job
        method: Any = {"method": "retrieve"} if job == "recommend" else {}
        run(model, out, tmp_path / "users.parquet", job=job, **method, max_bad_share=0.5)
        assert quarantined(out).select("user_id", "reason").rows() == [("b", "not_a_number")]
        assert set(results(out)["user_id"]) == {"a"}


def test_a_dead_engine_stops_the_job_which_goes_on_with_a_sound_one(
    run_folder: Path, users: Path, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    run(Recommender.load(run_folder, FakeEngine()), whole, users, shard_rows=5, max_bad_share=0.2)
    out = tmp_path / "recs"
    with pytest.raises(ModelError) as caught:
        run(Recommender.load(run_folder, Failing(dies=3)), out, users, shard_rows=5, max_bad_share=0.2)
    assert "the engine stopped: RuntimeError: CUDA error" in str(caught.value)
    assert "run the same command again" in str(caught.value)
    kept = {p.name: p.stat().st_mtime_ns for p in (out / "run-0001" / "parts").iterdir()}
    assert 1 <= len(kept) < 3
    run(Recommender.load(run_folder, FakeEngine()), out, users, shard_rows=5, max_bad_share=0.2)
    after = {p.name: p for p in (out / "latest" / "parts").iterdir()}
    assert {name: after[name].stat().st_mtime_ns for name in kept} == kept
    assert {name: path.read_bytes() for name, path in after.items()} == {
        p.name: p.read_bytes() for p in (whole / "latest" / "parts").iterdir()
    }


def test_too_many_bad_rows_fail_the_job_at_once_and_more_may_be_allowed(model: Recommender, tmp_path: Path) -> None:
    rows = [("nobody1", None), ("nobody2", None), *((f"u{i}", None) for i in range(18))]
    frame_of(rows).write_parquet(tmp_path / "users.parquet")
    out = tmp_path / "recs"
    with pytest.raises(DataError) as caught:
        run(model, out, tmp_path / "users.parquet", shard_rows=5, method="retrieve")
    assert "2 of 20 rows are in quarantine (unknown_user 2), over the share of 1.00%" in str(caught.value)
    assert not (out / "latest").exists()
    assert len(list((out / "run-0001" / "parts").iterdir())) < 4, "it did not wait for the end"
    summary = run(model, out, tmp_path / "users.parquet", shard_rows=5, method="retrieve", max_bad_share=0.1)
    assert (summary["state"], summary["bad_share"]) == ("complete", 0.1)


def test_the_engine_refusing_a_row_is_that_row_alone(run_folder: Path, tmp_path: Path) -> None:
    class Refusing(FakeEngine):
        def score(self, prompts: Any, continuations: list[list[Continuation]], **more: Any) -> Any:
            if any(isinstance(prompt, Prompt) and "Amélie" in prompt.text for prompt in prompts):
                raise DataError("would become a control token", where="tokenising data")
            return super().score(prompts, continuations, **more)

    frame_of([("a", ["1", "2"]), ("b", ["7"]), ("c", ["3"])]).write_parquet(tmp_path / "users.parquet")
    model = Recommender.load(run_folder, Refusing())
    run(model, tmp_path / "recs", tmp_path / "users.parquet", max_bad_share=0.5)
    assert quarantined(tmp_path / "recs").select("user_id", "reason", "detail").rows() == [
        ("b", "refused", "would become a control token")
    ]
