"""The mixture of encoder and LLM, and how validation chooses it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from penchant.fusion import CALIBRATIONS, Fusion, choose_fusion, zscore

values = st.lists(st.floats(-100, 100), min_size=1, max_size=15)


# -- zscore and the mixture --------------------------------------------------------------------


def test_zscore_by_hand() -> None:
    # Mean 2, population deviation sqrt(2/3).
    assert zscore(np.array([1.0, 2.0, 3.0])).tolist() == pytest.approx([-math.sqrt(1.5), 0, math.sqrt(1.5)])


@settings(max_examples=100)
@given(row=values)
def test_zscore_has_mean_0_and_deviation_1_and_keeps_the_order(row: list[float]) -> None:
    out = zscore(np.array(row))
    if max(row) == min(row):
        assert out.tolist() == [0] * len(row)
    elif max(row) - min(row) > 1e-6:
        assert statistics.fmean(out) == pytest.approx(0, abs=1e-6)
        assert statistics.pstdev(out) == pytest.approx(1, abs=1e-6)
        at = np.argsort(row)
        assert (np.diff(out[at]) >= 0).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 20])
def test_values_that_do_not_differ_become_zeros_not_rounding_errors(dtype: type, n: int) -> None:
    for value in (0.0, 0.1, -1 / 3, 12345.678):
        assert zscore(np.full(n, value, dtype=dtype)).tolist() == [0] * n


def test_the_mixture_by_hand() -> None:
    interest, likelihood, prior = np.array([1.0, 2, 3]), np.array([-1.0, -3, -2]), np.array([-1.0, -1, -4])
    root = math.sqrt(1.5)
    # likelihood - prior is 0, -2, 2; likelihood - prior / 2 is -.5, -2.5, 0.
    assert Fusion(0.0, 1.0).scores(interest, likelihood, prior).tolist() == pytest.approx([-root, 0, root])
    assert Fusion(1.0, 1.0).scores(interest, likelihood, prior).tolist() == pytest.approx([0, -root, root])
    assert Fusion(0.5, 1.0).scores(interest, likelihood, prior).tolist() == pytest.approx([-root / 2, -root / 2, root])
    deviation = math.sqrt((0.5**2 + 1.5**2 + 1.0**2) / 3)
    half = [0.5 / deviation, -1.5 / deviation, 1 / deviation]
    assert Fusion(1.0, 0.5).scores(interest, likelihood, prior).tolist() == pytest.approx(half)
    assert Fusion(0.3, 0.5).scores(interest, likelihood, prior).tolist() == pytest.approx(
        [0.7 * a + 0.3 * b for a, b in zip([-root, 0, root], half, strict=True)]
    )


def test_a_fusion_survives_its_dict() -> None:
    fusion = Fusion(0.3, 0.5, 0.25, 0.2, 100)
    assert Fusion(**fusion.to_dict()) == fusion


# -- choosing ----------------------------------------------------------------------------------


def users(rng: np.random.Generator, n: int, m: int = 12) -> tuple[list[Any], list[Any], list[Any], list[int]]:
    """Noise from the encoder, the LLM and the prior, and a target for each of n users with m candidates."""
    noise = [[rng.standard_normal(m) for _ in range(n)] for _ in range(3)]
    return noise[0], noise[1], noise[2], [int(t) for t in rng.integers(m, size=n)]


def pointing(rng: np.random.Generator, target: list[int], m: int = 12) -> list[NDArray[np.float64]]:
    """Scores that put every user's target on top."""
    out = [rng.standard_normal(m) for _ in target]
    for row, t in zip(out, target, strict=True):
        row[t] = row.max() + 5
    return out


def odds(a: float, b: float, c: float, data: tuple[list[Any], list[Any], list[Any], list[int]]) -> float:
    """-log p of the targets under a conditional logit, and the prior of its weights."""
    total = (a * a + b * b) / 200
    for interest, likelihood, prior, target in zip(*data, strict=True):
        if target >= 0:
            llm = likelihood - c * prior
            scores = a * (interest - interest.mean()) / interest.std() + b * (llm - llm.mean()) / llm.std()
            total += math.log(np.exp(scores).sum()) - scores[target]
    return total


def mean_ndcg(weight: float, c: float, data: tuple[list[Any], list[Any], list[Any], list[int]]) -> float:
    """NDCG@10 of a mixture, written out one user at a time."""
    total = 0.0
    for interest, likelihood, prior, target in zip(*data, strict=True):
        if target >= 0:
            llm = _z([x - c * y for x, y in zip(likelihood, prior, strict=True)])
            mixed = [(1 - weight) * x + weight * y for x, y in zip(_z(interest), llm, strict=True)]
            rank = 1 + sum(score >= mixed[target] for k, score in enumerate(mixed) if k != target)
            total += 1 / math.log2(rank + 1) if rank <= 10 else 0
    return total / len(data[3])


def _z(row: Sequence[float]) -> list[float]:
    mean, deviation = statistics.fmean(row), statistics.pstdev(row)
    return [(x - mean) / deviation if deviation else 0.0 for x in row]


def test_a_perfect_llm_beside_a_noisy_encoder_is_chosen(rng: np.random.Generator) -> None:
    interest, _, prior, target = users(rng, 40)
    fusion = choose_fusion(interest, pointing(rng, target), prior, target)
    assert fusion.weight > 0
    assert fusion.valid_ndcg == pytest.approx(1.0)
    assert fusion.interest_ndcg is not None
    assert fusion.interest_ndcg < 0.6
    assert fusion.n_users == 40


