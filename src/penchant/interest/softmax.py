"""Cross entropy over a whole catalogue, its gradient made in the same pass, a few targets at a time."""

from __future__ import annotations

from typing import Any

import torch

from penchant.engine.device import computes_bfloat16

# Logits held at once, 4 MB of float32, which stay in the processor's cache; but never fewer rows than make it worth
# while for a product to read the catalogue.
_HELD = 1_000_000
_LEAST_ROWS = 128


def logits_held(n_items: int) -> int:
    """Logits that stand in memory at once."""
    return max(_LEAST_ROWS, _HELD // n_items) * n_items


def _product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """``a @ b`` in their dtype, written into ``out``."""
    return torch.mm(a, b, out=out) if a.dtype == out.dtype else out.copy_(a @ b)


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
        # One room for every piece, changed in place: so much memory is slow to take anew.
        held = states.new_empty(min(rows, len(states)), len(items))
        for a in range(0, len(states), rows):
            part = slice(a, a + rows)
            logits = _product(factor_states[part], factor_items.T, held[: len(states[part])])
            at = (torch.arange(len(logits), device=logits.device), target[part])
            own, largest = logits[at], logits.amax(dim=1)
            risen = logits.sub_(largest[:, None]).exp_()
            total = risen.sum(dim=1)
            summed += ((largest + total.log() - own) * weight[part]).sum()
            # d loss / d logits = weight * (softmax - one at the target)
            slope = risen.mul_((weight[part] / total)[:, None])
            slope[at] -= weight[part]
            slope = slope.to(dtype)
            _product(slope, factor_items, slope_states[part])
            if slope.dtype == slope_items.dtype:
                slope_items.addmm_(slope.T, factor_states[part])
            else:
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
