"""Each option of the encoder by what it does: how histories are read, how items are met, what is learnt from."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch.nn import functional as F

from penchant.errors import ConfigError, DataError
from penchant.interest.behaviour import Behaviour
from penchant.interest.config import EncoderConfig
from penchant.interest.encoder import InterestEncoder
from penchant.interest.fit import predict
from penchant.interest.index import ExactIndex
from penchant.interest.inputs import Columns
from penchant.interest.losses import Objective, Targets, target_weights
from penchant.interest.search import index_of, search
from penchant.interest.train import Inputs, train_encoder
from penchant.interest.vectors import Scaling

N_ITEMS = 12
SMALL = EncoderConfig(
    dim=16, blocks=1, heads=2, dropout=0.0, max_length=8, epochs=30, patience=30, batch_rows=8, learning_rate=1e-2
)
KINDS = ["transformer", "gru", "mean"]


def config(**changes: Any) -> EncoderConfig:
    return EncoderConfig.model_validate(SMALL.model_dump() | changes)


def train(
    sequences: list[Any], settings: EncoderConfig, text: np.ndarray | None = None, **more: Any
) -> InterestEncoder:
    """The last epoch's encoder."""
    epoch = iter(range(1_000))
    return train_encoder(sequences, N_ITEMS, text, settings, lambda e: float(next(epoch)), **more)[0]


def untrained(settings: EncoderConfig, text: np.ndarray | None = None, **more: Any) -> InterestEncoder:
    """Large random weights, so that everything that is looked at shows."""
    torch.manual_seed(0)
    encoder = InterestEncoder(settings, N_ITEMS, text, **more)
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.5)
    return encoder.eval()


def best(encoder: InterestEncoder, history: Any, k: int = 1) -> list[int]:
    items, _ = search(index_of(encoder), encoder.encode([history]), k)
    return items[0].tolist()


def circles(rng: np.random.Generator, n: int = 60, length: int = 9) -> list[np.ndarray]:
    return [(rng.integers(N_ITEMS) + np.arange(length)) % N_ITEMS for _ in range(n)]


