"""Ranks and ranking metrics: by hand, by brute force, and against ir-measures."""

from __future__ import annotations

import math
from collections.abc import Callable

import ir_measures
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ir_measures import AP, RR, P, R, Success, nDCG

from penchant import metrics
from penchant.errors import DataError
from penchant.metrics import (
    Hits,
    Relevant,
    absolute_error,
    accuracy,
    auc,
    average_precision,
    f1,
    gauc,
    hit_rate,
    list_rank,
    log_loss,
    mae,
    mrr,
    ndcg,
    precision,
    recall,
    rmse,
    squared_error,
    target_rank,
    user_auc,
)

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


@settings(max_examples=100)
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


@settings(max_examples=60)
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


@settings(max_examples=60)
@given(rank=st.integers(1, 50), k=st.integers(1, 50))
def test_a_better_rank_never_scores_less_and_a_longer_list_never_finds_less(rank: int, k: int) -> None:
    at, below = np.array([rank]), np.array([rank + 1])
    for metric in (recall, ndcg):
        assert 0 <= metric(below, k)[0] <= metric(at, k)[0] <= metric(at, k + 1)[0] <= 1
    assert (ndcg(at, k)[0] > 0) == (recall(at, k)[0] == 1)


# -- one relevant item: the others -----------------------------------------------------------------


def test_the_other_metrics_of_one_target_by_hand() -> None:
    rank = np.array([1, 2, 5, 6, 1000])
    assert hit_rate(rank, 5).tolist() == [1, 1, 1, 0, 0]
    assert precision(rank, 5).tolist() == [0.2, 0.2, 0.2, 0, 0]
    assert f1(rank, 5) == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0, 0])  # 2 * .2 * 1 / 1.2
    assert mrr(rank, 5).tolist() == [1, 0.5, 0.2, 0, 0]
    assert average_precision(rank, 5).tolist() == [1, 0.5, 0.2, 0, 0]


@settings(max_examples=60)
@given(rank=st.lists(st.integers(1, 30), min_size=1, max_size=8), k=st.integers(1, 20))
def test_one_relevant_item_is_a_set_of_one(rank: list[int], k: int) -> None:
    lists = np.array([[7 if place == r else 100 + place for place in range(1, 21)] for r in rank])
    hits = Hits.of(lists, [np.array([7])] * len(rank))
    for single, many in (
        (hit_rate, hits.hit_rate),
        (recall, hits.recall),
        (precision, hits.precision),
        (f1, hits.f1),
        (ndcg, hits.ndcg),
        (mrr, hits.mrr),
        (average_precision, hits.average_precision),
    ):
        assert many(k) == pytest.approx(single(np.array(rank), k)), single.__name__


# -- several relevant items ------------------------------------------------------------------------


def test_several_relevant_items_by_hand() -> None:
    # Found at places 1, 3 and 4 of four relevant ones; one of two; none.
    hits = Hits.of(
        np.array([[1, 9, 2, 3], [9, 5, -1, -1], [9, 8, 7, -1]]), [np.array([3, 2, 1, 0]), np.array([5, 6]), [4]]
    )
    assert hits.n_relevant.tolist() == [4, 2, 1]
    assert hits.hit_rate(4).tolist() == [1, 1, 0]
    assert hits.hit_rate(1).tolist() == [1, 0, 0]
    assert hits.recall(4).tolist() == [0.75, 0.5, 0]
    assert hits.precision(4).tolist() == [0.75, 0.25, 0]
    assert hits.f1(4) == pytest.approx([0.75, 1 / 3, 0])
    assert hits.mrr(4).tolist() == [1, 0.5, 0]
    assert hits.average_precision(4) == pytest.approx([(1 + 2 / 3 + 3 / 4) / 4, (1 / 2) / 2, 0])
    dcg, ideal = 1 + 1 / 2 + 1 / math.log2(5), 1 + 1 / math.log2(3) + 1 / 2 + 1 / math.log2(5)
    assert hits.ndcg(4) == pytest.approx([dcg / ideal, (1 / math.log2(3)) / (1 + 1 / math.log2(3)), 0])
    # At 2 the best list of two is the ideal.
    assert hits.ndcg(2)[0] == pytest.approx(1 / (1 + 1 / math.log2(3)))


