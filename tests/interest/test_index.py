"""Exact search against a full sort in plain Python."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penchant.errors import DataError
from penchant.interest import index as module
from penchant.interest.index import ExactIndex, top_k

Answer = list[tuple[int, float]]


def full_sort(scores: list[float], k: int) -> Answer:
    """Best first, equal scores in index order, minus infinity left out, padded to k."""
    order = sorted((j for j in range(len(scores)) if scores[j] > -math.inf), key=lambda j: (-scores[j], j))[:k]
    return [(j, scores[j]) for j in order] + [(-1, -math.inf)] * (k - len(order))


def paired(items: np.ndarray, values: np.ndarray) -> list[Answer]:
    return [list(zip(a, b, strict=True)) for a, b in zip(items.tolist(), values.tolist(), strict=True)]


def expected(
    queries: np.ndarray,
    vectors: np.ndarray,
    k: int,
    exclude: list[np.ndarray] | None = None,
    allowed: np.ndarray | None = None,
) -> list[Answer]:
    out = []
    for i, query in enumerate(queries):
        scores = [float(sum(float(a) * float(b) for a, b in zip(query, v, strict=True))) for v in vectors]
        for j in range(len(vectors)):
            if (exclude is not None and j in exclude[i]) or (allowed is not None and not allowed[j]):
                scores[j] = -math.inf
        out.append(full_sort(scores, k))
    return out


def whole_numbers(rng: np.random.Generator, n: int, d: int) -> np.ndarray:
    """Small whole numbers: their products are exact in float32, and ties are many."""
    return rng.integers(-2, 3, size=(n, d)).astype(np.float32)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), n=st.integers(0, 5), m=st.integers(1, 9), k=st.integers(0, 12))
def test_top_k_is_a_full_sort(data: st.DataObject, n: int, m: int, k: int) -> None:
    value = st.one_of(st.integers(-2, 2).map(float), st.just(-math.inf))
    scores = data.draw(st.lists(st.lists(value, min_size=m, max_size=m), min_size=n, max_size=n))
    items, values = top_k(np.array(scores, dtype=np.float32).reshape(n, m), k)
    assert items.shape == values.shape == (n, k)
    assert (items.dtype, values.dtype) == (np.int32, np.float32)
    assert paired(items, values) == [full_sort(row, k) for row in scores]


def test_top_k_of_equal_scores_is_in_index_order_past_the_cut() -> None:
    items, values = top_k(np.array([[1.0, 2.0, 1.0, 2.0, 1.0]], dtype=np.float32), 3)
    assert (items.tolist(), values.tolist()) == ([[1, 3, 0]], [[2.0, 2.0, 1.0]])


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 7),
    m=st.integers(1, 20),
    k=st.integers(1, 25),
    filtered=st.booleans(),
    masked=st.booleans(),
)
def test_search_is_a_full_sort_of_dot_products(seed: int, n: int, m: int, k: int, filtered: bool, masked: bool) -> None:
    rng = np.random.default_rng(seed)
    queries, vectors = whole_numbers(rng, n, 4), whole_numbers(rng, m, 4)
    allowed = rng.random(m) < 0.5 if filtered else None
    exclude = [rng.integers(m, size=rng.integers(0, m + 1)) for _ in range(n)] if masked else None
    got = ExactIndex(vectors).search(queries, k, exclude=exclude, allowed=allowed)
    assert paired(*got) == expected(queries, vectors, k, exclude, allowed)


@pytest.mark.parametrize("left", [0, 1, 9, 10, 11])
def test_a_filter_that_leaves_few_items_gives_those_and_padding(left: int, rng: np.random.Generator) -> None:
    queries, vectors = whole_numbers(rng, 3, 4), whole_numbers(rng, 40, 4)
    allowed = np.zeros(40, dtype=bool)
    allowed[rng.choice(40, size=left, replace=False)] = True
    items, values = ExactIndex(vectors).search(queries, 10, allowed=allowed)
    assert paired(items, values) == expected(queries, vectors, 10, None, allowed)
    assert ((items >= 0).sum(axis=1) == min(left, 10)).all()
    assert allowed[items[items >= 0]].all()


@pytest.mark.parametrize("per_block", [1, 2, 3, 5])
def test_blocks_of_queries_give_the_same_answer(
    per_block: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries, vectors = whole_numbers(rng, 7, 4), whole_numbers(rng, 12, 4)
    exclude = [rng.choice(12, size=i, replace=False) for i in range(7)]  # each query its own
    allowed = rng.random(12) < 0.8
    monkeypatch.setattr(module, "_BLOCK", per_block * 12)
    got = ExactIndex(vectors).search(queries, 5, exclude=exclude, allowed=allowed)
    assert paired(*got) == expected(queries, vectors, 5, exclude, allowed)


def test_a_catalogue_larger_than_a_block_is_still_searched(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries, vectors = whole_numbers(rng, 3, 4), whole_numbers(rng, 12, 4)
    monkeypatch.setattr(module, "_BLOCK", 5)
    assert paired(*ExactIndex(vectors).search(queries, 4)) == expected(queries, vectors, 4)


def test_a_query_with_everything_excluded_gets_padding_and_others_do_not_notice() -> None:
    vectors = np.eye(3, dtype=np.float32)
    items, values = ExactIndex(vectors).search(vectors[:2], 2, exclude=[np.arange(3), np.array([1])])
    assert items.tolist() == [[-1, -1], [0, 2]]
    assert values[0].tolist() == [-math.inf, -math.inf]


def test_nobody_asks() -> None:
    items, values = ExactIndex(np.eye(3, dtype=np.float32)).search(np.zeros((0, 3), dtype=np.float32), 5)
    assert items.shape == values.shape == (0, 5)


def test_searching_changes_neither_vectors_nor_queries(rng: np.random.Generator) -> None:
    queries, vectors = whole_numbers(rng, 3, 4), whole_numbers(rng, 6, 4)
    before = queries.copy(), vectors.copy()
    index = ExactIndex(vectors)
    index.search(queries, 2, exclude=[np.array([0])] * 3, allowed=np.arange(6) > 2)
    assert (queries == before[0]).all()
    assert (index.vectors == before[1]).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_vector_that_is_not_finite_is_refused_by_its_item(value: float) -> None:
    vectors = np.ones((5, 3), dtype=np.float32)
    vectors[3, 1] = value
    with pytest.raises(DataError, match="item 3 is not finite"):
        ExactIndex(vectors)


def test_the_worked_dot_product() -> None:
    interest = np.array([[0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0]], dtype=np.float32)
    item = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0, 0, 0, 0, 0], dtype=np.float32)
    # .81 + .64 + .49 + .36 + .25
    items, values = ExactIndex(np.stack([np.zeros(10, dtype=np.float32), item])).search(interest, 1)
    assert items.tolist() == [[1]]
    assert values[0, 0] == pytest.approx(2.55, abs=1e-6)
