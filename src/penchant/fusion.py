"""The mixture of what encoder and LLM say of a user's candidates, and how validation chooses it.

Both scores are standardised among a user's candidates. log p(title | history) says how likely the LLM finds an item
next; titles differ in how likely they are as text alone, so log p(title | no history) is taken out, wholly or in part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from penchant import metrics

Rows = Sequence[NDArray[np.floating]]

# How much of the no-history likelihood is taken out: what validation chooses from.
CALIBRATIONS = (0.0, 0.5, 1.0)
# Nats by which the LLM must explain the validation targets better than the encoder alone: one for each parameter that
# it brings, weight and calibration (Akaike 1974, "A new look at the statistical model identification").
_PRICE = 2.0
# A weight of the logit is drawn to 0 as by a normal prior of this deviation; scores are standardised.
_PRIOR_DEVIATION = 10.0


@dataclass(frozen=True, slots=True)
class Fusion:
    """score = (1 - weight) * z(interest) + weight * z(log p(title | history) - calibration * log p(title))."""

    weight: float
    calibration: float
    valid_ndcg: float | None = None  # NDCG@10 on the validation users it was chosen on
    interest_ndcg: float | None = None  # the interest score's own, on the same users and candidates
    n_users: int = 0
    n_found: int = 0  # those whose target was retrieved: the weight is chosen on them

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def scores(
        self, interest: NDArray[np.floating], likelihood: NDArray[np.floating], prior: NDArray[np.floating]
    ) -> NDArray[np.float64]:
        """Fused scores of one user's candidates, all arguments and the result of shape (n,)."""
        llm = zscore(likelihood - self.calibration * prior)
        return (1 - self.weight) * zscore(interest) + self.weight * llm


def zscore(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """Mean 0 and deviation 1 over a user's candidates; all zeros where they don't differ."""
    centred = np.asarray(values, dtype=np.float64) - np.mean(values)
    deviation = centred.std()
    return centred / deviation if deviation > 0 else np.zeros_like(centred)


def choose_fusion(interest: Rows, likelihood: Rows, prior: Rows, target: Sequence[int]) -> Fusion:
    """The mixture under which the validation targets are likeliest, or the encoder alone where that gains too little.

    A conditional logit (McFadden 1974, "Conditional logit analysis of qualitative choice behavior"): the target among
    its user's candidates is a choice with log-odds a * z(interest) + b * z(LLM), a and b not negative, and weight is
    b / (a + b). It uses where every target stands, so few users tell more than by the best NDCG of a grid, which is
    often the best by luck alone; the LLM gets a say where it gains more nats than it brings parameters.

    Each sequence has one entry a user, arrays over that user's candidates; ``target`` is the position of the true item
    among them, -1 where retrieval missed it: what the LLM says there is not read.
    """
    found = [i for i, t in enumerate(target) if t >= 0]
    chosen, least = Fusion(0.0, 0.0), np.inf
    if found:
        own = _padded([zscore(interest[i]) for i in found])
        place = np.array([target[i] for i in found])
        _, alone = _logit(own, np.zeros_like(own), place)
        for calibration in CALIBRATIONS:
            said = _padded([zscore(likelihood[i] - calibration * prior[i]) for i in found])
            (a, b), loss = _logit(own, said, place)
            if loss < min(least, alone - _PRICE):
                chosen, least = Fusion(round(b / (a + b), 2), calibration), loss
    quality, plain = (_ndcg(fusion, interest, likelihood, prior, target) for fusion in (chosen, Fusion(0.0, 0.0)))
    return Fusion(chosen.weight, chosen.calibration, quality, plain, len(target), len(found))


def _padded(rows: Rows) -> NDArray[np.float64]:
    """Rows of one length, (n, most), with NaN behind their ends."""
    out = np.full((len(rows), max(map(len, rows))), np.nan)
    for row, values in zip(out, rows, strict=True):
        row[: len(values)] = values
    return out


def _logit(
    own: NDArray[np.float64], said: NDArray[np.float64], place: NDArray[np.integer]
) -> tuple[tuple[float, float], float]:
    """The two weights, neither negative, and the loss in nats (the prior's included) of the targets at ``place``."""
    none = np.isnan(own)
    features = np.where(none, 0.0, np.stack([own, said]))
    at = np.take_along_axis(features, place[None, :, None], axis=2)[:, :, 0]

    def loss(weights: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        scores = np.where(none, -np.inf, np.tensordot(weights, features, axes=1))
        total = np.logaddexp.reduce(scores, axis=1)
        share = np.exp(scores - total[:, None])
        value = total.sum() - (weights @ at).sum() + (weights @ weights) / (2 * _PRIOR_DEVIATION**2)
        slope = (features * share).sum(axis=(1, 2)) - at.sum(axis=1) + weights / _PRIOR_DEVIATION**2
        return float(value), slope

    done = minimize(loss, np.array([0.5, 0.1]), jac=True, method="L-BFGS-B", bounds=[(0, None)] * 2)
    return (float(done.x[0]), float(done.x[1])), float(done.fun)


def _ndcg(fusion: Fusion, interest: Rows, likelihood: Rows, prior: Rows, target: Sequence[int]) -> float:
    """Mean NDCG@10 of a mixture, ties counted against it; 0 without users."""
    rank = []
    for e, lik, p, t in zip(interest, likelihood, prior, target, strict=True):
        scores = fusion.scores(e, lik, p) if t >= 0 else None
        rank.append(len(e) + 1_000 if scores is None else int((scores >= scores[t]).sum()))
    return float(metrics.ndcg(np.array(rank), 10).mean()) if rank else 0.0
