"""What validation says of a student, against the same figures worked out in the plainest way."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.training.helpers import plain_logprobs, settings, stirred
from tests.training.test_choose import Fixed

from penchant.training.batch import Batch
from penchant.training.config import ChooseConfig, TrainConfig
from penchant.training.corpus import Corpus
from penchant.training.rows import Row, RowBuilder
from penchant.training.validation import AnswerScore, LetterScore, LikelihoodScore, label_scores


class Oracle:
    """A student that prefers the item with the smallest number, and a letter that stands for nobody above all."""

    dtype = torch.float32

    class causal_lm:  # noqa: N801
        device = "cpu"

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus

    def eval(self) -> Oracle:
        return self

    def __call__(self, batch: Batch) -> torch.Tensor:
        flat, position = batch.tokens.flatten(), batch.position.flatten()
        out = torch.full((len(batch.at), len(batch.choices)), 50.0)
        for i, at in enumerate(batch.at.tolist()):
            start = at - int(position[at])
            text = self.corpus.codec.tokenizer.decode(flat[start : at + 1].tolist())
            for letter, title in re.findall(r"^([A-Z])\. (.*)$", text, flags=re.MULTILINE):
                out[i, ord(letter) - ord("A")] = -self.corpus.texts.index(title)
        return out


def ndcg(ranks: list[int]) -> float:
    return float(np.mean([1 / np.log2(1 + r) if 0 < r <= 10 else 0.0 for r in ranks]))


@pytest.mark.parametrize("pack_tokens", [600, 4000])
def test_letters_are_scored_in_the_candidates_order(corpus: Corpus, byte_folder: Path, pack_tokens: int) -> None:
    config = settings(byte_folder, ChooseConfig, letters=6, pack_tokens=pack_tokens)
    targets = corpus.split.valid.sample(12, 0)
    found = Fixed(corpus).candidates(targets.position, 6)
    found.items[3, :2] = found.items[3, 4:6]  # one whose target was missed, and holds fewer
    found.items[3, 4:6] = -1
    oracle: Any = Oracle(corpus)
    said = LetterScore(corpus, config, targets, found)(oracle)
    ranks, encoder = [], []
    for row, target in zip(found.items.tolist(), targets.item.tolist(), strict=True):
        real = [i for i in row if i >= 0]
        ranks.append(1 + sorted(real).index(target) if target in real else 0)
        encoder.append(1 + real.index(target) if target in real else 0)
    assert said["NDCG@10"] == pytest.approx(ndcg(ranks))
    assert said["encoder NDCG@10"] == pytest.approx(ndcg(encoder))
    assert len(set(ranks)) > 3


class FirstLetter(Oracle):
    """A student that takes A, whatever stands behind it."""

    def __call__(self, batch: Batch) -> torch.Tensor:
        return -torch.arange(len(batch.choices)).repeat(len(batch.at), 1).float()


def test_the_letters_do_not_follow_the_retrievers_order(corpus: Corpus, byte_folder: Path) -> None:
    config = settings(byte_folder, ChooseConfig, letters=6)
    targets = corpus.split.valid
    found = Fixed(corpus).candidates(targets.position, 6)  # the truth always first
    student: Any = FirstLetter(corpus)
    chance = np.mean([1 / np.log2(1 + rank) for rank in range(1, 7)])
    assert LetterScore(corpus, config, targets, found)(student)["NDCG@10"] == pytest.approx(chance, abs=0.12)


def test_likelihoods_are_those_of_plain_forwards(corpus: Corpus, byte_folder: Path) -> None:
    config: TrainConfig = settings(byte_folder)
    student = stirred(config)
    targets = corpus.split.valid.sample(5, 1)
    found = Fixed(corpus).candidates(targets.position, 4)
    found.items[2] = found.items[2, [1, 2, 3, 3]]  # one whose target was missed, and holds fewer
    found.items[2, 3] = -1
    score = LikelihoodScore(corpus, config, targets, found, corpus.codec.tokenizer)
    asked = [0, 1, 3, 4]
    likelihood, prior = score.likelihoods(student)
    assert len(likelihood) == len(asked), "an order without the target tells nothing"
    ranks = [0]
    for row, i in enumerate(asked):
        history = [{"text": corpus.texts[j]} for j in targets.history(i)[-8:]]
        prompts = [corpus.templates.render("next_item", {"history": h}).prompt for h in (history, [])]
        with torch.no_grad():
            for got, prompt in zip((likelihood[row], prior[row]), prompts, strict=True):
                context = corpus.codec.encode(prompt)
                wanted = [float(plain_logprobs(student, context, corpus.item_tokens[c]).sum()) for c in found.items[i]]
                assert got == pytest.approx(wanted, abs=1e-3)
        ranks.append(1 + int((likelihood[row] > likelihood[row][score.places[row]]).sum()))
    said = score(student)
    assert said["LLM NDCG@10, calibration 0"] == pytest.approx(ndcg(ranks))
    assert said["encoder NDCG@10"] == 0.8, "the fixed retriever has the truth first, but where it missed it"
    assert said["NDCG@10"] == max(v for k, v in said.items() if k.startswith("LLM"))
    assert said["fused NDCG@10"] >= said["encoder NDCG@10"]


def test_whoever_retrieval_missed_counts_as_nothing(corpus: Corpus, byte_folder: Path) -> None:
    targets = corpus.split.valid.sample(3, 1)
    found = Fixed(corpus).candidates(targets.position, 4)
    found.items[:, 0] = -1  # where the truth stood
    oracle: Any = Oracle(corpus)
    likelihood = LikelihoodScore(corpus, settings(byte_folder), targets, found, corpus.codec.tokenizer)
    letters = LetterScore(corpus, settings(byte_folder, ChooseConfig, letters=4), targets, found)
    assert likelihood(oracle)["NDCG@10"] == letters(oracle)["NDCG@10"] == 0
    found.items[:] = -1
    nobody = LikelihoodScore(corpus, settings(byte_folder), targets, found, corpus.codec.tokenizer)
    assert np.isnan(nobody(oracle)["NDCG@10"])


def answers(n: int, seed: int) -> list[Row]:
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        builder = RowBuilder(rng.integers(3, 280, size=int(rng.integers(3, 30))).tolist(), choices=(11, 12))
        builder.answer(int(rng.choice([11, 12])))
        rows.append(builder.build())
    return rows


def test_the_auc_is_the_share_of_pairs_in_the_right_order(byte_folder: Path) -> None:
    config = settings(byte_folder, pack_tokens=64)
    student = stirred(config)
    rows = answers(25, 0)
    margins, truth = [], []
    for row in rows:
        with torch.no_grad():
            logits = student.causal_lm(input_ids=torch.from_numpy(row.tokens).long().unsqueeze(0)).logits[0, -1]
        margins.append(float(logits[11] - logits[12]))
        truth.append(int(row.label[0]) == 11)
    pairs = [
        m > n
        for m, yes in zip(margins, truth, strict=True)
        if yes
        for n, y in zip(margins, truth, strict=True)
        if not y
    ]
    assert AnswerScore(rows, config)(student)["AUC"] == pytest.approx(np.mean(pairs))


def test_labels_scores_do_not_depend_on_how_rows_are_packed(byte_folder: Path) -> None:
    student = stirred(settings(byte_folder))
    rows = answers(9, 1)
    one, many = label_scores(student, rows, 16), label_scores(student, rows, 4000)
    assert one.shape == (9, 2)
    assert one == pytest.approx(many, abs=1e-4)
    assert np.exp(one).sum(1) == pytest.approx(np.ones(9))
    assert label_scores(student, [], 16).shape == (0, 0)
