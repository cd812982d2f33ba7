"""Retrieved candidates: no encoder has seen, in training or in stopping, anything of the users it retrieves for."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest
from tests.training.helpers import distinct

from penchant.data.dataset import Dataset
from penchant.data.split import Split, leave_last_out
from penchant.interest.behaviour import Behaviour
from penchant.interest.beside import fit_beside
from penchant.interest.config import EncoderConfig
from penchant.interest.encoder import InterestEncoder
from penchant.interest.search import score_all
from penchant.interest.train import train_encoder
from penchant.training.candidates import Retriever


def retriever(split: Split, key: str, epochs: int = 3, neighbours: int = 0) -> Retriever:
    vectors = np.random.default_rng(0).normal(size=(split.log.n_items, 8)).astype(np.float32)
    config = EncoderConfig(epochs=epochs, seed=5, neighbours=neighbours)
    return Retriever(split, vectors, config, seed=5, key=(key,))


class Spy:
    """Stands before train_encoder: what each encoder was trained on, stopped by, and then retrieved for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.trained: list[set[int]] = []
        self.stopped: list[set[int]] = []
        self.retrieved: list[set[int]] = []
        self.matrices: list[Any] = []
        self.encoders: list[InterestEncoder] = []
        monkeypatch.setattr("penchant.training.candidates.train_encoder", self)

    def __call__(self, sequences: Any, n_items: int, text: Any, config: Any, validate: Any, **more: Any) -> Any:
        self.trained.append({int(i) for s in sequences for i in s})
        encoder, log = train_encoder(sequences, n_items, text, config, validate, **more)
        self.matrices.append(encoder.item_matrix())
        self.encoders.append(encoder)
        seen: set[int] = set()
        plain = encoder.encode

        def recording(histories: Any, **more: Any) -> Any:
            seen.update(int(i) for h in histories for i in Behaviour.of(h).item)
            return plain(histories, **more)

        encoder.encode = recording  # type: ignore[method-assign]
        validate(encoder)
        self.stopped.append(set(seen))
        seen.clear()
        self.retrieved.append(seen)
        return encoder, log


def targets_of(split: Split) -> np.ndarray[Any, np.dtype[np.int64]]:
    """All training events but each user's first."""
    train = np.flatnonzero(split.train)
    return train[train > split.log.start[split.log.user[train]]]


@pytest.mark.parametrize("folds", [2, 3])
def test_no_encoder_has_seen_a_user_it_retrieves_for(monkeypatch: pytest.MonkeyPatch, folds: int) -> None:
    split = leave_last_out(distinct(n_users=9))
    spy = Spy(monkeypatch)
    positions = targets_of(split)
    retriever(split, f"unseen {folds}").for_training(positions, 5, folds)
    assert len(spy.trained) == folds
    owner = {int(i): int(u) for i, u in zip(split.log.item, split.log.user, strict=True)}
    served: set[int] = set()
    for trained, stopped, retrieved in zip(spy.trained, spy.stopped, spy.retrieved, strict=True):
        taught, looked_at, asked = ({owner[i] for i in items} for items in (trained, stopped, retrieved))
        assert taught
        assert asked
        assert not taught & asked
        assert not looked_at & asked, "early stopping is training too"
        assert looked_at <= taught
        served |= asked
    assert served == set(range(9)), "every user is somebody's"


def with_target_changed(dataset: Dataset, user: str, event: int) -> Dataset:
    """The same dataset, but one event of a user is another item's."""
    events = dataset.interactions.with_row_index("row")
    row = events.filter(pl.col("user_id") == user)["row"][event]
    other = dataset.items["item_id"][-1]
    changed = events.with_columns(
        item_id=pl.when(pl.col("row") == row).then(pl.lit(other)).otherwise(pl.col("item_id")),
        timestamp=pl.col("timestamp") // 1_000_000,  # a dataset holds microseconds
    )
    return Dataset.read(changed.drop("row"), dataset.items)


def test_changing_a_users_target_changes_nothing_of_its_own_encoder(
    monkeypatch: pytest.MonkeyPatch, toy: Dataset
) -> None:
    splits = [leave_last_out(d) for d in (toy, with_target_changed(toy, "u4", 4))]
    user = splits[0].log.user_index["u4"]
    changed = np.flatnonzero(splits[0].log.item != splits[1].log.item)
    assert splits[0].log.user[changed].tolist() == [user]
    assert splits[0].train[changed].all()
    matrices = []
    for number, split in enumerate(splits):
        spy = Spy(monkeypatch)
        found = retriever(split, f"changed {number}", epochs=4)
        found.for_training(targets_of(split), 5, 2)
        fold = found._fold_of_user(2)[user]
        matrices.append((spy.matrices[fold], spy.matrices[1 - fold]))
    own, other = zip(*matrices, strict=True)
    assert np.array_equal(own[0], own[1]), "the encoder that retrieves for u4"
    assert not np.array_equal(other[0], other[1]), "the one that was trained on u4"


