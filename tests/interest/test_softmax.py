"""The fused loss against torch's own, value and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from penchant.interest import softmax
from penchant.interest.softmax import full_softmax_loss


def _both(n: int, m: int, d: int, seed: int, scale: float) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    states = (scale * torch.randn(n, d, generator=generator)).requires_grad_()
    items = (scale * torch.randn(m, d, generator=generator)).requires_grad_()
    return states, items, torch.randint(0, m, (n,), generator=generator), torch.rand(n, generator=generator) + 0.1


@settings(max_examples=40)
@given(
    n=st.integers(1, 70),
    m=st.integers(1, 50),
    d=st.integers(1, 9),
    seed=st.integers(0, 10_000),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    held=st.sampled_from([1, 100, 10**6]),
    least=st.sampled_from([1, 16, 128]),
)
def test_value_and_gradients_are_those_of_weighted_cross_entropy(
    n: int, m: int, d: int, seed: int, scale: float, held: int, least: int
) -> None:
    states, items, target, weight = _both(n, m, d, seed, scale)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(softmax, "_HELD", held)
        patch.setattr(softmax, "_LEAST_ROWS", least)
        got = full_softmax_loss(states, items, target, weight)
    found = torch.autograd.grad(3 * got, [states, items])
    wanted = (F.cross_entropy(states @ items.T, target, reduction="none") * weight).sum() / weight.sum()
    expected = torch.autograd.grad(3 * wanted, [states, items])
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * max(1.0, scale))


@pytest.mark.parametrize("computes", [True, False])
def test_bfloat16_products_stay_near_float32s_and_are_theirs_where_they_would_be_emulated(
    computes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(softmax, "computes_bfloat16", lambda device: computes)
    monkeypatch.setattr(softmax, "_HELD", 1)  # two pieces
    states, items, target, _ = _both(200, 300, 64, 0, 0.3)
    exact = torch.autograd.grad(full_softmax_loss(states, items, target), items)[0]
    loose = torch.autograd.grad(full_softmax_loss(states, items, target, dtype=torch.bfloat16), items)[0]
    assert torch.equal(exact, loose) is not computes
    assert float((exact - loose).norm() / exact.norm()) < 0.02
