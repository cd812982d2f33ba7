"""Contrastive training: the LLM's vector of a rendered history near the next item's, far from other items'.

The loss is InfoNCE (van den Oord et al. 2018, "Representation Learning with Contrastive Predictive Coding") over
cosines. A row holds the texts of one pair, each run on its own: the history, the item taken, and its hard
negatives. All items of a step are negatives of all its pairs, so the step's batch is what the gradient is of,
however little of it fits in memory at once: gradient caching (Gao et al. 2021, "Scaling Deep Contrastive Learning
Batch Size under Memory Limited Setup").
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from penchant.interest.histories import history_prompt
from penchant.training.batch import Batch
from penchant.training.candidates import Retriever
from penchant.training.choose import newest_targets
from penchant.training.config import ContrastiveConfig
from penchant.training.corpus import Corpus
from penchant.training.objectives import Forward, Gather, Loss
from penchant.training.rows import Row, RowBuilder
from penchant.training.student import Student

# -- rows ------------------------------------------------------------------------------------------


def contrastive_rows(corpus: Corpus, config: ContrastiveConfig, retriever: Retriever | None) -> Iterator[Row]:
    """One row a training target; its hard negatives come from a ``retriever`` that hasn't seen the user."""
    targets = newest_targets(corpus, config.targets_per_user)
    pool = None if retriever is None else retriever.for_training(targets, _pool(config), config.folds).items
    rng = np.random.default_rng(config.seed)
    for i, p in enumerate(targets.tolist()):
        hard = [] if pool is None else _hard(corpus, pool[i], p, config.hard, rng)
        yield contrastive_row(corpus, config, p, hard)


def valid_rows(corpus: Corpus, config: ContrastiveConfig, retriever: Retriever | None, n: int) -> list[Row]:
    """One row a validation target that has a history, of up to ``n`` seeded users."""
    targets = corpus.split.valid.sample(n, config.seed)
    targets = targets.take(np.flatnonzero(targets.position > targets.log.start[targets.user]))
    pool = None if retriever is None else retriever.for_targets(targets, _pool(config)).items
    rng = np.random.default_rng([config.seed, 1])
    rows = []
    for i, p in enumerate(targets.position.tolist()):
        hard = [] if pool is None else _hard(corpus, pool[i], p, config.hard, rng)
        rows.append(contrastive_row(corpus, config, p, hard, held_out=True))
    return rows


def contrastive_row(
    corpus: Corpus, config: ContrastiveConfig, position: int, hard: Sequence[int], *, held_out: bool = False
) -> Row:
    """The event at ``position`` as the item taken, the events before it as the history, ``hard`` as more negatives."""
    log = corpus.split.log
    past = np.arange(log.before(position).start, position)
    rendered = history_prompt(
        corpus.templates,
        corpus.codec,
        corpus.texts,
        log.item[past],
        max_history=config.max_history,
        prompt_tokens=config.prompt_tokens,
    )
    corpus.dropped += rendered.dropped
    kept, target = past[-config.max_history :][rendered.dropped :], np.array([position], dtype=np.int64)
    if not held_out:
        corpus.require_past(kept, target)
    builder = RowBuilder(corpus.codec.encode(rendered.prompt), user=int(log.user[position]))
    builder.embed(-1, pooling=config.pooling)
    for item in (int(log.item[position]), *hard):
        builder.embed(item, corpus.codec.encode(corpus.texts[item]), pooling=config.pooling)
    return builder.build(kept, target)


def _pool(config: ContrastiveConfig) -> int:
    return max(config.candidates, config.hard + 1)  # the target itself may be among them


def _hard(
    corpus: Corpus, candidates: NDArray[np.integer], position: int, n: int, rng: np.random.Generator
) -> list[int]:
    """``n`` of the retrieved items, drawn: none that is the target or in the history, nor one of the same text."""
    log, texts = corpus.split.log, corpus.texts
    taken = {texts[int(i)] for i in log.item[log.before(position).start : position + 1]}
    found = [int(c) for c in candidates if c >= 0 and texts[int(c)] not in taken]
    return [found[i] for i in np.sort(rng.permutation(len(found))[:n])]


# -- the loss --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Texts:
    """Embedded texts of whole pairs: a history, then the item taken, then its hard negatives, and so on.

    ``vectors`` (s, d); ``item`` (s,), -1 for a history; ``target`` (pairs,) the items taken, as positions in the log.
    """

    vectors: torch.Tensor
    item: NDArray[np.int64]
    target: NDArray[np.int64]


