"""Neighbours: similarities by plain loops, a bonus by its formula, a search that is every score's best, and a life with
the run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tests.conftest import toy_frames
from tests.fake_engine import FakeEngine

from penchant.batch import run
from penchant.data.dataset import Dataset
from penchant.data.split import leave_last_out
from penchant.evaluation.baselines.events import TrainingEvents
from penchant.evaluation.baselines.neighbours import NeighboursConfig
from penchant.evaluation.baselines.neighbours import fit_neighbours as fit_baseline
from penchant.evaluation.systems import Queries
from penchant.interest import neighbours as module
from penchant.interest.beside import fit_beside, fit_neighbours, match_trials
from penchant.interest.config import EncoderConfig
from penchant.interest.encoder import InterestEncoder
from penchant.interest.fit import encoder_ndcg
from penchant.interest.neighbours import WEIGHTS, similar_items
from penchant.interest.search import index_of, score_all, score_some, search
from penchant.interest.train import train_encoder
from penchant.interest.vectors import standardise
from penchant.recommend import Recommender
from penchant.run_folder import FitConfig

N_ITEMS = 20
CONFIG = EncoderConfig(dim=16, blocks=1, heads=2, dropout=0.0, max_length=12, epochs=2, batch_rows=4, neighbours=6)
Sequences = list[np.ndarray]


def similar_by_loops(sequences: Sequences, n_items: int) -> np.ndarray:
    pairs, events = np.zeros((n_items, n_items)), np.zeros(n_items)
    for sequence in sequences:
        for a, i in enumerate(sequence):
            events[i] += 1
            for b in range(a + 1, min(len(sequence), a + 51)):
                if sequence[b] != i:
                    pairs[i, sequence[b]] += 0.9 ** (b - a - 1)
    return (pairs + pairs.T / 2) / (np.sqrt(np.outer(events, events)) + 10)


def cut(similar: np.ndarray, size: int) -> np.ndarray:
    """The largest of each row, of equals the first."""
    out = np.zeros_like(similar)
    for i, row in enumerate(similar):
        best = np.lexsort((np.arange(len(row)), -row))[:size]
        out[i, best] = row[best]
    return out


def s_by_loops(history: list[int], similar: np.ndarray) -> np.ndarray:
    """s of every item."""
    asked: dict[int, float] = {}
    for age, item in enumerate(history[::-1][:10]):
        asked.setdefault(item, 0.8**age)
    return sum((weight * similar[item] for item, weight in asked.items()), np.zeros(len(similar)))


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000), size=st.sampled_from([1, 3, 50]), held=st.sampled_from([7, 10**6]))
def test_similarities_are_their_formula(seed: int, size: int, held: int) -> None:
    rng = np.random.default_rng(seed)
    sequences = [rng.integers(0, 9, size=n) for n in (1, 5, 0, 12, rng.integers(40, 80))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PAIRS", held)  # in one piece or in many
        found = similar_items(sequences, 11, size).toarray()
    np.testing.assert_allclose(found, cut(similar_by_loops(sequences, 11), size), atol=1e-6)


def test_nobody_took_anything_twice() -> None:
    assert similar_items([np.array([3]), np.array([4])], 6, 2).nnz == 0
    assert similar_items([], 6, 2).shape == (6, 6)


def made(rng: np.random.Generator, weight: float = 0.3, **changes: object) -> tuple[InterestEncoder, Sequences]:
    """An untrained encoder whose neighbours, and match, are as fitted, and the sequences they are from."""
    config = CONFIG.model_copy(update=changes)
    text = standardise(rng.standard_normal((N_ITEMS, 9)).astype(np.float32)) if config.use_text else None
    torch.manual_seed(0)
    encoder = InterestEncoder(config, N_ITEMS, text).eval()
    sequences = [rng.choice(N_ITEMS - 4, size=n).astype(np.int32) for n in (6, 9, 4, 7)]
    encoder.warm[-4:] = False
    histories = [sequence[:-1] for sequence in sequences]
    fit_beside(encoder, sequences, histories, np.array([sequence[-1] for sequence in sequences]))
    assert encoder.neighbours is not None
    encoder.neighbours.weight.fill_(weight)
    if encoder.match is not None:
        encoder.match.weight.fill_(0.2)
        encoder.match.shift.fill_(1.5)
    return encoder.eval(), sequences


VARIANTS = [
    {},
    {"use_text": False},
    {"relevance": "cosine"},
    {"interests": 3},
    {"match": 5},
    {"match": 5, "interests": 2},
]


@pytest.mark.parametrize("changes", VARIANTS)
@pytest.mark.parametrize("history", [[3], [1, 2, 17, 5], [*range(12), 3]])
def test_scores_are_both_added(changes: dict[str, object], history: list[int], rng: np.random.Generator) -> None:
    encoder, sequences = made(rng, **changes)
    interest, items = encoder.encode([np.array(history)]), encoder.item_matrix()
    own = encoder.scores(interest, items)[0].astype(np.float64)
    similar = cut(similar_by_loops(sequences, N_ITEMS), 6)
    s = s_by_loops(history, similar)
    scale = 1.0
    if not encoder.config.match:
        each = interest[0].reshape(-1, encoder.width) @ items[encoder.warm.numpy()].T
        scale = float(each.std(axis=1).mean())
    assert encoder.neighbours is not None
    usual = float(encoder.neighbours.usual)
    if changes == {}:
        every = [s_by_loops(sequence[:-1].tolist(), similar).std() for sequence in sequences]
        assert usual == pytest.approx(np.median(every), rel=1e-5)
    wanted = own + 0.3 * scale * s / max(s.std(), usual)
    np.testing.assert_allclose(score_all(encoder, items, [np.array(history)])[0], wanted, atol=2e-4)
    some = np.array([4, 0, 19])
    np.testing.assert_allclose(score_some(encoder, items, [np.array(history)], [some])[0], wanted[some], atol=2e-4)
    encoder.neighbours.weight.zero_()
    np.testing.assert_array_equal(score_all(encoder, items, [np.array(history)])[0], own.astype(np.float32))


@pytest.mark.parametrize("changes", VARIANTS)
@pytest.mark.parametrize("kind", ["exact", "hnsw"])
@pytest.mark.parametrize("filtered", [False, True])
def test_a_search_finds_the_best_of_all_scores(
    changes: dict[str, object], kind: str, filtered: bool, rng: np.random.Generator
) -> None:
    encoder, _ = made(rng, 0.8, **changes)
    index = index_of(encoder, kind)  # type: ignore[arg-type]
    index.delete(np.array([2]))
    histories = [rng.integers(N_ITEMS, size=n).astype(np.int32) for n in (1, 3, 11, 2, 5)]
    exclude = histories if filtered else None
    allowed = rng.random(N_ITEMS) < 0.7 if filtered else None
    interest = encoder.encode(histories)
    bonus = encoder.bonus(histories, interest)
    items, values = search(index, interest, 6, exclude=exclude, allowed=allowed, bonus=bonus)
    scores = score_all(encoder, encoder.item_matrix(), histories)
    scores[:, 2] = -np.inf
    if allowed is not None:
        scores[:, ~allowed] = -np.inf
        for row, history in enumerate(histories):
            scores[row, history] = -np.inf
    assert not np.array_equal(items, search(index, interest, 6, exclude=exclude, allowed=allowed)[0]), "it has a say"
    for row, mine in enumerate(scores):
        best = [item for item in np.lexsort((np.arange(N_ITEMS), -mine))[:6] if np.isfinite(mine[item])]
        assert items[row].tolist() == best + [-1] * (6 - len(best))
        np.testing.assert_allclose(values[row, : len(best)], mine[best], atol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"interests": 3}, {"match": 5}, {"match": 5, "cold_price": 0.5}])
def test_what_a_trial_finds_is_what_is_served(changes: dict[str, object], rng: np.random.Generator) -> None:
    encoder, sequences = made(rng, **changes)
    histories = [rng.choice(N_ITEMS, size=n, replace=False).astype(np.int32) for n in (1, 3, 11, 2, 0, 5) * 8]
    target = np.array([rng.choice(np.setdiff1d(np.arange(N_ITEMS), history)) for history in histories])
    found = fit_neighbours(encoder, sequences, histories, target)
    assert found is not None
    assert encoder.neighbours is not None
    assert list(found) == [0.0, *WEIGHTS]
    chosen = float(encoder.neighbours.weight)
    assert found[min(found, key=lambda weight: abs(weight - chosen))] == max(found.values())
    for weight, gain in found.items():
        encoder.neighbours.weight.fill_(weight)
        assert gain == pytest.approx(encoder_ndcg(encoder, histories, target), abs=1e-6)
    if encoder.match is None:
        return
    # The match is chosen beside the neighbours.
    encoder.neighbours.weight.fill_(0.3)
    trials = match_trials(encoder, histories, target)
    assert trials is not None
    for one in trials.found(len(histories)):
        encoder.match.weight.fill_(one.weight)
        encoder.match.shift.fill_(one.shift)
        assert one.all == pytest.approx(encoder_ndcg(encoder.eval(), histories, target), abs=1e-6)
    fit_beside(encoder, sequences, histories, target)
    assert float(encoder.neighbours.weight) == pytest.approx(chosen), "chosen first, whatever the match was"


def test_rare_pairs_are_remembered(rng: np.random.Generator) -> None:
    """Item 2p is followed by 2p + 1, in two histories each among popular ones: too rare to be learnt in two epochs."""
    sequences = []
    for pair in range(5, 40):
        for _ in range(2):
            popular = rng.integers(0, 10, size=6)
            sequences.append(np.concatenate([popular[:3], [2 * pair, 2 * pair + 1], popular[3:]]).astype(np.int32))
    encoder, _ = train_encoder(sequences, 80, None, CONFIG.model_copy(update={"use_text": False}), lambda e: 0.0)
    histories = [np.array([1, 2, 2 * pair], dtype=np.int32) for pair in range(5, 40)]
    target = np.array([2 * pair + 1 for pair in range(5, 40)])
    found = fit_neighbours(encoder, sequences, histories, target)
    assert found is not None
    assert max(found.values()) > 5 * found[0.0] > 0
    single = [sequence[:1] for sequence in sequences]
    assert fit_neighbours(encoder, single, histories, target) == dict.fromkeys(found, found[0.0])
    assert float(encoder.neighbours.weight) == 0, "what says nothing has no say"  # type: ignore[union-attr]
    assert fit_neighbours(encoder, sequences, [np.zeros(0, dtype=np.int32)], np.array([1])) is None


TOY = FitConfig(encoder=CONFIG.model_copy(update={"epochs": 3}), candidates=4, validation_users=6, max_history=6)


@pytest.mark.parametrize("index", ["exact", "hnsw"])
@pytest.mark.parametrize("match", [0, 4])
def test_it_is_saved_served_and_lives_with_the_run(index: str, match: int, tmp_path: Path) -> None:
    encoder = TOY.encoder.model_copy(update={"match": match})
    config = TOY.model_copy(update={"index": index, "encoder": encoder})
    fitted = Recommender.fit(leave_last_out(Dataset.read(*toy_frames())), FakeEngine(), config)
    assert fitted.encoder.neighbours is not None
    fitted.encoder.neighbours.weight.fill_(2.0)  # whatever validation chose
    fitted.save(tmp_path / "run")
    model = Recommender.load(tmp_path / "run", FakeEngine())
    users = [f"u{i}" for i in range(8)]
    before = model.recommend(users, k=5, method="retrieve")
    assert before.equals(fitted.recommend(users, k=5, method="retrieve"))
    fitted.encoder.neighbours.weight.zero_()
    assert not before.equals(fitted.recommend(users, k=5, method="retrieve"))

    # In a batch it is the same; a pair's score is that of the list.
    pl.DataFrame({"user_id": users}).write_parquet(tmp_path / "users.parquet")
    run(model, tmp_path / "batch", tmp_path / "users.parquet", k=5, method="retrieve")
    made = pl.read_parquet(tmp_path / "batch" / "latest" / "parts" / "*.parquet")
    assert made["item_id"].to_list() == before["item_id"].to_list()
    before.select("user_id", "item_id").write_parquet(tmp_path / "pairs.parquet")
    run(model, tmp_path / "scores", tmp_path / "pairs.parquet", job="score", method="retrieve")
    scored = pl.read_parquet(tmp_path / "scores" / "latest" / "parts" / "*.parquet")
    np.testing.assert_allclose(scored["score"].to_numpy(), before["score"].to_numpy(), atol=1e-4)

    # A new item has no neighbours, and its like in a history asks nobody; what is left of the history does.
    same = model.items.row(2, named=True)
    model.add_items([{**same, "item_id": "again", "title": same["title"] + "!"}])
    assert before["item_id"].to_list() == model.recommend(
        users, k=5, method="retrieve", deny=["again"]
    )["item_id"].to_list()  # fmt: skip
    history = [*model.items["item_id"][:2], "again"]
    found = model.recommend(history=history, k=5, method="retrieve")
    again = Recommender.load(tmp_path / "run", FakeEngine())
    same_again = again.recommend(history=history, k=5, method="retrieve")
    assert same_again["item_id"].equals(found["item_id"])
    np.testing.assert_allclose(same_again["score"], found["score"], atol=1e-5)


def test_a_new_event_brings_its_neighbours_at_once() -> None:
    model = Recommender.fit(leave_last_out(Dataset.read(*toy_frames())), FakeEngine(), TOY)
    near = model.encoder.neighbours
    assert near is not None
    near.weight.fill_(1e5)  # nothing else counts
    similar = near.similar().toarray()
    taken = int(similar.max(axis=1).argmax())
    user = "u0"
    model.update(user, [{"item_id": model.items["item_id"][taken], "timestamp": 10**9}])
    found = model.recommend([user], k=3, method="retrieve", include_seen=True)
    s = s_by_loops(model._behaviours[user].item.tolist(), similar)
    best = np.lexsort((np.arange(len(s)), -s))[:3]
    assert found["item_id"].to_list() == [model.items["item_id"][int(i)] for i in best]


def test_alone_it_is_a_baseline(rng: np.random.Generator) -> None:
    split = leave_last_out(Dataset.read(*toy_frames()))
    events = TrainingEvents.of(split)
    system = fit_baseline(events, NeighboursConfig(size=3))
    similar = cut(similar_by_loops(events.sequences(), events.n_items), 3)
    histories = [np.array([1, 5, 5, 2], dtype=np.int32), np.zeros(0, dtype=np.int32)]
    queries = Queries(np.zeros(2, dtype=np.int32), histories, np.zeros(2, dtype=np.int64))
    scores = system.scores(queries)
    s = s_by_loops([1, 5, 5, 2], similar)
    np.testing.assert_allclose(scores[0][s > 0], s[s > 0], atol=1e-6)
    assert scores[0][s == 0].max(initial=-1) < 0, "what has no evidence stands behind"
    np.testing.assert_array_equal(scores[1], events.counts)


@pytest.mark.parametrize("changes", [{"relevance": "mlp", "loss": "sampled"}, {"loss": "mse"}])
def test_settings_that_do_not_fit_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="added to a dot product"):
        EncoderConfig.model_validate({"neighbours": 8} | changes)
