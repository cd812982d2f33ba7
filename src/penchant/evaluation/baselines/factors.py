"""Matrix factorisation by implicit: ALS on confidences (Hu et al. 2008), BPR on pairs (Rendle et al. 2009)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from scipy import sparse

from penchant.evaluation.baselines.events import TrainingEvents, multi_hot, newest, popular_where_empty
from penchant.evaluation.baselines.extras import needed
from penchant.evaluation.systems import Queries


class ALSConfig(BaseModel):
    """What is tuned."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    factors: int = Field(default=128, ge=1, description="size of user and item factors")
    regularization: float = Field(default=10.0, ge=0, description="L2 on the factors")
    alpha: float = Field(default=10.0, gt=0, description="confidence of an event; 1 is that of no event")
    iterations: int = Field(default=15, ge=1, description="alternations")
    last: int | None = Field(default=None, ge=1, description="newest items of the history that count; None: all")


class BPRConfig(BaseModel):
    """What is tuned."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    factors: int = Field(default=64, ge=1, description="size of user and item factors, the bias apart")
    learning_rate: float = Field(default=0.05, gt=0, description="of the stochastic gradient steps")
    regularization: float = Field(default=0.03, ge=0, description="L2 on the factors")
    iterations: int = Field(default=150, ge=1, description="passes; as many sampled pairs in each as there are events")


@dataclass(frozen=True, eq=False)
class ALS:
    """score = user factors . item factors, the user folded in: solved anew from the query's own history.

    So an event after training (the validation event, in a test history) counts, and a user unknown to training is
    served like any other. Popularity from training for an empty history; a cold item scores -inf.
    """

    model: Any
    counts: NDArray[np.float32]
    last: int | None
    name: str = "ALS"

    def scores(self, queries: Queries) -> NDArray[np.float32]:
        history = sparse.csr_matrix(multi_hot(newest(queries.history, self.last), len(self.counts)))
        with _one_blas_thread("als"):
            users = self.model.recalculate_user(np.arange(len(queries)), history)
        return _served(users @ self.model.item_factors.T, queries, self.counts)


@dataclass(frozen=True, eq=False)
class BPR:
    """score = user factors . item factors + item bias, the user's factors as training left them.

    BPR has no closed form to fold a history in, so events after training do not count. Popularity from training
    for an empty history and for a user without a training event (``known`` (n_users,) says who has one); a cold
    item scores -inf.
    """

    users: NDArray[np.float32]
    items: NDArray[np.float32]
    known: NDArray[np.bool_]
    counts: NDArray[np.float32]
    name: str = "BPR"

    def scores(self, queries: Queries) -> NDArray[np.float32]:
        inside = (queries.user >= 0) & (queries.user < len(self.known))
        user = np.where(inside, queries.user, 0)
        out = _served(self.users[user] @ self.items.T, queries, self.counts)
        out[~(inside & self.known[user])] = self.counts
        return out


def fit_als(events: TrainingEvents, config: ALSConfig, seed: int) -> ALS:
    """Alternating least squares by conjugate gradients; the same for the same seed, however many threads."""
    als = needed("implicit.als", "als")
    with _one_blas_thread("als"):
        # A GPU, where there is one, would give other factors: the baselines are the CPU's everywhere.
        model = als.AlternatingLeastSquares(
            factors=config.factors,
            regularization=config.regularization,
            alpha=config.alpha,
            iterations=config.iterations,
            random_state=seed,
            use_gpu=False,
        )
        model.fit(sparse.csr_matrix(events.matrix), show_progress=False)
    return ALS(model, events.counts, config.last)


def fit_bpr(events: TrainingEvents, config: BPRConfig, seed: int) -> BPR:
    """Stochastic gradients on one thread (several race each other to another result every time).

    implicit draws the negatives as often as they are popular, not evenly as Rendle et al. do.
    """
    bpr = needed("implicit.bpr", "bpr")
    with _one_blas_thread("bpr"):
        model = bpr.BayesianPersonalizedRanking(
            factors=config.factors,
            learning_rate=config.learning_rate,
            regularization=config.regularization,
            iterations=config.iterations,
            random_state=seed,
            use_gpu=False,
            num_threads=1,
        )
        model.fit(sparse.csr_matrix(events.matrix), show_progress=False)
    known = np.zeros(events.n_users, dtype=bool)
    known[events.user] = True
    return BPR(model.user_factors, model.item_factors, known, events.counts)


def _served(scores: NDArray[np.float32], queries: Queries, counts: NDArray[np.float32]) -> NDArray[np.float32]:
    # Factors of an item without a training event are zeros, and 0 would beat every negative score.
    scores[:, counts == 0] = -np.inf
    return popular_where_empty(scores, queries, counts)


@contextmanager
def _one_blas_thread(baseline: str) -> Iterator[None]:
    """implicit brings its own threads; BLAS threads under each of them make it ten times slower, and it warns."""
    threadpoolctl = needed("threadpoolctl", baseline)
    with threadpoolctl.threadpool_limits(1, "blas"):
        yield
