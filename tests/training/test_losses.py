"""Losses against formulas written out by hand."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from penchant.training.batch import Batch, collate
from penchant.training.losses import (
    choice_loss,
    next_item_loss,
    preference_terms,
    sequence_logprobs,
    token_logprobs,
)
from penchant.training.rows import RowBuilder

# -- log-probabilities of tokens -------------------------------------------------------------------


def heads(bias: bool, trained: bool, seed: int = 0) -> tuple[torch.nn.Linear, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    head = torch.nn.Linear(24, 97, bias=bias)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    head.requires_grad_(trained)
    states = torch.randn(600, 24, generator=generator)  # more than are held at once
    label = torch.randint(97, (600,), generator=generator)
    weight = torch.rand(600, generator=generator)
    return head, states, label, weight


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_log_probabilities_and_their_gradients(bias: bool, trained: bool) -> None:
    head, states, label, weight = heads(bias, trained)
    mine, plain = states.clone().requires_grad_(), states.clone().requires_grad_()
    got = token_logprobs(mine, head, label)
    torch.autograd.backward((got * weight).sum())
    grads = [p.grad.clone() for p in head.parameters() if p.grad is not None]
    head.zero_grad()
    wanted = torch.log_softmax(head(plain), -1).gather(1, label[:, None]).squeeze(1)
    torch.autograd.backward((wanted * weight).sum())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mine.grad, plain.grad, atol=1e-5, rtol=1e-4)
    assert len(grads) == ((1 + bias) if trained else 0)
    for ours, parameter in zip(grads, head.parameters(), strict=False):
        torch.testing.assert_close(ours, parameter.grad, atol=1e-4, rtol=1e-4)


def test_the_frozen_path_by_finite_differences() -> None:
    head, states, label, _ = heads(True, False, seed=1)
    point = states[:3].clone().requires_grad_()
    token_logprobs(point, head, label[:3]).sum().backward()  # type: ignore[no-untyped-call]
    assert point.grad is not None
    step = 1e-2
    for i, j in ((0, 0), (1, 7), (2, 23)):
        moved = [states[:3].clone(), states[:3].clone()]
        moved[0][i, j] += step
        moved[1][i, j] -= step
        up, down = (float(token_logprobs(m, head, label[:3]).sum()) for m in moved)
        assert (up - down) / (2 * step) == pytest.approx(float(point.grad[i, j]), abs=2e-3)


def test_a_frozen_head_in_bfloat16_stays_near() -> None:
    head, states, label, weight = heads(False, False)
    wanted = torch.log_softmax(head(states), -1).gather(1, label[:, None]).squeeze(1)
    low = states.bfloat16().requires_grad_()
    got = token_logprobs(low, head.bfloat16(), label)
    torch.autograd.backward((got * weight).sum())
    assert low.grad is not None
    assert low.grad.dtype == torch.bfloat16
    assert float((got - wanted).detach().abs().max()) < 0.3


def test_a_trained_head_gets_its_gradient_without_holding_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    held = []
    head, states, label, _ = heads(False, True)
    forward = head.forward
    monkeypatch.setattr(head, "forward", lambda x: (held.append(len(x)), forward(x))[1])
    token_logprobs(states.requires_grad_(), head, label).sum().backward()  # type: ignore[no-untyped-call]
    assert max(held) <= 256
    assert head.weight.grad is not None


# -- the sums of the recipes -----------------------------------------------------------------------


def batch_of(labels: list[int], weights: list[float], choices: tuple[int, ...] = ()) -> Batch:
    rows = []
    for label, weight in zip(labels, weights, strict=True):
        builder = RowBuilder([1, 2], choices=choices)
        builder.answer(label, weight=weight)
        rows.append(builder.build())
    return collate([rows], torch.float32)


def test_the_next_item_loss_is_the_weighted_sum() -> None:
    batch = batch_of([4, 5], [1.0, 3.0])
    assert float(next_item_loss(torch.tensor([-2.0, -0.5]), batch)) == pytest.approx(2.0 + 1.5)


def test_the_choice_loss_is_cross_entropy_over_the_labels_alone() -> None:
    batch = batch_of([30, 10, 20], [1.0, 2.0, 1.0], choices=(10, 20, 30))
    logits = torch.tensor([[1.0, -1.0, 0.5], [0.0, 2.0, 0.0], [3.0, 3.0, -3.0]])
    wanted = 0.0
    for row, chosen, weight in zip(logits.tolist(), (2, 0, 1), (1.0, 2.0, 1.0), strict=True):
        wanted -= weight * math.log(math.exp(row[chosen]) / sum(math.exp(x) for x in row))
    assert float(choice_loss(logits, batch)) == pytest.approx(wanted, rel=1e-6)


def test_a_sequences_log_probability_is_the_sum_over_its_tokens() -> None:
    builder = RowBuilder([1, 2, 3, 4, 5])
    group = builder.supervise(1, 2)
    builder.branch(1, [7, 8, 9], group)
    builder.supervise(3, 2)
    batch = collate([[builder.build()]], torch.float32)
    logp = -torch.arange(1.0, 8.0)
    assert sequence_logprobs(logp, batch).tolist() == [-3.0, -12.0, -13.0]


# -- softmax DPO -----------------------------------------------------------------------------------


def brute_force(policy: list[list[float]], reference: list[list[float]], beta: float) -> list[float]:
    """Equation 8 of Chen et al. 2024, group by group: the first of each is the item taken."""
    out = []
    for mine, other in zip(policy, reference, strict=True):
        margin = [beta * (m - r) for m, r in zip(mine, other, strict=True)]
        if len(margin) > 1:
            inner = math.log(sum(math.exp(r - margin[0]) for r in margin[1:]))
            out.append(-math.log(1 / (1 + math.exp(inner))))
    return out


NATS = st.floats(-30, 0, width=32)
GROUP = st.lists(st.tuples(NATS, NATS), min_size=1, max_size=5)


@given(groups=st.lists(GROUP, min_size=1, max_size=5), beta=st.floats(0.05, 2))
@settings(max_examples=100)
def test_preference_terms_are_the_formula(groups: list[list[tuple[float, float]]], beta: float) -> None:
    policy, reference = ([[pair[i] for pair in g] for g in groups] for i in (0, 1))
    number = torch.tensor([i for i, g in enumerate(groups) for _ in g])
    flat = [torch.tensor([x for g in side for x in g], dtype=torch.float64) for side in (policy, reference)]
    got = preference_terms(flat[0], flat[1], number, beta)
    assert got.tolist() == pytest.approx(brute_force(policy, reference, beta), rel=1e-6, abs=1e-9)


def test_rivals_may_stand_anywhere_behind_the_item_taken() -> None:
    """All rows' candidates in one batch: groups need not be contiguous, only the first must be the item taken."""
    policy = torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0], dtype=torch.float64)
    group = torch.tensor([0, 1, 1, 0, 0])
    got = preference_terms(policy, torch.zeros(5, dtype=torch.float64), group, 1.0)
    zero = [[0.0] * 3, [0.0] * 2]
    assert got.tolist() == pytest.approx(brute_force([[-1.0, -4.0, -5.0], [-2.0, -3.0]], zero, 1.0))


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_with_one_rival_it_is_dpo(beta: float) -> None:
    rng = np.random.default_rng(0)
    policy, reference = (torch.from_numpy(rng.normal(-10, 3, size=8)) for _ in range(2))
    group = torch.arange(4).repeat_interleave(2)
    margin = (policy - reference).view(4, 2)
    wanted = -F.logsigmoid(beta * (margin[:, 0] - margin[:, 1]))
    torch.testing.assert_close(preference_terms(policy, reference, group, beta), wanted)


