"""What is known of log p along a trie behind one prompt, and what to ask for next, of an engine that answers requests.

A request (Ask) is a prompt and the path to a node. Its answer holds log p of that node's children, and, asked deeply,
of the path's own tokens too, as far as the engine ran them: what it had cached it cannot tell. So whoever asks
learns, and asks again for what is left: deeply behind a salt, which no cached block has, or node by node.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from penchant.catalog_trie import CatalogTrie
from penchant.errors import NotFiniteError

# Children that one request may name: vLLM's own limit of logprob_token_ids.
MOST_CHILDREN = 128


@dataclass(frozen=True, slots=True)
class Ask:
    """log p of ``tokens`` after ``ids``; with ``path`` > 0, of the last ``path`` tokens of ``ids`` as well.

    ``node`` and ``first`` say whose children the tokens are, from which child on. Only requests of one ``salt`` share
    what is cached.
    """

    ids: list[int]
    tokens: list[int]
    path: int
    salt: str | None
    node: int
    first: int


@dataclass(frozen=True, slots=True)
class Answer:
    """log p in nats of an Ask's ``tokens``, and of the last tokens of its ``ids`` that were run."""

    tokens: Sequence[float]
    path: Sequence[float]


class Known:
    """log p of trie edges behind one prompt: an array over the children of every node heard of, NaN where unknown."""

    def __init__(self, ids: list[int], trie: CatalogTrie) -> None:
        self.ids = ids
        self.trie = trie
        self._children: dict[int, NDArray[np.float64]] = {}
        self._asked: dict[int, int] = {}  # how often a node was asked for, by next()
        self._salt: str | None = None

    def complete(self, node: int) -> bool:
        """Whether log p of all the node's children is known."""
        return node in self._children and not np.isnan(self._children[node]).any()

    def children(self, node: int) -> NDArray[np.float64]:
        """log p of ``trie.children(node)`` given the prompt and the node's path, in that order."""
        return self._children[node]

    # -- asking --------------------------------------------------------------------------------

    def everything(self) -> list[Ask]:
        """Deep requests that tell all edges where nothing of the paths is cached: one for each node above a leaf.

        The root comes first: it runs the prompt once, whose own log-probabilities nobody needs.
        """
        leaves = np.flatnonzero(self.trie.end == np.arange(self.trie.n_nodes) + 1)
        above = np.unique(self.trie.parent[leaves]).tolist()
        return [ask for node in dict.fromkeys([0, *above]) for ask in self.ask(node, deep=True)]

    def rest(self, *, deep: bool) -> list[Ask]:
        """Requests for what is still unknown: every such node, or, deep, the lowest of them behind a salt of their own.

        Deep is of no use, and nodes are asked for one by one, where that takes no more requests.
        """
        unknown = [node for node in self._inner() if not self.complete(node)]
        if deep and unknown:
            above = zip(unknown, [*unknown[1:], self.trie.n_nodes], strict=True)
            lowest = [node for node, after in above if after >= self.trie.end[node]]
            if len(lowest) < len(unknown):
                self._salt = secrets.token_hex(8)
                return [ask for node in dict.fromkeys([0, *lowest]) for ask in self.ask(node, deep=True)]
        return [ask for node in unknown for ask in self.ask(node, deep=False)]

    def next(self, node: int, *, deep: bool) -> list[Ask]:
        """Requests for a node that a search wants expanded, each time another way until it is complete.

        Most of a title is a chain without branches: asked deeply, its end tells all of it at once.
        """
        times = self._asked[node] = self._asked.get(node, 0) + 1
        if not deep or times > 2:
            return self.ask(node, deep=False)
        if times == 2:
            self._salt = secrets.token_hex(8)
        end = node
        while True:
            children = self.trie.children(end)
            if len(children) > 1 or self.trie.end[children[0]] == children[0] + 1:
                return self.ask(end, deep=True)
            end = int(children[0])

    def ask(self, node: int, *, deep: bool) -> list[Ask]:
        """Requests for the node's children, as many at a time as one may name."""
        path = self.trie.path(node)
        ids = [*self.ids, *path]
        tokens = self.trie.token[self.trie.children(node)].tolist()
        return [
            Ask(ids, tokens[i : i + MOST_CHILDREN], len(path) if deep and i == 0 else 0, self._salt, node, i)
            for i in range(0, len(tokens), MOST_CHILDREN)
        ]

    # -- learning ------------------------------------------------------------------------------

    def learn(self, ask: Ask, answer: Answer) -> None:
        """Take in an answer to one of this prompt's requests; NotFiniteError where it is none, however often asked."""
        if np.isnan(answer.tokens).any():
            raise NotFiniteError("a log-probability is not a number", where="vLLM", remedy="load it in float32")
        self._of(ask.node)[ask.first : ask.first + len(ask.tokens)] = answer.tokens
        node = ask.node
        for value in reversed(answer.path):
            parent = int(self.trie.parent[node])
            self._of(parent)[np.searchsorted(self.trie.children(parent), node)] = value
            node = parent

    def edges(self) -> NDArray[np.float64]:
        """log p of each node given its parent's path, (n_nodes,), NaN where unknown; 0 at the root."""
        edge = np.full(self.trie.n_nodes, np.nan)
        edge[0] = 0.0
        for node, values in self._children.items():
            edge[self.trie.children(node)] = values
        return edge

    def _of(self, node: int) -> NDArray[np.float64]:
        if node not in self._children:
            self._children[node] = np.full(len(self.trie.children(node)), np.nan)
        return self._children[node]

    def _inner(self) -> list[int]:
        return np.flatnonzero(self.trie.end > np.arange(self.trie.n_nodes) + 1).tolist()