# -- E_u ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("interests", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_causal_and_padding_is_never_seen(kind: str, interests: int) -> None:
    encoder = untrained(config(kind=kind, interests=interests))
    row = np.array([3, 1, 4, 1, 5, 9])
    for place in range(1, len(row)):
        short = encoder.encode([row[:place]])[0]
        changed = row.copy()
        changed[place] = 11
        items = encoder.items()
        with torch.inference_mode():
            whole = encoder(encoder.batch([row]), items)[0, place - 1].numpy()
            other = encoder(encoder.batch([changed]), items)[0].numpy()
        np.testing.assert_allclose(short, whole, atol=1e-5)
        np.testing.assert_allclose(other[place - 1], whole, atol=1e-5)
        assert np.abs(other[place] - encoder(encoder.batch([row]), items)[0, place].detach().numpy()).max() > 1e-3
    together = encoder.encode([row, row[:2]])
    np.testing.assert_allclose(together[1], encoder.encode([row[:2]])[0], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_learns(kind: str, rng: np.random.Generator) -> None:
    # The mean cannot tell order, but the newest item weighs most.
    encoder = train(circles(rng), config(kind=kind, use_text=False))
    hits = [best(encoder, np.array([i, (i + 1) % N_ITEMS]))[0] == (i + 2) % N_ITEMS for i in range(N_ITEMS)]
    assert np.mean(hits) > 0.9


def test_the_recency_weighted_mean_by_hand() -> None:
    encoder = untrained(config(kind="mean", use_text=False, dim=4))
    decay = 0.8
    with torch.inference_mode():
        items = encoder.items()
        x = items[[2, 7, 5]] * 2.0  # sqrt(dim)
        mean = (decay**2 * x[0] + decay * x[1] + x[2]) / (decay**2 + decay + 1)
        expected = encoder.norm(mean).numpy()
    np.testing.assert_allclose(encoder.encode([np.array([2, 7, 5])])[0], expected, atol=1e-5)


# -- several interests ---------------------------------------------------------------------------


def two_tastes(rng: np.random.Generator, n: int = 150) -> list[np.ndarray]:
    """Everybody goes on in one of two of four groups of three items, a coin decides in which."""
    out = []
    for _ in range(n):
        groups = rng.choice(4, size=2, replace=False)
        out.append(np.array([3 * groups[rng.integers(2)] + rng.integers(3) for _ in range(9)]))
    return out


def test_several_interests_lie_apart_and_can_be_named(rng: np.random.Generator) -> None:
    encoder = train(two_tastes(rng), config(use_text=False, interests=2, max_length=16, epochs=40))
    history = np.array([0, 6, 1, 7, 2, 8, 0, 6])  # of the first group and of the third
    vectors = encoder.encode([history])
    assert vectors.shape == (1, 2, 16)
    nearest, _ = search(index_of(encoder), vectors[0], 3)
    groups = [{int(item) // 3 for item in row} for row in nearest]
    assert groups in ([{0}, {2}], [{2}, {0}])


@pytest.mark.parametrize("relevance", ["dot", "mlp"])
@settings(max_examples=15)
@given(seed=st.integers(0, 2**16), interests=st.integers(1, 4), k=st.integers(1, 14))
def test_search_is_the_best_of_all_interests_by_brute_force(relevance: str, seed: int, interests: int, k: int) -> None:
    chosen = config(use_text=False, interests=interests, relevance=relevance, loss="sampled")
    torch.manual_seed(seed)
    encoder = InterestEncoder(chosen, N_ITEMS, None).eval()
    rng = np.random.default_rng(seed)
    histories = [rng.integers(0, N_ITEMS, size=rng.integers(1, 8)) for _ in range(5)]
    interest, vectors = encoder.encode(histories), encoder.item_matrix()
    allowed = rng.random(N_ITEMS) < 0.8
    items, values = search(index_of(encoder), interest, k, exclude=histories, allowed=allowed)
    each = interest.reshape(len(histories), -1, 16)
    for row in range(len(histories)):
        scores = (each[row] @ vectors.T).max(axis=0)
        if relevance == "mlp":
            r = encoder.relevance
            with torch.inference_mode():
                hidden = F.relu(r.of_user(torch.from_numpy(each[row]))[:, None] + r.of_item(torch.from_numpy(vectors)))
                scores = (each[row] @ vectors.T + r.out(hidden)[..., 0].numpy()).max(axis=0)
        scores[~allowed] = -np.inf
        scores[histories[row]] = -np.inf
        order = [i for i in np.argsort(-scores, kind="stable") if scores[i] > -np.inf][:k]
        found = items[row][items[row] >= 0]
        assert len(found) == len(order)
        np.testing.assert_allclose(values[row][: len(order)], scores[order], atol=1e-4)
        np.testing.assert_allclose(scores[found], scores[order], atol=1e-4)


# -- R -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("item", "score"),
    [([0.9, 0.8, 0.7, 0.6, 0.5, 0, 0, 0, 0, 0], 2.55), ([0.1, 0.2, 0.3, 0.4, 0.5, 0, 0, 0, 0, 0], 0.95)],
)
def test_the_worked_example_of_a_dot_product(item: list[float], score: float) -> None:
    encoder = InterestEncoder(config(dim=10), N_ITEMS, None)
    interest = np.array([[0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0]], dtype=np.float32)
    assert encoder.scores(interest, np.array([item], dtype=np.float32))[0, 0] == pytest.approx(score, abs=1e-6)


def test_cosine_asks_for_directions_alone_and_learns_its_temperature(rng: np.random.Generator) -> None:
    encoder = train(circles(rng), config(use_text=False, relevance="cosine"))
    vectors = encoder.item_matrix()
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    interest = encoder.encode([np.array([0]), np.array([5, 6, 7])])
    scale = float(encoder.relevance.log_scale.detach().exp())
    assert scale != pytest.approx(14.0, abs=1e-3)
    np.testing.assert_allclose(np.linalg.norm(interest, axis=1), scale, rtol=1e-4)
    hits = [best(encoder, np.array([i, (i + 1) % N_ITEMS]))[0] == (i + 2) % N_ITEMS for i in range(N_ITEMS)]
    assert np.mean(hits) > 0.9


@pytest.mark.parametrize("changes", [{"relevance": "mlp", "loss": "sampled"}, {"relevance": "mlp", "loss": "bce"}])
def test_a_network_on_both_learns_too(changes: dict[str, Any], rng: np.random.Generator) -> None:
    encoder = train(circles(rng), config(use_text=False, negatives=8, **changes))
    hits = [best(encoder, np.array([i, (i + 1) % N_ITEMS]))[0] == (i + 2) % N_ITEMS for i in range(N_ITEMS)]
    assert np.mean(hits) > 0.8


# -- losses ----------------------------------------------------------------------------------------


def made(settings: EncoderConfig, counts: np.ndarray | None = None) -> tuple[InterestEncoder, Objective, torch.Tensor]:
    encoder = untrained(settings)
    counts = np.arange(1, N_ITEMS + 1) if counts is None else counts
    return encoder, Objective(encoder, counts), encoder.items()


def some_targets(n: int = 6, dim: int = 16) -> Targets:
    torch.manual_seed(1)
    return Targets(torch.randn(n, dim), torch.arange(n) * 2 % N_ITEMS, torch.arange(1.0, n + 1))


@pytest.mark.parametrize("sampling", ["uniform", "popularity"])
@pytest.mark.parametrize("hard", [0, 6])
def test_the_sampled_sum_is_the_whole_sum_in_the_mean(sampling: str, hard: int) -> None:
    """Z of the sampled softmax is unbiased: its mean over many draws is the full softmax's, hard negatives or not."""
    chosen = config(use_text=False, loss="sampled", sampling=sampling, negatives=4, hard_negatives=hard)
    _encoder, objective, items = made(chosen)
    targets = some_targets()
    with torch.inference_mode():
        right = (targets.states * items[targets.item]).sum(-1)
        whole = torch.logsumexp(targets.states @ items.T, dim=1).exp()
        torch.manual_seed(0)
        drawn = []
        for _ in range(3_000):
            negatives, expected = objective._drawn(targets.item)
            found = objective._hard(targets.states, items)
            loss = objective._sampled(
                targets.states, items[targets.item], targets.item, items, negatives, expected, found
            )
            drawn.append((loss + right).exp())
        mean = torch.stack(drawn).mean(0)
    np.testing.assert_allclose(mean.numpy(), whole.numpy(), rtol=0.15)


def test_hard_negatives_are_of_no_part_of_the_catalogue_more_than_of_another() -> None:
    """Each of six states has one best item and a next; of the twelve found any six are taken, the last ones too."""
    chosen = config(use_text=False, loss="sampled", negatives=4, hard_negatives=6)
    _encoder, objective, items = made(chosen)
    states = some_targets().states
    best = {int(i) for i in (states @ items.T).topk(2, dim=1).indices.flatten()}
    torch.manual_seed(0)
    taken = [set(objective._hard(states, items).tolist()) for _ in range(200)]
    assert {len(one) for one in taken} == {min(6, len(best))}
    assert set.union(*taken) == best
    share = {item: np.mean([item in one for one in taken]) for item in best}
    assert max(share.values()) - min(share.values()) < 0.25


def test_with_many_negatives_the_sampled_loss_is_the_full_one() -> None:
    chosen = config(use_text=False, loss="sampled", negatives=200_000)
    _encoder, objective, items = made(chosen)
    targets = some_targets()
    torch.manual_seed(0)
    sampled = float(objective.loss(items, targets).detach())
    logits = targets.states @ items.T
    each = F.cross_entropy(logits, targets.item, reduction="none")
    assert sampled == pytest.approx(float((each * targets.weight).mean().detach()), abs=0.02)


def test_negatives_of_the_step_are_its_other_targets() -> None:
    chosen = config(use_text=False, loss="sampled", sampling="in_batch")
    _encoder, objective, items = made(chosen)
    targets = some_targets()
    counts = np.arange(1, N_ITEMS + 1)
    share = counts / counts.sum()
    expected = []
    for row in range(6):
        logits = (targets.states[row] @ items.T).detach().numpy()
        own = int(targets.item[row])
        terms = [np.exp(logits[other]) / (6 * share[other]) for other in targets.item.tolist() if other != own]
        expected.append(np.log(np.exp(logits[own]) + sum(terms)) - logits[own])
    weight = targets.weight.numpy()
    found = float(objective.loss(items, targets).detach())
    assert found == pytest.approx(float((np.array(expected) * weight).mean()), abs=1e-4)


def test_clicks_by_bce_by_hand() -> None:
    chosen = config(use_text=False, loss="bce", sampling="in_batch")
    _encoder, objective, items = made(chosen)
    targets = some_targets()
    expected = []
    for row in range(6):
        logits = (targets.states[row] @ items.T).detach().numpy()
        own = int(targets.item[row])
        others = [logits[i] for i in targets.item.tolist() if i != own]
        expected.append(np.log1p(np.exp(-logits[own])) + np.mean(np.log1p(np.exp(others))))
    weight = targets.weight.numpy()
    found = float(objective.loss(items, targets).detach())
    assert found == pytest.approx(float((np.array(expected) * weight).mean()), abs=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "sampled"},
        {"loss": "sampled", "sampling": "popularity", "hard_negatives": 4},
        {"loss": "sampled", "sampling": "in_batch"},
        {"loss": "bce"},
    ],
    ids=str,
)
def test_every_loss_learns(changes: dict[str, Any], rng: np.random.Generator) -> None:
    encoder = train(circles(rng), config(use_text=False, negatives=6, **changes))
    hits = [best(encoder, np.array([i, (i + 1) % N_ITEMS]))[0] == (i + 2) % N_ITEMS for i in range(N_ITEMS)]
    assert np.mean(hits) > 0.9


