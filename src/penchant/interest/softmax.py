"""Cross entropy over a whole catalogue, its gradient made in the same pass, a few targets at a time."""

from __future__ import annotations

from typing import Any

import torch

from penchant.engine.device import computes_bfloat16

# Logits held at once: 1M float32 are 4 MB, and their softmax as many; both stay in the processor's cache.
_HELD = 1_000_000


def logits_held(n_items: int) -> int:
    """Logits that stand in memory at once."""
    return max(16, _HELD // n_items) * n_items


class _FullSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any,
        states: torch.Tensor,
        items: torch.Tensor,
        target: torch.Tensor,
        weight: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        summed = torch.zeros((), dtype=torch.float32, device=states.device)
        slope_states, slope_items = torch.empty_like(states), torch.zeros_like(items)
        factor_states, factor_items = states.to(dtype), items.to(dtype)
        rows = logits_held(len(items)) // len(items)
        for a in range(0, len(states), rows):
            part = slice(a, a + rows)
            logits = (factor_states[part] @ factor_items.T).float()
            at = (torch.arange(len(logits), device=logits.device), target[part])
            own, largest = logits[at], logits.amax(dim=1)
            # One fused pass over the logits; its largest value, never below 1 / n_items, gives the normaliser back.
            chance = torch.softmax(logits, dim=1)
            total = largest - chance.amax(dim=1).log()
            summed += ((total - own) * weight[part]).sum()
            # d loss / d logits = weight * (softmax - one at the target)
            chance.mul_(weight[part][:, None])
            chance[at] -= weight[part]
            slope = chance.to(dtype)
            slope_states[part] = slope @ factor_items
            slope_items += slope.T @ factor_states[part]
        context.save_for_backward(slope_states, slope_items)
        return summed

    @staticmethod
    def backward(context: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        slope_states, slope_items = context.saved_tensors
        return grad * slope_states, grad * slope_items, None, None, None


def full_softmax_loss(
    states: torch.Tensor,
    items: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Weighted mean of -log softmax(states @ items.T)[target] in nats, a scalar.

    ``states`` (n, d) and ``items`` (m, d) float32, ``target`` (n,), ``weight`` (n,) or None for ones. The n by m
    logits are never held: each piece gives its loss and its gradient, and goes. ``dtype`` is what the three products
    are taken in, float32 or bfloat16, which is float32 where the device would only emulate it; sums, exponentials and
    the loss are float32 in any case.
    """
    if dtype == torch.bfloat16 and not computes_bfloat16(states.device):
        dtype = torch.float32
    weight = torch.ones(len(states), dtype=states.dtype, device=states.device) if weight is None else weight
    apply: Any = _FullSoftmax.apply
    return apply(states, items, target, weight / weight.sum(), dtype)
