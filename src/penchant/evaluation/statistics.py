"""What a mean is worth: its interval, its difference from another's, and its spread over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from penchant.errors import ConfigError, DataError

_RESAMPLES = 2_000
# Sign flips of a permutation test: the smallest p it can give is about 1 in 10,000.
_FLIPS = 9_999
# Resampled values held at once: 20M indices and values are about 320 MB.
_HELD = 20_000_000


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over ``n`` users with its 95% bootstrap interval."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """``difference`` of two systems on the same users (first minus second) and ``p``, two-sided, uncorrected."""

    difference: Estimate
    p: float


@dataclass(frozen=True, slots=True)
class Spread:
    """Several seeds' means: how far apart chance alone puts them. ``sd`` (of a sample) is NaN for one seed."""

    mean: float
    low: float
    high: float
    sd: float
    n: int

    @classmethod
    def of(cls, means: Sequence[float] | NDArray[np.floating]) -> Spread:
        """From one mean a seed."""
        values = np.asarray(means, dtype=np.float64)
        if not values.size:
            raise DataError("no seed has a mean", where="statistics", remedy="give at least one")
        sd = float(values.std(ddof=1)) if values.size > 1 else float("nan")
        return cls(float(values.mean()), float(values.min()), float(values.max()), sd, values.size)


# -- averaging -------------------------------------------------------------------------------------


def per_user(values: NDArray[np.floating], user: NDArray[np.integer]) -> NDArray[np.float64]:
    """Each user's mean over its events, in ascending order of user: (n_users,).

    Averaging these counts users alike; averaging ``values`` counts events alike, and so busy users for more.
    """
    sums, counts = _by_user(values, user)
    return sums / counts


