"""What a student is worth on validation users: NDCG@10 of retrieved candidates, or AUC of yes and no."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from penchant import metrics
from penchant.engine.transformers import TransformersEngine
from penchant.fusion import CALIBRATIONS, Fusion, choose_fusion
from penchant.interest.histories import history_vectors, unit
from penchant.interest.index import ExactIndex
from penchant.rank import Ranker, letters
from penchant.training.batch import collate
from penchant.training.candidates import Candidates
from penchant.training.choose import choose_prompt
from penchant.training.config import ChooseConfig, ContrastiveConfig, TrainConfig
from penchant.training.corpus import Corpus
from penchant.training.rows import Row, RowBuilder
from penchant.training.student import Student

if TYPE_CHECKING:
    from penchant.data.history import Targets


def engine_of(
    student: Student, tokenizer: PreTrainedTokenizerBase, fingerprint: str = "in training"
) -> TransformersEngine:
    """The student behind the engine's verbs: what it will say when served, adapter and all."""
    return TransformersEngine(student.causal_lm, tokenizer, fingerprint=fingerprint)


class LikelihoodScore:
    """NDCG@10 of the encoder's candidates ordered by the student's likelihood of their titles.

    "NDCG@10" is the LLM's alone at the best of the calibrations; each of them, the encoder's own order and
    the fusion chosen on these same users (so an optimistic figure) stand beside it. Users whose target was missed count
    as 0, whatever the order of their candidates: the student is not asked about them.
    """

    def __init__(
        self,
        corpus: Corpus,
        config: TrainConfig,
        targets: Targets,
        candidates: Candidates,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        listed = [i for i in range(len(targets)) if (candidates.items[i] >= 0).any()]
        keep = [i for i in listed if targets.item[i] in candidates.items[i]]
        self._n = len(listed)
        self._corpus, self._config, self._tokenizer = corpus, config, tokenizer
        self._histories = [targets.history(i) for i in keep]
        self._target = targets.item[keep]
        self._items = [candidates.items[i][candidates.items[i] >= 0] for i in keep]
        self._interest = [candidates.scores[i][candidates.items[i] >= 0] for i in keep]

    def __call__(self, student: Student) -> dict[str, float]:
        likelihood, prior = self.likelihoods(student)
        return summary(self._interest, likelihood, prior, self.places, self._n)

    @property
    def places(self) -> list[int]:
        """Where each retrieved target stands among its candidates."""
        return [_place(row, t) for row, t in zip(self._items, self._target, strict=True)]

    def likelihoods(self, student: Student) -> tuple[list[NDArray[np.float64]], list[NDArray[np.float64]]]:
        """log p(title | history) and log p(title) in nats of the candidates, of users whose target is among them."""
        if not self._items:
            return [], []
        ranker = Ranker(
            engine_of(student, self._tokenizer),
            self._corpus.templates,
            self._corpus.texts,
            max_history=self._config.max_history,
            prompt_tokens=self._config.prompt_tokens,
        )
        likelihood = ranker.likelihoods(self._histories, self._items)
        ranker.priors(np.unique(np.concatenate(self._items)))
        return likelihood, [ranker.prior[row] for row in self._items]


class NearestScore:
    """NDCG@10 of the items nearest to each history's vector, seen ones left out: retrieval by the LLM alone.

    Searched are the targets' items and a seeded sample of others, ``catalogue`` in all: of a larger catalogue
    the figure is higher than over the whole.
    """

    def __init__(
        self, corpus: Corpus, config: ContrastiveConfig, targets: Targets, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        keep = [i for i in range(len(targets)) if len(targets.history(i))]
        self._corpus, self._config, self._tokenizer = corpus, config, tokenizer
        self._histories = [targets.history(i) for i in keep]
        wanted, n_items = np.unique(targets.item[keep]), len(corpus.texts)
        others = np.setdiff1d(np.random.default_rng([config.seed, 3]).permutation(n_items), wanted, assume_unique=True)
        self._items = np.sort(np.append(wanted, others[: max(0, config.catalogue - len(wanted))]))
        self._target = np.searchsorted(self._items, targets.item[keep])

    def __call__(self, student: Student) -> dict[str, float]:
        if student.layer is None or not self._histories:
            return {"NDCG@10": float("nan")}
        engine, config, texts = engine_of(student, self._tokenizer), self._config, self._corpus.texts
        vectors = engine.embed([texts[i] for i in self._items], pooling=config.pooling, layer=student.layer)
        histories = history_vectors(
            engine,
            self._corpus.templates,
            texts,
            self._histories,
            layer=student.layer,
            pooling=config.pooling,
            max_history=config.max_history,
            prompt_tokens=config.prompt_tokens,
        )
        seen = [np.flatnonzero(np.isin(self._items, history)) for history in self._histories]
        found, _ = ExactIndex(unit(vectors)).search(histories, 10, exclude=seen)
        return {"NDCG@10": float(metrics.ndcg(metrics.list_rank(found, self._target), 10).mean())}


class LetterScore:
    """NDCG@10 of the encoder's candidates in the order of their letters' probabilities, alone and fused."""

    def __init__(self, corpus: Corpus, config: ChooseConfig, targets: Targets, candidates: Candidates) -> None:
        self._corpus, self._config = corpus, config
        listed = [i for i in range(len(targets)) if (candidates.items[i] >= 0).sum() > 1]
        keep = [i for i in listed if targets.item[i] in candidates.items[i]]  # of others no order is asked for
        self._n = len(listed)
        log, rng = corpus.split.log, np.random.default_rng([config.seed, 2])
        self._rows: list[Row] = []
        self._order: list[NDArray[np.int64]] = []
        labels = corpus.labels(letters(config.letters))
        items = [candidates.items[i][candidates.items[i] >= 0] for i in keep]
        for i, row in zip(keep, items, strict=True):
            order = rng.permutation(len(row))  # the retriever's order must not show in the letters
            p = int(targets.position[i])
            history = np.arange(log.before(p).start, p)
            prompt, _ = choose_prompt(corpus, config, history, row[order])
            builder = RowBuilder(prompt, choices=labels)
            builder.answer(labels[0])  # whichever: only the state there is looked at
            self._rows.append(builder.build())
            self._order.append(order)
        self._interest = [candidates.scores[i][: len(row)] for i, row in zip(keep, items, strict=True)]
        self._places = [_place(row, targets.item[i]) for i, row in zip(keep, items, strict=True)]

    def __call__(self, student: Student) -> dict[str, float]:
        logp = label_scores(student, self._rows, self._config.pack_tokens)
        likelihood = []
        for row, order in zip(logp, self._order, strict=True):
            scores = np.empty(len(order))
            scores[order] = row[: len(order)]
            likelihood.append(scores)
        none = [np.zeros(len(row)) for row in likelihood]
        return summary(self._interest, likelihood, none, self._places, self._n)


class AnswerScore:
    """AUC of log p(yes) - log p(no) over labelled rows."""

    def __init__(self, rows: Sequence[Row], config: TrainConfig) -> None:
        self._rows, self._config = rows, config

    def __call__(self, student: Student) -> dict[str, float]:
        logp = label_scores(student, self._rows, self._config.pack_tokens)
        truth = np.array([row.label[0] == row.choices[0] for row in self._rows])
        return {"AUC": metrics.auc(logp[:, 0] - logp[:, 1], truth)}


@torch.no_grad()
def label_scores(student: Student, rows: Sequence[Row], pack_tokens: int) -> NDArray[np.float64]:
    """log p of each label among the labels at each row's answer, in nats: (n, c)."""
    student.eval()
    out: list[NDArray[np.float64]] = []
    pack: list[Row] = []
    for row in [*rows, None]:
        if pack and (row is None or sum(map(len, pack)) + len(row) > pack_tokens):
            logits = student(collate([pack], student.dtype, student.causal_lm.device))
            out.append(torch.log_softmax(logits, dim=-1).double().cpu().numpy())
            pack = []
        if row is not None:
            pack.append(row)
    return np.concatenate(out) if out else np.zeros((0, 0))


def summary(
    interest: Sequence[NDArray[np.floating]],
    likelihood: Sequence[NDArray[np.float64]],
    prior: Sequence[NDArray[np.float64]],
    places: Sequence[int],
    n: int,
) -> dict[str, float]:
    """NDCG@10 of the LLM's order at each calibration, of the encoder's, and of the best fusion of the two.

    The sequences are of the users whose target was retrieved, and the means over ``n`` users, missed ones as 0.
    """
    if n == 0:
        return {"NDCG@10": float("nan")}

    def quality(fusion: Fusion) -> float:
        lists = zip(interest, likelihood, prior, places, strict=True)
        ranks = [int((s >= s[t]).sum()) for s, t in ((fusion.scores(e, lik, p), t) for e, lik, p, t in lists)]
        return float(metrics.ndcg(np.array(ranks, dtype=np.int64), 10).sum()) / n

    alone = {c: quality(Fusion(1.0, c)) for c in CALIBRATIONS}
    fused = choose_fusion(interest, likelihood, prior, places)
    return {
        "NDCG@10": max(alone.values()),
        **{f"LLM NDCG@10, calibration {c:g}": value for c, value in alone.items()},
        "encoder NDCG@10": quality(Fusion(0.0, 0.0)),
        "fused NDCG@10": quality(fused),
        "fused weight": fused.weight,
        "fused calibration": fused.calibration,
    }


def _place(row: NDArray[np.integer], target: int) -> int:
    return int(np.flatnonzero(row == target)[0])
