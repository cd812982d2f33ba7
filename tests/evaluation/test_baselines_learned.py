"""The baselines that are trained: what they learn, whom they can serve, and that a seed makes them again."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from itertools import count

import numpy as np
import pytest
import torch
from tests.evaluation.planted import queries, two_tastes
from tests.fake_engine import FakeEngine
from tests.tiny import TITLES

from penchant.data.split import Split
from penchant.errors import ConfigError, DataError, ModelError
from penchant.evaluation.baselines.events import TrainingEvents
from penchant.evaluation.baselines.factors import ALSConfig, BPRConfig, fit_als, fit_bpr
from penchant.evaluation.baselines.llm import ZeroShotConfig, ZeroShotLLM, zero_shot_likelihoods
from penchant.evaluation.baselines.mult_vae import MultVAESystemConfig, fit_mult_vae
from penchant.evaluation.baselines.popularity import Popularity, fit_popularity
from penchant.evaluation.baselines.sasrec import fit_sasrec
from penchant.evaluation.baselines.tune import Validation
from penchant.evaluation.systems import Queries, System
from penchant.interest.config import EncoderConfig
from penchant.interest.mult_vae import MultVAE, MultVAEConfig, kl_weight, train_mult_vae
from penchant.prompt import Templates
from penchant.rank import Ranker

ALS_CONFIG = ALSConfig(factors=8, regularization=1.0)
BPR_CONFIG = BPRConfig(factors=8, iterations=60)
VAE = MultVAESystemConfig(hidden=24, latent=8, epochs=12, batch_users=16, learning_rate=1e-2)
SASREC = EncoderConfig(use_text=False, dim=16, blocks=1, dropout=0.1, max_length=9, epochs=8, learning_rate=1e-2)

Fit = Callable[[TrainingEvents, Callable[[System], float]], System]
FITS: dict[str, Fit] = {
    "als": lambda events, validate: fit_als(events, ALS_CONFIG, 3),
    "bpr": lambda events, validate: fit_bpr(events, BPR_CONFIG, 3),
    "mult_vae": lambda events, validate: fit_mult_vae(events, VAE, validate, 60.0),
    "sasrec": lambda events, validate: fit_sasrec(events, SASREC, validate, 60.0),
}


@pytest.fixture(scope="module")
def split() -> Split:
    return two_tastes()


@pytest.fixture(scope="module")
def events(split: Split) -> TrainingEvents:
    return TrainingEvents.of(split)


@pytest.fixture(scope="module")
def systems(split: Split, events: TrainingEvents) -> dict[str, System]:
    valid = Validation.of(split, seed=0)
    return {name: fit(events, valid.ndcg) for name, fit in FITS.items()}


@pytest.mark.parametrize("name", FITS)
def test_a_planted_taste_is_learnt(name: str, systems: dict[str, System], split: Split, events: TrainingEvents) -> None:
    """Three unseen items of the user's own half against twelve of the other: popularity cannot tell them apart."""
    valid = Validation.of(split, seed=0)
    assert valid.ndcg(systems[name]) > 0.5
    assert valid.ndcg(fit_popularity(events)) < 0.35
    # and in the test, whose items nothing was fitted or chosen on
    asked = Queries.of(split.test)
    scores = systems[name].scores(asked)
    for i in range(len(asked)):
        scores[i, asked.history[i]] = -np.inf
    best = scores.argmax(axis=1)
    assert (best // 12 == asked.user % 2).mean() > 0.95


@pytest.mark.parametrize("name", FITS)
def test_the_seed_makes_it_again(name: str, systems: dict[str, System], split: Split, events: TrainingEvents) -> None:
    asked = Queries.of(split.test)
    again = FITS[name](events, Validation.of(split, seed=0).ndcg)
    np.testing.assert_array_equal(systems[name].scores(asked), again.scores(asked))


@pytest.mark.parametrize("name", FITS)
def test_shape_type_empty_histories_and_no_queries(
    name: str, systems: dict[str, System], events: TrainingEvents
) -> None:
    scores = systems[name].scores(queries([], [1, 2], [], user=[0, 1, -1]))
    assert scores.shape == (3, events.n_items)
    assert scores.dtype == np.float32
    assert not np.isnan(scores).any()
    assert scores[[0, 2]].tolist() == [events.counts.tolist()] * 2
    assert systems[name].scores(queries()).shape == (0, events.n_items)


@pytest.mark.parametrize("name", ["als", "mult_vae", "sasrec"])
def test_a_user_unknown_to_training_is_served_from_the_history(name: str, systems: dict[str, System]) -> None:
    liked = [np.setdiff1d(np.arange(12), [0, 1, 2, 3]), np.setdiff1d(np.arange(12, 24), [12, 13, 14, 15])]
    scores = systems[name].scores(queries([0, 1, 2, 3], [12, 13, 14, 15], user=[-1, 10**6]))
    assert scores[0, liked[0]].mean() > scores[0, liked[1]].mean()
    assert scores[1, liked[1]].mean() > scores[1, liked[0]].mean()


def test_als_solves_the_user_from_the_history(events: TrainingEvents) -> None:
    """Hu et al. 2008, equation 4: x = (Y'Y + Y'(C - I)Y + reg I)^-1 Y'C p, for the events of the query."""
    system = fit_als(events, ALS_CONFIG, 0)
    y = system.model.item_factors.astype(np.float64)
    history, alpha = [0, 5, 7], ALS_CONFIG.alpha
    taken = y[history]
    a = y.T @ y + (alpha - 1) * taken.T @ taken + ALS_CONFIG.regularization * np.eye(y.shape[1])
    expected = y @ np.linalg.solve(a, alpha * taken.sum(axis=0))
    np.testing.assert_allclose(system.scores(queries([5, 0, 7, 5]))[0], expected, rtol=1e-3, atol=1e-4)


def test_bpr_serves_users_of_training_by_their_factors_and_others_by_popularity(
    systems: dict[str, System], events: TrainingEvents
) -> None:
    scores = systems["bpr"].scores(queries([1], [2, 3], [1], [1], user=[0, 0, -1, 10**6]))
    assert scores[0].tolist() == scores[1].tolist()  # the history is not looked at
    assert scores[2].tolist() == scores[3].tolist() == events.counts.tolist()
    alone = TrainingEvents(events.n_users + 1, events.n_items, events.user, events.item, events.time)
    fitted = fit_bpr(alone, BPR_CONFIG, 0)
    assert fitted.scores(queries([1], user=[events.n_users]))[0].tolist() == events.counts.tolist()


@pytest.mark.parametrize("name", FITS)
def test_cold_items_are_never_ahead(name: str, split: Split, events: TrainingEvents) -> None:
    wider = TrainingEvents(events.n_users, events.n_items + 2, events.user, events.item, events.time)
    epochs = count()  # the last epoch is kept
    scores = FITS[name](wider, lambda system: float(next(epochs))).scores(Queries.of(split.test))
    cold = scores[:, -2:].max(axis=1)
    if name in ("als", "bpr"):
        assert np.isneginf(cold).all()
    else:
        assert (cold < np.sort(scores, axis=1)[:, -10]).all()


@pytest.mark.parametrize(
    ("name", "module"),
    [("als", "implicit.als"), ("bpr", "implicit.bpr"), ("als", "threadpoolctl"), ("bpr", "threadpoolctl")],
)
def test_a_missing_package_names_the_extra(
    name: str, module: str, events: TrainingEvents, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=r"not installed(.|\n)*pip install 'penchant\[eval\]'"):
        FITS[name](events, lambda system: 0.0)


# -- Mult-VAE ----------------------------------------------------------------------------------


def test_mult_vae_encodes_a_bag_of_unit_length() -> None:
    """Outside training: code mean of tanh(W'x / |x| + b), in whatever order and however often the items stand."""
    config = MultVAEConfig(hidden=5, latent=3)
    torch.manual_seed(0)
    model = MultVAE(config, 7).eval()
    with torch.no_grad():
        model.first_bias.normal_()
    x = np.zeros(7)
    x[[1, 4, 6]] = 1 / np.sqrt(3)
    hidden = np.tanh(x @ model.first.detach().numpy() + model.first_bias.detach().numpy())
    code = hidden @ model.code.weight.detach().numpy().T + model.code.bias.detach().numpy()
    decoder = model.decoder
    middle = np.tanh(code[:3] @ decoder[0].weight.detach().numpy().T + decoder[0].bias.detach().numpy())
    expected = middle @ decoder[2].weight.detach().numpy().T + decoder[2].bias.detach().numpy()
    got = model.logits([np.array([6, 1, 4, 1]), np.zeros(0, dtype=np.int32)])
    np.testing.assert_allclose(got[0], expected, rtol=1e-4, atol=1e-5)
    assert np.isfinite(got[1]).all()  # an empty bag has logits too; the baseline does not use them


def test_mult_vae_keeps_its_best_epoch_and_stops_by_patience_or_time() -> None:
    histories = [np.array([0, 1, 2]), np.array([2, 3])]
    config = MultVAEConfig(hidden=4, latent=2, epochs=30, patience=4)
    seen: list[np.ndarray] = []

    def best_is_the_third(model: MultVAE) -> float:
        seen.append(model.logits(histories))
        return 1.0 if len(seen) == 3 else 0.5

    model, log = train_mult_vae(histories, 4, config, best_is_the_third)
    assert len(log) == 3 + config.patience
    np.testing.assert_array_equal(model.logits(histories), seen[2])
    _, log = train_mult_vae(histories, 4, config, lambda model: 0.0, max_seconds=0.0)
    assert len(log) == 1


def test_mult_vae_leaves_the_callers_randomness_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train_mult_vae([np.array([0, 1])], 3, MultVAEConfig(hidden=2, latent=2, epochs=2), lambda model: 0.0)
    assert torch.equal(torch.rand(3), expected)


def test_mult_vae_is_its_seeds_whatever_was_drawn_before() -> None:
    histories = [np.array([0, 1, 2]), np.array([2, 3])]

    def trained(seed: int, drawn_before: int) -> np.ndarray:
        torch.manual_seed(drawn_before)
        config = MultVAEConfig(hidden=4, latent=2, epochs=2, seed=seed)
        return train_mult_vae(histories, 4, config, lambda model: 0.0)[0].logits(histories)

    np.testing.assert_array_equal(trained(1, 0), trained(1, 5))
    assert not np.array_equal(trained(1, 0), trained(2, 0))


def test_mult_vae_anneals_the_kl_term_to_beta_and_no_further() -> None:
    config = MultVAEConfig(beta=0.2, anneal=0.5)
    assert [kl_weight(step, 8, config) for step in range(1, 9)] == pytest.approx([0.05, 0.1, 0.15] + [0.2] * 5)
    assert kl_weight(1, 8, MultVAEConfig(beta=0.2, anneal=0.0)) == 0.2

    def kl(beta: float) -> float:
        """After training, of one bag: the heavier its term, the nearer the codes to the prior."""
        shape = {"hidden": 8, "latent": 4, "dropout": 0.0, "epochs": 60, "patience": 60, "learning_rate": 0.05}
        epochs = count()
        config = MultVAEConfig(beta=beta, **shape)
        model, _ = train_mult_vae([np.array([0, 1]), np.array([2, 3])], 4, config, lambda model: float(next(epochs)))
        return float(model([torch.tensor([0, 1])])[1].detach()[0])

    assert kl(1.0) < 0.5 * kl(0.0)


def test_mult_vae_hides_items_from_its_encoder_in_training() -> None:
    model = MultVAE(MultVAEConfig(hidden=4, latent=2, dropout=0.5), 50).train()
    bag = [torch.arange(40)]
    assert not torch.equal(model.encode(bag)[0], model.encode(bag)[0])
    model.eval()
    assert torch.equal(model.encode(bag)[0], model.encode(bag)[0])


def test_mult_vae_kl_is_that_of_two_gaussians() -> None:
    torch.manual_seed(0)
    model = MultVAE(MultVAEConfig(hidden=4, latent=3), 6).eval()
    bag = [torch.tensor([1, 2])]
    mean, log_variance = model.encode(bag)
    code = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    kl = torch.distributions.kl_divergence(code, torch.distributions.Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(model(bag)[1], kl)


def test_mult_vae_without_events_or_with_a_loss_that_is_lost() -> None:
    with pytest.raises(DataError, match="no user has a training event"):
        train_mult_vae([np.zeros(0, dtype=np.int32)], 3, MultVAEConfig(), lambda model: 0.0)
    config = MultVAEConfig(hidden=4, latent=2, learning_rate=1e30, epochs=50)
    with pytest.raises(ModelError, match="lower learning_rate"):
        train_mult_vae([np.array([0, 1]), np.array([1, 2])], 3, config, lambda model: 0.0)


# -- the zero-shot LLM -------------------------------------------------------------------------

COUNTS = np.arange(len(TITLES), dtype=np.float32)[::-1].copy()


class Fixed:
    """A retriever whose scores are the same for everybody; the last item it never recommends."""

    name = "fixed"

    def scores(self, queries: Queries) -> np.ndarray:
        row = np.array([5, 5, 9, 7, 7, 3, 1, 0, -1, -2, -3, -4, -5, -6, -6, -np.inf], dtype=np.float32)
        return np.repeat(row[None], len(queries), axis=0)


def llm(engine: FakeEngine, retriever: System | None, config: ZeroShotConfig) -> ZeroShotLLM:
    return ZeroShotLLM(zero_shot_likelihoods(engine, Templates(None), TITLES)(config), retriever, config, COUNTS)


@pytest.mark.parametrize("calibration", [0.0, 1.0])
def test_the_llm_orders_unseen_candidates_and_the_retriever_the_rest(
    fake_engine: FakeEngine, calibration: float
) -> None:
    system = llm(fake_engine, Fixed(), ZeroShotConfig(candidates=4, calibration=calibration))
    history = np.array([3, 6], dtype=np.int32)
    scores = system.scores(queries(history.tolist()))[0]
    candidates = np.array([2, 4, 0, 1], dtype=np.int32)  # the best four without 3, which was seen
    ranker = Ranker(fake_engine, Templates(None), TITLES, max_history=20, prompt_tokens=512)
    likelihood = ranker.likelihoods([history], [candidates])[0] - calibration * ranker.priors(candidates)
    expected = candidates[np.argsort(-likelihood)].tolist()
    order = np.argsort(-scores, kind="stable").tolist()
    assert order == [*expected, 3, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]
    assert scores[13] == scores[14]  # equal for the retriever, equal here
    assert np.isneginf(scores[15])
    assert "4 of fixed" in system.name


@pytest.mark.parametrize(("seen_last", "candidates"), [(None, {4, 0, 1, 5}), (1, {2, 4, 0, 1})])
def test_candidates_may_hold_what_was_seen_before_the_newest_events(
    fake_engine: FakeEngine, seen_last: int | None, candidates: set[int]
) -> None:
    system = dataclasses.replace(llm(fake_engine, Fixed(), ZeroShotConfig(candidates=4)), seen_last=seen_last)
    scores = system.scores(queries([2, 3]))[0]
    assert set(np.argsort(-scores)[:4].tolist()) == candidates


def test_the_llm_ranks_the_whole_catalogue_when_asked(fake_engine: FakeEngine) -> None:
    system = llm(fake_engine, None, ZeroShotConfig(candidates=None, calibration=0.0))
    history = np.array([1], dtype=np.int32)
    ranker = Ranker(fake_engine, Templates(None), TITLES, max_history=20, prompt_tokens=512)
    everything = np.arange(len(TITLES), dtype=np.int32)
    likelihood = ranker.likelihoods([history], [everything])[0]
    scores = system.scores(queries([1], []))
    assert np.argsort(-scores[0]).tolist() == np.argsort(-likelihood).tolist()
    assert scores[1].tolist() == COUNTS.tolist()


def test_calibrations_are_compared_at_the_price_of_one_pass(fake_engine: FakeEngine) -> None:
    likelihoods = zero_shot_likelihoods(fake_engine, Templates(None), TITLES)
    asked = queries([0, 1], [2])

    def scored_after(config: ZeroShotConfig) -> int:
        ZeroShotLLM(likelihoods(config), Popularity(COUNTS), config, COUNTS).scores(asked)
        return fake_engine.scored

    first = scored_after(ZeroShotConfig(candidates=4, calibration=1.0))
    assert scored_after(ZeroShotConfig(candidates=4, calibration=0.5)) == first
    assert scored_after(ZeroShotConfig(candidates=4, calibration=0.0)) == first
    assert scored_after(ZeroShotConfig(candidates=4, calibration=0.0, max_history=1)) > first
