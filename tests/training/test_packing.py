"""Packs: every row once, never over size, little waste; steps: a function of seed and epoch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penchant.errors import ConfigError
from penchant.training.packing import Plan, pack

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=120)


@given(lengths=LENGTHS, spare=st.integers(0, 60), seed=st.integers(0, 99))
@settings(max_examples=150)
def test_every_row_is_packed_once_and_no_pack_is_over_size(lengths: list[int], spare: int, seed: int) -> None:
    size = max(lengths) + spare
    packs = pack(lengths, size, np.random.default_rng(seed))
    assert sorted(row for rows in packs for row in rows) == list(range(len(lengths)))
    assert all(0 < sum(lengths[row] for row in rows) <= size for rows in packs)


def test_windows_of_shuffled_rows_are_packed_apart_and_lose_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penchant.training.packing._WINDOW", 16)
    lengths = np.random.default_rng(0).integers(1, 30, size=100)
    packs = pack(lengths, 40, np.random.default_rng(1))
    assert sorted(row for rows in packs for row in rows) == list(range(100))
    assert max(sum(lengths[row] for row in rows) for rows in packs) <= 40


def test_a_row_longer_than_a_pack_is_refused_by_its_number() -> None:
    with pytest.raises(ConfigError, match=r"row 2 has 65 tokens and a pack only 64.*cut off"):
        pack([3, 64, 65], 64, np.random.default_rng(0))
    with pytest.raises(ConfigError, match="row 2 has 65 tokens"):  # when the run is planned, before it validates
        Plan(np.array([3, 64, 65]), pack_tokens=64, packs_per_step=1, seed=0)


@pytest.mark.parametrize(("size", "most"), [(1024, 40), (2048, 40), (1024, 20)])
def test_padding_is_under_five_percent_on_histories_like_movielens(size: int, most: int) -> None:
    """943 users, 20 to 737 events (median 65, mean 106), titles of 12 tokens: rows of at most ``most`` titles."""
    rng = np.random.default_rng(3)
    events = np.clip(np.exp(rng.normal(4.17, 0.98, size=943)), 20, 737).astype(int)
    lengths = []
    for n in events:
        for start in range(0, n, most):
            titles = rng.normal(12, 3.5, size=min(most, n - start)).clip(4, 30).astype(int)
            lengths.append(14 + int(titles.sum()))
    plan = Plan(np.array(lengths), pack_tokens=size, packs_per_step=4, seed=0)
    packs = [rows for step in range(plan.steps_per_epoch) for rows in plan.step(step)]
    waste = 1 - sum(lengths) / (size * len(packs))
    assert plan.padding() == pytest.approx(waste)
    assert waste < 0.05


def epoch(plan: Plan, number: int) -> list[list[list[int]]]:
    n = plan.steps_per_epoch
    return [plan.step(number * n + s) for s in range(n)]


@given(lengths=LENGTHS, size=st.integers(50, 90), per_step=st.integers(1, 5), seed=st.integers(0, 9))
@settings(max_examples=80)
def test_steps_are_a_function_of_seed_and_number(lengths: list[int], size: int, per_step: int, seed: int) -> None:
    def plan() -> Plan:
        return Plan(np.array(lengths), pack_tokens=size, packs_per_step=per_step, seed=seed)

    first, second = plan(), plan()
    steps = [first.step(s) for s in range(3 * first.steps_per_epoch)]
    assert all(steps), "no step is without a pack"
    # In another order, as a resumed run asks for them.
    for s in reversed(range(len(steps))):
        assert second.step(s) == steps[s]
    for e in range(3):
        rows = sorted(row for step in epoch(first, e) for rows in step for row in rows)
        assert rows == list(range(len(lengths))), "an epoch is every row once"


def test_epochs_and_seeds_differ() -> None:
    lengths = np.random.default_rng(0).integers(5, 40, size=200)
    plan, other = (Plan(lengths, pack_tokens=100, packs_per_step=4, seed=s) for s in (0, 1))
    assert epoch(plan, 0) != epoch(plan, 1)
    assert epoch(plan, 0) != epoch(other, 0)


def test_steps_of_an_epoch_hold_nearly_the_same_number_of_packs() -> None:
    lengths = np.random.default_rng(0).integers(5, 40, size=500)
    plan = Plan(lengths, pack_tokens=100, packs_per_step=4, seed=0)
    sizes = {len(step) for e in range(4) for step in epoch(plan, e)}
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 4
