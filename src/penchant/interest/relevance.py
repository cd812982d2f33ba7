"""R: how well an interest and an item fit, r(u, c). Dot product, cosine, or a small network on both."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from penchant.interest.config import EncoderConfig

# Hidden values of the network held at once: 8M float32 are 32 MB.
_HELD = 8_000_000
# 1 / temperature that a cosine begins with, and the most it may become (CLIP, Radford et al. 2021, section 2.5).
_FIRST, _LARGEST = 14.0, 100.0


class Relevance(nn.Module):
    """r(u, c) = u.c (dot); cos(u, c) / temperature, learnt (cosine); u.c + v.relu(A u + B c) (mlp).

    What ``users`` and ``items`` give is compared by dot product; the network of mlp comes on top of that.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.kind = config.relevance
        if self.kind == "cosine":
            self.log_scale = nn.Parameter(torch.tensor(math.log(_FIRST)))
        if self.kind == "mlp":
            self.of_user = nn.Linear(config.dim, config.hidden)
            self.of_item = nn.Linear(config.dim, config.hidden, bias=False)
            self.out = nn.Linear(config.hidden, 1, bias=False)
        if config.loss == "mse":
            self.level = nn.Parameter(torch.zeros(()))  # ratings lie around a mean, which the training sets first

    def users(self, states: torch.Tensor) -> torch.Tensor:
        """States (..., dim) as they are compared."""
        if self.kind == "cosine":
            return F.normalize(states, dim=-1) * self.log_scale.clamp(max=math.log(_LARGEST)).exp()
        return states

    def items(self, items: torch.Tensor) -> torch.Tensor:
        """Item representations (..., dim) as they are compared."""
        return F.normalize(items, dim=-1) if self.kind == "cosine" else items

    def each(self, users: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """r of row i with row i: (n, dim) and (n, dim) to (n,)."""
        found = (users * items).sum(-1)
        if self.kind == "mlp":
            found = found + self.out(F.relu(self.of_user(users) + self.of_item(items)))[..., 0]
        return found + self.level if hasattr(self, "level") else found

    def all(self, users: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """r of every pair: (n, dim) and (m, dim) to (n, m)."""
        found = users @ items.T
        if self.kind == "mlp":
            left, right = self.of_user(users), self.of_item(items)
            rows = max(1, _HELD // max(1, right.numel()))
            parts = [
                self.out(F.relu(left[a : a + rows, None] + right[None]))[..., 0] for a in range(0, len(left), rows)
            ]
            found = found + torch.cat(parts)
        return found + self.level if hasattr(self, "level") else found

    def pairs(self, users: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """The same for users with several interests, (n, K, dim): the best of them counts."""
        if users.dim() == 2:
            return self.all(users, items)
        return torch.stack([self.all(users[:, k], items) for k in range(users.shape[1])]).max(dim=0).values

    def nearest(self, users: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """Of K interests (n, K, dim) the one that fits each row's item (n, dim) best: (n, dim).

        What training goes by (ComiRec, Cen et al. 2020, section 3.3): each target teaches one interest.
        """
        if users.dim() == 2:
            return users
        fit = torch.stack([self.each(users[:, k], items) for k in range(users.shape[1])], dim=1)
        return users[torch.arange(len(users), device=users.device), fit.argmax(dim=1)]
