"""What counts beside a trained encoder: how much neighbours and the text match do is chosen on validation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from penchant import metrics
from penchant.interest.behaviour import Behaviour, History
from penchant.interest.encoder import InterestEncoder
from penchant.interest.match import Chosen, Trials
from penchant.interest.neighbours import WEIGHTS, similar_items

# Scores held at once: 4M float32 are 16 MB.
_HELD = 4_000_000


def fit_beside(
    encoder: InterestEncoder,
    sequences: Sequence[History],
    histories: Sequence[History],
    target: NDArray[np.integer],
    *,
    seen: Sequence[NDArray[np.integer]] | None = None,
) -> None:
    """Choose on validation what counts beside a trained encoder: neighbours, learnt from the training sequences, and
    then the text match beside both.

    ``seen`` are the items that may not come, by default each history's own; targets without a history count 0.
    """
    fit_neighbours(encoder, sequences, histories, target, seen=seen)
    fit_match(encoder, histories, target, seen=seen)


@torch.inference_mode()
def fit_neighbours(
    encoder: InterestEncoder,
    sequences: Sequence[History],
    histories: Sequence[History],
    target: NDArray[np.integer],
    *,
    seen: Sequence[NDArray[np.integer]] | None = None,
) -> dict[float, float] | None:
    """Let neighbours learn from the training sequences, and choose their weight: of equals the smallest.

    Returns the NDCG@10 of each weight; None where there are no neighbours or nobody to choose by.
    """
    near = encoder.neighbours
    rows = [i for i in range(len(histories)) if len(histories[i])]
    if near is None or not rows:
        return None
    near.weight.zero_()
    encoder.eval()
    if encoder.match is not None:
        encoder.match.weight.zero_()
    items, warm = encoder.item_matrix(), encoder.warm.cpu()
    taken = [Behaviour.of(sequence).item for sequence in sequences]
    similar = similar_items(taken, encoder.n_items, near.size)
    near.learn(similar, torch.from_numpy(items)[warm].to(near.spread), [Behaviour.of(histories[i]).item for i in rows])
    weights, gains = (0.0, *WEIGHTS), []  # what each weight gains, (weights, n) of each block
    for part, known, interest, plain in _blocks(encoder, items, histories, seen):
        near.weight.fill_(1.0)
        bonus = encoder.bonus(known, interest)
        near.weight.zero_()
        more = np.zeros_like(plain) if bonus is None else bonus.toarray()
        gains.append(
            [metrics.ndcg(metrics.target_rank(plain + np.float32(w) * more, target[part]), 10) for w in weights]
        )
    sums = np.concatenate(gains, axis=1).sum(axis=1) / len(histories)
    found = dict(zip(weights, sums.tolist(), strict=True))
    near.weight.fill_(max(found, key=lambda weight: found[weight]))
    return found


def fit_match(
    encoder: InterestEncoder,
    histories: Sequence[History],
    target: NDArray[np.integer],
    *,
    seen: Sequence[NDArray[np.integer]] | None = None,
) -> Chosen | None:
    """Choose on validation how much the text match of a trained encoder counts; None where it has none.

    ``seen`` are the items that may not come, by default each history's own; targets without a history count 0.
    """
    trials = match_trials(encoder, histories, target, seen)
    if trials is None or encoder.match is None:
        return None
    chosen = trials.best(len(histories), encoder.config.cold_price)
    encoder.match.weight.fill_(chosen.weight)
    encoder.match.shift.fill_(chosen.shift)
    return chosen


@torch.inference_mode()
def match_trials(
    encoder: InterestEncoder,
    histories: Sequence[History],
    target: NDArray[np.integer],
    seen: Sequence[NDArray[np.integer]] | None = None,
) -> Trials | None:
    """Let the match learn what it standardises by, and try every weight and shift; None where there is none to try."""
    match, text = encoder.match, encoder.text
    if match is None or text is None or not any(len(history) for history in histories):
        return None
    match.weight.zero_()
    encoder.eval()
    items, warm = torch.from_numpy(encoder.item_matrix()), encoder.warm.cpu()
    match.learn(text, items[warm].to(text))
    texts = match.texts(text)
    trials = Trials(~warm.numpy())
    for part, known, interest, plain in _blocks(encoder, items.numpy(), histories, seen):
        scaled, mean = match.standardised(torch.from_numpy(interest).to(text))
        own = encoder.relevance.pairs(torch.cat([scaled, -mean], dim=-1), F.pad(items.to(text), (0, 1), value=1.0))
        bonus = encoder.bonus(known, interest)
        if bonus is not None and encoder.neighbours is not None:
            np.add(plain, bonus.toarray(), out=plain)
            own += float(encoder.neighbours.weight) * torch.from_numpy(
                encoder.neighbours.standardised([history.item for history in known]).toarray()
            ).to(own)
        likeness = match.newest([history.item for history in known], texts) @ texts.T
        trials.add(plain, own.cpu().numpy(), likeness.cpu().numpy(), target[part])
    return trials


def _blocks(
    encoder: InterestEncoder,
    items: NDArray[np.float32],
    histories: Sequence[History],
    seen: Sequence[NDArray[np.integer]] | None,
) -> Iterator[tuple[list[int], list[Behaviour], NDArray[np.float32], NDArray[np.float32]]]:
    """The histories that are not empty, a block at a time: their places, themselves, their interests, and the encoder's
    scores (n, n_items), -inf where an item may not come.
    """
    rows = [i for i in range(len(histories)) if len(histories[i])]
    block = max(1, _HELD // len(items))
    for start in range(0, len(rows), block):
        part = rows[start : start + block]
        known = [Behaviour.of(histories[i]) for i in part]
        interest = encoder.encode(known)
        plain = encoder.scores(interest, items)
        for row, (i, history) in enumerate(zip(part, known, strict=True)):
            plain[row, history.item if seen is None else seen[i]] = -np.inf
        yield part, known, interest, plain
