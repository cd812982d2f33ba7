"""Intervals, averages, tests and spreads: what they cover, by hand and against scipy and statsmodels."""

from __future__ import annotations

import itertools
import math
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from penchant.errors import ConfigError, DataError
from penchant.evaluation import statistics as module
from penchant.evaluation.statistics import (
    Spread,
    bootstrap_by_user,
    bootstrap_mean,
    holm,
    paired_permutation,
    per_user,
)


@settings(max_examples=30)
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


def test_values_that_repeat_have_the_interval_of_values_drawn_one_by_one(rng: np.random.Generator) -> None:
    values = 1 / np.log2(rng.integers(1, 8, size=400) + 1.0)  # seven different ones
    means = np.sort(rng.choice(values, size=(20_000, 400)).mean(axis=1))
    found = bootstrap_mean(values)
    width = means[19_500] - means[500]
    assert found.low == pytest.approx(means[500], abs=width / 15)
    assert found.high == pytest.approx(means[19_500], abs=width / 15)
    assert found.low < found.mean < found.high
    assert found.mean == pytest.approx(values.mean())


# -- averaging -------------------------------------------------------------------------------------


def test_per_user_is_each_users_mean_in_order_of_user() -> None:
    values, user = np.array([1.0, 0, 0, 1, 1, 0.5]), np.array([7, 3, 7, 7, 3, 9])
    assert per_user(values, user) == pytest.approx([1 / 2, 2 / 3, 1 / 2])
    assert per_user(np.array([]), np.array([], dtype=int)).tolist() == []
    with pytest.raises(DataError, match="2 values and 1 users"):
        per_user(np.array([1.0, 2.0]), np.array([1]))


def test_busy_users_count_more_per_event_and_alike_per_user() -> None:
    values, user = np.array([1.0, 1, 1, 1, 0]), np.array([0, 0, 0, 0, 1])
    assert bootstrap_by_user(values, user).mean == 0.8
    assert bootstrap_mean(per_user(values, user)).mean == 0.5


def test_whole_users_are_drawn_again(rng: np.random.Generator) -> None:
    # Users of 20 equal events: no more is known than 60 users say, whatever the number of events.
    own = (rng.random(60) < 0.4).astype(float)
    values, user = np.repeat(own, 20), np.repeat(np.arange(60), 20)
    clustered, naive, plain = bootstrap_by_user(values, user), bootstrap_mean(values), bootstrap_mean(own)
    assert (clustered.n, clustered.mean) == (60, pytest.approx(own.mean()))
    assert clustered.low == pytest.approx(plain.low, abs=0.03)
    assert clustered.high == pytest.approx(plain.high, abs=0.03)
    assert (naive.high - naive.low) < (clustered.high - clustered.low) / 3
    assert bootstrap_by_user(own, np.arange(60), 3) == bootstrap_mean(own, 3)
    one = bootstrap_by_user(np.array([1.0, 0.0]), np.array([4, 4]))
    assert (one.mean, one.n, math.isnan(one.low)) == (0.5, 1, True)
    same = bootstrap_by_user(np.ones(3), np.array([1, 1, 2]))
    assert (same.low, same.high, same.n) == (1, 1, 2)


# -- permutation tests -----------------------------------------------------------------------------


@settings(max_examples=40)
@given(differences=st.lists(st.integers(-4, 4), min_size=1, max_size=10))
def test_small_tests_are_exact(differences: list[int]) -> None:
    a, b = np.array(differences, dtype=float), np.zeros(len(differences))
    flips = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    expected = np.mean([flip >= abs(sum(differences)) for flip in flips])
    assert paired_permutation(a, b).p == pytest.approx(expected)


def test_large_tests_agree_with_scipy(rng: np.random.Generator) -> None:
    for values in (rng.standard_normal(80) + 0.2, rng.integers(-2, 4, size=200) / 3):
        theirs = stats.permutation_test(
            (values,),
            np.mean,
            permutation_type="samples",
            vectorized=True,
            n_resamples=9_999,
            rng=np.random.default_rng(5),
        )
        assert paired_permutation(values, np.zeros(len(values))).p == pytest.approx(theirs.pvalue, abs=0.02)


