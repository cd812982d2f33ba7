"""From the events of a history to what the user is inclined to after each of them: three ways, all causal.

Rows are right-padded and no position looks ahead, so padding is never seen.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from penchant.interest.config import EncoderConfig


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.rate = heads, dropout
        self.norm_in, self.norm_mid = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * dim, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, length, dim = x.shape
        q, k, v = self.qkv(self.norm_in(x)).view(n, length, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, dropout_p=self.rate if self.training else 0.0
        )
        x = x + self.dropout(self.out(attended.transpose(1, 2).reshape(n, length, dim)))
        return x + self.dropout(self.mlp(self.norm_mid(x)))


class Transformer(nn.Module):
    """Causal self-attention over positions (SASRec, Kang and McAuley 2018, section 3): (n, L, dim) to the same."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.positions = nn.Embedding(config.max_length, config.dim)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.blocks = nn.ModuleList(_Block(config.dim, config.heads, config.dropout) for _ in range(config.blocks))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.dropout(x + self.positions(torch.arange(x.shape[1], device=x.device)))
        for block in self.blocks:
            x = block(x)
        return x


class GRU(nn.Module):
    """A recurrent network (GRU4Rec, Hidasi et al. 2016, section 3): (n, L, dim) to the same."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        between = config.dropout if config.blocks > 1 else 0.0
        self.cells = nn.GRU(config.dim, config.dim, num_layers=config.blocks, batch_first=True, dropout=between)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = self.cells(self.dropout(x))[0]
        return states


class RecencyMean(nn.Module):
    """The mean of the events so far, each weighing ``decay`` times the next: (n, L, dim) to the same.

    The decay, between 0 (the newest alone) and 1 (all alike), is the only thing learnt; it begins at .8.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.logit(torch.tensor(0.8)))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        at = torch.arange(x.shape[1], device=x.device)
        age = at[:, None] - at[None, :]
        weight = torch.exp(F.logsigmoid(self.logit) * age.clamp(min=0)) * (age >= 0)
        return (weight / weight.sum(dim=1, keepdim=True)) @ self.dropout(x)


class Interests(nn.Module):
    """One state to K interests: (n, L, dim) to (n, L, K, dim).

    Each interest attends to the states so far with a query of its own, and sees the newest state through a map of its
    own (the self-attentive extraction of ComiRec, Cen et al. 2020, section 3.2, at every position and causal).
    """

    def __init__(self, dim: int, interests: int) -> None:
        super().__init__()
        self.key = nn.Linear(dim, dim)
        self.queries = nn.Linear(dim, interests, bias=False)
        self.own = nn.Linear(dim, interests * dim)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        n, length, dim = states.shape
        # Bounded, so that the sums stay exact: the newest may weigh e**20 times the oldest.
        weight = torch.exp(self.queries(torch.tanh(self.key(states))).clamp(-10, 10))
        summed = torch.cumsum(weight[..., None] * states[:, :, None, :], dim=1)
        pooled = summed / torch.cumsum(weight, dim=1)[..., None]
        return pooled + self.own(states).view(n, length, -1, dim)


SEQUENCES: dict[str, type[Transformer] | type[GRU] | type[RecencyMean]] = {
    "transformer": Transformer,
    "gru": GRU,
    "mean": RecencyMean,
}
