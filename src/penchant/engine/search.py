"""Searches over a catalogue trie: best-first, which proves its top k, and beams, which guess it.

Both speak to an engine in the same way: ``take`` names nodes to expand, ``feed`` gives the
log-probabilities of a node's children. An item's score is the summed log-probability of its sequence,
plus a bonus of its own where one is given (minus the no-history log-probability, when calibrated).

Best-first: a log-probability only falls along a path, so an open node's log-probability plus the
largest bonus below it bounds everything there. Once the k-th best item found is at least every open
node's bound, the top k is proved (A* with an admissible bound; Hart, Nilsson and Raphael 1968).
"""

from __future__ import annotations

import heapq
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from penchant.catalog_trie import CatalogTrie
from penchant.engine.base import Generation
from penchant.errors import NotFiniteError


class Search(Protocol):
    """What an engine drives: alternate ``take`` and ``feed`` until ``take`` returns nothing."""

    def take(self, width: int) -> list[int]:
        """Nodes to expand now; best-first gives up to ``width``, beams give all that they hold."""
        ...

    def feed(self, node: int, children: NDArray[np.floating]) -> None:
        """The log-probabilities of ``trie.children(node)``, in that order, for a node that was taken; NotFiniteError
        where one is not a number.
        """
        ...

    def result(self) -> list[Generation]: ...


class _Found:
    """Items scored so far, with the log-probability of every node on the way to them."""

    def __init__(
        self, trie: CatalogTrie, k: int, allowed: NDArray[np.bool_] | None, bonus: NDArray[np.floating] | None
    ) -> None:
        values = np.zeros(trie.n_items) if bonus is None else np.asarray(bonus, dtype=np.float64)
        hidden = ~trie.alive if allowed is None else ~(trie.alive & allowed)
        # In sequence order, the items below a node are one slice; -inf marks those that may not be named.
        self.values = np.where(hidden, -np.inf, values)[trie.item_order]
        self.trie = trie
        self.k = min(k, int(np.isfinite(self.values).sum()))
        self.logprob: dict[int, float] = {0: 0.0}
        self.best: list[tuple[float, int, int]] = []  # a heap of (score, -item, node), the worst of the k first

    @property
    def bar(self) -> float:
        """The k-th best score so far; minus infinity while there are fewer."""
        return self.best[0][0] if self.best and len(self.best) >= self.k else -np.inf

    def totals(self, node: int, children: NDArray[np.floating]) -> NDArray[np.float64]:
        """log p of each child of a node, its path included; NotFiniteError where the model gave none."""
        if np.isnan(children).any():
            raise NotFiniteError("a log-probability is not a number", where="generate", remedy="load it in float32")
        return self.logprob[node] + np.asarray(children, dtype=np.float64)

    def bonus_below(self, node: int) -> NDArray[np.float64]:
        """Largest bonus at or below each child of ``node``: their slices lie side by side."""
        children, trie = self.trie.children(node), self.trie
        first, end = int(trie.first_item[children[0]]), int(trie.last_item[node])
        return np.maximum.reduceat(self.values[first:end], trie.first_item[children] - first)

    def bonus_beyond(self, node: int) -> float:
        """Largest bonus strictly below ``node``."""
        first = int(self.trie.first_item[node] + self.trie.n_ending[node])
        below = self.values[first : int(self.trie.last_item[node])]
        return float(below.max()) if below.size else -np.inf

    def offer_ending(self, node: int, logprob: float) -> None:
        """Offer every allowed item that ends at ``node``."""
        first = int(self.trie.first_item[node])
        for row in range(first, first + int(self.trie.n_ending[node])):
            if self.values[row] > -np.inf:
                entry = (logprob + float(self.values[row]), -int(self.trie.item_order[row]), node)
                if len(self.best) < self.k:
                    heapq.heappush(self.best, entry)
                elif entry > self.best[0]:
                    heapq.heapreplace(self.best, entry)
        self.logprob[node] = logprob

    def result(self, gap: float) -> list[Generation]:
        out = []
        for score, negative, node in sorted(self.best, reverse=True):
            path = [self.logprob[node]]
            up = int(self.trie.parent[node])
            while up >= 0:
                path.append(self.logprob[up])
                up = int(self.trie.parent[up])
            steps = tuple(a - b for a, b in pairwise(path))[::-1]
            out.append(Generation(-negative, path[0], score, gap, steps))
        return out


