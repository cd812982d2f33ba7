"""Text match: how like the texts of a user's newest items an item's text is, fused into R once the encoder is trained.

A trained projection knows the texts it was trained on; it orders others hardly better than chance. The LLM's own
vectors, made comparable and compared as they are, know no item better than another: they find items that nobody has
taken yet, and lift the others too (trials: eval/results/NOTES.md). Both are dot products, so their sum is one, over
vectors side by side, and every index searches it:

    r'(u, c) = standardised r(u, c) + weight * standardised cos(m, x),    standardised r = shift where c is cold

m is the recency-weighted sum of the newest items' text vectors x. ``weight`` and ``shift`` are chosen on validation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from penchant import metrics

# How many of the newest items are compared with, and how much each weighs of the one after it.
_NEWEST, _DECAY = 10, 0.85
# Directions of less than this share of the mean variance are noise: whitening would blow them up.
_LEAST = 1e-3
# What is tried on validation, in standard deviations of the other score.
WEIGHTS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 1.0)
SHIFTS = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0)
# Where no item is cold validation says nothing of the shift, and items that are added later stand half the way up: the
# best of warm items have 3 or so.
_UNTOLD = 1.5


class TextMatch(nn.Module):
    """What comes beside interests (n, dim) and items (n, dim): ``extra`` dimensions, once ``weight`` is above 0.

    ``size`` is D, the directions of most variance of the standardised text vectors (n_items, d_text) that are
    compared, whitened (Su et al. 2021, "Whitening Sentence Representations").
    """

    map: torch.Tensor
    weight: torch.Tensor
    shift: torch.Tensor
    centre: torch.Tensor
    spread: torch.Tensor
    likeness: torch.Tensor

    def __init__(self, size: int, dim: int, d_text: int) -> None:
        super().__init__()
        size = min(size, d_text)
        self.extra = size + 2
        self.register_buffer("map", torch.zeros(d_text, size))
        self.register_buffer("weight", torch.zeros(()))
        self.register_buffer("shift", torch.zeros(()))
        self.register_buffer("centre", torch.zeros(dim))  # mean and ...
        self.register_buffer("spread", torch.zeros(dim, dim))  # ... covariance of the warm items' vectors
        self.register_buffer("likeness", torch.zeros(size, size))  # second moments of the items' text vectors

    def learn(self, text: torch.Tensor, items: torch.Tensor) -> None:
        """What is standardised by: all items' ``text`` (n, d_text), and the warm items' vectors (m, dim)."""
        variance, axes = torch.linalg.eigh((text.T @ text).double() / len(text))
        best = variance.argsort(descending=True)[: self.map.shape[1]]
        # What these items do not vary in must not decide what is like an item added later.
        told = variance[best] > _LEAST * variance.mean()
        self.map.copy_(axes[:, best] * torch.where(told, variance[best].clamp(min=1e-12).rsqrt(), 0.0))
        unit = self.texts(text)
        self.likeness.copy_(unit.T @ unit / len(unit))
        self.centre.copy_(items.mean(dim=0))
        centred = items - self.centre
        self.spread.copy_(centred.T @ centred / len(items))

    def texts(self, text: torch.Tensor) -> torch.Tensor:
        """x: text vectors (n, d_text) as they are compared, (n, D) of unit length; no text, no likeness."""
        return F.normalize(text @ self.map, dim=-1, eps=1e-6)

    def newest(self, histories: Sequence[NDArray[np.int32]], texts: torch.Tensor) -> torch.Tensor:
        """m over its standard deviation among the items, (n, D)."""
        item = np.zeros((len(histories), _NEWEST), dtype=np.int64)
        weight = np.zeros(item.shape, dtype=np.float32)
        for row, history in enumerate(histories):
            n = min(len(history), _NEWEST)
            item[row, :n] = history[len(history) - n :]
            weight[row, :n] = _DECAY ** np.arange(n)[::-1]
        found = torch.einsum("nl,nld->nd", torch.from_numpy(weight).to(texts), texts[torch.from_numpy(item)])
        return found / _deviation(found, self.likeness)

    def standardised(self, interest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Interests (..., dim) whose products with the warm items have deviation 1, and what their mean then is."""
        scale = _deviation(interest, self.spread)
        return interest / scale, (interest @ self.centre)[..., None] / scale

    def users(self, interest: torch.Tensor, newest: torch.Tensor) -> torch.Tensor:
        """Interests (n, dim) or (n, K, dim), and ``newest`` (n, D), side by side."""
        scaled, mean = self.standardised(interest)
        beside = newest if interest.dim() == 2 else newest[:, None].expand(-1, interest.shape[1], -1)
        return torch.cat([scaled, -mean, torch.ones_like(mean), self.weight * beside], dim=-1)

    def items(self, items: torch.Tensor, warm: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        """Item vectors (n, dim), of which training knows those ``warm`` (n,), and texts (n, D) side by side."""
        known = warm[:, None].to(items)
        return torch.cat([items * known, known, self.shift * (1 - known), texts], dim=-1)


def _deviation(vectors: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
    """Of the products of vectors (..., d) with what has these second moments, (..., 1); 1 where there is none."""
    found = ((vectors @ moments) * vectors).sum(-1, keepdim=True).clamp(min=0).sqrt()
    return torch.where(found > 1e-6, found, 1.0)


@dataclass(frozen=True)
class Chosen:
    """A weight and a shift, and the NDCG@10 of all validation targets and of the cold ones (None: there are none)."""

    weight: float
    shift: float
    all: float
    cold: float | None


class Trials:
    """Every weight and shift on validation targets: the target's rank for each pair, queries taken up in blocks."""

    def __init__(self, cold: NDArray[np.bool_]) -> None:
        """``cold`` (n_items,): items without a training event."""
        self._cold = cold
        shifts = SHIFTS if cold.any() else (_UNTOLD,)
        self._pairs = [(0.0, 0.0), *((weight, shift) for weight in WEIGHTS for shift in shifts)]
        self._ranks: list[NDArray[np.int64]] = []  # (pairs, n) of each block
        self._targets: list[NDArray[np.integer]] = []

    def add(
        self,
        plain: NDArray[np.float32],
        own: NDArray[np.float32],
        match: NDArray[np.float32],
        target: NDArray[np.integer],
    ) -> None:
        """The encoder's scores as they are, standardised, and those of the match, (n, n_items); ``plain`` are -inf
        where an item may not come.
        """
        at, may = np.arange(len(target)), np.isfinite(plain)
        ranks = np.zeros((len(self._pairs), len(target)), dtype=np.int64)
        for place, (weight, shift) in enumerate(self._pairs):
            scores = plain
            if weight:  # without it the encoder is left as it is, cold items included
                scores = np.where(self._cold, np.float32(shift), own) + np.float32(weight) * match
                scores[~may] = -np.inf
            mine = scores[at, target]
            # Ties count against us; a target that may not come is found nowhere.
            ranks[place] = np.where(may[at, target], (scores >= mine[:, None]).sum(axis=1), own.shape[1] + 10)
        self._ranks.append(ranks)
        self._targets.append(target)

    def found(self, n: int) -> list[Chosen]:
        """What every pair finds of n targets (those never added count 0)."""
        cold = self._cold[np.concatenate(self._targets)]
        found = []
        for (weight, shift), rank in zip(self._pairs, np.concatenate(self._ranks, axis=1), strict=True):
            gain = metrics.ndcg(rank, 10)
            found.append(Chosen(weight, shift, float(gain.sum() / n), float(gain[cold].mean()) if cold.any() else None))
        return found

    def best(self, n: int, price: float) -> Chosen:
        """The pair with the largest NDCG@10 of n targets; where ``price`` is given, of the pairs that fall short of it
        by no more than this share the one that finds most cold targets, and of equals there the best.
        """
        found = self.found(n)
        best = max(found, key=lambda one: one.all)
        within = [one for one in found if one.all >= (1 - price) * best.all]
        return max(within, key=lambda one: (one.cold or 0.0, one.all)) if price else best