def rated(rng: np.random.Generator, n: int = 80) -> list[Behaviour]:
    """Half of the people like even items (5) and not odd ones (1), half the other way; their first ratings tell."""
    out = []
    for person in range(n):
        item = rng.integers(0, N_ITEMS, size=8).astype(np.int32)
        value = np.where(item % 2 == person % 2, 5.0, 1.0).astype(np.float32)
        out.append(Behaviour(item, (1 + (value == 5)).astype(np.int32)[:, None], None, value))
    return out


def test_ratings_are_learnt_in_their_own_unit(rng: np.random.Generator) -> None:
    chosen = config(use_text=False, loss="mse", inputs=("rating",), epochs=40)
    encoder = train(rated(rng), chosen, inputs=Inputs(columns=[3]))
    history = Behaviour(np.array([0, 1, 2], np.int32), np.array([[2], [1], [2]], np.int32))
    predicted = predict(encoder, [history, history], np.array([4, 5]))
    assert predicted[0] == pytest.approx(5, abs=0.7)
    assert predicted[1] == pytest.approx(1, abs=0.7)
    other = Behaviour(history.item, np.array([[1], [2], [1]], np.int32))
    assert predict(encoder, [other], np.array([4]))[0] == pytest.approx(1, abs=0.7)


def test_clicks_with_labels_are_probabilities(rng: np.random.Generator) -> None:
    labelled = [Behaviour(b.item, b.codes, None, (b.value == 5).astype(np.float32)) for b in rated(rng)]
    chosen = config(use_text=False, loss="bce", value="clicked", inputs=("rating",))
    encoder = train(labelled, chosen, inputs=Inputs(columns=[3]))
    history = Behaviour(np.array([0, 1, 2], np.int32), np.array([[2], [1], [2]], np.int32))
    yes, no = predict(encoder, [history, history], np.array([4, 5]))
    assert 0.8 < yes <= 1
    assert 0 <= no < 0.2
    wrong = [Behaviour(b.item, b.codes, None, b.value) for b in rated(rng)]
    with pytest.raises(ConfigError, match=r"holds [15]"):
        train(wrong, chosen, inputs=Inputs(columns=[3]))
    with pytest.raises(DataError, match="no event has a value"):
        train([np.array([1, 2, 3])], chosen)


