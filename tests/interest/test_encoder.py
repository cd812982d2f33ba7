"""The interest encoder: what it may see, what it learns, and what makes it the same again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from penchant.errors import ConfigError, DataError, ModelError
from penchant.interest.behaviour import Behaviour, pad
from penchant.interest.config import EncoderConfig
from penchant.interest.encoder import InterestEncoder
from penchant.interest.index import ExactIndex
from penchant.interest.train import train_encoder, windows
from penchant.interest.vectors import standardise

N_ITEMS = 12
SMALL = EncoderConfig(dim=16, blocks=2, heads=2, dropout=0.0, max_length=8, epochs=2, batch_rows=4)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Models this small run no faster on more threads, and far slower where the cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def never(encoder: InterestEncoder) -> float:
    """No epoch is better than the first."""
    return 0.0


def better_each_time() -> Callable[[InterestEncoder], float]:
    """The last epoch is kept."""
    epochs = count(1)
    return lambda encoder: float(next(epochs))


def loud(config: EncoderConfig = SMALL, text: np.ndarray | None = None, seed: int = 0) -> InterestEncoder:
    """An untrained encoder whose weights are large, so that everything it looks at shows."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = InterestEncoder(config, N_ITEMS, text)
        with torch.no_grad():
            for parameter in encoder.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.5)
    return encoder.eval()


def interests(encoder: InterestEncoder, rows: list[list[int]]) -> np.ndarray:
    """Interest after each event of equally long rows: (n, length, dim)."""
    with torch.inference_mode():
        return encoder(pad(as_rows(rows)), encoder.items()).numpy()


def as_rows(rows: list[list[int]]) -> list[np.ndarray]:
    return [np.array(row, dtype=np.int32) for row in rows]


# -- windows -----------------------------------------------------------------------------------


def test_windows_by_hand() -> None:
    cut = [w.tolist() for w in windows(np.arange(8), 3)]
    assert cut == [[4, 5, 6, 7], [1, 2, 3, 4], [0, 1]]


@settings(max_examples=200)
@given(n=st.integers(0, 60), length=st.integers(1, 20))
def test_every_event_but_the_first_is_a_target_exactly_once(n: int, length: int) -> None:
    sequence = np.arange(100, 100 + n)  # each event names its place
    cut = windows(sequence, length)
    assert sorted(int(t) for w in cut for t in w[1:]) == list(range(101, 100 + n))
    for w in cut:
        assert 2 <= len(w) <= length + 1
        assert (np.diff(w) == 1).all()  # neighbours in the sequence, in its order
    if n > 1:
        assert cut[0][-1] == 99 + n  # counted from the newest end
        assert len(cut[0]) == min(n, length + 1)


# -- what an interest vector sees --------------------------------------------------------------


def test_a_later_event_changes_no_earlier_interest_and_an_earlier_one_does() -> None:
    encoder = loud()
    row = [3, 1, 4, 1, 5, 9, 2, 6]
    base = interests(encoder, [row])[0]
    for place in range(len(row)):
        changed = row.copy()
        changed[place] = 11
        other = interests(encoder, [changed])[0]
        np.testing.assert_allclose(other[:place], base[:place], atol=1e-6)
        moved = np.abs(other[place:] - base[place:]).max(axis=1)
        assert (moved > 1e-3).all()


def test_the_order_of_earlier_events_matters() -> None:
    # In one block the last event sees the earlier ones as a set, but for their positions.
    encoder = loud(SMALL.model_copy(update={"blocks": 1}))
    a, b = encoder.encode(as_rows([[1, 2, 3], [2, 1, 3]]))
    assert np.abs(a - b).max() > 1e-3


@pytest.mark.parametrize("filler", [0, 7])
def test_right_padding_changes_nothing(filler: int) -> None:
    encoder = loud()
    short = interests(encoder, [[5, 2, 8]])[0]
    padded = interests(encoder, [[5, 2, 8, *[filler] * 5]])[0]
    np.testing.assert_allclose(padded[:3], short, atol=1e-5)


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 12), batch=st.integers(1, 5))
def test_who_else_is_in_the_batch_changes_nothing(seed: int, n: int, batch: int) -> None:
    rng = np.random.default_rng(seed)
    encoder = loud()
    histories = [rng.integers(N_ITEMS, size=rng.integers(1, 15)).astype(np.int32) for _ in range(n)]
    together = encoder.encode(histories, batch=batch)
    alone = np.concatenate([encoder.encode([h]) for h in histories])
    assert (together.shape, together.dtype) == ((n, SMALL.dim), np.float32)
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_only_the_newest_max_length_events_are_read() -> None:
    encoder = loud()
    long = list(range(12))
    a, b, c = encoder.encode(as_rows([long, long[-8:], long[-7:]]))
    np.testing.assert_allclose(a, b, atol=1e-6)
    assert np.abs(a - c).max() > 1e-3


