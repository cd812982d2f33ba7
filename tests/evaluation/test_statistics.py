"""Bootstrap intervals: what they cover, how they shrink, and where there is none."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penchant.evaluation import statistics as module
from penchant.evaluation.statistics import bootstrap_mean


@settings(max_examples=30, deadline=None)
@given(values=st.lists(st.floats(-10, 10), min_size=2, max_size=40), seed=st.integers(0, 1000))
def test_the_interval_lies_within_the_values_and_around_the_mean(values: list[float], seed: int) -> None:
    found = bootstrap_mean(np.array(values), seed)
    assert found.n == len(values)
    assert found.mean == pytest.approx(math.fsum(values) / len(values), abs=1e-9)
    slack = 1e-9
    assert min(values) - slack <= found.low <= found.mean + slack
    assert found.mean - slack <= found.high <= max(values) + slack


def test_the_interval_is_that_of_resampled_means(rng: np.random.Generator) -> None:
    values = rng.exponential(size=60)  # skewed: the interval is not symmetric
    means = sorted(float(np.mean([values[j] for j in rng.integers(60, size=60)])) for _ in range(4_000))
    found = bootstrap_mean(values)
    assert found.low == pytest.approx(means[100], abs=0.03)
    assert found.high == pytest.approx(means[3_900], abs=0.03)


def test_the_interval_is_near_the_normal_one_for_many_users(rng: np.random.Generator) -> None:
    values = (rng.random(2_000) < 0.3).astype(float)
    half = 1.96 * values.std() / math.sqrt(2_000)
    found = bootstrap_mean(values)
    assert found.low == pytest.approx(values.mean() - half, abs=half / 8)
    assert found.high == pytest.approx(values.mean() + half, abs=half / 8)


def test_about_95_of_100_intervals_cover_the_truth(rng: np.random.Generator) -> None:
    covered = []
    for seed in range(200):
        found = bootstrap_mean((rng.random(150) < 0.3).astype(float), seed)
        covered.append(found.low <= 0.3 <= found.high)
    assert 0.88 <= np.mean(covered) <= 0.99


def test_four_times_the_users_halve_the_width(rng: np.random.Generator) -> None:
    values = rng.standard_normal(3_200)
    widths = [(e := bootstrap_mean(values[:n])).high - e.low for n in (50, 200, 800, 3_200)]
    for wide, narrow in pairwise(widths):
        assert 0.35 < narrow / wide < 0.7


def test_the_same_seed_gives_the_same_interval_and_another_seed_hardly_another(rng: np.random.Generator) -> None:
    values = rng.standard_normal(100)
    first, again, other = bootstrap_mean(values, 1), bootstrap_mean(values, 1), bootstrap_mean(values, 2)
    assert first == again
    assert first != other
    assert first.low == pytest.approx(other.low, abs=0.05)


def test_the_interval_moves_and_stretches_with_the_values(rng: np.random.Generator) -> None:
    values = rng.standard_normal(80)
    plain, moved = bootstrap_mean(values, 3), bootstrap_mean(2 * values + 5, 3)
    for name in ("mean", "low", "high"):
        assert getattr(moved, name) == pytest.approx(2 * getattr(plain, name) + 5)


@pytest.mark.parametrize("value", [0.0, 1.0, -0.25])
@pytest.mark.parametrize("n", [2, 50])
def test_values_that_do_not_differ_have_an_interval_of_no_width(value: float, n: int) -> None:
    found = bootstrap_mean(np.full(n, value))
    assert (found.mean, found.low, found.high, found.n) == (value, value, value, n)


def test_one_user_has_a_mean_and_no_interval_and_nobody_has_neither() -> None:
    one, none = bootstrap_mean(np.array([0.5])), bootstrap_mean(np.array([]))
    assert (one.mean, one.n) == (0.5, 1)
    assert none.n == 0
    assert all(math.isnan(x) for x in (one.low, one.high, none.mean, none.low, none.high))


def test_resampling_in_pieces_gives_the_same_kind_of_interval(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = rng.standard_normal(100)
    whole = bootstrap_mean(values)
    for held in (1, 1_000, 30_000):
        monkeypatch.setattr(module, "_HELD", held)
        pieces = bootstrap_mean(values)
        assert pieces.low == pytest.approx(whole.low, abs=0.05)
        assert pieces.high == pytest.approx(whole.high, abs=0.05)


def test_the_global_random_state_is_left_alone() -> None:
    before = np.random.get_state()[1].copy()
    bootstrap_mean(np.arange(10.0))
    assert (np.random.get_state()[1] == before).all()
