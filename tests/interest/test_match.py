"""Text match: one dot product that is two scores fused, its weight chosen on validation."""

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
from penchant.interest.beside import fit_match, match_trials
from penchant.interest.config import EncoderConfig
from penchant.interest.encoder import InterestEncoder
from penchant.interest.fit import encoder_ndcg
from penchant.interest.match import SHIFTS, WEIGHTS, TextMatch, Trials
from penchant.interest.train import train_encoder
from penchant.interest.vectors import standardise
from penchant.recommend import Recommender
from penchant.run_folder import FitConfig

N_ITEMS, N_COLD = 14, 4
CONFIG = EncoderConfig(dim=16, blocks=1, heads=2, dropout=0.0, max_length=12, epochs=2, batch_rows=4, match=6)


def matched(rng: np.random.Generator, weight: float = 0.3, shift: float = 1.5, **changes: object) -> InterestEncoder:
    """An untrained encoder, the last items cold, whose match is as fitted with these."""
    config = CONFIG.model_copy(update=changes)
    text = standardise(rng.standard_normal((N_ITEMS, 9)).astype(np.float32))
    torch.manual_seed(0)
    encoder = InterestEncoder(config, N_ITEMS, text).eval()
    encoder.warm[-N_COLD:] = False
    assert encoder.match is not None
    encoder.match.learn(torch.from_numpy(text), torch.from_numpy(encoder.item_matrix())[:-N_COLD])
    encoder.match.weight.fill_(weight)
    encoder.match.shift.fill_(shift)
    return encoder.eval()


def by_hand(encoder: InterestEncoder, history: list[int], weight: float, shift: float) -> np.ndarray:
    """The fused scores of every item, by the formulas: (n_items,)."""
    assert encoder.match is not None
    assert encoder.text is not None
    text, warm = encoder.text.numpy().astype(np.float64), encoder.warm.numpy()
    # Directions of most variance, whitened.
    variance, axes = np.linalg.eigh(text.T @ text / len(text))
    best = np.argsort(-variance)[: encoder.config.match]
    x = text @ axes[:, best] / np.sqrt(variance[best])
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    newest = history[-10:]
    m = sum(0.85 ** (len(newest) - 1 - place) * x[item] for place, item in enumerate(newest))
    likeness = x @ m
    likeness /= np.sqrt(np.mean(likeness**2))
    encoder.match.weight.zero_()
    encoder.eval()
    interests = encoder.encode([np.array(history)]).reshape(-1, encoder.config.dim)
    found = []
    for own in (interests @ encoder.item_matrix().T).astype(np.float64):
        scaled = (own - own[warm].mean()) / own[warm].std()
        scaled[~warm] = shift
        found.append(scaled + weight * likeness)
    return np.max(found, axis=0)