def test_encode_is_the_interest_after_the_last_event_without_dropout() -> None:
    encoder = loud(SMALL.model_copy(update={"dropout": 0.5}))
    encoder.train()
    got = encoder.encode(as_rows([[3, 1, 4], [2]]))
    np.testing.assert_allclose(got[0], interests(encoder, [[3, 1, 4]])[0, -1], atol=1e-5)
    np.testing.assert_allclose(got[1], interests(encoder, [[2]])[0, -1], atol=1e-5)


def test_nobody_to_encode() -> None:
    assert loud().encode([]).shape == (0, SMALL.dim)


def test_histories_are_left_as_they_were_even_when_read_only() -> None:
    history = np.array([1, 2, 3])
    history.flags.writeable = False
    loud().encode([history])
    assert history.tolist() == [1, 2, 3]


def test_pad_by_hand() -> None:
    plain = pad(as_rows([[4, 5], [6], [1, 2, 3]]))
    assert plain.item.tolist() == [[4, 5, 0], [6, 0, 0], [1, 2, 3]]
    assert plain.length.tolist() == [2, 1, 3]
    assert plain.real.tolist() == [[True, True, False], [True, False, False], [True, True, True]]
    assert (plain.codes, plain.words, plain.value) == (None, None, None)
    more = Behaviour(
        np.array([4, 5], np.int32),
        np.array([[1, 2], [3, 4]], np.int32),
        np.array([[7], [-1]], np.int32),
        np.array([0.5, np.nan], np.float32),
    )
    batch = pad([more, np.array([6, 1, 2])], 2, 1, value=True)
    assert batch.codes is not None
    assert batch.words is not None
    assert batch.value is not None
    assert batch.codes.tolist() == [[[1, 2], [3, 4], [0, 0]], [[0, 0]] * 3]
    assert batch.words.tolist() == [[[7], [-1], [-1]], [[-1]] * 3]
    np.testing.assert_array_equal(batch.value.numpy(), [[0.5, np.nan, np.nan], [np.nan] * 3])


# -- items -------------------------------------------------------------------------------------


def test_with_ids_alone_an_item_is_its_embedding() -> None:
    config = SMALL.model_copy(update={"use_text": False})
    encoder = loud(config)
    assert encoder.ids is not None
    np.testing.assert_array_equal(encoder.item_matrix(), encoder.ids.weight.detach().numpy())


def test_with_both_an_item_is_the_sum_and_with_text_alone_the_projection(rng: np.random.Generator) -> None:
    text = rng.standard_normal((N_ITEMS, 5)).astype(np.float32)
    both = loud(SMALL, text)
    assert both.project is not None
    assert both.ids is not None
    with torch.inference_mode():
        projected = both.project(torch.from_numpy(text)).numpy()
    np.testing.assert_allclose(both.item_matrix(), projected + both.ids.weight.detach().numpy(), atol=1e-5)
    alone = loud(SMALL.model_copy(update={"use_ids": False}), text)
    assert alone.ids is None
    assert not any("text" in name for name in alone.state_dict())


def test_the_worked_example_is_a_dot_product_of_interest_and_item() -> None:
    interest = np.array([[0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0]], dtype=np.float32)
    item = np.array([[0.9, 0.8, 0.7, 0.6, 0.5, 0, 0, 0, 0, 0]], dtype=np.float32)
    _, score = ExactIndex(item).search(interest, 1)
    assert score[0, 0] == pytest.approx(2.55, abs=1e-6)


# -- learning ----------------------------------------------------------------------------------


def circle(n_users: int, length: int, rng: np.random.Generator) -> list[np.ndarray]:
    return [(rng.integers(N_ITEMS) + np.arange(length)) % N_ITEMS for _ in range(n_users)]


LEARNING = EncoderConfig(
    dim=16, blocks=1, heads=2, dropout=0.1, max_length=8, epochs=25, patience=25, batch_rows=8, learning_rate=1e-2
)