def test_weights_give_every_user_and_every_item_the_same_say() -> None:
    user, item = target_weights(config(user_weight=1, item_weight=0.5), [1, 4], np.array([0, 1, 4, 100]))
    np.testing.assert_allclose(user, [1, 0.25])
    np.testing.assert_allclose(item, [1, 1, 0.5, 0.1])
    _, objective, items = made(config(use_text=False))
    targets = some_targets(2)
    each = F.cross_entropy(targets.states @ items.T, targets.item, reduction="none")
    assert float(objective.loss(items, targets).detach()) == pytest.approx(
        float((each[0] + 2 * each[1]).detach() / 2), abs=1e-5
    )


def test_an_item_weight_serves_the_tail(rng: np.random.Generator) -> None:
    """After item 0 comes 1 nine times of ten and 2 once: with weights against popularity 2 gets its share."""
    sequences = [np.array([0, 1 if n % 10 else 2]) for n in range(200)]
    plain, fair = (train(sequences, config(use_text=False, item_weight=w, epochs=20)) for w in (0.0, 1.0))
    gaps = []
    for encoder in (plain, fair):
        scores = encoder.scores(encoder.encode([np.array([0])]), encoder.item_matrix())[0]
        gaps.append(float(scores[1] - scores[2]))
    assert gaps[0] == pytest.approx(np.log(9), abs=0.6)
    assert gaps[1] == pytest.approx(0, abs=0.6)