@pytest.mark.parametrize("changes", [{}, {"relevance": "cosine"}, {"interests": 3}, {"use_ids": False}])
@pytest.mark.parametrize("history", [[3], [1, 2, 12, 5], list(range(12))])
def test_the_dot_product_is_both_scores_fused(
    changes: dict[str, object], history: list[int], rng: np.random.Generator
) -> None:
    encoder = matched(rng, **changes)
    users = encoder.encode([np.array(history), np.array([0])])
    items = encoder.item_matrix()
    assert users.shape[-1] == items.shape[1] == encoder.width == 16 + 2 + 6
    found = encoder.scores(users, items)[0]
    np.testing.assert_allclose(found, by_hand(encoder, history, 0.3, 1.5), atol=2e-4)


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), price=st.sampled_from([0.0, 0.1, 0.5]))
def test_what_is_chosen_by_plain_loops(seed: int, price: float) -> None:
    rng = np.random.default_rng(seed)
    n, n_items = 12, 15
    own = rng.standard_normal((n, n_items)).astype(np.float32)
    match = rng.standard_normal((n, n_items)).astype(np.float32)
    target, cold = rng.integers(n_items, size=n), rng.random(n_items) < 0.4
    own[rng.random((n, n_items)) < 0.1] = -np.inf
    match[np.arange(n), target] += 1  # so that it is worth something
    trials = Trials(cold)
    trials.add(own[:5], own[:5], match[:5], target[:5])
    trials.add(own[5:], own[5:], match[5:], target[5:])
    found = {}
    shifts = SHIFTS if cold.any() else (1.5,)
    for weight, shift in [(0.0, 0.0), *((w, s) for w in WEIGHTS for s in shifts)]:
        gains = []
        for row in range(n):
            scores = {}
            for i in range(n_items):
                if np.isfinite(own[row, i]):
                    base = own[row, i] if not (weight and cold[i]) else np.float32(shift)
                    scores[i] = base + np.float32(weight) * match[row, i] if weight else base
            mine = scores.get(int(target[row]))
            rank = 99 if mine is None else sum(score >= mine for score in scores.values())
            gains.append(1 / np.log2(1 + rank) if rank <= 10 else 0.0)
        of_cold = [gain for gain, item in zip(gains, target, strict=True) if cold[item]]
        found[weight, shift] = (sum(gains) / (n + 2), float(np.mean(of_cold)) if of_cold else 0.0)
    chosen = trials.best(n + 2, price)  # two more had no history
    best = max(gain for gain, _ in found.values())
    own_gain, own_cold = found[chosen.weight, chosen.shift]
    assert chosen.all == pytest.approx(own_gain)
    if price:
        within = [(c, g) for g, c in found.values() if g >= (1 - price) * best]
        assert (own_cold, own_gain) == pytest.approx(max(within))
    else:
        assert own_gain == pytest.approx(best)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_length": 2},
        {"relevance": "cosine"},
        {"interests": 3},
        {"use_ids": False},
        {"match": 3, "kind": "mean"},
    ],
)
def test_what_a_trial_finds_is_what_is_served(changes: dict[str, object], rng: np.random.Generator) -> None:
    encoder = matched(rng, **changes)
    # What the match standardises by is learnt again, from the warm items alone.
    histories = [rng.choice(N_ITEMS, size=n, replace=False).astype(np.int32) for n in (1, 3, 11, 2, 0, 5) * 8]
    target = np.array([rng.choice(np.setdiff1d(np.arange(N_ITEMS), history)) for history in histories])
    trials = match_trials(encoder, histories, target)
    assert trials is not None
    assert encoder.match is not None
    found = trials.found(len(histories))
    assert len(found) == 1 + len(WEIGHTS) * len(SHIFTS)
    for one in found:
        encoder.match.weight.fill_(one.weight)
        encoder.match.shift.fill_(one.shift)
        encoder.eval()
        assert one.all == pytest.approx(encoder_ndcg(encoder, histories, target), abs=1e-6)
    encoder.match.weight.fill_(0.3)
    fused = encoder.scores(encoder.encode(histories[2:3]), encoder.item_matrix())[0]
    shift = float(encoder.match.shift)
    np.testing.assert_allclose(fused, by_hand(encoder, histories[2].tolist(), 0.3, shift), atol=2e-4)
    # What is chosen is served, and what the configuration pays for cold items is paid.
    for price in (0.0, 0.9):
        encoder.config = encoder.config.model_copy(update={"cold_price": price})
        chosen = fit_match(encoder, histories, target)
        assert chosen == trials.best(len(histories), price)
        assert chosen.all == pytest.approx(encoder_ndcg(encoder.eval(), histories, target), abs=1e-6)
    # Another choice of what may come is another task.
    nothing = [history[:0] for history in histories]
    free = match_trials(encoder, histories, target, nothing)
    assert free is not None
    assert free.found(len(histories)) != found


def test_a_price_is_paid_for_cold_items_only(rng: np.random.Generator) -> None:
    match = rng.standard_normal((40, 12)).astype(np.float32)
    target = rng.integers(12, size=40)
    match[np.arange(40), target] += 2
    own = rng.standard_normal((40, 12)).astype(np.float32)
    cold = np.zeros(12, dtype=bool)
    for nobody_asks in (cold, np.arange(12) == 12 - 1):
        kept = target != 11
        trials = Trials(nobody_asks)
        trials.add(own[kept], own[kept], match[kept], target[kept])
        assert trials.best(40, 0.3) == trials.best(40, 0.0)
    assert trials.best(40, 0.0).weight > 0
    warm = Trials(cold)
    warm.add(own, own, match, target)
    assert warm.best(40, 0.0).shift == 1.5, "items added later are not buried"


def test_an_item_added_later_is_like_what_it_copies(rng: np.random.Generator) -> None:
    """Directions that the fitted items do not vary in decide nothing."""
    text = torch.from_numpy(standardise(rng.standard_normal((40, 60)).astype(np.float32)))
    match = TextMatch(60, 4, 60)
    match.learn(text, torch.from_numpy(rng.standard_normal((40, 4)).astype(np.float32)))
    copy = text + 0.1 * torch.from_numpy(rng.standard_normal((40, 60)).astype(np.float32))
    assert (match.texts(text) * match.texts(copy)).sum(-1).min() > 0.95
    match.learn(text, torch.zeros(1, 4))  # one warm item: nothing to be standardised by
    scaled, _ = match.standardised(torch.ones(1, 4))
    assert scaled.abs().max() == 1


def planted(rng: np.random.Generator) -> tuple[np.ndarray, list[np.ndarray]]:
    """Twenty pairs of items with like texts, walked pair by pair in any order: what comes next is a text's like.

    Of the last five pairs nobody has the second item.
    """
    base = rng.standard_normal((20, 12)).astype(np.float32)
    text = np.repeat(base, 2, axis=0) + 0.05 * rng.standard_normal((40, 12)).astype(np.float32)
    sequences = [
        np.concatenate([[2 * pair, 2 * pair + 1] for pair in rng.permutation(15)[:6]]).astype(np.int32)
        for _ in range(60)
    ]
    sequences += [np.array([2 * pair, 0, 1], dtype=np.int32) for pair in range(15, 20)]
    return standardise(text), sequences