def test_an_llm_perfect_only_after_calibration_is_calibrated(rng: np.random.Generator) -> None:
    interest, _, prior, target = users(rng, 40)
    prior = [30 * p for p in prior]  # how likely a title is as text drowns what the history says
    likelihood = [a + p for a, p in zip(pointing(rng, target), prior, strict=True)]
    fusion = choose_fusion(interest, likelihood, prior, target)
    assert fusion.calibration == 1.0
    assert fusion.valid_ndcg == pytest.approx(1.0)


def test_a_noisy_llm_beside_a_perfect_encoder_gets_no_say(rng: np.random.Generator) -> None:
    _, likelihood, prior, target = users(rng, 40)
    fusion = choose_fusion(pointing(rng, target), likelihood, prior, target)
    assert (fusion.weight, fusion.calibration) == (0.0, 0.0)
    assert fusion.valid_ndcg == fusion.interest_ndcg == 1.0


@pytest.mark.parametrize("what", ["constant", "the encoder again"])
def test_an_llm_that_only_ties_with_the_encoder_gets_no_say(what: str, rng: np.random.Generator) -> None:
    interest, _, _, target = users(rng, 40)
    likelihood = [np.full(12, -3.0) for _ in target] if what == "constant" else interest
    fusion = choose_fusion(interest, likelihood, [np.zeros(12) for _ in target], target)
    assert (fusion.weight, fusion.calibration) == (0.0, 0.0)
    assert fusion.valid_ndcg == fusion.interest_ndcg


def test_where_the_encoder_says_nothing_the_llm_alone_orders(rng: np.random.Generator) -> None:
    target = [int(t) for t in rng.integers(12, size=20)]
    fusion = choose_fusion([np.ones(12)] * 20, pointing(rng, target), [np.zeros(12)] * 20, target)
    assert (fusion.weight, fusion.calibration) == (1.0, 0.0)
    assert (fusion.valid_ndcg, fusion.interest_ndcg) == (1.0, 0.0)  # all 12 tie, so the target is last


def test_where_retrieval_missed_every_target_nothing_is_claimed(rng: np.random.Generator) -> None:
    interest, likelihood, prior, _ = users(rng, 5)
    assert choose_fusion(interest, likelihood, prior, [-1] * 5) == Fusion(0.0, 0.0, 0.0, 0.0, 5)


def test_without_users_the_llm_gets_no_say() -> None:
    assert choose_fusion([], [], [], []) == Fusion(0.0, 0.0, 0.0, 0.0, 0)


def test_users_may_have_few_or_no_candidates(rng: np.random.Generator) -> None:
    rows = [np.zeros(0), np.array([0.3]), rng.standard_normal(4)]
    fusion = choose_fusion(rows, rows, [np.zeros(len(r)) for r in rows], [-1, 0, int(np.argmax(rows[2]))])
    assert fusion.valid_ndcg == pytest.approx(2 / 3)
    assert fusion.weight == 0


@settings(max_examples=20)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(3, 25),
    missed=st.booleans(),
    own=st.floats(0, 2),
    more=st.floats(0, 2),
)
def test_the_choice_is_the_likeliest_mixture_and_the_encoder_alone_where_it_gains_too_little(
    seed: int, n: int, missed: bool, own: float, more: float
) -> None:
    rng = np.random.default_rng(seed)
    interest, likelihood, prior, target = users(rng, n, 6)
    for a, b, t in zip(interest, likelihood, target, strict=True):
        a[t] += own
        b[t] += more
    if missed:
        target[0] = -1
    data = (interest, likelihood, prior, target)
    fusion = choose_fusion(*data)
    grid = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 10.0)
    found = {(a, b, c): odds(a, b, c, data) for a in grid for b in grid for c in CALIBRATIONS}
    alone, best = min(found[a, 0, 0] for a in grid), min(found.values())
    if fusion.weight:
        # At its ratio there are weights as good as the best of the grid, and the gain pays for two parameters.
        at = fusion.weight
        own_best = min(
            odds(scale * (1 - at), scale * at, fusion.calibration, data) for scale in np.geomspace(0.1, 60, 40)
        )
        assert own_best <= best + 0.3
        assert own_best <= alone - 2 + 0.3
    else:
        assert best >= alone - 2 - 0.3
    assert fusion.valid_ndcg == pytest.approx(mean_ndcg(fusion.weight, fusion.calibration, data))
    assert fusion.interest_ndcg == pytest.approx(mean_ndcg(0, 0, data))
    assert fusion.n_users == n


def chosen(rng: np.random.Generator, n: int, own: float, more: float) -> Fusion:
    interest, likelihood, prior, target = users(rng, n, 20)
    for a, b, t in zip(interest, likelihood, target, strict=True):
        a[t] += own
        b[t] += more
    return choose_fusion(interest, likelihood, prior, [t if rng.random() < 0.3 else -1 for t in target])


def test_an_llm_that_says_nothing_is_hardly_ever_heard(rng: np.random.Generator) -> None:
    heard = [chosen(rng, 300, 0.5, 0.0).weight for _ in range(40)]
    assert sum(weight > 0 for weight in heard) <= 4
    assert max(heard) < 0.5


def test_an_llm_that_helps_is_heard_about_as_much_as_it_should_be(rng: np.random.Generator) -> None:
    """Both normal with deviation 1 around the target's lead: the right weight is more / (own + more)."""
    weights = [chosen(rng, 1000, 0.8, 0.4).weight for _ in range(20)]
    assert min(weights) > 0
    assert statistics.fmean(weights) == pytest.approx(1 / 3, abs=0.06)
