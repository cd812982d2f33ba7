"""EASE: the linear autoencoder with a closed form (Steck 2019, "Embarrassingly Shallow Autoencoders", eq. 8)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from scipy.linalg import lapack

from penchant.errors import ConfigError, ModelError
from penchant.evaluation.baselines.events import TrainingEvents, fading, newest, popular_where_empty
from penchant.evaluation.systems import Queries

# One float32 matrix of items by items is held: 40,000 of them are 6.4 GB, and LAPACK's index ends at 46,340.
MOST_ITEMS = 40_000
_BLOCK = 1024


class EASEConfig(BaseModel):
    """What is tuned."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ridge: float = Field(default=500.0, gt=0, description="lambda: weight of the L2 penalty on the item-item weights")
    last: int | None = Field(default=None, ge=1, description="newest items of the history that count; None: all")
    decay: float = Field(default=1.0, gt=0, le=1, description="weight of an event against that of the next newer one")


@dataclass(frozen=True, eq=False)
class EASE:
    """score = newest history @ B; B = -P / diag(P) outside its zero diagonal, P = (X'X + ridge)^-1.

    The history is a row of ones and zeros, or fades with age. ``inverse`` (n_items, n_items) float32 is P with its
    diagonal taken out into ``diagonal`` (n_items,). Popularity from training for an empty history. A cold item has no
    weights: it scores -inf, never recommended.
    """

    inverse: NDArray[np.float32]
    diagonal: NDArray[np.float32]
    counts: NDArray[np.float32]
    last: int | None
    decay: float = 1.0
    name: str = "EASE"

    def scores(self, queries: Queries) -> NDArray[np.float32]:
        out = fading(newest(queries.history, self.last), len(self.counts), self.decay) @ self.inverse
        out /= -self.diagonal
        out[:, self.counts == 0] = -np.inf
        return popular_where_empty(out, queries, self.counts)


def check_size(n_items: int) -> None:
    """ConfigError where items by items are too many to hold."""
    if n_items > MOST_ITEMS:
        raise ConfigError(
            f"EASE would hold {n_items:,} x {n_items:,} weights, {4 * n_items**2 / 1e9:.0f} GB",
            where="baseline ease",
            remedy=f"leave it out, or keep at most {MOST_ITEMS:,} items",
        )


def fit_ease(events: TrainingEvents, config: EASEConfig) -> EASE:
    """One Cholesky factorisation in float32, in place: memory is one matrix of items by items.

    Raises ConfigError for more items than ``MOST_ITEMS``, ModelError where the ridge is too small for float32.
    """
    n = events.n_items
    check_size(n)
    matrix = events.matrix
    # LAPACK's order, so that nothing is copied. Only the lower triangle is computed with.
    gram = np.asfortranarray((matrix.T @ matrix).toarray(order="F"), dtype=np.float32)
    gram[np.diag_indices(n)] += np.float32(config.ridge)
    factor, failed = lapack.spotrf(gram, lower=1, clean=0, overwrite_a=1)
    if not failed:
        factor, failed = lapack.spotri(factor, lower=1, overwrite_c=1)
    if failed:
        raise ModelError(
            "the Gram matrix cannot be inverted in float32", where="baseline ease", remedy="use a larger ridge"
        )
    inverse = _mirrored(factor.T)
    diagonal = inverse.diagonal().copy()
    np.fill_diagonal(inverse, 0)
    return EASE(inverse, diagonal, events.counts, config.last, config.decay)


def _mirrored(upper: NDArray[np.float32]) -> NDArray[np.float32]:
    """Copy the upper triangle to the lower, in place, a block of rows at a time."""
    for start in range(0, len(upper), _BLOCK):
        end = min(start + _BLOCK, len(upper))
        upper[start:end, :start] = upper[:start, start:end].T
        square = upper[start:end, start:end]
        square[:] = np.triu(square) + np.triu(square, 1).T
    return upper
