"""What needs no language model to say yes or no: how much this user likes things, and how much this item is liked.

The two shares are what matrix factorisation calls biases (Koren, Bell and Volinsky 2009, "Matrix factorization
techniques for recommender systems", section "Adding biases"), in place of ratings the answers yes and no.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from penchant.errors import DataError
from penchant.evaluation.readers import YesNoRow

Floats = NDArray[np.float64]

# An item's share is drawn to that of all items as if this many had said the latter.
_PRIOR = 5.0


def own_share(rows: Sequence[YesNoRow]) -> Floats:
    """The share of likes among the titles that each row's user has rated, (n,): one like and one dislike are added."""
    return np.array([(1 + len(row.liked)) / (2 + len(row.liked) + len(row.disliked)) for row in rows])


@dataclass(frozen=True, eq=False)
class Shares:
    """Who of some rows' users liked which title. ``answers``: title, then user, to whether it was liked."""

    answers: dict[str, dict[str, bool]]
    overall: float

    @classmethod
    def of(cls, rows: Sequence[YesNoRow]) -> Shares:
        """Counts what the rows say, histories and targets: each user and title once. DataError where there are none."""
        answers: dict[str, dict[str, bool]] = {}
        for number, row in enumerate(rows):
            for title, liked in (*((t, True) for t in row.liked), *((t, False) for t in row.disliked)):
                answers.setdefault(title, {})[_who(row, number)] = liked
            answers.setdefault(row.target, {})[_who(row, number)] = row.label
        every = [liked for of in answers.values() for liked in of.values()]
        if not every:
            raise DataError("there are no rows to count likes in", where="yes/no task")
        return cls(answers, float(np.mean(every)))

    def share(self, title: str, *, without: str | None = None) -> float:
        """The share of likes of a title, drawn to the overall one; ``without`` a user's own answer."""
        found = self.answers.get(title, {})
        said = [liked for user, liked in found.items() if user != without]
        return (sum(said) + _PRIOR * self.overall) / (len(said) + _PRIOR)

    def features(self, rows: Sequence[YesNoRow], *, own: bool = False) -> Floats:
        """The log-odds of the target's share, and how far the user's likes are above those titles' shares: (n, 2).

        ``own``: the rows are those that were counted, and what a row's own user said is left out.
        """
        out = np.zeros((len(rows), 2))
        for number, row in enumerate(rows):
            without = _who(row, number) if own else None
            share = self.share(row.target, without=without)
            above = [1 - self.share(t, without=without) for t in row.liked]
            above += [-self.share(t, without=without) for t in row.disliked]
            out[number] = np.log(share / (1 - share)), float(np.mean(above)) if above else 0.0
        return out


def _who(row: YesNoRow, number: int) -> str:
    """A row whose user is not known is a user of its own."""
    return f"row {number}" if row.user is None else row.user


@dataclass(frozen=True, eq=False)
class Logistic:
    """Logistic regression with a small ridge: log-odds ``(x - mean) / deviation @ weight + bias``."""

    mean: Floats
    deviation: Floats
    weight: Floats
    bias: float

    @classmethod
    def fit(cls, features: Floats, label: NDArray[np.bool_], *, ridge: float = 1.0) -> Logistic:
        """Of ``features`` (n, d) and ``label`` (n,); ``ridge`` is of the weights on standardised features, in nats."""
        mean, deviation = features.mean(axis=0), features.std(axis=0)
        deviation = np.where(deviation > 0, deviation, 1.0)
        x, sign = (features - mean) / deviation, np.where(label, 1.0, -1.0)

        def loss(w: Floats) -> tuple[float, Floats]:
            margin = sign * (x @ w[1:] + w[0])
            pull = -sign * np.exp(-np.logaddexp(0, margin))
            slope = np.concatenate([[pull.sum()], x.T @ pull + ridge * w[1:]])
            return float(np.logaddexp(0, -margin).sum() + ridge / 2 * w[1:] @ w[1:]), slope

        found = minimize(loss, np.zeros(x.shape[1] + 1), jac=True, method="L-BFGS-B").x
        return cls(mean, deviation, found[1:], float(found[0]))

    def odds(self, features: Floats) -> Floats:
        """log p(yes) - log p(no) of each row, nats, (n,)."""
        out: Floats = (features - self.mean) / self.deviation @ self.weight + self.bias
        return out