def _by_user(values: NDArray[np.floating], user: NDArray[np.integer]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Each user's sum and number of values, in ascending order of user."""
    if len(values) != len(user):
        raise DataError(f"{len(values)} values and {len(user)} users", where="statistics")
    _check_finite(values)
    code = np.unique(user, return_inverse=True)[1]
    return np.bincount(code, weights=values).astype(np.float64, copy=False), np.bincount(code)


def _check_finite(values: NDArray[np.floating]) -> None:
    """A mean with one value that is no number in it says nothing, and a test on it says whatever it likes."""
    wrong = np.flatnonzero(~np.isfinite(values))
    if wrong.size:
        raise DataError(
            f"{wrong.size:,} of {len(values):,} values are not finite numbers",
            where=f"statistics, value {wrong[0]}",
            remedy="find out why; leave targets without a value out knowingly",
        )


# -- intervals -------------------------------------------------------------------------------------


def bootstrap_mean(values: NDArray[np.floating], seed: int = 0) -> Estimate:
    """Mean and 95% percentile bootstrap interval over users (Efron 1979); one user has no interval (NaN).

    DataError for a value that is not a finite number.
    """
    _check_finite(values)
    n = len(values)
    mean = float(np.mean(values)) if n else float("nan")
    if n < 2:
        return Estimate(mean, float("nan"), float("nan"), n)
    if np.ptp(values) == 0:
        return Estimate(mean, mean, mean, n)
    rng = np.random.default_rng(seed)
    distinct, counts = np.unique(values, return_counts=True)
    if 8 * len(distinct) <= n:
        # Ranking metrics take few values: drawing how often each comes up is the same resampling, without the draws.
        drawn = rng.multinomial(n, counts / n, size=_RESAMPLES) @ distinct.astype(np.float64) / n
        low, high = np.percentile(drawn, [2.5, 97.5])
        return Estimate(mean, float(low), float(high), n)
    interval = stats.bootstrap((values,), np.mean, **_plan(n, rng)).confidence_interval
    return Estimate(mean, float(interval.low), float(interval.high), n)


def bootstrap_by_user(values: NDArray[np.floating], user: NDArray[np.integer], seed: int = 0) -> Estimate:
    """Mean over events, with the interval of whole users drawn again: events of one user are not independent.

    ``n`` is the number of users. Where every user has one event it is ``bootstrap_mean``.
    """
    sums, counts = _by_user(values, user)
    if len(sums) == len(values):
        return bootstrap_mean(values, seed)
    n, mean = len(sums), float(sums.sum() / counts.sum())
    if n < 2:
        return Estimate(mean, float("nan"), float("nan"), n)

    def ratio(s: NDArray[np.floating], c: NDArray[np.floating], axis: int = -1) -> NDArray[np.floating]:
        return s.sum(axis=axis) / c.sum(axis=axis)

    if np.ptp(values) == 0:
        return Estimate(mean, mean, mean, n)
    plan = _plan(2 * n, np.random.default_rng(seed))
    interval = stats.bootstrap((sums, counts), ratio, paired=True, **plan).confidence_interval
    return Estimate(mean, float(interval.low), float(interval.high), n)


def _plan(n: int, rng: np.random.Generator) -> dict[str, object]:
    return {
        "n_resamples": _RESAMPLES,
        "batch": max(1, min(_RESAMPLES, _HELD // n)),
        "vectorized": True,
        "method": "percentile",
        "rng": rng,
    }


# -- tests -----------------------------------------------------------------------------------------


def paired_permutation(
    a: NDArray[np.floating],
    b: NDArray[np.floating],
    seed: int = 0,
    *,
    user: NDArray[np.integer] | None = None,
) -> Comparison:
    """Is the mean of ``a`` another than that of ``b`` on the same targets? Two-sided, by sign flips (Fisher 1935).

    If the systems were alike, each difference could as well have the other sign. Exact where 13 targets or fewer
    differ, else by 9,999 seeded draws, p being (1 + as extreme) / 10,000. ``user``: the target's users, where some
    have several targets; their differences then flip together. p is 1 where nothing differs, NaN without targets.
    DataError for a value that is not a finite number.
    """
    if len(a) != len(b):
        raise DataError(f"{len(a)} and {len(b)} values are not pairs", where="paired permutation test")
    _check_finite(a)
    _check_finite(b)
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    if user is None:
        estimate, flipped = bootstrap_mean(difference, seed), difference
    else:
        estimate, flipped = bootstrap_by_user(difference, user, seed), _by_user(difference, user)[0]
    if not len(flipped):
        return Comparison(estimate, float("nan"))
    return Comparison(estimate, _sign_flip_p(flipped[flipped != 0], np.random.default_rng(seed)))


def _sign_flip_p(difference: NDArray[np.float64], rng: np.random.Generator) -> float:
    """p of a sum as far from 0 as this one's, when each term (none of them 0) has a random sign."""
    if difference.size < 2:
        return 1.0  # either sign is as far from 0
    if abs(difference.sum()) <= 1e-12 * float(np.abs(difference).sum()):
        return 1.0  # 0 but for rounding, which the exact test below would take for the sum
    if 2**difference.size <= _FLIPS:
        exact = stats.permutation_test(
            (difference,), np.sum, permutation_type="samples", vectorized=True, n_resamples=_FLIPS
        )
        return float(exact.pvalue)
    size, counts = np.unique(np.abs(difference), return_counts=True)
    observed = abs(difference.sum())
    # A sum that is equal but for rounding is as extreme.
    bar = observed - 1e-12 * float(size @ counts)
    extreme = 0
    block = max(1, _HELD // len(size))
    for start in range(0, _FLIPS, block):
        # Of c terms of one size, a binomial number keep their sign.
        kept = rng.binomial(counts, 0.5, size=(min(block, _FLIPS - start), len(size)))
        extreme += int((np.abs((2 * kept - counts) @ size) >= bar).sum())
    return (1 + extreme) / (1 + _FLIPS)


def holm(p_values: Sequence[float] | NDArray[np.floating]) -> NDArray[np.float64]:
    """p values corrected for their number (Holm 1979), in the order given; a NaN is no test and stays NaN.

    ConfigError where statsmodels is absent.
    """
    values = np.asarray(p_values, dtype=np.float64)
    tested = ~np.isnan(values)
    if ((values[tested] < 0) | (values[tested] > 1)).any():
        raise DataError("a p value is outside [0, 1]", where="holm")
    try:
        from statsmodels.stats.multitest import multipletests
    except ImportError as error:
        raise ConfigError(
            "Holm's correction needs statsmodels, which is not installed",
            where="holm",
            remedy="pip install 'penchant[eval]'",
        ) from error
    corrected = np.full(values.shape, np.nan)
    if tested.any():
        corrected[tested] = multipletests(values[tested], method="holm")[1]
    return corrected
