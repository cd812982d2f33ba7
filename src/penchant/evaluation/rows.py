"""From ranks to the rows of a table: metrics, averaged over events or users, and differences with their tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from penchant import metrics
from penchant.errors import ConfigError
from penchant.evaluation.ranking import Ranked
from penchant.evaluation.report import Row, SliceRow
from penchant.evaluation.slices import Slice
from penchant.evaluation.statistics import (
    Estimate,
    bootstrap_by_user,
    bootstrap_mean,
    holm,
    paired_permutation,
    per_user,
)

Average = Literal["event", "user"]
Values = NDArray[np.float64]
Ranks = NDArray[np.integer]

RANDOM_ORDER = "the candidates in random order (expected)"


@dataclass(frozen=True, eq=False)
class Table:
    """How values of targets become means: the cut-off, the catalogue's size, whose targets, and which average.

    ``user`` (n,) is each target's user. Under "event" targets count alike, under "user" users do; the interval
    draws whole users again in both.
    """

    k: int
    n_items: int
    user: NDArray[np.integer]
    average: Average = "event"
    seed: int = 0

    def take(self, rows: NDArray[np.integer] | NDArray[np.bool_]) -> Table:
        """The same for some of the targets."""
        return dataclasses.replace(self, user=self.user[rows])

    def mean(self, values: Values) -> Estimate:
        """The mean of one value a target, with its interval."""
        if self.average == "event":
            return bootstrap_by_user(values, self.user, self.seed)
        return bootstrap_mean(per_user(values, self.user), self.seed)

    def headline(self, rank: Ranks) -> dict[str, Values]:
        """Recall@k (with one target also the hit rate), NDCG@k, and MRR over the whole ranking: a value a target."""
        k, rank = self.k, self._found(rank)
        whole = metrics.mrr(rank, self.n_items)
        return {f"Recall@{k}": metrics.recall(rank, k), f"NDCG@{k}": metrics.ndcg(rank, k), "MRR": whole}

    def more(self, rank: Ranks) -> dict[str, Values]:
        """What follows from the same ranks: the other metrics at k, and the headline's at other cut-offs."""
        k, rank = self.k, self._found(rank)
        out = {
            f"HitRate@{k}": metrics.hit_rate(rank, k),
            f"Precision@{k}": metrics.precision(rank, k),
            f"F1@{k}": metrics.f1(rank, k),
            f"MAP@{k}": metrics.average_precision(rank, k),
            f"MRR@{k}": metrics.mrr(rank, k),
        }
        for other in (1, 5, 10, 20, 50, 100):
            if other != k:
                out |= {f"Recall@{other}": metrics.recall(rank, other), f"NDCG@{other}": metrics.ndcg(rank, other)}
        return out

    def _found(self, rank: Ranks) -> Ranks:
        """Ranks with n_items + 1, which says that the target was not found, beyond every k, a small catalogue's too."""
        return np.where(rank > self.n_items, np.iinfo(np.int64).max, rank)

    def row(self, group: str, system: str, rank: Ranks) -> Row:
        """One system's row."""
        head, more = ({n: self.mean(v) for n, v in part.items()} for part in (self.headline(rank), self.more(rank)))
        return Row(group, system, head, more=more)

    def rows(self, group: str, ranked: Sequence[Ranked]) -> list[Row]:
        """One row a system."""
        return [self.row(group, one.system, one.rank) for one in ranked]

    def difference(self, group: str, name: str, one: Ranks | Sequence[Ranks], other: Ranks | Sequence[Ranks]) -> Row:
        """The first minus the second on the same targets; p, not yet corrected, is of NDCG@k.

        Of several rankings by one system, one a seed, each target's mean counts.
        """
        head, base = self._over_seeds(one), self._over_seeds(other)
        found = {metric: self.mean(head[metric] - base[metric]) for metric in head}
        a, b = head[f"NDCG@{self.k}"], base[f"NDCG@{self.k}"]
        if self.average == "event":
            tested = paired_permutation(a, b, self.seed, user=self.user)
        else:
            tested = paired_permutation(per_user(a, self.user), per_user(b, self.user), self.seed)
        return Row(group, name, found, difference=True, p=tested.p)

    def _over_seeds(self, ranks: Ranks | Sequence[Ranks]) -> dict[str, Values]:
        if isinstance(ranks, np.ndarray):
            return self.headline(ranks)
        each = [self.headline(one) for one in ranks]
        return {name: np.mean([values[name] for values in each], axis=0) for name in each[0]}

    def random_order(self, group: str, choices: NDArray[np.integer], behind: NDArray[np.integer]) -> Row:
        """What the candidates give in random order, in expectation.

        ``choices`` (n,) is how many candidates each target stands among, each place as likely; 0 where it is none: then
        its rank is that of ``behind`` (n,), which no order of the candidates changes.
        """
        values = self.headline(np.where(choices > 0, 1, behind))
        for n in np.unique(choices[choices > 0]):
            for name, at_place in self.headline(np.arange(1, n + 1)).items():
                values[name][choices == n] = at_place.mean()
        return Row(group, RANDOM_ORDER, {name: self.mean(v) for name, v in values.items()})

    def slice_rows(self, slices: Sequence[Slice], ranked: Sequence[Ranked]) -> list[SliceRow]:
        """Every system's headline on every slice of its targets."""
        out = []
        for part in slices:
            table = self.take(part.mask)
            for one in ranked:
                values = table.headline(one.rank[part.mask])
                means = {name: table.mean(v) for name, v in values.items()}
                out.append(SliceRow(part.name, part.value, len(part), one.system, means))
        return out


def corrected(rows: Sequence[Row]) -> tuple[list[Row], list[str]]:
    """The rows with Holm's correction over all their differences, and notes on what p means."""
    tested = [i for i, row in enumerate(rows) if row.p is not None]
    out = list(rows)
    if not tested:
        return out, []
    note = "p: two-sided paired permutation test on NDCG over users"
    if len(tested) == 1:
        return out, [note]
    try:
        p = holm([rows[i].p or 0.0 for i in tested])
    except ConfigError as error:
        return out, [f"{note}, NOT corrected for {len(tested)} tests: {error.what}"]
    for i, value in zip(tested, p, strict=True):
        out[i] = dataclasses.replace(rows[i], p=float(value))
    return out, [f"{note}, Holm-corrected over the {len(tested)} differences of this report"]
