"""What the encoder is taught: the next item among all or some, clicks, or ratings.

Full-softmax cross entropy, not sampled negatives with BCE, is what makes SASRec strong (Klenitskiy and Vasilev 2023,
"Turning Dross Into Gold Loss"; Petrov and Macdonald 2023); where the catalogue is too large for it, the sampled softmax
below estimates the same loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from penchant.errors import ConfigError, DataError
from penchant.interest.config import EncoderConfig
from penchant.interest.encoder import InterestEncoder
from penchant.interest.softmax import full_softmax_loss

# States of a step that hard negatives are looked up for: the search is over all items.
_SEARCHED = 64


@dataclass(frozen=True, eq=False)
class Targets:
    """What a step learns: T states (T, dim) or (T, K, dim), the item (T,) that followed each, how much each counts
    (T,), and the values (T,) to be predicted, NaN where unknown, or None.
    """

    states: torch.Tensor
    item: torch.Tensor
    weight: torch.Tensor
    value: torch.Tensor | None = None


class Objective:
    """The loss of a model, for training events whose items were taken ``counts`` (n_items,) times."""

    def __init__(self, model: InterestEncoder, counts: NDArray[np.integer]) -> None:
        config, device = model.config, model.warm.device
        self.model, self.config, self.kind = model, config, config.loss_for(len(counts))
        self.dtype = getattr(torch, config.softmax_dtype)
        warm = np.flatnonzero(counts > 0) if model.project is not None else np.arange(len(counts))
        # Items without an event are no competitors: what text says of them must not be pushed down. IDs alone say
        # nothing of them, and pushing down is all there is.
        self.warm = torch.from_numpy(warm).to(device)
        self.place = torch.zeros(len(counts), dtype=torch.long, device=device)
        self.place[self.warm] = torch.arange(len(warm), device=device)
        # How likely each of these is drawn in one draw.
        weight = np.maximum(counts[warm], 1).astype(np.float64)
        share = np.full(len(warm), 1 / len(warm)) if config.sampling == "uniform" else weight / weight.sum()
        self.share = torch.from_numpy(share).float().to(device)

    def loss(self, items: torch.Tensor, targets: Targets) -> torch.Tensor:
        """Weighted sum over the targets divided by their number, in nats (mse: squared units of the value).

        Not by the sum of the step's weights: a step without a rare item would count its popular ones for more.
        ``items`` are E_c of all items.
        """
        fit, weight = self.model.relevance, targets.weight / len(targets.weight)
        states = fit.users(targets.states)
        own = fit.items(items[targets.item])
        states = fit.nearest(states, own)
        if self.config.value_column is not None:
            return self._values(fit.each(states, own), targets)
        if self.kind == "softmax":
            place = self.place[targets.item]
            mean = full_softmax_loss(states, fit.items(items[self.warm]), place, targets.weight, dtype=self.dtype)
            return mean * weight.sum()
        negatives, log_expected = self._drawn(targets.item)
        if self.kind == "bce":
            wrong = fit.all(states, fit.items(items[negatives]))
            clash = negatives[None] == targets.item[:, None]
            kept = (~clash).sum(dim=1).clamp(min=1)
            against = F.softplus(wrong).masked_fill(clash, 0.0).sum(dim=1) / kept
            return ((F.softplus(-fit.each(states, own)) + against) * weight).sum()
        hard = self._hard(states, items)
        return (self._sampled(states, own, targets.item, items, negatives, log_expected, hard) * weight).sum()

    def _values(self, predicted: torch.Tensor, targets: Targets) -> torch.Tensor:
        if targets.value is None:
            raise DataError("the histories hold no values to learn", where="interest encoder", remedy="give the column")
        known = ~torch.isnan(targets.value)
        weight = torch.where(known, targets.weight, torch.zeros_like(targets.weight))
        value = torch.where(known, targets.value, torch.zeros_like(targets.value))
        if self.kind == "mse":
            each = (predicted - value) ** 2
        else:
            each = F.binary_cross_entropy_with_logits(predicted, value, reduction="none")
        # A step in which nothing is known teaches nothing.
        return (each * weight).sum() / known.sum().clamp(min=1)

    def _drawn(self, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Items (n,) that stand for all others, and the log of how often each was to be expected among them."""
        if self.config.sampling == "in_batch":
            n, drawn = len(target), self.place[target]
        else:
            n = self.config.negatives
            drawn = torch.multinomial(self.share, n, replacement=True)
        return self.warm[drawn], torch.log(n * self.share[drawn])

    def _sampled(
        self,
        states: torch.Tensor,
        own: torch.Tensor,
        target: torch.Tensor,
        items: torch.Tensor,
        negatives: torch.Tensor,
        log_expected: torch.Tensor,
        hard: torch.Tensor,
    ) -> torch.Tensor:
        """-log softmax, its sum over the catalogue estimated without bias, a value a target.

        The sum is the target's own term, the hard negatives' terms, and of the drawn ones each divided by how often it
        was to be expected; drawn items that are the target or hard are counted there already (the logQ correction, put
        right for the target as in Khrylchenko et al. 2025, "Correcting the LogQ Correction").
        """
        fit = self.model.relevance
        right = fit.each(states, own)[:, None]
        logits = fit.all(states, fit.items(items[negatives])) - log_expected
        twice = torch.isin(negatives, hard)[None] | (negatives[None] == target[:, None])
        parts = [right, logits.masked_fill(twice, -torch.inf)]
        if len(hard):
            known = fit.all(states, fit.items(items[hard]))
            parts.append(known.masked_fill(hard[None] == target[:, None], -torch.inf))
        return torch.logsumexp(torch.cat(parts, dim=1), dim=1) - right[:, 0]

    @torch.no_grad()
    def _hard(self, states: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """The items (h,) that now score best for some of the states: a search of the whole catalogue."""
        n = self.config.hard_negatives
        if n == 0:
            return self.warm[:0]
        some = states[torch.randperm(len(states), device=states.device)[:_SEARCHED]]
        fit = self.model.relevance
        scores = fit.all(some, fit.items(items[self.warm]))
        best = scores.topk(min(len(self.warm), max(1, n // len(some)) + 1), dim=1).indices
        found = torch.unique(best)  # in the catalogue's order, of which no part must be preferred
        return self.warm[found[torch.randperm(len(found), device=found.device)[:n]]]


def target_weights(
    config: EncoderConfig, lengths: Sequence[int], counts: NDArray[np.integer]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """How much a target counts by its user (one value a history of that many events) and by its item (n_items,).

    Busy users and popular items are most of a log; with an exponent of 1 every user, or every item, has the same say.
    """
    user = np.maximum(np.asarray(lengths, dtype=np.float64), 1.0) ** -config.user_weight
    item = np.maximum(counts, 1).astype(np.float64) ** -config.item_weight
    return user.astype(np.float32), item.astype(np.float32)


def check_values(config: EncoderConfig, values: NDArray[np.floating]) -> None:
    """Refuse values that the loss cannot learn: none at all, or for bce others than 0 and 1."""
    known = values[~np.isnan(values)]
    if not len(known):
        raise DataError(
            f"no event has a value in the column {config.value_column!r}",
            where="interest encoder",
            remedy="map the column when reading the data, or use another loss",
        )
    if config.loss == "bce" and not np.isin(known, (0.0, 1.0)).all():
        raise ConfigError(
            f"the column {config.value_column!r} holds {known[~np.isin(known, (0.0, 1.0))][0]:g}",
            where="loss bce",
            remedy="give a column of 0 and 1, or use loss mse",
        )
