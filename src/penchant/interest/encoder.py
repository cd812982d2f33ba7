"""The interest encoder: a history's item vectors in, one interest vector out.

A causal transformer over item representations (SASRec, Kang and McAuley 2018, section 3), where an
item is its LLM text vector through a trained projection, plus an ID embedding. With IDs alone it is
SASRec; the interest vector's dot product with an item's representation is that item's score.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from penchant.errors import StorageError


class EncoderConfig(BaseModel):
    """Shape and training of the encoder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dim: int = Field(default=64, ge=4, description="size of item and interest vectors")
    blocks: int = Field(default=2, ge=1, description="transformer blocks")
    heads: int = Field(default=2, ge=1, description="attention heads; must divide dim")
    dropout: float = Field(default=0.3, ge=0, lt=1, description="after embeddings, attention and feed-forward")
    max_length: int = Field(default=100, ge=1, description="newest events of a history that are read")
    use_text: bool = Field(default=True, description="item vectors from the LLM")
    use_ids: bool = Field(default=True, description="an ID embedding for each item")
    epochs: int = Field(default=40, ge=1, description="most epochs; training stops earlier by patience")
    patience: int = Field(default=6, ge=1, description="epochs without a better validation NDCG@10 before it stops")
    batch_rows: int | None = Field(
        default=None, ge=1, description="histories in a training step; None: as many as hold about 2,000 events"
    )
    learning_rate: float = Field(default=2e-3, gt=0, description="AdamW's peak, after warm-up, before cosine decay")
    weight_decay: float = Field(default=0.01, ge=0, description="AdamW")
    softmax_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="of the products over the catalogue in training (bfloat16: faster on new CPUs)"
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="of initial weights, dropout and the order of batches")


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
        # Right padding: a causal mask alone keeps real positions from seeing it.
        attended = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, dropout_p=self.rate if self.training else 0.0
        )
        x = x + self.dropout(self.out(attended.transpose(1, 2).reshape(n, length, dim)))
        return x + self.dropout(self.mlp(self.norm_mid(x)))


class InterestEncoder(nn.Module):
    """E_u and E_c of one model. ``text`` (n_items, d_text) are standardised LLM vectors, or None without text."""

    text: torch.Tensor | None

    def __init__(self, config: EncoderConfig, n_items: int, text: NDArray[np.float32] | None) -> None:
        super().__init__()
        self.config = config
        self.n_items = n_items
        # Not a parameter and not saved with the weights: the run keeps the vectors themselves.
        self.register_buffer("text", None if text is None else torch.from_numpy(text), persistent=False)
        dim = config.dim
        self.ids = nn.Embedding(n_items, dim) if config.use_ids else None
        self.project = (
            nn.Sequential(nn.Linear(text.shape[1], 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
            if text is not None and config.use_text
            else None
        )
        self.positions = nn.Embedding(config.max_length, dim)
        self.blocks = nn.ModuleList(_Block(dim, config.heads, config.dropout) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(config.dropout)
        for embedding in (self.ids, self.positions):
            if embedding is not None:
                nn.init.normal_(embedding.weight, std=0.02)

    def items(self) -> torch.Tensor:
        """E_c: the representation of every item, (n_items, dim)."""
        parts: list[torch.Tensor] = []
        if self.project is not None:
            parts.append(self.project(self.text))
        if self.ids is not None:
            parts.append(self.ids.weight)
        return torch.stack(parts).sum(0)

    def forward(self, history: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """Interest after each event: item indices (n, length), right-padded, to (n, length, dim)."""
        position = torch.arange(history.shape[1], device=history.device)
        # Scaled as in SASRec: unscaled, positions drown the items for the first epochs of a sparse log.
        x = self.dropout(items[history] * math.sqrt(self.config.dim) + self.positions(position))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def save(self, path: Path) -> None:
        """Write the trained weights as safetensors; the text vectors are the run's to keep."""
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, path)

    @classmethod
    def load(cls, path: Path, config: EncoderConfig, n_items: int, text: NDArray[np.float32] | None) -> InterestEncoder:
        """Read weights written by ``save`` into an encoder of the same shape; StorageError where they don't fit."""
        with torch.random.fork_rng(devices=[]):  # its first weights are thrown away; the caller's randomness is not
            encoder = cls(config, n_items, text)
        try:
            encoder.load_state_dict(load_file(path))
        except (OSError, RuntimeError, SafetensorError) as error:
            raise StorageError(
                f"cannot be read as this encoder: {error}", where=str(path), remedy="make the run again"
            ) from error
        return encoder.eval()

    @torch.inference_mode()
    def item_matrix(self) -> NDArray[np.float32]:
        """E_c as numpy, (n_items, dim) float32, for an index."""
        self.eval()
        return self.items().float().cpu().numpy()

    @torch.inference_mode()
    def encode(self, histories: Sequence[NDArray[np.integer]], batch: int = 256) -> NDArray[np.float32]:
        """E_u: one interest vector a history (item indices, oldest first, not empty): (n, dim) float32."""
        self.eval()
        out = np.zeros((len(histories), self.config.dim), dtype=np.float32)
        if not len(histories):
            return out
        items = self.items()
        recent = [h[-self.config.max_length :] for h in histories]
        order = sorted(range(len(recent)), key=lambda i: len(recent[i]))
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            ids, length = pad([recent[i] for i in rows])
            states = self(ids.to(items.device), items)
            out[rows] = states[torch.arange(len(rows)), length - 1].float().cpu().numpy()
        return out


def pad(rows: Sequence[NDArray[np.integer]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of item indices, right-padded with 0: (n, longest) and their lengths (n,)."""
    length = torch.tensor([len(r) for r in rows])
    ids = torch.zeros((len(rows), int(length.max())), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.from_numpy(np.array(row, dtype=np.int64))
    return ids, length
