"""Rows: what is rendered, what is trained in it, and that both are what serving has."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tests import tiny
from tests.training.helpers import corpus_of, supervised_targets
from tests.training.helpers import settings as train_settings

from penchant.catalog_trie import CatalogTrie
from penchant.data.dataset import Dataset
from penchant.errors import DataError
from penchant.prompt import Templates
from penchant.tokens import TextCodec, clean
from penchant.training.corpus import Corpus
from penchant.training.next_item import dense_row, next_item_rows, single_row, target_weights, valid_rows
from penchant.training.rows import Row, RowBuilder

TERMINATOR = "\n"


@lru_cache
def codec(kind: Any) -> TextCodec:
    return TextCodec(tiny.tokenizer(kind))


@lru_cache
def templates() -> Templates:
    return Templates()


# -- the template is prefix-closed, through the tokenizer ------------------------------------------

ODD = [
    "\n",
    "  ",
    ")",
    '"',
    "<|im_end|>",
    "</s>",
    "<think>",
    "{{ x }}",
    "é",
    "é",
    "人",
    "🎬",
    "👨‍👩‍👧",
    "\u202e",
    "\t-",
    "1",
]
TITLE = st.lists(st.one_of(st.sampled_from(ODD), st.text(max_size=8)), min_size=1, max_size=5).map("".join)


@pytest.mark.parametrize("kind", ["byte", "sentencepiece"])
@given(titles=st.lists(TITLE, min_size=1, max_size=5))
@settings(max_examples=60, suppress_health_check=[HealthCheck.filter_too_much])
def test_rendering_n_items_is_a_token_prefix_of_rendering_one_more(kind: Any, titles: list[str]) -> None:
    texts = [clean(t) for t in titles]
    assume(all(texts))
    c = codec(kind)
    try:
        items = c.encode_items(texts, TERMINATOR)
    except DataError:
        assume(False)  # a title this tokenizer can only write as a control token is refused, not trained on
    tokens = [
        c.encode(templates().render("next_item", {"history": [{"text": t} for t in texts[:n]]}).prompt)
        for n in range(len(texts) + 1)
    ]
    for n, item in enumerate(items):
        assert tokens[n + 1] == [*tokens[n], *item]
        assert not c.control_ids.intersection(item)


# -- dense -----------------------------------------------------------------------------------------


def rows_of(corpus: Corpus, model: Path, **changes: Any) -> list[Row]:
    return list(next_item_rows(corpus, train_settings(model, **changes)))


@pytest.mark.parametrize(("window", "pack_tokens"), [(40, 1024), (3, 1024), (2, 1024), (40, 60), (5, 75)])
def test_every_training_event_is_a_target_exactly_once(
    corpus: Corpus, byte_folder: Path, window: int, pack_tokens: int
) -> None:
    rows = rows_of(corpus, byte_folder, window=window, pack_tokens=pack_tokens)
    targets = np.concatenate([row.targets for row in rows])
    assert sorted(targets.tolist()) == np.flatnonzero(corpus.split.train).tolist()
    assert max(len(row) for row in rows) <= pack_tokens
    assert max(len(row.targets) for row in rows) <= window
    for row in rows:
        assert row.n_targets == len(row.targets)
        assert (np.diff(row.targets) == 1).all(), "a row is a stretch of one history"
        assert row.inputs.tolist() == row.targets[:-1].tolist()
        assert set(corpus.split.log.user[row.targets].tolist()) == {row.user}


def test_the_labels_are_the_tries_sequences_with_their_terminator(tiny_folder: Path, toy: Dataset) -> None:
    corpus = corpus_of(toy, tiny_folder)
    trie = CatalogTrie.build(corpus.codec.encode_items(corpus.texts, TERMINATOR))
    end = corpus.codec.encode_template(TERMINATOR)
    item = corpus.split.log.item
    for mode in ("dense", "single"):
        rows = rows_of(corpus, tiny_folder, mode=mode)
        for row, labels in zip(rows, supervised_targets(rows), strict=True):
            assert labels == [tuple(trie.sequence(int(item[p]))) for p in row.targets]
            assert all(sequence[-len(end) :] == end for sequence in labels)


def test_loss_is_on_item_tokens_and_terminators_and_nothing_else(corpus: Corpus, byte_folder: Path) -> None:
    opening = corpus.codec.encode(corpus.templates.render("next_item", {"history": []}).prompt)
    for row in rows_of(corpus, byte_folder, window=4):
        assert row.tokens[: len(opening)].tolist() == opening
        assert (row.at + 1).tolist() == list(range(len(opening), len(row))), "all after the opening, and once"
        assert (row.tokens[row.at + 1] == row.label).all()
        assert row.position.tolist() == list(range(len(row)))


def test_a_dense_row_is_the_serving_prompt_of_its_history(corpus: Corpus, byte_folder: Path) -> None:
    row = rows_of(corpus, byte_folder)[5]
    history = [{"text": corpus.texts[i]} for i in corpus.split.log.item[row.targets]]
    served = corpus.codec.encode(corpus.templates.render("next_item", {"history": history}).prompt)
    assert row.tokens.tolist() == served


# -- one target a prompt ---------------------------------------------------------------------------


def test_single_mode_has_one_row_a_target_behind_its_newest_events(corpus: Corpus, byte_folder: Path) -> None:
    rows = rows_of(corpus, byte_folder, mode="single", max_history=3)
    log = corpus.split.log
    assert [int(row.targets[0]) for row in rows] == np.flatnonzero(corpus.split.train).tolist()
    for row in rows:
        past = np.arange(log.before(int(row.targets[0])).start, row.targets[0])[-3:]
        assert row.inputs.tolist() == past.tolist()
        history = [{"text": corpus.texts[i]} for i in log.item[past]]
        prompt = corpus.codec.encode(corpus.templates.render("next_item", {"history": history}).prompt)
        assert row.tokens.tolist() == [*prompt, *corpus.item_tokens[int(log.item[row.targets[0]])]]
        assert (row.at + 1).tolist() == list(range(len(prompt), len(row)))
        assert row.n_targets == 1


def test_a_single_prompt_over_its_budget_loses_its_oldest_events(corpus: Corpus, byte_folder: Path) -> None:
    config = train_settings(byte_folder, mode="single", prompt_tokens=45)
    positions = corpus.train_positions[0]
    row = single_row(corpus, positions, config, target_weights(corpus, 0.0))
    assert 0 < len(row.inputs) < len(positions) - 1
    assert row.inputs.tolist() == positions[:-1][-len(row.inputs) :].tolist()
    assert len(row) - len(row.label) <= 45
    assert corpus.dropped == len(positions) - 1 - len(row.inputs)


def test_held_out_rows_supervise_the_validation_event_behind_its_history(corpus: Corpus, byte_folder: Path) -> None:
    rows = valid_rows(corpus, train_settings(byte_folder), 10)
    valid = {int(p): corpus.split.valid.history(i) for i, p in enumerate(corpus.split.valid.position)}
    assert len(rows) == 10
    for row in rows:
        assert row.n_targets == 1
        assert int(row.targets[0]) in valid
        assert corpus.split.log.item[row.inputs].tolist() == valid[int(row.targets[0])][-8:].tolist()


# -- weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [0.0, 0.3, 1.0])
def test_weights_against_popularity_have_mean_one_over_the_targets(
    corpus: Corpus, byte_folder: Path, power: float
) -> None:
    rows = rows_of(corpus, byte_folder, popularity_power=power, window=4)
    weights, items = [], []
    for row in rows:
        for s, p in enumerate(row.targets):
            of = row.weight[row.sequence == s]
            assert (of == of[0]).all(), "one weight a target"
            weights.append(float(of[0]))
            items.append(int(corpus.split.log.item[p]))
    assert np.mean(weights) == pytest.approx(1, abs=1e-6)
    counts = np.bincount(items, minlength=corpus.split.log.n_items)
    assert counts.min() != counts.max()
    scaled = np.array(weights) * counts[items] ** power
    assert scaled == pytest.approx(np.full(len(scaled), scaled[0]), rel=1e-5)


def test_weights_of_items_never_trained_on_are_finite(toy: Dataset, byte_folder: Path, corpus: Corpus) -> None:
    split = corpus.split
    rare = int(split.log.item[np.flatnonzero(split.train)[0]])
    split.train[split.log.item == rare] = False
    weights = target_weights(corpus, 1.0)
    assert np.isfinite(weights).all()
    assert float((weights * split.train_counts).sum() / split.train_counts.sum()) == pytest.approx(1)


# -- the builder -----------------------------------------------------------------------------------


def test_a_row_in_which_nothing_is_supervised_is_refused() -> None:
    with pytest.raises(DataError, match="every token is masked"):
        RowBuilder([1, 2, 3]).build()


def test_a_row_without_a_prompt_is_refused() -> None:
    with pytest.raises(DataError, match="without a prompt"):
        RowBuilder([])


@pytest.mark.parametrize(("first", "n"), [(0, 1), (2, 2), (1, 0), (3, 1)])
def test_a_target_outside_the_trunk_is_refused(first: int, n: int) -> None:
    with pytest.raises(DataError, match="no such target"):
        RowBuilder([1, 2, 3]).supervise(first, n)


@pytest.mark.parametrize(("behind", "tokens"), [(0, [1]), (4, [1]), (2, [])])
def test_a_branch_that_hangs_nowhere_is_refused(behind: int, tokens: list[int]) -> None:
    builder = RowBuilder([1, 2, 3])
    group = builder.supervise(1, 2)
    with pytest.raises(DataError, match="no such branch"):
        builder.branch(behind, tokens, group)


# -- what may stand in a row -----------------------------------------------------------------------


@pytest.mark.parametrize("part", ["valid", "test"])
@pytest.mark.parametrize("as_target", [True, False])
def test_a_held_out_event_in_a_training_row_is_refused(corpus: Corpus, part: str, as_target: bool) -> None:
    held = int(getattr(corpus.split, part).position[3])
    user = corpus.split.log.user[held]
    past = corpus.train_positions[user]
    positions = np.append(past, held) if as_target else np.append(past[:-1], [held, past[-1]])
    with pytest.raises(DataError, match="validation or test event") as raised:
        dense_row(corpus, positions, target_weights(corpus, 0.0))
    assert corpus.split.log.user_ids[user] in str(raised.value.where)
    assert corpus.split.log.item_ids[corpus.split.log.item[held]] in str(raised.value.where)


def test_a_held_out_event_in_a_single_prompt_is_refused(corpus: Corpus, byte_folder: Path) -> None:
    held = int(corpus.split.valid.position[0])
    positions = np.arange(corpus.split.log.before(held).start, held + 1)
    with pytest.raises(DataError, match="validation or test event"):
        single_row(corpus, positions, train_settings(byte_folder), target_weights(corpus, 0.0))


def test_an_event_later_than_the_target_is_refused(corpus: Corpus) -> None:
    past = corpus.train_positions[0]
    with pytest.raises(DataError, match="later than every target"):
        corpus.require_past(past[2:3], past[1:2])


def test_two_users_in_one_row_are_refused(corpus: Corpus) -> None:
    with pytest.raises(DataError, match="several users"):
        corpus.require_past(corpus.train_positions[0][:1], corpus.train_positions[1][:1])