@pytest.mark.parametrize("kind", ["ids", "text", "both"])
def test_a_deterministic_pattern_is_learnt(kind: str, rng: np.random.Generator) -> None:
    config = LEARNING.model_copy(update={"use_ids": kind != "text", "use_text": kind != "ids"})
    text = None if kind == "ids" else rng.standard_normal((N_ITEMS, 10)).astype(np.float32)
    encoder, log = train_encoder(circle(40, 9, rng), N_ITEMS, text, config, better_each_time())
    held = circle(50, 6, rng)
    items, _ = ExactIndex(encoder.item_matrix()).search(encoder.encode(held), 1)
    right = items[:, 0] == [(h[-1] + 1) % N_ITEMS for h in held]
    assert right.mean() >= 0.98
    assert log[-1]["loss"] < 0.5 < np.log(N_ITEMS) / 1.5 < log[0]["loss"]


def test_text_alone_scores_an_item_never_trained_on(rng: np.random.Generator) -> None:
    # Items 0-4 are of one kind, 5-9 of another, and users alternate. 10 and 11 are seen by nobody; their
    # texts are of the first and of the second kind.
    kinds = rng.standard_normal((2, 8))
    kind = np.array([0] * 5 + [1] * 5 + [0, 1])
    text = standardise((kinds[kind] + 0.1 * rng.standard_normal((N_ITEMS, 8))).astype(np.float32))
    sequences = []
    for _ in range(40):
        begin = rng.integers(2)
        sequences.append(np.array([rng.integers(5) + 5 * ((begin + n) % 2) for n in range(8)]))
    config = LEARNING.model_copy(update={"use_ids": False, "epochs": 40})
    encoder, _ = train_encoder(sequences, N_ITEMS, text, config, better_each_time())
    after_first, after_second = encoder.encode(as_rows([[7, 2], [2, 7]])) @ encoder.item_matrix().T
    assert after_first[11] > after_first[:5].max()
    assert after_first[11] > after_first[10]
    assert after_second[10] > after_second[5:10].max()
    # And an unseen item serves as history like its kin.
    unseen, kin = encoder.encode(as_rows([[7, 10], [7, 2]])) @ encoder.item_matrix().T
    assert unseen[5:10].min() > unseen[:5].max()
    assert kin[5:10].min() > kin[:5].max()


def test_the_loss_is_the_mean_over_real_targets_in_nats() -> None:
    # With a vanishing step size the loss stays that of the untrained encoder.
    config = SMALL.model_copy(update={"epochs": 1, "learning_rate": 1e-12, "weight_decay": 0.0})
    sequences = as_rows([[1, 2, 3], [4, 5, 6, 7, 8, 9], [2, 2]])
    encoder, log = train_encoder(sequences, N_ITEMS, None, config, never)
    losses = []
    for row in sequences:
        logits = interests(encoder, [row[:-1].tolist()])[0] @ encoder.item_matrix().T
        logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        losses += [-logp[j, t] for j, t in enumerate(row[1:])]
    assert log[0]["loss"] == pytest.approx(float(np.mean(losses)), abs=1e-4)


# -- the same again ----------------------------------------------------------------------------


def weights(seed: int, noise: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(noise)  # what the caller does with torch's own generator must not matter
    config = SMALL.model_copy(update={"seed": seed, "dropout": 0.3})
    sequences = circle(9, 7, np.random.default_rng(1))
    return train_encoder(sequences, N_ITEMS, None, config, never)[0].state_dict()


def test_the_same_seed_gives_identical_weights_and_another_seed_others() -> None:
    with torch.random.fork_rng():
        first, again, other = weights(3), weights(3, noise=99), weights(4)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["ids.weight"], other["ids.weight"])


def test_the_seed_decides_the_initial_weights_too() -> None:
    # One row, so one order, and hardly a step: what differs is where training began.
    still = SMALL.model_copy(update={"epochs": 1, "learning_rate": 1e-12})
    first, again, other = (
        train_encoder(as_rows([[1, 2, 3]]), N_ITEMS, None, still.model_copy(update={"seed": seed}), never)[0]
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first.item_matrix(), again.item_matrix())
    assert np.abs(first.item_matrix() - other.item_matrix()).max() > 1e-3


def test_training_leaves_the_callers_random_state_alone() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(20261124)
        before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
        train_encoder(as_rows([[1, 2, 3]]), N_ITEMS, None, SMALL, never)
        assert torch.equal(torch.get_rng_state(), before)
        assert (np.random.get_state()[1] == numpy_before).all()