# -- E_c: text, IDs, and what is cold ---------------------------------------------------------------


def kinds_of_items(rng: np.random.Generator) -> tuple[np.ndarray, list[np.ndarray]]:
    """Items 0-4 are of one kind, 5-9 of another, users stay with one; 10 and 11 are of them and seen by nobody."""
    kinds = rng.standard_normal((2, 8))
    kind = np.array([0] * 5 + [1] * 5 + [0, 1])
    vectors = (kinds[kind] + 0.1 * rng.standard_normal((N_ITEMS, 8))).astype(np.float32)
    text = Scaling.fit(vectors).apply(vectors)
    return text, [rng.permutation(5)[:4] + 5 * (n % 2) for n in range(80)]


@pytest.mark.parametrize("id_dropout", [0.0, 0.3])
def test_a_cold_item_is_found_by_its_text_and_its_id_says_nothing(id_dropout: float, rng: np.random.Generator) -> None:
    text, sequences = kinds_of_items(rng)
    encoder = train(sequences, config(id_dropout=id_dropout, epochs=40), text)
    assert encoder.warm.tolist() == [True] * 10 + [False] * 2
    assert encoder.project is not None
    with torch.inference_mode():
        projected = encoder.project(torch.from_numpy(text)).numpy()
    np.testing.assert_allclose(encoder.item_matrix()[10:], projected[10:], atol=1e-6)
    assert np.abs(encoder.item_matrix()[:10] - projected[:10]).max() > 1e-3
    scores = encoder.scores(encoder.encode([np.array([0, 1]), np.array([5, 6])]), encoder.item_matrix())
    assert scores[0, 10] > scores[0, 11]
    assert scores[1, 11] > scores[1, 10]