def test_an_item_twice_in_a_list_or_twice_relevant_counts_once() -> None:
    hits = Hits.of(np.array([[4, 4, 4, 5]]), [np.array([4, 4, 6])])
    assert (hits.place.tolist(), hits.n_relevant.tolist()) == ([1], [2])
    assert hits.recall(4).tolist() == [0.5]
    assert hits.ndcg(4)[0] <= 1


def test_a_row_without_relevant_items_and_a_cut_below_the_list_are_refused() -> None:
    with pytest.raises(DataError, match="1 rows have no relevant item"):
        Hits.of(np.array([[1], [2]]), [np.array([1]), np.array([], dtype=int)])
    with pytest.raises(DataError, match="at 3 of lists with 2 places"):
        Hits.of(np.array([[1, 2]]), [np.array([1])]).ndcg(3)
    with pytest.raises(DataError, match="negative"):
        Relevant.of([np.array([-1, 3])])
    with pytest.raises(DataError, match="2 lists and 1"):
        Hits.of(np.array([[1], [2]]), [np.array([1])])


@pytest.mark.parametrize("block", [1, 40, 250_000])
@pytest.mark.parametrize("k", [1, 3, 10])
def test_several_relevant_items_agree_with_ir_measures(
    k: int, block: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penchant.metrics._BLOCK", block)
    n, n_items, length = 50, 30, 12
    lists = np.array([rng.permutation(n_items)[:length] for _ in range(n)])
    lists[rng.random(n) < 0.3, 7:] = -1  # some lists are short
    relevant = [rng.permutation(n_items)[: rng.integers(1, 16)] for _ in range(n)]
    run = {f"q{u}": {f"d{i}": float(-p) for p, i in enumerate(row) if i >= 0} for u, row in enumerate(lists)}
    qrels = {f"q{u}": {f"d{i}": 1 for i in items} for u, items in enumerate(relevant)}
    hits = Hits.of(lists, relevant)
    ours = {
        R @ k: hits.recall(k),
        P @ k: hits.precision(k),
        nDCG @ k: hits.ndcg(k),
        AP @ k: hits.average_precision(k),
        RR @ k: hits.mrr(k),
        Success @ k: hits.hit_rate(k),
    }
    for measure, values in ours.items():
        theirs = {m.query_id: m.value for m in ir_measures.iter_calc([measure], qrels, run)}
        assert values.tolist() == pytest.approx([theirs.get(f"q{u}", 0.0) for u in range(n)]), str(measure)


# -- pointwise predictions -------------------------------------------------------------------------


def test_auc_by_hand_and_ties_count_half() -> None:
    assert auc(np.array([0.1, 0.4, 0.35, 0.8]), np.array([0, 0, 1, 1])) == 0.75
    assert auc(np.array([1.0, 1.0, 1.0]), np.array([0, 1, 1])) == 0.5
    assert auc(np.array([2.0, 1.0, 1.0]), np.array([1, 1, 0])) == 0.75
    assert math.isnan(auc(np.array([1.0, 2.0]), np.array([1, 1])))
    assert math.isnan(auc(np.array([]), np.array([])))


@settings(max_examples=80)
@given(
    rows=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.booleans()), min_size=1, max_size=40),
)
def test_user_auc_is_the_share_of_pairs_in_order(rows: list[tuple[int, int, bool]]) -> None:
    user, score, label = (np.array(column) for column in zip(*rows, strict=True))
    users, found, events = user_auc(score.astype(float), label, user)
    for u, value, n in zip(users, found, events, strict=True):
        positive = [s for a, s, y in rows if a == u and y]
        negative = [s for a, s, y in rows if a == u and not y]
        assert n == len(positive) + len(negative)
        pairs = [(p > q) + (p == q) / 2 for p in positive for q in negative]
        assert math.isnan(value) if not pairs else value == pytest.approx(sum(pairs) / len(pairs))
    grouped = gauc(score.astype(float), label, user)
    kept = ~np.isnan(found)
    assert (grouped.n_users, grouped.left_out) == (kept.sum(), (~kept).sum())
    if kept.any():
        assert grouped.value == pytest.approx((found[kept] * events[kept]).sum() / events[kept].sum())
        assert gauc(score.astype(float), label, user, by_events=False).value == pytest.approx(found[kept].mean())
    else:
        assert math.isnan(grouped.value)