def test_preference_gradients_are_autograds_of_the_formula() -> None:
    rng = np.random.default_rng(1)
    group = torch.tensor([0, 0, 0, 1, 2, 2])
    reference = torch.from_numpy(rng.normal(-10, 2, size=6))
    mine = torch.from_numpy(rng.normal(-10, 2, size=6)).requires_grad_()
    plain = mine.detach().clone().requires_grad_()
    preference_terms(mine, reference, group, 0.5).sum().backward()  # type: ignore[no-untyped-call]
    wanted = torch.zeros((), dtype=torch.float64)
    for members in ([0, 1, 2], [4, 5]):
        margin = 0.5 * (plain[members] - reference[members])
        wanted = wanted - F.logsigmoid(-torch.logsumexp(margin[1:] - margin[0], 0))
    wanted.backward()  # type: ignore[no-untyped-call]
    assert mine.grad is not None
    torch.testing.assert_close(mine.grad, plain.grad)
    assert float(mine.grad[3]) == 0, "a target without rivals has no preference to learn"


@pytest.mark.parametrize("gap", [1e3, 1e4, -1e4])
def test_extreme_margins_stay_finite(gap: float) -> None:
    policy = torch.tensor([0.0, gap, gap - 5, -gap], requires_grad=True)
    terms = preference_terms(policy, torch.zeros(4), torch.zeros(4, dtype=torch.long), 1.0)
    terms.sum().backward()  # type: ignore[no-untyped-call]
    assert policy.grad is not None
    assert torch.isfinite(terms).all()
    assert torch.isfinite(policy.grad).all()
    assert float(terms[0].detach()) == pytest.approx(max(gap, -gap), rel=1e-3)


def test_no_rival_anywhere_is_no_term() -> None:
    assert preference_terms(torch.zeros(2), torch.zeros(2), torch.tensor([0, 1]), 1.0).tolist() == []


def test_a_batch_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch_of([1], [1.0]).n_tokens = 0  # type: ignore[misc]