def test_ids_are_dropped_in_training_only_and_whole() -> None:
    text = np.random.default_rng(0).standard_normal((N_ITEMS, 5)).astype(np.float32)
    encoder = untrained(config(id_dropout=0.5), text)
    assert encoder.project is not None
    assert encoder.ids is not None
    served = encoder.items().detach()
    torch.testing.assert_close(served, encoder.items().detach())
    encoder.train()
    torch.manual_seed(0)
    rest = (encoder.items() - encoder.project(encoder.text)).detach()
    gone = (rest.abs() < 1e-6).all(dim=1)
    assert 0 < int(gone.sum()) < N_ITEMS
    torch.testing.assert_close(rest[~gone], encoder.ids.weight.detach()[~gone], atol=1e-5, rtol=1e-4)


def test_items_that_nobody_took_are_no_competitors_where_text_speaks_for_them() -> None:
    text = np.random.default_rng(0).standard_normal((N_ITEMS, 5)).astype(np.float32)
    counts = np.array([1] * 10 + [0, 0])
    encoder = untrained(config(), text)
    encoder.warm.copy_(torch.from_numpy(counts > 0))
    items, targets = encoder.items(), some_targets(4)
    each = F.cross_entropy(targets.states @ items[:10].T, targets.item, reduction="none")
    expected = float((each * targets.weight).mean().detach())
    assert float(Objective(encoder, counts).loss(items, targets).detach()) == pytest.approx(expected, abs=1e-5)


def test_new_items_are_served_from_text_and_ids_alone_cannot() -> None:
    rng = np.random.default_rng(0)
    text = rng.standard_normal((N_ITEMS + 2, 5)).astype(np.float32)
    encoder = untrained(config(), text[:N_ITEMS])
    before, history = encoder.item_matrix(), np.array([1, 2])
    old = encoder.encode([history])
    assert encoder.add_items(text[N_ITEMS:]) == N_ITEMS
    after = encoder.item_matrix()
    np.testing.assert_array_equal(after[:N_ITEMS], before)
    assert encoder.project is not None
    with torch.inference_mode():
        np.testing.assert_allclose(after[N_ITEMS:], encoder.project(torch.from_numpy(text[N_ITEMS:])), atol=1e-6)
    np.testing.assert_array_equal(encoder.encode([history]), old)
    assert np.abs(encoder.encode([np.array([1, N_ITEMS])]) - old).max() > 1e-3  # a new item in a history is read
    with pytest.raises(ConfigError, match="IDs alone"):
        untrained(config(use_text=False)).add_items(text[:1])


# -- inputs ------------------------------------------------------------------------------------


def events(**columns: Any) -> pl.DataFrame:
    n = len(next(iter(columns.values())))
    return pl.DataFrame({"user_id": ["u"] * n, "item_id": ["1"] * n, "timestamp": list(range(n))} | columns)


def test_columns_by_hand() -> None:
    seen = events(event_type=["view", "buy", None, "view"], rating=[1.0, 5.0, 3.0, None], device=["a", "b", "a", "a"])
    columns = Columns.fit(seen, config(inputs=("event_type", "rating", "gap", "device")))
    assert [c.kind for c in columns.columns] == ["category", "number", "gap", "category"]
    later = pl.DataFrame(
        {
            "user_id": ["a", "a", "a", "b"],
            "item_id": ["1"] * 4,
            "timestamp": [0, 500_000, 3_500_000, 9_000_000],
            "event_type": ["buy", "view", "gift", None],
            "rating": [1.9, 2.1, 9.0, None],
            "device": ["b", "c", None, "a"],
        }
    )
    codes = columns.codes(later)
    assert codes is not None
    # view is the commonest value; ratings 1, 3, 5 are told apart at 2 and 4; half a second, then three; a new user.
    assert codes.tolist() == [[2, 1, 0, 2], [1, 2, 1, 0], [0, 3, 3, 0], [0, 0, 0, 1]]
    assert all(row.max() < size for row, size in zip(codes.T, columns.sizes, strict=True))


def test_a_column_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="'place' is no column"):
        Columns.fit(events(device=["a"]), config(inputs=("place",)))


def test_a_column_may_be_called_count() -> None:
    columns = Columns.fit(events(count=["few", "many", "many"]), config(inputs=("count",)))
    assert columns.columns[0].values == ["many", "few"]
    with pytest.raises(ConfigError, match="'rating' is no column"):
        Columns.fit(events(device=["a"]), config(loss="mse"))


