"""choose: lettered candidates, one letter the answer, the letters shuffled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from scipy.stats import chisquare
from tests.conftest import toy_frames
from tests.training.helpers import corpus_of, settings

from penchant.data.dataset import Dataset
from penchant.errors import ConfigError, DataError
from penchant.rank import letters
from penchant.training.candidates import Candidates
from penchant.training.choose import choose_row, choose_rows, newest_targets, valid_rows
from penchant.training.config import ChooseConfig
from penchant.training.corpus import Corpus
from penchant.training.rows import Row


class Fixed:
    """A retriever that gives every target the same kind of candidates: the first items it hasn't taken."""

    def __init__(self, corpus: Corpus, *, miss: bool = False) -> None:
        self.corpus, self.miss = corpus, miss

    def candidates(self, positions: Any, k: int) -> Candidates:
        log = self.corpus.split.log
        items = np.full((len(positions), k), -1, dtype=np.int32)
        for i, p in enumerate(positions):
            target = int(log.item[p])
            past = set(log.item[log.before(int(p))].tolist()) | {target}
            pool = [target, *(j for j in range(log.n_items) if j not in past)][self.miss :][:k]
            items[i, : len(pool)] = pool
        return Candidates(items, np.where(items < 0, -np.inf, -np.arange(k, dtype=np.float32)).astype(np.float32))

    def for_training(self, positions: Any, k: int, folds: int) -> Candidates:
        return self.candidates(positions, k)

    def for_targets(self, targets: Any, k: int) -> Candidates:
        return self.candidates(targets.position, k)


def config(folder: Path, **changes: Any) -> ChooseConfig:
    return settings(folder, ChooseConfig, **{"letters": 5, "targets_per_user": 3, "prompt_tokens": 700, **changes})


def test_the_answer_is_the_letter_before_the_items_title(corpus: Corpus, byte_folder: Path) -> None:
    log = corpus.split.log
    position = int(corpus.train_positions[2][4])
    candidates = np.array([3, 1, int(log.item[position]), 0])
    row = choose_row(corpus, config(byte_folder), position, candidates)
    assert row.label.tolist() == corpus.labels(["C"])
    assert row.at.tolist() == [len(row) - 1]
    assert row.choices.tolist() == corpus.labels(["A", "B", "C", "D", "E"])
    text = corpus.codec.tokenizer.decode(row.tokens.tolist())
    for letter, item in zip("ABCD", candidates, strict=True):
        assert f"\n{letter}. {corpus.texts[item]}\n" in text
    assert row.inputs.tolist() == list(range(log.before(position).start, position))
    assert row.targets.tolist() == [position]


def test_letters_are_uniform_over_the_answers(corpus: Corpus, byte_folder: Path) -> None:
    """The retriever puts the truth first every time: if order leaked, every answer would be A."""
    counts = np.zeros(5)
    retriever: Any = Fixed(corpus)
    for seed in range(6):
        for row in choose_rows(corpus, config(byte_folder, seed=seed), retriever):
            counts[row.choices.tolist().index(int(row.label[0]))] += 1
    assert counts.sum() == 6 * 90
    assert chisquare(counts).pvalue > 1e-3


def test_rows_are_of_the_newest_training_events_with_a_history(corpus: Corpus, byte_folder: Path) -> None:
    retriever: Any = Fixed(corpus)
    rows = list(choose_rows(corpus, config(byte_folder, targets_per_user=2), retriever))
    assert sorted(int(row.targets[0]) for row in rows) == newest_targets(corpus, 2).tolist()
    newest = [p for positions in corpus.train_positions for p in positions[-2:]]
    assert newest_targets(corpus, 2).tolist() == newest
    assert len(newest_targets(corpus, 99)) == sum(len(p) - 1 for p in corpus.train_positions)


def test_a_target_that_retrieval_missed_is_left_out_or_inserted(corpus: Corpus, byte_folder: Path) -> None:
    retriever: Any = Fixed(corpus, miss=True)
    assert list(choose_rows(corpus, config(byte_folder), retriever)) == []
    rows = list(choose_rows(corpus, config(byte_folder, insert_missed=True), retriever))
    assert len(rows) == 90
    for row in rows:
        assert int(row.label[0]) in row.choices.tolist()


