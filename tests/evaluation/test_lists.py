"""Recommendations from anywhere: what is refused, and what is scored by which rule."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conftest import toy_frames

from penchant.data.dataset import Dataset
from penchant.data.history import Targets
from penchant.data.split import Split, global_time, leave_last_out
from penchant.errors import ConfigError, DataError
from penchant.evaluation import lists as module
from penchant.evaluation.evaluate_lists import evaluate_lists
from penchant.evaluation.lists import score_lists
from penchant.metrics import list_rank, recall

# Every user has had items 0 to 3 (ids "a" to "d") in that order and then e; f to j nobody.
IDS = "abcdefghij"
N = len(IDS)


@pytest.fixture(scope="module")
def split() -> Split:
    """Users u0 to u3, whose test target is e; u4, whose target repeats its first item, a."""
    rows = [
        (f"u{u}", item, 10_000_000 + t) for u in range(5) for t, item in enumerate("abcd" + ("a" if u == 4 else "e"))
    ]
    interactions = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    items = pl.DataFrame({"item_id": list(IDS), "title": [f"title {i}" for i in IDS]})
    return leave_last_out(Dataset.read(interactions, items))


@pytest.fixture(scope="module")
def targets(split: Split) -> Targets:
    return split.test


def table(lists: dict[str, str], **columns: list[Any]) -> pl.DataFrame:
    """One row an item of each user's list, ranked from 1 unless columns are given."""
    user = [u for u, items in lists.items() for _ in items]
    item = [i for items in lists.values() for i in items]
    frame = {"user_id": user, "item_id": item}
    return pl.DataFrame(
        frame | (columns or {"rank": [r for items in lists.values() for r in range(1, len(items) + 1)]})
    )


FULL = {f"u{u}": "fghijeabcd" for u in range(5)}


# -- what is scored --------------------------------------------------------------------------------


def test_whole_lists_by_rank(targets: Targets) -> None:
    lists = {"u0": "efghij", "u1": "fghije", "u2": "fgehij", "u3": "fghijc", "u4": "fghijb"}
    found = score_lists(table(lists), targets, k=5)
    assert found.rank.tolist() == [1, 6, 3, N + 1, N + 1]
    assert found.top.tolist() == [[IDS.index(i) for i in items[:5]] for items in lists.values()]
    assert (found.findings.without_list, found.findings.short, found.findings.missing_places) == (0, 0, 0)
    assert found.findings.notes(5) == [
        "1 targets are repeats of an item the user has already; they cannot be found and count as misses"
    ]


def test_the_rows_may_come_in_any_order(targets: Targets, rng: np.random.Generator) -> None:
    frame = table({f"u{u}": "".join(rng.permutation(list(IDS))) for u in range(5)})
    mixed = frame[rng.permutation(len(frame))]
    straight, shuffled = score_lists(frame, targets, 4), score_lists(mixed, targets, 4)
    assert (straight.rank == shuffled.rank).all()
    assert (straight.top == shuffled.top).all()


def test_three_of_ten_miss_the_other_seven(targets: Targets) -> None:
    lists = {"u0": "fge", "u1": "fgh", "u2": "fghijeabcd", "u3": "e", "u4": "fgh"}
    found = score_lists(table(lists), targets, k=10)
    assert found.rank.tolist() == [3, N + 1, 6, 1, N + 1]
    assert found.top[0].tolist() == [5, 6, 4, -1, -1, -1, -1, -1, -1, -1]
    assert (found.findings.short, found.findings.missing_places) == (4, 7 + 7 + 9 + 7)
    assert "4 lists have fewer than 10 items: 30 places that miss" in found.findings.notes(10)
    assert recall(found.rank, 10).mean() == 3 / 5


def test_a_user_without_a_list_misses(targets: Targets) -> None:
    found = score_lists(table({"u1": "efghi"}), targets, k=5)
    assert found.rank.tolist() == [N + 1, 1, N + 1, N + 1, N + 1]
    assert (found.top[0] == -1).all()
    assert (found.findings.without_list, found.findings.targets, found.findings.short) == (4, 5, 0)
    assert "4 targets are of users without a list, and count as misses" in found.findings.notes(5)