class BestFirst:
    """The exact search. After ``max_expansions`` nodes it gives the best found, and the gap that remains."""

    def __init__(
        self,
        trie: CatalogTrie,
        k: int,
        allowed: NDArray[np.bool_] | None = None,
        bonus: NDArray[np.floating] | None = None,
        max_expansions: int = 20_000,
    ) -> None:
        self._found = _Found(trie, k, allowed, bonus)
        self._open: list[tuple[float, int]] = [(-np.inf, 0)] if self._found.k > 0 else []
        self._left = max_expansions

    def take(self, width: int) -> list[int]:
        """Up to ``width`` open nodes, the highest bound first; none once the top k is proved."""
        taken: list[int] = []
        while self._open and len(taken) < min(width, self._left):
            if -self._open[0][0] <= self._found.bar:
                self._open.clear()
                break
            taken.append(heapq.heappop(self._open)[1])
        self._left -= len(taken)
        return taken

    def feed(self, node: int, children: NDArray[np.floating]) -> None:
        """See Search.feed."""
        found, trie = self._found, self._found.trie
        nodes = trie.children(node)
        totals = found.totals(node, children)
        bounds = totals + found.bonus_below(node)
        useful = (bounds > -np.inf) & (bounds >= found.bar)
        for child, total, bound in zip(
            nodes[useful].tolist(), totals[useful].tolist(), bounds[useful].tolist(), strict=True
        ):
            inner = trie.end[child] > child + 1
            if trie.n_ending[child]:
                found.offer_ending(child, total)
                bound = total + found.bonus_beyond(child) if inner else -np.inf  # noqa: PLW2901
            if inner and bound > found.bar:
                found.logprob[child] = total
                heapq.heappush(self._open, (-bound, child))

    def result(self) -> list[Generation]:
        """The best items, best first; ``gap`` is 0 when the search ended by proof."""
        bound = -self._open[0][0] if self._open else -np.inf
        gap = max(0.0, bound - self._found.bar) if bound > self._found.bar else 0.0
        return self._found.result(gap)


class Beams:
    """Constrained beam search as transformers' ``generate`` does it, over the trie: ``width`` beams, no proof.

    Of all children of all beams the best 2 * width are looked at: those that end an item are finished
    if they are among the best ``width``, the others go on, ``width`` at most. It stops when the worst
    finished item is at least the best beam (``length_penalty=0``, ``early_stopping=False``).
    """

    def __init__(
        self,
        trie: CatalogTrie,
        k: int,
        width: int,
        allowed: NDArray[np.bool_] | None = None,
        bonus: NDArray[np.floating] | None = None,
    ) -> None:
        self._found = _Found(trie, max(k, width), allowed, bonus)
        self._k = k
        self._width = width
        self._beams = [0] if self._found.k > 0 else []
        self._candidates: list[tuple[float, int]] = []

    def take(self, width: int) -> list[int]:
        """All beams of the next step."""
        if self._candidates:
            self._step()
        return list(self._beams)

    def feed(self, node: int, children: NDArray[np.floating]) -> None:
        """See Search.feed."""
        found = self._found
        totals = found.totals(node, children)
        named = found.bonus_below(node) > -np.inf
        self._candidates += zip(totals[named].tolist(), found.trie.children(node)[named].tolist(), strict=True)

    def _step(self) -> None:
        found, trie = self._found, self._found.trie
        best = sorted(self._candidates, key=lambda c: (-c[0], c[1]))[: 2 * self._width]
        self._candidates, self._beams = [], []
        for place, (total, node) in enumerate(best):
            if trie.n_ending[node] and place < self._width:
                found.offer_ending(node, total)
            below = trie.end[node] > node + 1 and found.bonus_beyond(node) > -np.inf
            if below and len(self._beams) < self._width:
                found.logprob[node] = total
                self._beams.append(node)
        if self._beams and len(found.best) >= min(self._width, found.k) and found.bar >= found.logprob[self._beams[0]]:
            self._beams = []

    def result(self) -> list[Generation]:
        """The best finished items, best first. Nothing is proved: ``gap`` is infinite."""
        return self._found.result(np.inf)[: self._k]
