"""Neighbours: items that stood near each other in training histories, remembered one by one beside what was learnt.

An encoder of a few dimensions generalises, and forgets which rare items were taken together. Item-based neighbours
(Sarwar et al. 2001; Deshpande and Karypis 2004), here with the order and the distance of events counted as sequential
rules do (Ludewig and Jannach 2018, section 3.1), remember just that. Added to the encoder's score,

    r'(u, c) = r(u, c) + weight * sd_c(r(u, c)) * s(u, c) / sd_c(s(u, c))
    s(u, c) = sum of decay ** age * similarity(i, c) over the newest items i of u's history

is more than either alone (trials: eval/results/NOTES.md). Where sd_c(s(u, c)) is below the usual one, the median over
users, that one stands in its place: who has little to go on gets a small bonus. s is nowhere negative, and 0 but for
the neighbours of a few items: so the best k of r' are among the best k of r and those neighbours, and every index finds
them (search.py). ``weight`` is chosen on validation.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import nn

Items = NDArray[np.integer]

# Of a history: how many of the newest items are asked for their neighbours, and how much each weighs of the one after.
_NEWEST, _DECAY = 10, 0.8
# Two events count the less for each other the further they are apart, and nothing beyond the window; a pair says half
# as much of the earlier item as of the later one; and rare pairs count less by what is added to the denominator.
_CLOSENESS, _WINDOW, _BACK, _SHRINKAGE = 0.9, 50, 0.5, 10.0
# Pairs held at once, about.
_PAIRS = 4_000_000
# What is tried on validation, in standard deviations of the encoder's score.
WEIGHTS = (0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)


class Neighbours(nn.Module):
    """The ``size`` most similar items of each of ``n_items``, and the bonus they give; ``dim`` is the encoder's."""

    item: torch.Tensor
    value: torch.Tensor
    weight: torch.Tensor
    spread: torch.Tensor
    usual: torch.Tensor

    def __init__(self, size: int, n_items: int, dim: int) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("item", torch.full((n_items, size), -1, dtype=torch.int32))  # -1: there are no more
        self.register_buffer("value", torch.zeros(n_items, size))
        self.register_buffer("weight", torch.zeros(()))
        self.register_buffer("spread", torch.zeros(dim, dim))  # covariance of the warm items' vectors
        self.register_buffer("usual", torch.zeros(()))  # deviation of s
        self._similar: sparse.csr_array | None = None

    def learn(self, similar: sparse.csr_array, items: torch.Tensor, histories: Sequence[Items]) -> None:
        """Take up similarities (n_items, n_items), at most ``size`` a row, the warm items' vectors (m, dim), and what
        is usual among these histories.
        """
        row = np.repeat(np.arange(similar.shape[0]), np.diff(similar.indptr))
        place = np.arange(similar.nnz) - similar.indptr[row]
        self.item.fill_(-1)
        self.value.zero_()
        self.item[row, place] = torch.from_numpy(similar.indices.astype(np.int32)).to(self.item)
        self.value[row, place] = torch.from_numpy(similar.data.astype(np.float32)).to(self.value)
        centred = items - items.mean(dim=0)
        self.spread.copy_(centred.T @ centred / len(items))
        self._similar = similar
        found = deviations(newest(histories, len(self.item)) @ similar)
        self.usual.fill_(float(np.median(found[found > 0])) if (found > 0).any() else 1.0)

    def similar(self) -> sparse.csr_array:
        """Similarities (n_items, n_items): row i holds the neighbours of i."""
        if self._similar is None:
            item, value = self.item.cpu().numpy(), self.value.cpu().numpy()
            there = item >= 0
            start = np.concatenate([[0], np.cumsum(there.sum(axis=1))])
            self._similar = sparse.csr_array((value[there], item[there], start), shape=(len(item), len(item)))
        return self._similar

    def standardised(self, histories: Sequence[Items]) -> sparse.csr_array:
        """s over its standard deviation among all items, or the usual one, (n, n_items); items added after the fit have
        no neighbours.
        """
        found = (newest(histories, len(self.item)) @ self.similar()).tocsr()
        scale = np.maximum(deviations(found), float(self.usual))
        found.data = (found.data / np.repeat(scale, np.diff(found.indptr))).astype(np.float32)
        return found

    def deviation(self, interest: NDArray[np.float32]) -> NDArray[np.float32]:
        """Of the encoder's scores of the warm items, (n,), for interests (n, dim) or (n, K, dim): then their mean."""
        vectors = torch.from_numpy(interest).to(self.spread)
        found = ((vectors @ self.spread) * vectors).sum(-1).clamp(min=0).sqrt()
        several: NDArray[np.float32] = found.cpu().numpy()
        return several if several.ndim == 1 else several.mean(axis=1)