def test_an_empty_table_is_all_misses(targets: Targets) -> None:
    for columns in ({"rank": []}, {"score": []}):
        empty = table({}, **columns).cast({"user_id": pl.String, "item_id": pl.String, next(iter(columns)): pl.Int64})
        found = score_lists(empty, targets, k=5)
        assert found.rank.tolist() == [N + 1] * 5
        assert found.findings.without_list == 5


def test_seen_items_keep_their_places_and_are_counted(targets: Targets) -> None:
    found = score_lists(table({"u0": "abcde", "u1": "eabcd", "u2": "fghij"}), targets, k=5)
    assert found.rank.tolist()[:3] == [5, 1, N + 1]
    assert found.top[0].tolist() == [0, 1, 2, 3, 4]
    assert (found.findings.with_seen, found.findings.seen_places) == (2, 8)
    assert any("2 lists hold 8 items that the user had before" in note for note in found.findings.notes(5))
    # Beyond k they are nobody's places.
    assert score_lists(table({"u0": "fghijabcde"}), targets, k=5).findings.seen_places == 0


def test_a_repeat_may_be_hit_only_where_that_was_asked_for(targets: Targets) -> None:
    frame = table({"u4": "fag"})
    masked, kept = score_lists(frame, targets, 3), score_lists(frame, targets, 3, repeats=True)
    assert (masked.rank[4], kept.rank[4]) == (N + 1, 2)
    assert masked.findings.repeats == kept.findings.repeats == 1
    assert any("cannot be found" in note for note in masked.findings.notes(3))
    assert any("count like any other" in note for note in kept.findings.notes(3, repeats=True))


def test_ties_everywhere_put_the_target_last(targets: Targets) -> None:
    found = score_lists(table({f"u{u}": "efghij" for u in range(5)}, score=[0.5] * 30), targets, k=5)
    assert found.rank.tolist() == [6, 6, 6, 6, N + 1]
    assert recall(found.rank, 5).sum() == 0
    assert found.findings.tied == 4
    assert any("were put last" in note for note in found.findings.notes(5))


def test_among_scores_the_target_is_last_of_its_equals(targets: Targets) -> None:
    lists = {"u0": "fghe", "u1": "ejih", "u2": "efgh"}
    score = [3.0, 2, 2, 2, 1.0, 1, 1, 0, 7.0, 6, 5, 4]
    found = score_lists(table(lists, score=score), targets, k=2)
    assert found.rank.tolist()[:3] == [4, 3, 1]
    assert found.top[:3].tolist() == [[5, 4], [4, 8], [4, 5]]  # equals by index
    assert found.findings.tied == 2


@settings(max_examples=60)
@given(data=st.data(), k=st.integers(1, 12))
def test_scores_in_plain_loops(targets: Targets, data: st.DataObject, k: int) -> None:
    lists, score = {}, []
    for u in range(5):
        items = data.draw(st.lists(st.sampled_from(IDS), unique=True, max_size=N))
        lists[f"u{u}"] = "".join(items)
        score += data.draw(st.lists(st.integers(0, 3), min_size=len(items), max_size=len(items)))
    frame = table(lists, score=score).cast({"user_id": pl.String, "item_id": pl.String, "score": pl.Float32})
    found = score_lists(frame, targets, k, repeats=True)
    left = list(score)
    for u in range(5):
        items = lists[f"u{u}"]
        own = dict(zip(items, left[: len(items)], strict=True))
        left = left[len(items) :]
        answer = IDS[targets.item[u]]
        expected = sum(s >= own[answer] for s in own.values()) if answer in own else N + 1
        assert found.rank[u] == expected
        order = sorted(own, key=lambda i: (-own[i], i))[:k]
        assert [IDS[i] for i in found.top[u] if i >= 0] == order
        # Where nothing ties, the list says the same as the rank.
        if answer in own and list(own.values()).count(own[answer]) == 1:
            assert min(expected, k + 1) == list_rank(found.top[u : u + 1], targets.item[u : u + 1])[0]