def test_what_kind_of_event_it_was_decides(rng: np.random.Generator) -> None:
    """The next item is one up after a purchase and one down after a view: only the event's type tells."""
    sequences = []
    for _ in range(120):
        item, types = [int(rng.integers(N_ITEMS))], rng.integers(1, 3, size=9)
        for kind in types[:-1]:
            item.append((item[-1] + (1 if kind == 1 else -1)) % N_ITEMS)
        sequences.append(Behaviour(np.array(item, np.int32), types[:, None].astype(np.int32)))
    encoder = train(sequences, config(use_text=False, inputs=("event_type",)), inputs=Inputs(columns=[3]))
    for item in range(N_ITEMS):
        up, down = (Behaviour(np.array([item], np.int32), np.array([[kind]], np.int32)) for kind in (1, 2))
        assert best(encoder, up) == [(item + 1) % N_ITEMS]
        assert best(encoder, down) == [(item - 1) % N_ITEMS]


def test_the_users_own_words_decide(rng: np.random.Generator) -> None:
    """What somebody writes of an item says which way they go on; the words of the target are never seen."""
    words = np.eye(4, dtype=np.float32)[:2]
    sequences = []
    for _ in range(120):
        item, said = [int(rng.integers(N_ITEMS))], rng.integers(0, 2, size=9)
        for text in said[:-1]:
            item.append((item[-1] + (1 if text else -1)) % N_ITEMS)
        sequences.append(Behaviour(np.array(item, np.int32), None, said[:, None].astype(np.int32)))
    chosen = config(use_text=False, inputs=("review",))
    encoder = train(sequences, chosen, inputs=Inputs(words=words, n_words=1))
    for text, step in ((1, 1), (0, -1)):
        said = Behaviour(np.array([5], np.int32), None, np.array([[text]], np.int32))
        assert best(encoder, said) == [5 + step]
    # A new text near to a known one says the same.
    row = encoder.add_words(np.array([[0.1, 0.9, 0, 0]], np.float32))
    assert best(encoder, Behaviour(np.array([5], np.int32), None, np.array([[row]], np.int32))) == [6]


# -- scaling, bad settings -----------------------------------------------------------------------


def test_whitening_leaves_uncorrelated_directions(rng: np.random.Generator) -> None:
    vectors = (rng.standard_normal((500, 6)) @ rng.standard_normal((6, 6)) + 3).astype(np.float32)
    white = Scaling.fit(vectors, "whiten").apply(vectors)
    np.testing.assert_allclose(white.T @ white / (len(white) - 1), np.eye(6), atol=1e-3)
    scaled = Scaling.fit(vectors).apply(vectors)
    np.testing.assert_allclose(scaled.std(axis=0), 1, atol=1e-3)
    # A direction without variance is left small, not blown up; a field without text is the mean.
    flat = np.concatenate([vectors, vectors[:, :1]], axis=1)
    assert np.abs(Scaling.fit(flat, "whiten").apply(flat)).max() < 100
    vectors[3] = np.nan
    assert (Scaling.fit(vectors).apply(vectors)[3] == 0).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"relevance": "mlp"},
        {"relevance": "mlp", "loss": "softmax"},
        {"hard_negatives": 4},
        {"value": "rating"},
        {"inputs": ("gap", "gap")},
        {"interests": 0},
        {"id_dropout": 1.0},
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        config(**changes)


def test_auto_is_the_full_softmax_until_the_catalogue_is_large() -> None:
    assert config().loss_for(100_000) == "softmax"
    assert config().loss_for(100_001) == "sampled"
    assert config(loss="bce").loss_for(10) == "bce"


def test_a_vector_that_is_not_finite_is_refused() -> None:
    with pytest.raises(DataError, match="item 1"):
        ExactIndex(np.array([[1.0], [np.nan]], dtype=np.float32))
