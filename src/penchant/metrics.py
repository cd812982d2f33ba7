"""Ranking metrics in numpy, for one relevant item a user: the target."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def target_rank(scores: NDArray[np.floating], target: NDArray[np.integer]) -> NDArray[np.int64]:
    """Rank, from 1, of each row's target among the columns of ``scores`` (n, m); ties count against us.

    A target scored -inf (masked) or NaN can't be found: its rank is m + 1.
    """
    own = scores[np.arange(len(scores)), target]
    # Not "at least as good" but "not worse": a competitor that is NaN counts against us too.
    rank = (~(scores < own[:, None])).sum(axis=1)
    return np.where(np.isneginf(own) | np.isnan(own), scores.shape[1] + 1, rank)


def list_rank(lists: NDArray[np.integer], target: NDArray[np.integer]) -> NDArray[np.int64]:
    """Rank, from 1, of each row's target in a ranked list (n, k) padded with -1; k + 1 where it is absent."""
    hit = lists == target[:, None]
    return np.where(hit.any(axis=1), hit.argmax(axis=1) + 1, lists.shape[1] + 1)


def recall(rank: NDArray[np.integer], k: int) -> NDArray[np.float64]:
    """1 where the target is among the first k, else 0. With one relevant item this is also the hit rate."""
    return (rank <= k).astype(np.float64)


def ndcg(rank: NDArray[np.integer], k: int) -> NDArray[np.float64]:
    """1 / log2(rank + 1) within the first k, else 0 (Jaervelin and Kekaelaeinen 2002; the ideal is 1)."""
    return np.where(rank <= k, 1.0 / np.log2(rank + 1.0), 0.0)