def test_held_out_rows_ask_for_the_validation_event(corpus: Corpus, byte_folder: Path) -> None:
    retriever: Any = Fixed(corpus)
    rows = valid_rows(corpus, config(byte_folder), retriever, 12)
    assert len(rows) == 12
    assert {int(row.targets[0]) for row in rows} <= set(corpus.split.valid.position.tolist())


def test_held_out_letters_say_nothing_either(corpus: Corpus, byte_folder: Path) -> None:
    """The fixed retriever has the truth first: in its order the letter would always be A."""
    rows = valid_rows(corpus, config(byte_folder), Fixed(corpus), 99)  # type: ignore[arg-type]
    answers = [row.choices.tolist().index(int(row.label[0])) for row in rows]
    assert len(rows) > 20
    assert set(answers) == set(range(5))


def test_a_held_out_event_is_no_training_row(corpus: Corpus, byte_folder: Path) -> None:
    held = int(corpus.split.test.position[0])
    candidates = np.array([int(corpus.split.log.item[held]), 15])
    with pytest.raises(DataError, match="validation or test event"):
        choose_row(corpus, config(byte_folder), held, candidates)


@pytest.mark.parametrize("n", [2, 26, 27, 50])
def test_letters_are_distinct_single_tokens(corpus: Corpus, n: int) -> None:
    found = letters(n)
    assert len(set(found)) == n
    assert all(len(letter) == 1 for letter in found)
    assert len(set(corpus.labels(found))) == n


def test_more_candidates_than_letters_are_refused() -> None:
    with pytest.raises(ConfigError, match="53 candidates"):
        letters(53)


@pytest.mark.parametrize("n", [1, 51])
def test_the_settings_take_two_to_fifty_letters(byte_folder: Path, n: int) -> None:
    with pytest.raises(ValidationError, match="letters"):
        config(byte_folder, letters=n)


def test_a_label_of_several_tokens_is_refused(corpus: Corpus) -> None:
    with pytest.raises(ConfigError, match=r"'Maybe' has \d tokens"):
        corpus.labels(["A", "Maybe"])


def test_two_labels_of_one_token_are_refused(corpus: Corpus) -> None:
    with pytest.raises(ConfigError, match="same token"):
        corpus.labels(["A", "B", "A"])


def test_a_prompt_whose_candidates_alone_are_too_long_is_refused(corpus: Corpus, byte_folder: Path) -> None:
    position = int(corpus.train_positions[2][4])
    candidates = np.array([int(corpus.split.log.item[position]), 1, 2, 3])
    with pytest.raises(DataError, match="over the budget"):
        choose_row(corpus, config(byte_folder, prompt_tokens=60), position, candidates)


def test_no_wrong_answer_has_the_right_one_s_text(
    byte_folder: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interactions, items = toy_frames()
    twins = items.with_columns(title=items["title"].gather([i // 2 * 2 for i in range(len(items))]))
    corpus = corpus_of(Dataset.read(interactions, twins.drop("genres", "year")), byte_folder, prompts)
    seen: list[tuple[str, list[str]]] = []

    def row(corpus: Corpus, config: ChooseConfig, position: int, candidates: Any, **more: Any) -> Row:
        target = corpus.texts[int(corpus.split.log.item[position])]
        seen.append((target, [corpus.texts[int(c)] for c in candidates]))
        return choose_row(corpus, config, position, candidates, **more)

    monkeypatch.setattr("penchant.training.choose.choose_row", row)
    retriever: Any = Fixed(corpus)
    assert list(choose_rows(corpus, config(byte_folder, letters=12), retriever))
    assert valid_rows(corpus, config(byte_folder, letters=12), retriever, 9)
    assert all(texts.count(target) == 1 for target, texts in seen)
    assert any(len(texts) > 2 for _, texts in seen)