def test_auc_agrees_with_scipys_u_statistic(rng: np.random.Generator) -> None:
    from scipy.stats import mannwhitneyu

    score, label = np.round(rng.standard_normal(500), 1), rng.random(500) < 0.3
    n = int(label.sum())
    assert auc(score, label) == pytest.approx(mannwhitneyu(score[label], score[~label]).statistic / (n * (500 - n)))


def test_pointwise_losses_by_hand() -> None:
    p, y = np.array([0.9, 0.9, 0.5, 1.0, 0.0]), np.array([1, 0, 1, 1, 1])
    expected = [-math.log(0.9), -math.log(0.1), math.log(2), 1e-15, -math.log(1e-15)]
    assert log_loss(p, y) == pytest.approx(expected, rel=1e-6)
    assert accuracy(p, y).tolist() == [1, 0, 0, 1, 0]
    assert squared_error(np.array([1.0, 4.0]), np.array([3.0, 4.0])).tolist() == [4, 0]
    assert absolute_error(np.array([1.0, 4.0]), np.array([3.0, 4.0])).tolist() == [2, 0]
    assert (rmse(np.array([1.0, 4]), np.array([3.0, 4])), mae(np.array([1.0, 4]), np.array([3.0, 4]))) == (
        pytest.approx(math.sqrt(2)),
        1.0,
    )


def test_a_half_precision_certainty_costs_no_infinity() -> None:
    assert np.isfinite(log_loss(np.array([1.0, 0.0], dtype=np.float16), np.array([0, 1]))).all()


def test_predictions_that_are_no_number_and_labels_that_are_no_class_are_refused() -> None:
    with pytest.raises(DataError, match="not a number"):
        auc(np.array([NAN, 1.0]), np.array([0, 1]))
    with pytest.raises(DataError, match="neither 0 nor 1"):
        auc(np.array([0.1, 0.2]), np.array([1, 5]))
    with pytest.raises(DataError, match="outside"):
        log_loss(np.array([1.5]), np.array([1]))


@pytest.mark.parametrize("call", [rmse, mae, log_loss, accuracy, auc])
def test_predictions_and_truths_of_other_shapes_are_one_error(call: Callable[..., object]) -> None:
    for predicted, true in (
        (np.array([0.5, 0.2]), np.array([1])),
        (np.array([0.5]), np.array([1, 0])),
        (np.array([[0.5], [0.2]]), np.array([1, 0])),
        (np.array([0.5, 0.2, 0.1]), np.array([1, 0])),
    ):
        with pytest.raises(DataError, match="predictions of shape"):
            call(predicted, true)
    with pytest.raises(DataError, match="2 predictions and 1 users"):
        gauc(np.array([0.5, 0.2]), np.array([1, 0]), np.array([3]))


@pytest.mark.parametrize("name", ["recall", "hit_rate", "precision", "f1", "ndcg", "mrr", "average_precision"])
@pytest.mark.parametrize("k", [0, -1])
def test_a_cut_off_below_1_is_refused(name: str, k: int) -> None:
    with pytest.raises(DataError, match=f"a metric at {k}"):
        getattr(metrics, name)(np.array([1, 2]), k)
    hits = Hits.of(np.array([[0, 1]]), [np.array([1])])
    with pytest.raises(DataError, match=f"a metric at {k}"):
        getattr(hits, name)(k)
