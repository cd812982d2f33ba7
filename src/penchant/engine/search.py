"""Best-first search over a catalogue trie: the exact top k by summed log-probability.

A log-probability only falls along a path, so an open node bounds everything below it. Once the k-th
best item found is at least every open node's bound, the top k is proved. (A* with a zero heuristic;
Hart, Nilsson and Raphael 1968.) An engine supplies the log-probabilities of a node's children.
"""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

from penchant.catalog_trie import CatalogTrie
from penchant.engine.base import Generation


class BestFirst:
    """The state of one prompt's search. Alternate ``take`` and ``feed`` until ``take`` returns nothing."""

    def __init__(
        self, trie: CatalogTrie, k: int, allowed: NDArray[np.bool_] | None = None, max_expansions: int = 20_000
    ) -> None:
        everything = np.ones(trie.n_items, dtype=bool)
        self._trie = trie
        self._allowed = everything if allowed is None else allowed
        self._below = trie.count_below(self._allowed)
        self._k = min(k, int(self._below[0]))
        self._open: list[tuple[float, int]] = [(0.0, 0)] if self._k > 0 else []
        self._best: list[tuple[float, int]] = []  # a heap of (logprob, -item), the worst of the k best first
        self._left = max_expansions

    @property
    def bar(self) -> float:
        """The k-th best log-probability found so far; minus infinity while there are fewer."""
        return self._best[0][0] if len(self._best) == self._k else -np.inf

    def take(self, width: int) -> list[tuple[int, float]]:
        """Up to ``width`` (node, log-probability) to expand next, the most likely first."""
        taken: list[tuple[int, float]] = []
        while self._open and len(taken) < min(width, self._left):
            if -self._open[0][0] <= self.bar:
                self._open.clear()
                break
            negative, node = heapq.heappop(self._open)
            taken.append((node, -negative))
        self._left -= len(taken)
        return taken

    def feed(self, node: int, logprob: float, children: NDArray[np.floating]) -> None:
        """Give the log-probabilities of ``trie.children(node)``, in that order, for a node taken at ``logprob``."""
        trie = self._trie
        nodes = trie.children(node)
        totals = logprob + np.asarray(children, dtype=np.float64)
        useful = (self._below[nodes] > 0) & (totals >= self.bar)
        for child, total in zip(nodes[useful].tolist(), totals[useful].tolist(), strict=True):
            ending = 0
            for item in trie.ending_at(child).tolist() if trie.n_ending[child] else ():
                if self._allowed[item]:
                    ending += 1
                    self._offer(total, item)
            if self._below[child] > ending and total > self.bar:
                heapq.heappush(self._open, (-total, child))

    def _offer(self, logprob: float, item: int) -> None:
        entry = (logprob, -item)
        if len(self._best) < self._k:
            heapq.heappush(self._best, entry)
        elif entry > self._best[0]:
            heapq.heapreplace(self._best, entry)

    def result(self) -> list[Generation]:
        """The best items found, best first; exact only when the search ended by proof."""
        exact = not self._open or -self._open[0][0] <= self.bar
        return [Generation(-item, logprob, exact) for logprob, item in sorted(self._best, reverse=True)]