def test_candidates_are_best_first_and_hold_nothing_of_the_history(toy: Dataset) -> None:
    split = leave_last_out(toy)
    positions = targets_of(split)
    found = retriever(split, "best first").for_training(positions, 10, 2)
    assert found.items.shape == found.scores.shape == (len(positions), 10)
    for row, scores, p in zip(found.items, found.scores, positions, strict=True):
        real = row >= 0
        assert real.any()
        past = split.log.item[split.log.before(int(p))]
        assert not set(row[real].tolist()) & set(past.tolist())
        assert len(set(row[real].tolist())) == real.sum()
        assert (np.diff(scores[real]) <= 0).all()
        assert not real[int(real.sum()) :].any(), "padding stands at the end"


def test_what_stood_near_in_training_histories_is_part_of_the_score(
    monkeypatch: pytest.MonkeyPatch, toy: Dataset
) -> None:
    """The retriever's candidates are those of a fit with neighbours: every item's score, bonus included, in order."""
    split = leave_last_out(toy)
    spy = Spy(monkeypatch)

    def weighed(encoder: InterestEncoder, *given: Any) -> None:
        fit_beside(encoder, *given)
        assert encoder.neighbours is not None
        encoder.neighbours.weight.fill_(0.3)  # so tiny a validation may want none

    monkeypatch.setattr("penchant.training.candidates.fit_beside", weighed)
    valid = split.valid
    found = retriever(split, "near", neighbours=4).for_targets(valid, 6)
    (encoder,) = spy.encoders
    histories = [valid.history(i) for i in range(len(valid))]
    scores = score_all(encoder, encoder.item_matrix(), histories)
    for row, history in zip(scores, histories, strict=True):
        row[history] = -np.inf
    best = np.sort(scores, axis=1)[:, ::-1][:, :6]
    there = np.isfinite(found.scores)
    np.testing.assert_allclose(found.scores[there], best[there], rtol=1e-5)
    monkeypatch.undo()
    plain = retriever(split, "near").for_targets(valid, 6)
    assert not np.array_equal(found.scores, plain.scores)


def test_events_without_a_history_get_no_candidates(toy: Dataset) -> None:
    split = leave_last_out(toy)
    found = retriever(split, "no history").for_training(split.log.start[:-1], 4, 2)
    assert (found.items == -1).all()


def test_candidates_are_kept_in_the_cache(monkeypatch: pytest.MonkeyPatch, toy: Dataset) -> None:
    split = leave_last_out(toy)
    spy = Spy(monkeypatch)
    first = retriever(split, "kept").for_targets(split.valid, 6)
    again = retriever(split, "kept").for_targets(split.valid, 6)
    assert len(spy.trained) == 1
    assert np.array_equal(first.items, again.items)
    assert np.array_equal(first.scores, again.scores)
    fewer = retriever(split, "kept").for_targets(split.valid, 3)
    assert np.array_equal(fewer.items, first.items[:, :3]), "another question, and the same encoder's answer"
    train = {int(i) for i in split.log.item[split.train]}
    assert spy.trained[0] == train, "for held-out targets: every user's training events"


def test_everybodys_encoder_is_trained_once_for_all_sets_of_targets(
    monkeypatch: pytest.MonkeyPatch, toy: Dataset
) -> None:
    split = leave_last_out(toy)
    spy = Spy(monkeypatch)
    one = retriever(split, "once")
    one.for_targets(split.valid, 6)
    found = one.for_targets(split.test, 6)
    assert len(spy.trained) == 1
    one.for_training(targets_of(split), 6, 2)
    assert len(spy.trained) == 3, "and one of each fold, which nobody asks again"
    apart = retriever(split, "each time").for_targets(split.test, 6)
    assert np.array_equal(found.items, apart.items)
    assert np.array_equal(found.scores, apart.scores)


def test_no_more_candidates_than_items(toy: Dataset) -> None:
    split = leave_last_out(toy)
    assert retriever(split, "all").for_targets(split.valid, 500).items.shape == (30, 16)
