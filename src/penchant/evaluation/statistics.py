"""Intervals for means over users."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

_RESAMPLES = 2_000
# Resampled values held at once: 20M indices and values are about 320 MB.
_HELD = 20_000_000


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over ``n`` users with its 95% bootstrap interval."""

    mean: float
    low: float
    high: float
    n: int


def bootstrap_mean(values: NDArray[np.floating], seed: int = 0) -> Estimate:
    """Mean and 95% percentile bootstrap interval over users (Efron 1979); one user has no interval (NaN)."""
    n = len(values)
    mean = float(np.mean(values)) if n else float("nan")
    if n < 2:
        return Estimate(mean, float("nan"), float("nan"), n)
    if np.ptp(values) == 0:
        return Estimate(mean, mean, mean, n)
    interval = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=_RESAMPLES,
        batch=max(1, min(_RESAMPLES, _HELD // n)),
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Estimate(mean, float(interval.low), float(interval.high), n)
