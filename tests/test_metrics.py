"""Ranks and ranking metrics: by hand, by brute force, and against ir-measures."""

from __future__ import annotations

import math

import ir_measures
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ir_measures import RR, R, nDCG

from penchant.metrics import list_rank, ndcg, recall, target_rank

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("scores", "target", "rank"),
    [
        ([3.0, 2.0, 1.0], 0, 1),
        ([3.0, 2.0, 1.0], 1, 2),
        ([3.0, 2.0, 1.0], 2, 3),
        ([1.0, 1.0, 1.0], 0, 3),  # ties count against us, wherever the target stands
        ([1.0, 1.0, 1.0], 2, 3),
        ([2.0, 1.0, 1.0, 0.0], 1, 3),
        ([0.0, -0.0], 0, 2),
        ([-INF, -INF, 5.0], 2, 1),  # masked competitors are no competitors
        ([-INF, 1.0, -INF], 0, 4),  # a masked target cannot be found
        ([-INF, -INF, -INF], 1, 4),
        ([NAN, 1.0, 2.0], 0, 4),
        ([NAN, 1.0, 2.0], 2, 2),  # a competitor without a score is no easier to beat
        ([INF, 1.0, INF], 0, 2),
        ([7.0], 0, 1),
    ],
)
def test_target_rank_by_hand(scores: list[float], target: int, rank: int) -> None:
    assert target_rank(np.array([scores]), np.array([target])).tolist() == [rank]


@settings(max_examples=100, deadline=None)
@given(data=st.data(), n=st.integers(1, 6), m=st.integers(1, 8))
def test_target_rank_is_one_more_than_all_others_at_least_as_good(data: st.DataObject, n: int, m: int) -> None:
    value = st.one_of(st.integers(-3, 3).map(float), st.just(-INF))  # few values: many ties
    scores = data.draw(st.lists(st.lists(value, min_size=m, max_size=m), min_size=n, max_size=n))
    target = data.draw(st.lists(st.integers(0, m - 1), min_size=n, max_size=n))
    expected = [
        m + 1 if row[t] == -INF else 1 + sum(score >= row[t] for j, score in enumerate(row) if j != t)
        for row, t in zip(scores, target, strict=True)
    ]
    assert target_rank(np.array(scores), np.array(target)).tolist() == expected


def test_list_rank_by_hand() -> None:
    lists = np.array([[5, 3, 9], [3, 5, -1], [9, -1, -1], [-1, -1, -1], [5, 5, 5]])
    assert list_rank(lists, np.array([9, 5, 3, 0, 5])).tolist() == [3, 2, 4, 4, 1]


@settings(max_examples=60, deadline=None)
@given(n_items=st.integers(1, 12), k=st.integers(1, 12), seed=st.integers(0, 2**32 - 1))
def test_list_rank_of_a_full_sort_is_target_rank(n_items: int, k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.permuted(np.tile(np.arange(n_items, dtype=float), (5, 1)), axis=1)  # no ties
    target = rng.integers(n_items, size=5)
    lists = np.full((5, k), -1)
    lists[:, : min(k, n_items)] = np.argsort(-scores, axis=1)[:, :k]
    assert list_rank(lists, target).tolist() == np.minimum(target_rank(scores, target), k + 1).tolist()


def test_recall_and_ndcg_by_hand() -> None:
    rank = np.array([1, 2, 3, 10, 11, 1000])
    assert recall(rank, 10).tolist() == [1, 1, 1, 1, 0, 0]
    assert recall(rank, 1).tolist() == [1, 0, 0, 0, 0, 0]
    gain = ndcg(rank, 10)
    assert gain[:3] == pytest.approx([1.0, 1 / math.log2(3), 0.5])
    assert gain[3] == pytest.approx(1 / math.log2(11))
    assert gain[4:].tolist() == [0, 0]
    assert (recall(rank, 10).dtype, gain.dtype) == (np.float64, np.float64)


@pytest.mark.parametrize("k", [1, 3, 5, 10, 20])
def test_metrics_agree_with_ir_measures(k: int, rng: np.random.Generator) -> None:
    n_users, n_items = 60, 30
    # Quantised scores: many ties, which target_rank counts against us.
    scores = np.round(rng.standard_normal((n_users, n_items)), 1)
    scores[rng.random(scores.shape) < 0.1] = -INF
    target = rng.integers(n_items, size=n_users)
    rank = target_rank(scores, target)
    run, qrels = {}, {}
    for user in range(n_users):
        # The same list for ir-measures: scores strictly decreasing by rank, the target last among its ties.
        order = sorted(
            (j for j in range(n_items) if scores[user, j] > -INF),
            key=lambda j: (-scores[user, j], j == target[user]),
        )
        run[f"q{user}"] = {f"d{j}": float(n_items - place) for place, j in enumerate(order)}
        qrels[f"q{user}"] = {f"d{target[user]}": 1}
    theirs: dict[str, dict[str, float]] = {}
    for metric in ir_measures.iter_calc([R @ k, nDCG @ k, RR], qrels, run):
        theirs.setdefault(str(metric.measure), {})[metric.query_id] = metric.value
    # A user whose list is empty or lacks the target may be absent there: that is a zero.
    per_user = {name: [values.get(f"q{u}", 0.0) for u in range(n_users)] for name, values in theirs.items()}
    assert recall(rank, k).tolist() == pytest.approx(per_user[f"R@{k}"])
    assert ndcg(rank, k).tolist() == pytest.approx(per_user[f"nDCG@{k}"])
    found = np.isfinite(scores[np.arange(n_users), target])
    assert 0 < found.sum() < n_users
    assert np.where(found, 1 / rank, 0).tolist() == pytest.approx(per_user["RR"])


@settings(max_examples=60, deadline=None)
@given(rank=st.integers(1, 50), k=st.integers(1, 50))
def test_a_better_rank_never_scores_less_and_a_longer_list_never_finds_less(rank: int, k: int) -> None:
    at, below = np.array([rank]), np.array([rank + 1])
    for metric in (recall, ndcg):
        assert 0 <= metric(below, k)[0] <= metric(at, k)[0] <= metric(at, k + 1)[0] <= 1
    assert (ndcg(at, k)[0] > 0) == (recall(at, k)[0] == 1)