def test_rank_and_score_together_go_by_rank(targets: Targets) -> None:
    found = score_lists(table({"u0": "fegh"}, rank=[1, 2, 3, 4], score=[1.0, 1, 1, 1]), targets, k=4)
    assert (found.rank[0], found.findings.tied) == (2, 0)
    # A list made diverse has its places for its ranks, and scores that rise somewhere.
    found = score_lists(table({"u0": "fegh"}, rank=[1, 2, 3, 4], score=[1.0, 2, 1, 1]), targets, k=4)
    assert (found.rank[0], found.findings.tied, found.findings.disagree) == (2, 0, 1)
    assert "1 users' lists have a higher score at a lower place" in found.findings.notes(4)[-1]


@pytest.mark.parametrize("block", [1, 7, 8_000_000])
def test_one_list_answers_all_of_a_users_targets(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", block)
    moments = [datetime.fromtimestamp(1_000_000 + s, UTC) for s in (200, 300)]
    split = global_time(Dataset.read(*toy_frames(n_users=6)), valid_from=moments[0], test_from=moments[1])
    assert len(split.test) > split.test.log.n_users
    ids, n = split.log.item_ids, split.log.n_items
    rng = np.random.default_rng(3)
    lists = {user: rng.permutation(n)[:12] for user in split.log.user_ids}
    frame = pl.DataFrame(
        [(u, ids[i], r) for u, row in lists.items() for r, i in enumerate(row, 1)],
        schema=["user_id", "item_id", "rank"],
        orient="row",
    )
    found = score_lists(frame, split.test, k=8)
    seen = 0
    for t in range(len(split.test)):
        row, answer, had = (
            lists[split.log.user_ids[split.test.user[t]]].tolist(),
            split.test.item[t],
            split.test.history(t),
        )
        # What the user had by then: an item of a later target is new to an earlier one.
        expected = row.index(answer) + 1 if answer in row and answer not in had else n + 1
        assert found.rank[t] == expected
        seen += sum(i in had for i in row[:8])
    assert found.findings.seen_places == seen > 0
    assert found.findings.repeats == sum(split.test.item[t] in split.test.history(t) for t in range(len(split.test)))


def test_users_of_the_table_without_a_target_are_left_out_and_counted(targets: Targets) -> None:
    found = score_lists(table(FULL), targets.take(np.array([0, 2])), k=5)
    assert len(found.rank) == 2
    assert found.findings.users_not_asked == 3


def test_a_parquet_file_and_ids_that_are_numbers(tmp_path: Path) -> None:
    interactions, items = toy_frames(n_users=4)
    split = leave_last_out(Dataset.read(interactions.with_columns(pl.col("user_id").str.strip_prefix("u")), items))
    frame = pl.DataFrame(
        {
            "user_id": [int(split.log.user_ids[u]) for u in split.test.user],
            "item_id": [int(split.log.item_ids[i]) for i in split.test.item],
            "rank": [1] * 4,
        }
    )
    frame.write_parquet(tmp_path / "recs.parquet")
    assert score_lists(tmp_path / "recs.parquet", split.test, 1, repeats=True).rank.tolist() == [1] * 4
    assert score_lists(str(tmp_path / "recs.parquet"), split.test, 1, repeats=True).rank.tolist() == [1] * 4


def test_what_recommend_gives_can_be_scored_as_it_is(targets: Targets) -> None:
    frame = table({"u0": "ef"}, rank=[1, 2], score=[0.9, 0.1]).with_columns(
        pl.lit("title").alias("title"), pl.lit("llm").alias("stage"), pl.col("rank").cast(pl.Int32)
    )
    assert score_lists(frame, targets, k=2).rank[0] == 1


def test_a_file_called_popularity_stands_beside_the_baseline(targets: Targets, split: Split, tmp_path: Path) -> None:
    log = targets.log
    frame = pl.DataFrame(
        {
            "user_id": [log.user_ids[u] for u in targets.user],
            "item_id": [log.item_ids[i] for i in targets.item],
            "rank": [1] * len(targets),
        }
    )
    frame.write_parquet(tmp_path / "popularity.parquet")
    report = evaluate_lists(split, targets, tmp_path / "popularity.parquet")
    assert {row.system for row in report.rows[:2]} == {"popularity (given)", "popularity"}
    best = next(row for row in report.rows if row.system == "popularity (given)")
    assert best.metrics["NDCG@10"].mean == pytest.approx(0.8)  # u4's target is one that it had


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frame", "what"),
    [
        (table({"u0": "efx"}), "unknown item_id 'x'"),
        (table({"u0": "ef", "nobody": "e"}), "unknown user_id 'nobody'"),
        (table({"u0": "efe"}), "'e' is recommended twice"),
        (table({"u0": "efg"}, rank=[1, 2, 2]), "not 1 to n"),
        (table({"u0": "efg"}, rank=[0, 1, 2]), "not 1 to n"),
        (table({"u0": "efg"}, rank=[1, 2, 4]), "not 1 to n"),
        (table({"u0": "efg"}, rank=[1.0, 2.5, 3.0]), "not 1 to n"),
        (table({"u0": "efg"}, rank=[1.0, 2.0, float("nan")]), "not 1 to n"),
        (table({"u0": "efg", "u1": "f"}, rank=[1, 2, 3, 4]), "not 1 to n"),
        (table({"u0": "efg"}, score=[1.0, float("nan"), 0.0]), "a score is nan"),
        (table({"u0": "efg"}, score=[1.0, float("-inf"), 0.0]), "a score is -inf"),
        (table({"u0": "efg"}, score=[1.0, float("inf"), 0.0], rank=[1, 2, 3]), "a score is inf"),
        (table({"u0": "efg"}, score=[1.0, None, 0.0]), "is empty"),
        (table({"u0": "efg"}, score=["a", "b", "c"]), "is String"),
        (table({"u0": "efg"}).drop("rank"), "no column rank or score"),
        (table({"u0": "efg"}).drop("item_id"), "no column item_id"),
        (table({"u0": "efg"}).rename({"user_id": "user"}), "no column user_id"),
        (table({"u0": "efg"}).with_columns(pl.lit(1.5).alias("user_id")), "ids are Float64"),
        (table({"u0": "efg"}).with_columns(pl.lit(None, dtype=pl.String).alias("item_id")), "is empty"),
    ],
)
def test_what_cannot_be_judged_is_refused(targets: Targets, frame: pl.DataFrame, what: str) -> None:
    with pytest.raises(DataError, match=what) as caught:
        score_lists(frame, targets, k=3)
    assert "recommendations" in str(caught.value)
    assert caught.value.remedy or "no column" in what


def test_some_of_many_unknown_ids_are_named(targets: Targets) -> None:
    with pytest.raises(DataError, match=r"'q', 'r', 's', 't', 'u' and 2 more"):
        score_lists(table({"u0": "eqrstuvw"}), targets, k=3)


def test_options_and_files_that_are_none(targets: Targets, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="k is 0"):
        score_lists(table(FULL), targets, k=0)
    (tmp_path / "text.parquet").write_text("user_id,item_id\n")
    for path in (tmp_path / "text.parquet", tmp_path / "none.parquet"):
        with pytest.raises(DataError, match="cannot be read as parquet"):
            score_lists(path, targets)


def test_a_split_without_a_test_is_refused(targets: Targets, split: Split) -> None:
    frame = table({"u0": "ef"}, rank=[1, 2])
    with pytest.raises(DataError, match="no targets to evaluate on"):
        evaluate_lists(split, targets.take(np.zeros(0, dtype=np.int64)), frame)