def scripted(scores: list[float], kept: list[dict[str, torch.Tensor]]) -> Callable[[InterestEncoder], float]:
    def validate(encoder: InterestEncoder) -> float:
        kept.append({name: value.clone() for name, value in encoder.state_dict().items()})
        return scores[len(kept) - 1]

    return validate


@pytest.mark.parametrize(
    ("scores", "patience", "best", "ran"),
    [
        ([0.1, 0.5, 0.3, 0.4, 0.9], 2, 2, 4),  # 0.9 would come after patience ran out
        ([0.1, 0.5, 0.3, 0.6, 0.2], 2, 4, 5),
        ([0.5, 0.5, 0.5, 0.5, 0.5], 3, 1, 4),  # no better is not better
        ([0.0, 0.0, 0.0, 0.0, 0.1], 9, 5, 5),
        ([0.3, 0.2, 0.1, 0.0, 0.0], 1, 1, 2),
        ([0.3, 0.0, 0.0, 0.0, 0.0], 3, 1, 4),
        ([0.0, 0.0, 0.0, 0.0, 0.0], 2, 5, 5),  # while nothing is found the newest has learnt most
        ([0.0, 0.0, 0.2, 0.0, 0.0], 2, 3, 5),
    ],
)
def test_training_stops_by_patience_and_keeps_the_best_epoch(
    scores: list[float], patience: int, best: int, ran: int
) -> None:
    kept: list[dict[str, torch.Tensor]] = []
    told: list[tuple[int, float, float]] = []
    config = SMALL.model_copy(update={"epochs": 5, "patience": patience})
    encoder, log = train_encoder(
        circle(9, 7, np.random.default_rng(0)),
        N_ITEMS,
        None,
        config,
        scripted(scores, kept),
        on_epoch=lambda *done: told.append(done),
    )
    assert [row["epoch"] for row in log] == list(range(1, ran + 1))
    assert [row["valid"] for row in log] == scores[:ran]
    assert told == [(row["epoch"], row["loss"], row["valid"]) for row in log]
    state = encoder.state_dict()
    assert all(torch.equal(state[name], kept[best - 1][name]) for name in state)
    assert not torch.equal(kept[0]["ids.weight"], kept[1]["ids.weight"])
    assert not encoder.training


def test_max_seconds_ends_training_after_the_epoch_under_way() -> None:
    encoder, log = train_encoder(as_rows([[1, 2, 3]]), N_ITEMS, None, SMALL, never, max_seconds=0)
    assert len(log) == 1
    assert np.isfinite(encoder.item_matrix()).all()


# -- errors ------------------------------------------------------------------------------------


def test_errors_say_what_is_wrong() -> None:
    rows = as_rows([[1, 2, 3]])
    with pytest.raises(ConfigError, match="3 heads do not divide dim 16"):
        train_encoder(rows, N_ITEMS, None, SMALL.model_copy(update={"heads": 3}), never)
    with pytest.raises(ConfigError, match="neither ids nor text"):
        train_encoder(rows, N_ITEMS, None, SMALL.model_copy(update={"use_ids": False}), never)
    text = np.ones((N_ITEMS, 4), dtype=np.float32)
    with pytest.raises(ConfigError, match="neither ids nor text"):
        train_encoder(rows, N_ITEMS, text, SMALL.model_copy(update={"use_ids": False, "use_text": False}), never)
    for nothing in ([], as_rows([[1], [2], []])):
        with pytest.raises(DataError, match="no user has two training events"):
            train_encoder(nothing, N_ITEMS, None, SMALL, never)
    text[3, 1] = np.nan
    with pytest.raises(ModelError, match="loss is nan in epoch 1"):
        train_encoder(rows, N_ITEMS, text, SMALL, never)


@pytest.mark.parametrize(
    "bad", [{"dim": 2}, {"dropout": 1.0}, {"epochs": 0}, {"max_length": 0}, {"learning_rate": 0}, {"colour": "red"}]
)
def test_a_config_out_of_range_is_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        EncoderConfig.model_validate(bad)


@pytest.mark.parametrize(("epochs", "patience", "waits"), [(60, None, 15), (41, None, 11), (8, None, 6), (60, 4, 4)])
def test_without_a_patience_it_waits_a_quarter_of_the_epochs(epochs: int, patience: int | None, waits: int) -> None:
    assert EncoderConfig(epochs=epochs, patience=patience).waits == waits