class InfoNCE:
    """The loss of a step's pairs: -log softmax of the item taken among all the step's items, cosine / temperature."""

    def __init__(self, corpus: Corpus, config: ContrastiveConfig) -> None:
        self._log, self._temperature = corpus.split.log, config.temperature
        # Items of one text are one vector, and so one item.
        self._text = np.unique(np.array(corpus.texts), return_inverse=True)[1]

    def over(self, student: Student, batches: Sequence[Batch], gather: Gather) -> Loss:
        """Gradient caching: all vectors without a graph, the loss's slope at each, then each batch run once more.

        A batch's loss is its own pairs' plus slope * (its vectors run anew - those of before). The second part is
        zero, dropout being drawn as before, and its gradient is the whole step's with respect to the weights.
        """
        device = student.causal_lm.device
        noise, vectors = [], []
        with torch.no_grad():
            for batch in batches:
                noise.append(_noise(device))
                vectors.append(student(batch))
        items = np.concatenate([_items(batch) for batch in batches])
        own = Texts(torch.cat(vectors).cpu(), items, np.concatenate([batch.targets for batch in batches]))
        everyone, mine = gather(own)
        with torch.enable_grad():
            leaf = torch.cat(vectors).requires_grad_()
            losses = self.pairs(
                Texts(
                    torch.cat([leaf if i == mine else texts.vectors.to(device) for i, texts in enumerate(everyone)]),
                    np.concatenate([texts.item for texts in everyone]),
                    np.concatenate([texts.target for texts in everyone]),
                )
            )
            (slope,) = torch.autograd.grad(losses.sum(), leaf)
        losses = torch.split(losses.detach(), [len(texts.target) for texts in everyone])[mine]
        parts = zip(
            noise,
            vectors,
            torch.split(slope, [len(v) for v in vectors]),
            torch.split(losses, [len(batch.targets) for batch in batches]),
            strict=True,
        )
        cached = {id(batch): part for batch, part in zip(batches, parts, strict=True)}

        def loss(forward: Forward, student: Student, batch: Batch) -> torch.Tensor:
            drawn, before, slope, value = cached[id(batch)]
            _redraw(device, drawn)
            return value.sum() + ((forward(batch) - before) * slope).sum()

        return loss

    def pairs(self, texts: Texts) -> torch.Tensor:
        """The loss of each pair in nats (pairs,), every pair against every item but those it can't be held against."""
        is_item = texts.item >= 0
        columns = np.flatnonzero(is_item)
        own = np.searchsorted(columns, np.flatnonzero(~is_item) + 1)
        false = torch.from_numpy(self.false_negatives(texts.item[columns], texts.target, own))
        unit = F.normalize(texts.vectors, dim=-1)
        rows, other = (unit[torch.from_numpy(mask).to(unit.device)] for mask in (~is_item, is_item))
        logits = (rows @ other.T / self._temperature).masked_fill(false.to(unit.device), -torch.inf)
        return F.cross_entropy(logits, torch.from_numpy(own).to(unit.device), reduction="none")

    def false_negatives(
        self, items: NDArray[np.int64], target: NDArray[np.int64], own: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """(pairs, items): where an item has the text of the pair's own or of one in its history, but its own place."""
        false = np.zeros((len(target), len(items)), dtype=bool)
        text = self._text[items]
        for i, p in enumerate(target.tolist()):
            taken = self._log.item[self._log.before(p).start : p + 1]
            false[i] = np.isin(text, self._text[taken])
        false[np.arange(len(target)), own] = False
        return false


def n_pairs(batch: Batch) -> float:
    """What the summed loss is divided by."""
    return float(len(batch.targets))


def _items(batch: Batch) -> NDArray[np.int64]:
    """The item of each text of a batch (s,), -1 for a history."""
    items = torch.empty(len(batch.group), dtype=torch.long, device=batch.label.device)
    items[batch.sequence] = batch.label
    return items.cpu().numpy()


def _noise(device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Where the generators that dropout draws from stand."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _redraw(device: torch.device, noise: tuple[torch.Tensor, torch.Tensor | None]) -> None:
    """Set them back, so that dropout is drawn as it was."""
    torch.set_rng_state(noise[0])
    if noise[1] is not None:
        torch.cuda.set_rng_state(noise[1], device)
