"""Small splits with a structure that is known: for the tests of the baselines."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl

from penchant.data.dataset import Dataset
from penchant.data.split import Split, leave_last_out
from penchant.evaluation.systems import Queries

DAY = 86_400_000_000  # microseconds


def split_of(histories: Sequence[Sequence[int]], n_items: int, times: Sequence[Sequence[int]] | None = None) -> Split:
    """Leave-last-out of users' item indices, oldest first; ``times`` are in days, by default one a day."""
    rows = [
        (f"{u}", f"{item}", (times[u][k] if times else k + 1) * DAY // 1_000_000)
        for u, history in enumerate(histories)
        for k, item in enumerate(history)
    ]
    events = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    items = pl.DataFrame({"item_id": [f"{i}" for i in range(n_items)], "title": [f"Item {i}" for i in range(n_items)]})
    return leave_last_out(Dataset.read(events, items))


def two_tastes(n_users: int = 80, per_taste: int = 12, seed: int = 0) -> Split:
    """Every user likes one half of the catalogue and takes nine of its items in any order."""
    rng = np.random.default_rng(seed)
    histories = [(u % 2) * per_taste + rng.permutation(per_taste)[:9] for u in range(n_users)]
    return split_of([h.tolist() for h in histories], 2 * per_taste)


def queries(*histories: Sequence[int], user: Sequence[int] | None = None, day: Sequence[int] | None = None) -> Queries:
    """Queries of these histories; the user -1 is nobody that training knows."""
    n = len(histories)
    return Queries(
        np.array(user if user is not None else [-1] * n, dtype=np.int32),
        [np.array(h, dtype=np.int32) for h in histories],
        np.array(day if day is not None else [10**6] * n, dtype=np.int64) * DAY,
    )