def test_items_that_nobody_took_are_found_by_their_text(rng: np.random.Generator) -> None:
    text, sequences = planted(rng)
    falling = iter(range(CONFIG.epochs, 0, -1))  # so the first epoch is kept, when IDs alone know little
    encoder, _ = train_encoder(
        sequences, 40, text, CONFIG.model_copy(update={"match": 12}), lambda e: float(next(falling))
    )
    assert encoder.width == 16, "not yet chosen"
    histories = [np.array([0, 1, 2 * pair], dtype=np.int32) for pair in range(20)]
    target = np.array([2 * pair + 1 for pair in range(20)])
    chosen = fit_match(encoder, histories[2:], target[2:])
    assert chosen is not None
    assert chosen.weight > 0
    assert chosen.cold is not None
    assert encoder.width == 16 + 2 + 12
    fused = np.argsort(-encoder.scores(encoder.encode(histories), encoder.item_matrix()), axis=1)[:, :5]
    assert all(2 * pair + 1 in fused[pair] for pair in range(15, 20))


def test_text_that_says_nothing_is_given_no_say(rng: np.random.Generator) -> None:
    text = standardise(rng.standard_normal((12, 8)).astype(np.float32))
    sequences = [np.arange(start, start + 8, dtype=np.int32) % 12 for start in range(12)] * 6
    config = CONFIG.model_copy(update={"epochs": 30, "learning_rate": 1e-2})
    encoder, _ = train_encoder(sequences, 12, text, config, lambda e: 0.0)
    histories = [sequence[:5] for sequence in sequences[:12]]
    chosen = fit_match(encoder, histories, np.array([sequence[5] for sequence in sequences[:12]]))
    assert chosen is not None
    assert chosen.weight == 0
    assert encoder.width == 16
    assert fit_match(encoder, [np.zeros(0, dtype=np.int32)], np.array([1])) is None, "nobody to choose by"


TOY = FitConfig(encoder=CONFIG.model_copy(update={"epochs": 3}), candidates=4, validation_users=6, max_history=6)


@pytest.fixture(scope="module")
def fitted() -> Recommender:
    model = Recommender.fit(leave_last_out(Dataset.read(*toy_frames())), FakeEngine(), TOY)
    assert model.encoder.match is not None
    model.encoder.match.weight.fill_(0.5)  # whatever validation chose
    model.encoder.match.shift.fill_(1.0)
    return model


@pytest.mark.parametrize("index", ["exact", "hnsw"])
def test_it_is_saved_served_and_lives_with_the_run(fitted: Recommender, index: str, tmp_path: Path) -> None:
    fitted.config = fitted.config.model_copy(update={"index": index})
    fitted.save(tmp_path / "run")
    model = Recommender.load(tmp_path / "run", FakeEngine())
    width = 16 + 2 + model.encoder.match.map.shape[1]  # type: ignore[union-attr]
    assert model.encoder.width == model.index.vectors.shape[1] == width
    users = [f"u{i}" for i in range(8)]
    before = model.recommend(users, k=5, method="retrieve")

    # What it knows of the newest items it knows of new ones too, at once and after loading again.
    same = model.items.row(2, named=True)
    model.add_items([{**same, "item_id": "again", "title": same["title"] + "!"}])
    assert model.index.vectors[-1, :18].tolist() == [0.0] * 17 + [1.0], "cold: no R, and the shift in its place"
    history = [model.items["item_id"][2]]
    found = model.recommend(history=history, k=3, method="retrieve", unique_titles=False)
    assert "again" in found["item_id"].to_list(), "as like the newest item as can be"
    again = Recommender.load(tmp_path / "run", FakeEngine())
    assert again.recommend(history=history, k=3, method="retrieve", unique_titles=False).equals(found)
    assert before["item_id"].to_list() == again.recommend(
        users, k=5, method="retrieve", deny=["again"]
    )["item_id"].to_list()  # fmt: skip

    vectors, named = model.interests("u0", n=3)
    assert vectors.shape == (1, width)
    assert len(named) == 3
    assert (model.index_recall(n=5, k=3) is None) == (index == "exact")
    pl.DataFrame({"user_id": users}).write_parquet(tmp_path / "users.parquet")
    run(model, tmp_path / "vectors", tmp_path / "users.parquet", job="embed-users")
    made = pl.read_parquet(tmp_path / "vectors" / "latest" / "parts" / "*.parquet")
    np.testing.assert_allclose(made["vector"].to_numpy()[0], vectors[0], atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"use_text": False}, "give use_text"),
        ({"relevance": "mlp", "loss": "sampled"}, "second dot product"),
        ({"loss": "mse"}, "second dot product"),
        ({"match": 0, "cold_price": 0.1}, "paid for match"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, object], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        EncoderConfig.model_validate({"match": 8} | changes)


def test_vectors_are_not_whitened_twice() -> None:
    """Of whitened vectors no direction has more variance than another: which are compared would be chance."""
    with pytest.raises(ValidationError, match="whitens by itself"):
        FitConfig(encoder=CONFIG, scale="whiten")
