"""The catalogue's token sequences as a trie in flat arrays, built without a Python loop over items.

Nodes are numbered in depth-first order with tokens ascending, so a node's subtree is the index
interval [node, end[node]) and the items below it are an interval of ``item_order``. That makes
ancestor tests, pruning by a filter and pieces of a traversal plain comparisons of integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from penchant.errors import DataError, StorageError
from penchant.files import save_array, staged_folder

IntArray = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class CatalogTrie:
    """A trie over token ids; node 0 is the root. Items with equal sequences share a node.

    Arrays over nodes (n_nodes,): ``token`` (root: -1), ``parent`` (root: -1), ``depth`` (root: 0),
    ``end`` (one past the subtree), ``first_item`` and ``last_item`` (interval of ``item_order`` below the node),
    ``n_ending`` (items ending exactly there; they come first in that interval). ``child_start`` (n_nodes + 1,) and
    ``child`` are the children, tokens ascending. ``item_order`` (n_items,) holds item indices in sequence order,
    equal sequences in catalogue order. ``item_node`` (n_items,) is the node at which each item ends, ``alive``
    (n_items,) False for removed items: their nodes stay, and no search names them.
    """

    token: IntArray
    parent: IntArray
    depth: IntArray
    end: IntArray
    first_item: IntArray
    last_item: IntArray
    n_ending: IntArray
    child_start: IntArray
    child: IntArray
    item_order: IntArray
    item_node: IntArray
    alive: NDArray[np.bool_]

    @property
    def n_nodes(self) -> int:
        return len(self.token)

    @property
    def n_items(self) -> int:
        return len(self.item_node)

    @classmethod
    def build(cls, sequences: Sequence[Sequence[int]]) -> CatalogTrie:
        """Build from one token sequence an item; an empty sequence is a DataError."""
        n = len(sequences)
        length = np.fromiter((len(s) for s in sequences), dtype=np.int64, count=n)
        if n == 0 or length.min() == 0:
            what = "no items" if n == 0 else f"item {int(np.argmin(length))} has no tokens"
            raise DataError(what, where="catalogue trie", remedy="give every item a text")
        flat = np.fromiter((t for s in sequences for t in s), dtype=np.int32, count=int(length.sum()))
        width = int(length.max())
        grid = np.full((n, width), -1, dtype=np.int32)
        column = np.arange(width)
        grid[column < length[:, None]] = flat
        # -1 sorts before every token: a sequence comes before its own extensions. lexsort is stable.
        order = np.lexsort(grid.T[::-1])
        grid, length = grid[order], length[order]
        # Depth at which each row leaves the row before it; equal rows leave nowhere and make no node.
        shared = np.zeros(n, dtype=np.int64)
        differs = grid[1:] != grid[:-1]
        shared[1:] = np.where(differs.any(axis=1), differs.argmax(axis=1), width)
        new = (column >= shared[:, None]) & (column < length[:, None])
        row, depth0 = np.nonzero(new)
        n_nodes = len(row) + 1
        # The latest node at each depth, row by row: ids only grow, so a running maximum finds it.
        at = np.zeros((n, width), dtype=np.int32)
        at[new] = np.arange(1, n_nodes, dtype=np.int32)
        np.maximum.accumulate(at, axis=0, out=at)

        token = np.concatenate([[-1], grid[new]]).astype(np.int32)
        depth = np.concatenate([[0], depth0 + 1]).astype(np.int32)
        parent = np.full(n_nodes, -1, dtype=np.int32)
        parent[1:] = np.where(depth0 == 0, 0, at[row, np.maximum(depth0 - 1, 0)])
        size = np.ones(n_nodes, dtype=np.int32)
        by_depth = np.argsort(depth, kind="stable")
        starts = np.searchsorted(depth[by_depth], np.arange(width + 2))
        for d in range(width, 0, -1):
            level = by_depth[starts[d] : starts[d + 1]]
            np.add.at(size, parent[level], size[level])
        end = np.arange(n_nodes, dtype=np.int32) + size
        row_of = np.concatenate([[0], row, [n]]).astype(np.int32)  # of each node, and one past the last
        child = np.argsort(parent, kind="stable")[1:].astype(np.int32)
        child_start = np.concatenate([[0], np.cumsum(np.bincount(parent[1:], minlength=n_nodes))]).astype(np.int32)
        node_of_row = at[np.arange(n), length - 1]
        item_node = np.empty(n, dtype=np.int32)
        item_node[order] = node_of_row
        return cls(
            token=token,
            parent=parent,
            depth=depth,
            end=end,
            first_item=row_of[:-1],
            last_item=row_of[end],
            n_ending=np.bincount(node_of_row, minlength=n_nodes).astype(np.int32),
            child_start=child_start,
            child=child,
            item_order=order.astype(np.int32),
            item_node=item_node,
            alive=np.ones(n, dtype=bool),
        )

    def without(self, items: Sequence[int] | NDArray[np.integer]) -> CatalogTrie:
        """The same trie with these items removed; all other arrays are shared. New items need a rebuild."""
        alive = self.alive.copy()
        alive[np.asarray(items, dtype=np.int64)] = False
        return replace(self, alive=alive)

    @cached_property
    def _edge_keys(self) -> NDArray[np.int64]:
        """(parent, token) of every child as one ascending number, in the order of ``child``."""
        return self.parent[self.child].astype(np.int64) << 32 | self.token[self.child]

    def step(self, nodes: NDArray[np.integer], tokens: NDArray[np.integer]) -> NDArray[np.int64]:
        """Where each token leads from each node, (n,): the child's number, or -1 where the trie has no such path."""
        keys = np.asarray(nodes, dtype=np.int64) << 32 | np.asarray(tokens, dtype=np.int64)
        at = np.minimum(np.searchsorted(self._edge_keys, keys), max(len(self.child) - 1, 0))
        return np.where(self._edge_keys[at] == keys, self.child[at], -1).astype(np.int64)

    def children(self, node: int) -> IntArray:
        """Child nodes of ``node``, tokens ascending."""
        return self.child[self.child_start[node] : self.child_start[node + 1]]

    def children_of(self, nodes: NDArray[np.integer]) -> tuple[NDArray[np.int64], IntArray]:
        """Children of many nodes at once: (position in ``nodes``, child node), each of shape (total,)."""
        nodes = np.asarray(nodes, dtype=np.int64)
        start = self.child_start[nodes].astype(np.int64)
        count = self.child_start[nodes + 1] - start
        position = np.repeat(np.arange(len(nodes)), count)
        within = np.arange(len(position)) - np.repeat(np.cumsum(count) - count, count)
        return position, self.child[start[position] + within]

    def path_sums(self, edge: NDArray[np.float64]) -> NDArray[np.float64]:
        """The sum of ``edge`` (n_nodes,), one value for each node's token, along the path to each node: (n_nodes,)."""
        total = edge.copy()
        for d in range(2, int(self.depth.max()) + 1):
            at = np.flatnonzero(self.depth == d)
            total[at] += total[self.parent[at]]
        return total

    def ending_at(self, node: int) -> IntArray:
        """Items whose sequence ends exactly at ``node``, in catalogue order."""
        first = self.first_item[node]
        return self.item_order[first : first + self.n_ending[node]]

    def sequence(self, item: int) -> list[int]:
        """The token ids of an item."""
        return self.path(int(self.item_node[item]))

    def path(self, node: int) -> list[int]:
        """The token ids from the root to a node."""
        ids = []
        while node > 0:
            ids.append(int(self.token[node]))
            node = int(self.parent[node])
        return ids[::-1]

    def save(self, folder: Path) -> None:
        """Write one .npy file an array, atomically."""
        with staged_folder(Path(folder)) as stage:
            for field in fields(self):
                save_array(stage / f"{field.name}.npy", getattr(self, field.name))

    @classmethod
    def load(cls, folder: Path) -> CatalogTrie:
        """Memory-map a saved trie; a missing or torn file is a StorageError."""
        arrays = {}
        for field in fields(cls):
            path = Path(folder) / f"{field.name}.npy"
            try:
                arrays[field.name] = np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError) as error:
                raise StorageError(
                    f"cannot be read ({error})", where=str(path), remedy="build the trie again"
                ) from error
        return cls(**arrays)
