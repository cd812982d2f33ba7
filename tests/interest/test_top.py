"""The top of a block against a full sort in plain Python."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penchant.errors import ModelError
from penchant.interest.top import top_k

Answer = list[tuple[int, float]]
# Few values, so that ties are everywhere; -inf is "never".
VALUES = st.one_of(st.integers(-2, 2).map(float), st.just(-math.inf))


def full_sort(scores: list[float], k: int, above: float = -math.inf) -> Answer:
    """Best first, equal scores in index order, what is not above left out, padded to k."""
    order = sorted((j for j in range(len(scores)) if scores[j] > above), key=lambda j: (-scores[j], j))[:k]
    return [(j, scores[j]) for j in order] + [(-1, -math.inf)] * (k - len(order))


def paired(items: np.ndarray, values: np.ndarray) -> list[Answer]:
    return [list(zip(a, b, strict=True)) for a, b in zip(items.tolist(), values.tolist(), strict=True)]


@settings(max_examples=150)
@given(data=st.data(), n=st.integers(0, 5), m=st.integers(0, 70), k=st.integers(0, 80), bounded=st.booleans())
def test_it_is_a_full_sort(data: st.DataObject, n: int, m: int, k: int, bounded: bool) -> None:
    rows = st.lists(st.lists(VALUES, min_size=m, max_size=m), min_size=n, max_size=n)
    scores = data.draw(rows)
    above = data.draw(st.lists(VALUES, min_size=n, max_size=n)) if bounded else [-math.inf] * n
    items, values = top_k(
        np.array(scores, dtype=np.float32).reshape(n, m), k, above=np.array(above, np.float32) if bounded else None
    )
    assert items.shape == values.shape == (n, k)
    assert (items.dtype, values.dtype) == (np.int32, np.float32)
    assert paired(items, values) == [full_sort(row, k, a) for row, a in zip(scores, above, strict=True)]


@pytest.mark.parametrize("m", [2_999, 4_096])
@pytest.mark.parametrize("k", [1, 10, 100, 3_000])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_groups_of_groups_lose_nothing(m: int, k: int, kind: type, rng: np.random.Generator) -> None:
    """Rows that are all different, of a few values, and sorted, with some that can never be served."""
    scores = rng.standard_normal((6, m)).astype(kind)
    scores[2:4] = rng.integers(0, 5, (2, m))
    scores[4:].sort(axis=1)
    scores[rng.random(scores.shape) < 0.1] = -np.inf
    items, values = top_k(scores, k)
    for row, item, value in zip(scores, items, values, strict=True):
        order = np.lexsort((np.arange(m), -row))
        order = order[row[order] > -np.inf][:k]
        assert item.tolist() == order.tolist() + [-1] * (k - len(order))
        assert (value[: len(order)] == row[order].astype(np.float32)).all()
        assert np.isneginf(value[len(order) :]).all()


def test_equal_scores_are_in_index_order_past_the_cut() -> None:
    items, values = top_k(np.array([[1.0, 2.0, 1.0, 2.0, 1.0]], dtype=np.float32), 3)
    assert (items.tolist(), values.tolist()) == ([[1, 3, 0]], [[2.0, 2.0, 1.0]])


@pytest.mark.parametrize("at", [0, 7, 39])
def test_not_a_number_is_refused_wherever_it_stands(at: int) -> None:
    scores = np.zeros((2, 40), np.float32)
    scores[1, at] = np.nan
    with pytest.raises(ModelError, match="my system: gave a score that is not a number"):
        top_k(scores, 3, where="my system")