def newest(histories: Sequence[Items], n_items: int) -> sparse.csr_array:
    """How much each of a history's newest items is asked, (n, n_items) float32; of repeats the newest counts."""
    start, item, value = [0], [], []
    for history in histories:
        last = np.asarray(history[-_NEWEST:])[::-1]
        known, first = np.unique(last, return_index=True)
        kept = known < n_items
        item.append(known[kept])
        value.append(_DECAY ** first[kept])
        start.append(start[-1] + int(kept.sum()))
    values = np.concatenate([*value, np.zeros(0)]).astype(np.float32)
    items = np.concatenate([*item, np.zeros(0)]).astype(np.int32)
    return sparse.csr_array((values, items, np.array(start)), shape=(len(histories), n_items))


def deviations(scores: sparse.csr_array) -> NDArray[np.float64]:
    """The standard deviation of each row, what is not there counted as 0."""
    exact = scores.astype(np.float64)
    mean = exact.sum(axis=1) / scores.shape[1]
    return np.sqrt(np.maximum(exact.multiply(exact).sum(axis=1) / scores.shape[1] - mean**2, 0.0))


def similar_items(sequences: Sequence[Items], n_items: int, size: int) -> sparse.csr_array:
    """The ``size`` most similar items of each, (n_items, n_items), equal ones in index order but for rounding, in no
    order within a row.

    similarity(i, j) = (pairs(i, j) + pairs(j, i) / 2) / (sqrt(n_i n_j) + 10), where pairs(i, j) counts the times that j
    comes d <= 50 events after i, each as .9 ** (d - 1), and n_i the events of i.
    """
    item = np.concatenate([*sequences, np.zeros(0, dtype=np.int32)]).astype(np.int32)
    owner = np.repeat(np.arange(len(sequences), dtype=np.int32), [len(sequence) for sequence in sequences])
    events = np.bincount(item, minlength=n_items)
    by_item, end = np.argsort(item, kind="stable"), np.cumsum(events)
    rows = []
    first, at_once = 0, max(1, _PAIRS // (2 * _WINDOW))
    while first < n_items:  # the items of so many events at once, so that memory doesn't grow with the log
        before = end[first] - events[first]
        last = max(first + 1, int(np.searchsorted(end, before + at_once, side="right")))
        at = by_item[before : end[last - 1]]  # one item may have more of them: then in pieces
        pairs = sparse.csr_array((last - first, n_items), dtype=np.float32)
        for piece in np.split(at, range(at_once, len(at), at_once)):
            pairs = pairs + _pairs(item, owner, piece, first, pairs.shape)
        rows.append(_most_similar(pairs, events, first, size))
        first = last
    return sparse.vstack(rows, format="csr") if rows else sparse.csr_array((0, 0), dtype=np.float32)


def _pairs(item: Items, owner: Items, at: Items, first: int, shape: tuple[int, int]) -> sparse.csr_array:
    """pairs(i, j) + pairs(j, i) / 2 for the items i from ``first`` on, whose events are ``at`` these places."""
    row, column, value = [], [], []
    for apart in range(1, _WINDOW + 1):
        for step, weight in ((apart, 1.0), (-apart, _BACK)):
            here = at[(at + step >= 0) & (at + step < len(item))]
            here = here[(owner[here] == owner[here + step]) & (item[here] != item[here + step])]
            row.append(item[here] - first)
            column.append(item[here + step])
            value.append(np.full(len(here), weight * _CLOSENESS ** (apart - 1), dtype=np.float32))
    found = sparse.coo_array((np.concatenate(value), (np.concatenate(row), np.concatenate(column))), shape=shape)
    return found.tocsr()


def _most_similar(pairs: sparse.csr_array, events: Items, first: int, size: int) -> sparse.csr_array:
    """The ``size`` most similar of each row; row 0 is item ``first``."""
    pairs.sort_indices()
    common = np.sqrt(events)
    start, columns, values = [0], [np.zeros(0, dtype=np.int32)], [np.zeros(0, dtype=np.float32)]
    for i, (a, b) in enumerate(zip(pairs.indptr[:-1].tolist(), pairs.indptr[1:].tolist(), strict=True)):
        column = pairs.indices[a:b]
        value = pairs.data[a:b] / (common[first + i] * common[column] + _SHRINKAGE)
        best = np.argsort(-value, kind="stable")[:size]  # of one row at a time: sorting all of them takes for ever
        columns.append(column[best])
        values.append(value[best].astype(np.float32))
        start.append(start[-1] + len(best))
    return sparse.csr_array((np.concatenate(values), np.concatenate(columns), np.array(start)), shape=pairs.shape)
