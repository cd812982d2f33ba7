"""Measures beyond accuracy: by hand and against plain loops, however memory is cut into blocks."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penchant.errors import ConfigError, DataError
from penchant.evaluation import beyond as module
from penchant.evaluation.beyond import (
    coverage,
    describe,
    exposure,
    genre_calibration,
    genre_matrix,
    gini,
    intra_list_distance,
    novelty,
    popularity_lift,
    validity,
)

EMPTY = np.zeros(0, dtype=np.int32)


@pytest.fixture(params=[1, 50, 16_000_000], autouse=True)
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", request.param)


@pytest.fixture
def top(rng: np.random.Generator) -> np.ndarray:
    """Lists of five of eight items: real ones, empty places, answers that name no item, repeats."""
    lists = rng.integers(-2, 9, size=(40, 5)).astype(np.int32)
    lists[3] = -1
    lists[4] = [2, -1, -1, -1, -1]
    return lists


def real(row: np.ndarray) -> list[int]:
    return [int(i) for i in row if 0 <= i < 8]


# -- the catalogue's side --------------------------------------------------------------------------


def test_coverage_and_exposure_by_hand() -> None:
    top = np.array([[0, 1, -1], [1, 1, 9], [-1, -1, -2]])
    assert exposure(top, 5).tolist() == [1, 3, 0, 0, 0]
    assert coverage(top, 5) == 0.4
    assert coverage(np.full((2, 3), -1), 5) == 0


def test_gini_by_hand() -> None:
    assert gini(np.array([3, 3, 3])) == pytest.approx(0)
    assert gini(np.array([0, 0, 0, 7])) == pytest.approx(3 / 4)
    assert gini(np.array([1, 3])) == pytest.approx(1 / 4)
    assert math.isnan(gini(np.array([0, 0])))


@settings(max_examples=50)
@given(shown=st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any))
def test_gini_is_half_the_relative_mean_difference(shown: list[int]) -> None:
    n, mean = len(shown), sum(shown) / len(shown)
    expected = sum(abs(a - b) for a in shown for b in shown) / (2 * n * n * mean)
    assert gini(np.array(shown)) == pytest.approx(expected, abs=1e-12)


# -- the lists' side -------------------------------------------------------------------------------


def test_intra_list_distance_is_the_mean_over_pairs(top: np.ndarray, rng: np.random.Generator) -> None:
    vectors = rng.standard_normal((8, 3))
    vectors[5] = 0  # an item without a vector is as far from all as a right angle
    found = intra_list_distance(top, vectors)
    for row, value in zip(top, found, strict=True):
        pairs = list(combinations(real(row), 2))
        if not pairs:
            assert math.isnan(value)
            continue
        distance = []
        for a, b in pairs:
            norms = np.linalg.norm(vectors[a]) * np.linalg.norm(vectors[b])
            distance.append(1 - (vectors[a] @ vectors[b] / norms if norms else 0))
        assert value == pytest.approx(np.mean(distance), abs=1e-6)


def test_opposite_items_are_two_apart_and_equal_ones_none() -> None:
    vectors = np.array([[1.0, 0], [-2, 0], [0.5, 0]])
    assert intra_list_distance(np.array([[0, 1], [0, 2]]), vectors).tolist() == [2, 0]


def test_novelty_by_hand() -> None:
    counts = np.array([4, 2, 1, 1, 0])  # of eight events
    assert novelty(np.array([[0, 1], [2, -1], [4, 4], [-1, -1]]), counts) == pytest.approx(
        [1.5, 3, 3, math.nan], nan_ok=True
    )


def test_popularity_lift_by_hand() -> None:
    counts = np.array([10, 2, 0])
    histories = [np.array([1, 1]), np.array([0, 2]), EMPTY, np.array([0])]
    # Histories: 2 and 5, mean 3.5. Lists: 10 and 2, mean 6. The others have no history or no list.
    top = np.array([[0, -1], [1, 1], [0, 0], [-1, -1]])
    assert popularity_lift(top, histories, counts) == pytest.approx((6 - 3.5) / 3.5)
    assert popularity_lift(np.array([[1]]), [np.array([1])], counts) == 0
    assert math.isnan(popularity_lift(np.array([[-1]]), [np.array([1])], counts))
    with pytest.raises(DataError, match="no item has"):
        popularity_lift(np.array([[0]]), [np.array([7])], counts)


def test_genre_calibration_by_hand() -> None:
    genres = np.array([[1, 0], [0, 1], [1, 1], [0, 0]], dtype=bool)
    histories = [np.array([0, 0, 0, 1])] * 4
    found = genre_calibration(
        np.array([[0, 0, 0, 1], [0, 0, -1, -1], [2, -1, -1, -1], [3, 3, -1, -1]]), histories, genres
    )
    wanted = (0.75, 0.25)

    def divergence(share: float) -> float:
        smoothed = [0.99 * s + 0.01 * w for s, w in zip((share, 1 - share), wanted, strict=True)]
        return sum(w * math.log(w / s) for w, s in zip(wanted, smoothed, strict=True))

    assert found == pytest.approx([0, divergence(1), divergence(0.5), math.nan], nan_ok=True)
    assert math.isnan(genre_calibration(np.array([[0]]), [EMPTY], genres)[0])


def test_genre_calibration_in_plain_loops(top: np.ndarray, rng: np.random.Generator) -> None:
    genres = rng.random((8, 4)) < 0.4
    histories = [rng.integers(8, size=rng.integers(0, 6)) for _ in top]
    found = genre_calibration(top, histories, genres)

    def shares(items: list[int]) -> np.ndarray | None:
        total = sum((genres[i] / genres[i].sum() for i in items if genres[i].any()), np.zeros(4))
        return total / total.sum() if total.sum() else None

    for row, history, value in zip(top, histories, found, strict=True):
        p, q = shares(list(history)), shares(real(row))
        if p is None or q is None:
            assert math.isnan(value)
        else:
            smoothed = 0.99 * q + 0.01 * p
            assert value == pytest.approx(sum(a * math.log(a / b) for a, b in zip(p, smoothed, strict=True) if a))
            assert value >= -1e-12


def test_validity_by_hand(top: np.ndarray) -> None:
    found = validity(np.array([[0, 0, 1, -1], [2, -2, 99, -2], [-1, -1, -1, -1]]), 5)
    assert (found.missing, found.invalid, found.duplicates) == (5 / 12, 3 / 12, 1 / 12)
    found = validity(top, 8)
    assert found.missing == pytest.approx((top == -1).mean())
    assert found.invalid == pytest.approx(((top < -1) | (top >= 8)).mean())
    assert found.duplicates == pytest.approx(sum(len(real(r)) - len(set(real(r))) for r in top) / top.size)


# -- all together ----------------------------------------------------------------------------------


def test_describe_holds_the_means_of_all(top: np.ndarray, rng: np.random.Generator) -> None:
    counts, vectors, genres = rng.integers(0, 9, 8), rng.standard_normal((8, 3)), rng.random((8, 4)) < 0.5
    histories = [rng.integers(8, size=3) for _ in top]
    found = describe(top, train_counts=counts, histories=histories, vectors=vectors, genres=genres)
    assert found.coverage == coverage(top, 8)
    assert found.intra_list_distance == pytest.approx(np.nanmean(intra_list_distance(top, vectors)))
    assert found.novelty == pytest.approx(np.nanmean(novelty(top, counts)))
    assert found.popularity_lift == popularity_lift(top, histories, counts)
    assert found.gini == gini(exposure(top, 8))
    assert found.genre_calibration == pytest.approx(np.nanmean(genre_calibration(top, histories, genres)))
    assert (found.duplicates, found.invalid) == (validity(top, 8).duplicates, validity(top, 8).invalid)
    bare = describe(top, train_counts=counts, histories=histories).to_dict()
    assert (bare["intra_list_distance"], bare["genre_calibration"]) == (None, None)
    assert bare["novelty"] == found.novelty


def test_genres_come_from_separated_texts_and_lists() -> None:
    items = pl.DataFrame({"item_id": ["1", "2", "3", "4"], "genres": ["b|a", " a ", "", None]})
    matrix, names = genre_matrix(items, "genres")
    assert names == ["a", "b"]
    assert matrix.tolist() == [[True, True], [True, False], [False, False], [False, False]]
    lists = items.with_columns(pl.Series("genres", [["b", "a"], ["a"], [], None]))
    assert (genre_matrix(lists, "genres")[0] == matrix).all()
    with pytest.raises(ConfigError, match="no column 'kind'"):
        genre_matrix(items, "kind")
    nobody = items.with_columns(pl.lit(None, dtype=pl.String).alias("genres"))
    assert genre_matrix(nobody, "genres")[0].shape == (4, 0)
