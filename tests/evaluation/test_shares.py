"""Shares of likes: counted by hand, and the logistic regression that weighs them against a brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penchant.errors import DataError
from penchant.evaluation.readers import YesNoRow
from penchant.evaluation.shares import Logistic, Shares, own_share
from penchant.evaluation.yes_no import LLM, SHARES, TASTE, weighed_on, yes_no_report

ROWS = [
    YesNoRow(("A", "B"), ("C",), "D", True, "u1"),
    YesNoRow(
        ("A", "B"), ("C", "D"), "C", False, "u1"
    ),  # the same user says of D what they said before: the last counts
    YesNoRow((), ("A", "D"), "B", True, "u2"),
]


def test_each_user_and_title_counts_once() -> None:
    shares = Shares.of(ROWS)
    assert shares.answers == {
        "A": {"u1": True, "u2": False},
        "B": {"u1": True, "u2": True},
        "C": {"u1": False},
        "D": {"u1": False, "u2": False},
    }
    assert shares.overall == pytest.approx(3 / 7)
    prior = 5 * 3 / 7
    assert shares.share("A") == pytest.approx((1 + prior) / 7)
    assert shares.share("A", without="u1") == pytest.approx(prior / 6)
    assert shares.share("never seen") == pytest.approx(3 / 7)


def test_features_are_the_items_share_and_how_far_the_user_is_above_the_shares() -> None:
    shares = Shares.of(ROWS)
    asked = YesNoRow(("A",), ("B",), "C", True, "u9")
    c = shares.share("C")
    above = ((1 - shares.share("A")) - shares.share("B")) / 2
    assert shares.features([asked])[0] == pytest.approx([math.log(c / (1 - c)), above])
    nothing = YesNoRow((), (), "C", True, "u9")
    assert shares.features([nothing])[0, 1] == 0


def test_a_counted_rows_own_user_says_nothing_of_it() -> None:
    """Whatever a user answered, the features of their own rows stay: the answer must not show in them."""
    turned = [YesNoRow(r.liked, r.disliked, r.target, not r.label if r.user == "u2" else r.label, r.user) for r in ROWS]
    own, other = (Shares.of(rows).features(ROWS, own=True)[2, 0] for rows in (ROWS, turned))
    b = (1 + 5 * Shares.of(ROWS).overall) / 6  # what u1 said of B
    assert own == pytest.approx(math.log(b / (1 - b)))
    # Only the share of all likes, to which items are drawn, has moved.
    t = (1 + 5 * Shares.of(turned).overall) / 6
    assert other == pytest.approx(math.log(t / (1 - t)))


def test_rows_without_users_are_users_of_their_own() -> None:
    rows = [YesNoRow(("A",), (), "B", True), YesNoRow((), ("A",), "B", True)]
    assert Shares.of(rows).answers["A"] == {"row 0": True, "row 1": False}
    with pytest.raises(DataError, match="no rows"):
        Shares.of([])


def test_the_users_share_is_of_the_history_alone() -> None:
    assert own_share(ROWS).tolist() == pytest.approx([3 / 5, 3 / 6, 1 / 4])


@given(seed=st.integers(0, 10_000), n=st.integers(4, 60), d=st.integers(1, 3))
@settings(max_examples=40)
def test_the_logistic_regression_is_at_its_minimum(seed: int, n: int, d: int) -> None:
    rng = np.random.default_rng(seed)
    x, label = rng.normal(3, 2, size=(n, d)), rng.random(n) < 0.4
    found = Logistic.fit(x, label)
    z = (x - x.mean(0)) / x.std(0)

    def loss(weight: np.ndarray, bias: float) -> float:
        return float(np.logaddexp(0, -np.where(label, 1, -1) * (z @ weight + bias)).sum() + weight @ weight / 2)

    best = loss(found.weight, found.bias)
    for _ in range(20):
        assert best <= loss(found.weight + rng.normal(0, 0.05, d), found.bias + rng.normal(0, 0.05)) + 1e-4
    assert found.odds(x) == pytest.approx(z @ found.weight + found.bias)


def test_a_feature_that_never_changes_weighs_nothing() -> None:
    found = Logistic.fit(np.ones((6, 1)), np.array([True, False, True, True, False, True]))
    assert found.weight.tolist() == [0]
    assert found.odds(np.ones((1, 1)))[0] == pytest.approx(math.log(2), abs=1e-3)


def planted(n: int, seed: int) -> list[YesNoRow]:
    """Users who like most things or few, items that are liked or not: both decide."""
    rng = np.random.default_rng(seed)
    rows = []
    for u in range(n // 10):
        kind = rng.normal(0, 1.5)

        def likes(title: int, kind: float = kind) -> bool:
            return bool(rng.random() < 1 / (1 + math.exp(-(kind + (title % 5) - 2))))

        for _ in range(10):
            said = {t: likes(t) for t in rng.permutation(30)[:11].tolist()}
            *history, target = said
            rows.append(
                YesNoRow(
                    tuple(str(t) for t in history if said[t]),
                    tuple(str(t) for t in history if not said[t]),
                    str(target),
                    said[target],
                    f"{seed}:{u}",
                )
            )
    return rows


def test_shares_find_what_is_planted_and_the_llm_stands_beside_them_weighed_on_validation() -> None:
    train, valid, test = planted(600, 1), planted(300, 2), planted(400, 3)
    rng = np.random.default_rng(0)
    held = weighed_on(valid, 0)
    assert len(held) == 200
    assert len({row.user for row in held}) > 20, "a sample, not the first users"
    noise, said = rng.normal(size=len(test)), rng.normal(size=len(held))
    report = yes_no_report({LLM: noise}, test, train, valid=(held, {LLM: said}))
    auc = {row.system: row.metrics["AUC"].mean for row in report.rows}
    _, fused, both, own, flat = auc.values()
    assert next(iter(auc)) == "llm yes_no"
    assert both > own + 0.03 > flat + 0.1
    assert abs(fused - both) < 0.02, "an LLM that says nothing gets hardly any weight"
    truth = np.array([1.0 if row.label else -1.0 for row in test]) + rng.normal(size=len(test))
    known = np.array([1.0 if row.label else -1.0 for row in held]) + rng.normal(size=len(held))
    better = yes_no_report({LLM: noise, TASTE: truth}, test, train, valid=(held, {LLM: said, TASTE: known}))
    auc = {row.system: row.metrics["AUC"].mean for row in better.rows}
    assert list(auc)[:5] == [LLM, TASTE, f"{LLM} and {SHARES}", f"{TASTE} and {SHARES}", SHARES]
    assert auc[f"{TASTE} and {SHARES}"] > max(auc[TASTE], both) + 0.01
    assert auc[f"{LLM} and {SHARES}"] == fused, "each way has a weight of its own"
