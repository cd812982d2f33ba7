"""The last look at a list: variety, at most so many of a kind, nothing twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from penchant.errors import ConfigError
from penchant.schema import TITLE, VALUES


@dataclass(frozen=True, eq=False)
class Rules:
    """What a list must keep to, looked up once for a catalogue.

    ``diversity`` from 0 (the order as it comes) to 1 (variety alone). ``labels`` holds for each capped column the
    labels of every item, and its cap. ``title`` (n_items,) numbers the distinct titles; None: one may come
    twice.
    """

    diversity: float
    labels: list[tuple[list[tuple[str, ...]], int]]
    title: NDArray[np.int64] | None

    @classmethod
    def of(
        cls, items: pl.DataFrame, *, diversity: float = 0.0, caps: Mapping[str, int] | None = None, unique: bool = True
    ) -> Rules:
        """``caps`` maps item columns to how many items of one value a list may hold; values separated by | are several
        labels, and an item without a value is capped by nothing. ConfigError for what can't be kept to.
        """
        if not 0 <= diversity <= 1:
            raise ConfigError(f"diversity is {diversity}", where="recommend", remedy="give 0 (none) to 1")
        labels = []
        for column, cap in (caps or {}).items():
            if column not in items.columns:
                there = ", ".join(items.columns)
                raise ConfigError(f"the items have no column {column!r}", where="caps", remedy=f"use one of {there}")
            if not isinstance(cap, int | np.integer):
                raise ConfigError(f"the cap of {column!r} is {cap!r}", where="caps", remedy="give a whole number")
            if cap < 1:
                raise ConfigError(f"the cap of {column!r} is {cap}", where="caps", remedy="give 1 or more")
            values = items[column].cast(pl.String).to_list()
            split = [
                tuple(dict.fromkeys(p for part in (value or "").split(VALUES) if (p := part.strip())))
                for value in values
            ]
            labels.append((split, cap))
        title = items[TITLE].str.to_lowercase().str.strip_chars().rank("dense").to_numpy() if unique else None
        return cls(diversity, labels, None if title is None else title.astype(np.int64))

    def pool(self, k: int) -> int:
        """How many candidates a list of k should be chosen from at first: for variety, many more than k."""
        return max(100, 10 * k) if self.diversity else k

    @property
    def keeps_order(self) -> bool:
        """Whether a list without a title twice stays as it is."""
        return not self.diversity and not self.labels

    def repeats(self, items: NDArray[np.integer]) -> NDArray[np.bool_]:
        """(n,): which of n lists (n, k) hold a title twice that may come once."""
        if self.title is None or items.shape[1] < 2:
            return np.zeros(len(items), dtype=bool)
        titles = np.sort(self.title[items], axis=1)
        return (titles[:, 1:] == titles[:, :-1]).any(axis=1)

    def choose(self, items: Sequence[int], vectors: NDArray[np.float32] | None, k: int) -> list[int]:
        """Places of the k chosen of ``items`` (best first), in their new order; fewer where the rules leave fewer.

        Maximal marginal relevance (Carbonell and Goldstein 1998): each place goes to the item with the largest
        (1 - diversity) * relevance - diversity * (largest cosine with those chosen). Relevance falls evenly from 1 at
        the first place to 0 behind the last: scores of different stages don't compare, places do. ``vectors`` (n, d)
        are of these items; they are needed where diversity is above 0.
        """
        n = len(items)
        if self.keeps_order:  # a list as it comes, as most are: its places in order
            first = np.asarray(items[:k], dtype=np.int64)
            if not self.repeats(first[None])[0]:
                return list(range(len(first)))
        relevance = 1 - np.arange(n) / max(1, n)
        likeness = np.zeros(n)
        unit = None
        if self.diversity and vectors is not None:
            unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
            likeness[:] = -1.0  # the cosine with nothing
        free = np.ones(n, dtype=bool)
        titles = None if self.title is None else self.title[np.asarray(items, dtype=np.int64)]
        counts: list[dict[str, int]] = [{} for _ in self.labels]
        chosen: list[int] = []
        while len(chosen) < k and free.any():
            value = np.where(free, (1 - self.diversity) * relevance - self.diversity * likeness, -np.inf)
            best = int(np.argmax(value))
            free[best] = False
            if not self._within(int(items[best]), counts):
                continue
            chosen.append(best)
            for (labels, _), count in zip(self.labels, counts, strict=True):
                for label in labels[int(items[best])]:
                    count[label] = count.get(label, 0) + 1
            if titles is not None:
                free &= titles != titles[best]
            if unit is not None:
                likeness = np.maximum(likeness, unit @ unit[best])
        return chosen

    def _within(self, item: int, counts: Sequence[Mapping[str, int]]) -> bool:
        return all(
            count.get(label, 0) < cap
            for (labels, cap), count in zip(self.labels, counts, strict=True)
            for label in labels[item]
        )
