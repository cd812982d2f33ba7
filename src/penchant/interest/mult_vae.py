"""Mult-VAE: a variational autoencoder with a multinomial likelihood (Liang et al. 2018, sections 2 and 3).

A user is the bag of items they had. Two tanh layers encode it to a Gaussian code, two decode the code to
logits over the catalogue. The KL term is annealed from 0 and stops at ``beta`` below 1 ("partially
regularised", section 2.2.2).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from torch.nn import functional as F

from penchant.errors import DataError, ModelError


class MultVAEConfig(BaseModel):
    """Shape and training of the autoencoder; the defaults are the paper's where it names one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    hidden: int = Field(default=600, ge=1, description="width of the hidden layers")
    latent: int = Field(default=200, ge=1, description="size of the code")
    dropout: float = Field(default=0.5, ge=0, lt=1, description="share of a user's items hidden from the encoder")
    beta: float = Field(default=0.2, ge=0, le=1, description="weight of the KL term after annealing")
    anneal: float = Field(default=0.5, ge=0, le=1, description="share of the planned steps until beta is reached")
    epochs: int = Field(default=100, ge=1, description="most epochs; training stops earlier by patience")
    patience: int = Field(default=15, ge=1, description="epochs without a better validation score before it stops")
    batch_users: int = Field(default=128, ge=1, description="users in a training step")
    learning_rate: float = Field(default=1e-3, gt=0, description="Adam")
    weight_decay: float = Field(default=0.0, ge=0, description="L2 on all weights, Adam")
    seed: int = Field(default=0, ge=0, lt=2**63, description="of weights, dropout, codes and the order of users")


class MultVAE(nn.Module):
    """Bags of items to logits over ``n_items``."""

    def __init__(self, config: MultVAEConfig, n_items: int) -> None:
        super().__init__()
        self.config, self.n_items = config, n_items
        # The first layer's input is nearly all zeros, so its weights are looked up, not multiplied.
        self.first = nn.Parameter(torch.empty(n_items, config.hidden))
        self.first_bias = nn.Parameter(torch.zeros(config.hidden))
        self.code = nn.Linear(config.hidden, 2 * config.latent)
        self.decoder = nn.Sequential(
            nn.Linear(config.latent, config.hidden), nn.Tanh(), nn.Linear(config.hidden, n_items)
        )
        nn.init.xavier_uniform_(self.first)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def encode(self, bags: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log variance of each bag's code, both (n, latent). A bag holds distinct item indices."""
        length = torch.tensor([len(b) for b in bags])
        start = torch.cumsum(length, 0) - length
        # The bag's vector has length 1; then items are dropped and the rest scaled up, as dropout does.
        value = torch.rsqrt(length.clamp(min=1).float()).repeat_interleave(length)
        value = F.dropout(value, self.config.dropout, self.training)
        summed = F.embedding_bag(torch.cat(list(bags)), self.first, start, mode="sum", per_sample_weights=value)
        mean, log_variance = self.code(torch.tanh(summed + self.first_bias)).chunk(2, dim=1)
        return mean, log_variance

    def forward(self, bags: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (n, n_items) from a sampled code (its mean outside training), and the KL term (n,) in nats."""
        mean, log_variance = self.encode(bags)
        kl = 0.5 * (log_variance.exp() + mean**2 - 1 - log_variance).sum(1)
        code = mean + torch.randn_like(mean) * (0.5 * log_variance).exp() if self.training else mean
        return self.decoder(code), kl

    @torch.inference_mode()
    def logits(self, histories: Sequence[NDArray[np.integer]], batch: int = 512) -> NDArray[np.float32]:
        """Logits over the catalogue for each history (item indices), (n, n_items) float32."""
        self.eval()
        out = np.empty((len(histories), self.n_items), dtype=np.float32)
        for start in range(0, len(histories), batch):
            bags = [_bag(h) for h in histories[start : start + batch]]
            out[start : start + batch] = self(bags)[0].numpy()
        return out


def train_mult_vae(
    histories: Sequence[NDArray[np.integer]],
    n_items: int,
    config: MultVAEConfig,
    validate: Callable[[MultVAE], float],
    *,
    max_seconds: float = math.inf,
) -> tuple[MultVAE, list[dict[str, float]]]:
    """Train on users' training items (item indices, not empty); keep the best epoch by ``validate``.

    Returns the model and one record an epoch (loss in nats a user, valid score, seconds). The same inputs, seed and
    thread count give the same model, unless ``max_seconds`` cuts training short.
    """
    bags = [_bag(h) for h in histories if len(h)]
    if not bags:
        raise DataError("no user has a training event", where="Mult-VAE", remedy="give longer histories")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return _train(bags, n_items, config, validate, max_seconds)


def _train(
    bags: list[torch.Tensor],
    n_items: int,
    config: MultVAEConfig,
    validate: Callable[[MultVAE], float],
    max_seconds: float,
) -> tuple[MultVAE, list[dict[str, float]]]:
    model = MultVAE(config, n_items)
    optimiser = torch.optim.Adam(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    rng = np.random.default_rng(config.seed)
    steps = config.epochs * math.ceil(len(bags) / config.batch_users)
    log: list[dict[str, float]] = []
    best, best_epoch, kept, step = -math.inf, 0, {}, 0
    begun = time.perf_counter()
    for epoch in range(1, config.epochs + 1):
        model.train()
        summed = 0.0
        order = rng.permutation(len(bags))
        for start in range(0, len(bags), config.batch_users):
            batch = [bags[i] for i in order[start : start + config.batch_users]]
            step += 1
            loss = _loss(model, batch, kl_weight(step, steps, config))
            if not torch.isfinite(loss):
                raise ModelError(
                    f"the loss is {float(loss.detach())} in epoch {epoch}",
                    where="Mult-VAE",
                    remedy="lower learning_rate",
                )
            optimiser.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimiser.step()
            summed += float(loss.detach()) * len(batch)
        score = validate(model)
        seconds = time.perf_counter() - begun
        log.append({"epoch": epoch, "loss": summed / len(bags), "valid": score, "seconds": round(seconds, 2)})
        if score > best:
            best, best_epoch = score, epoch
            kept = {name: value.detach().clone() for name, value in model.state_dict().items()}
        if epoch - best_epoch >= config.patience or seconds > max_seconds:
            break
    model.load_state_dict(kept)
    return model.eval(), log


def kl_weight(step: int, steps: int, config: MultVAEConfig) -> float:
    """Weight of the KL term in step 1, 2, ... of the planned steps: a straight line up to beta, and beta from there."""
    annealing = config.anneal * steps
    return config.beta * min(1.0, step / annealing) if annealing else config.beta


def _loss(model: MultVAE, bags: list[torch.Tensor], beta: float) -> torch.Tensor:
    """Mean over users of -sum over their items of log softmax, plus beta times the KL term."""
    logits, kl = model(bags)
    length = torch.tensor([len(b) for b in bags])
    row = torch.arange(len(bags)).repeat_interleave(length)
    taken = F.log_softmax(logits, dim=1)[row, torch.cat(bags)]
    return (beta * kl.sum() - taken.sum()) / len(bags)


def _bag(history: NDArray[np.integer]) -> torch.Tensor:
    return torch.from_numpy(np.unique(history).astype(np.int64))
