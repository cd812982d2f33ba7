"""Log-probabilities of supervised tokens without holding their logits, and the recipes' losses, as sums."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from penchant.training.batch import Batch

# Rows of logits held at once: 256 rows of a 50,000-token vocabulary are 50 MB in float32.
_ROWS = 256


class _FrozenHead(torch.autograd.Function):
    """log p of one label a state behind a head that isn't trained.

    d log p / d state = W[label] - softmax(logits) W, made in the forward pass while the logits are at
    hand: neither they nor a second pass over the head are needed later.
    """

    @staticmethod
    def forward(
        context: Any, states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, label: torch.Tensor
    ) -> torch.Tensor:
        logp = torch.empty(len(states), dtype=torch.float32, device=states.device)
        slope = torch.empty_like(states)
        for a in range(0, len(states), _ROWS):
            part = slice(a, a + _ROWS)
            logits = F.linear(states[part], weight, bias).float()
            every = torch.log_softmax(logits, dim=-1)
            logp[part] = every.gather(1, label[part].unsqueeze(1)).squeeze(1)
            slope[part] = weight[label[part]] - every.exp_().to(weight.dtype) @ weight
        context.save_for_backward(slope)
        return logp

    @staticmethod
    def backward(context: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (slope,) = context.saved_tensors
        return (grad.unsqueeze(1) * slope).to(slope.dtype), None, None, None


def token_logprobs(states: torch.Tensor, head: Any, label: torch.Tensor) -> torch.Tensor:
    """log p in nats of ``label`` (m,) at ``states`` (m, d) through ``head``: (m,) float32, few logits at a time."""
    frozen = type(head) is torch.nn.Linear and not head.weight.requires_grad and head.weight.dtype == states.dtype
    if frozen:
        apply: Any = _FrozenHead.apply
        return apply(states, head.weight, head.bias, label)

    def piece(some: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return -F.cross_entropy(head(some).float(), labels, reduction="none")

    parts = [
        checkpoint(piece, states[a : a + _ROWS], label[a : a + _ROWS], use_reentrant=False)
        for a in range(0, len(states), _ROWS)
    ]
    return torch.cat(parts)


def next_item_loss(logp: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Cross entropy of all supervised tokens, weighted, summed: nats."""
    return -(logp * batch.weight).sum()


def choice_loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Cross entropy over the label tokens alone (LlamaRec, Yue et al. 2023, section 3.2), summed: nats.

    ``logits`` (m, c) are the label tokens' at each supervised state.
    """
    target = (batch.choices.unsqueeze(0) == batch.label.unsqueeze(1)).int().argmax(1)
    return (F.cross_entropy(logits.float(), target, reduction="none") * batch.weight).sum()


def sequence_logprobs(logp: torch.Tensor, batch: Batch) -> torch.Tensor:
    """log p in nats of each candidate sequence of the batch, (s,): the sum over its tokens."""
    return torch.zeros(len(batch.group), dtype=logp.dtype, device=logp.device).index_add(0, batch.sequence, logp)


def first_of_group(group: torch.Tensor) -> torch.Tensor:
    """The first sequence of each group (n_groups,): the item that was taken."""
    order = torch.arange(len(group), device=group.device)
    return torch.full((int(group.max()) + 1,), len(group), device=group.device).scatter_reduce(0, group, order, "amin")


def preference_terms(
    sequences: torch.Tensor, reference: torch.Tensor, group: torch.Tensor, beta: float, lead: torch.Tensor | float = 0.0
) -> torch.Tensor:
    """Softmax DPO (Chen et al. 2024, "On Softmax Direct Preference Optimization for Recommendation", equation 8).

    ``sequences`` and ``reference`` (s,) are log p under the adapter and without it, in nats; the first
    sequence of each group is the item taken, the others its rivals. One loss, in nats, a group that has any:
    -log sigma(-log sum over rivals of exp(beta (margin of rival - margin of taken))). ``lead`` (s,), nats, is added
    to beta times the margin: what is known of each candidate without this model.
    """
    margin = beta * (sequences - reference) + lead
    n = int(group.max()) + 1
    first = first_of_group(group)
    rival = torch.ones(len(group), dtype=torch.bool, device=group.device)
    rival[first] = False
    of = group[rival]
    gap = margin[rival] - margin[first][of]
    # log sum exp within each group, stable: the largest gap is taken out first.
    largest = torch.full((n,), -torch.inf, dtype=gap.dtype, device=gap.device)
    largest = largest.scatter_reduce(0, of, gap.detach(), "amax")
    summed = torch.zeros(n, dtype=gap.dtype, device=gap.device).index_add(0, of, (gap - largest[of]).exp())
    some = largest > -torch.inf  # groups without a rival have no preference to learn
    return F.softplus(largest[some] + summed[some].log())