def test_equal_systems_are_rarely_told_apart_and_unlike_ones_are(rng: np.random.Generator) -> None:
    p = []
    for seed in range(200):
        a, b = (rng.random((2, 60)) < 0.3).astype(float)
        p.append(paired_permutation(a, b, seed).p)
    assert np.mean(np.array(p) <= 0.05) <= 0.09
    worse = rng.random(300)
    found = paired_permutation(worse + 0.3 * rng.random(300), worse)
    assert found.p == 1 / 10_000
    assert found.difference.low > 0
    assert found.difference.mean == pytest.approx(-paired_permutation(worse, worse + 0.15).difference.mean, abs=0.03)


def test_the_test_is_two_sided_seeded_and_blind_to_ties(rng: np.random.Generator) -> None:
    a, b = rng.random(100), rng.random(100)
    assert paired_permutation(a, b, 4) == paired_permutation(a, b, 4)
    assert paired_permutation(a, b).p == pytest.approx(paired_permutation(b, a).p)
    padded = paired_permutation(np.append(a, np.ones(50)), np.append(b, np.ones(50)))
    assert padded.p == pytest.approx(paired_permutation(a, b).p)
    assert paired_permutation(a, a).p == 1
    assert paired_permutation(a[:1], b[:1]).p == 1
    assert math.isnan(paired_permutation(a[:0], b[:0]).p)
    with pytest.raises(DataError, match="not pairs"):
        paired_permutation(a, b[:5])


def test_a_users_events_flip_together() -> None:
    # Two users who both gained, ten times each: as events 2 ** -19, as users 2 of 4 sign patterns.
    a, b, user = np.ones(20), np.zeros(20), np.repeat([0, 1], 10)
    assert paired_permutation(a, b, user=user).p == 0.5
    assert paired_permutation(a, b).p < 0.001


def test_resampling_in_pieces_gives_the_same_p(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = rng.random(50), rng.random(50)
    whole = paired_permutation(a, b).p
    monkeypatch.setattr(module, "_HELD", 70_000)
    assert paired_permutation(a, b).p == pytest.approx(whole, abs=0.02)


# -- Holm and seeds --------------------------------------------------------------------------------


def test_holm_by_hand_and_what_is_no_test_is_not_counted() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    found = holm([0.01, math.nan, 0.04, 0.03])
    assert math.isnan(found[1])
    assert found[[0, 2, 3]] == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]).tolist() == [1, 1]
    assert holm([]).tolist() == []
    assert np.isnan(holm([math.nan])).all()
    with pytest.raises(DataError):
        holm([1.2])


@settings(max_examples=10)
@given(p=st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_the_running_maximum_of_p_times_what_is_left(p: list[float]) -> None:
    order = sorted(range(len(p)), key=lambda i: p[i])
    expected, highest = [0.0] * len(p), 0.0
    for place, i in enumerate(order):
        highest = max(highest, min(1.0, p[i] * (len(p) - place)))
        expected[i] = highest
    assert holm(p) == pytest.approx(expected)


def test_without_statsmodels_holm_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "statsmodels.stats.multitest", None)
    with pytest.raises(ConfigError, match=r"penchant\[eval\]"):
        holm([0.1])


def test_the_spread_of_seeds() -> None:
    found = Spread.of([0.1, 0.2, 0.3])
    assert (found.mean, found.low, found.high, found.sd, found.n) == (
        pytest.approx(0.2),
        0.1,
        0.3,
        pytest.approx(0.1),
        3,
    )
    assert math.isnan(Spread.of([0.1]).sd)
    with pytest.raises(DataError):
        Spread.of([])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_refused_and_never_a_p_of_0(bad: float) -> None:
    values, fine = np.array([0.1, bad, *[0.3] * 20]), np.linspace(0, 1, 22)
    user = np.repeat(np.arange(11), 2)
    for call in (
        lambda: bootstrap_mean(values),
        lambda: bootstrap_by_user(values, user),
        lambda: paired_permutation(values, fine),
        lambda: paired_permutation(fine, values, user=user),
    ):
        with pytest.raises(DataError, match="1 of 22 values are not finite numbers"):
            call()


def test_differences_that_cancel_are_no_evidence_whatever_their_rounding() -> None:
    ours = np.array([0.667, 0.098, 0.315, -0.315, -0.098, -0.667])
    assert abs(ours.sum()) > 0, "but for rounding it is 0"
    assert paired_permutation(ours, np.zeros(6)).p == 1.0
