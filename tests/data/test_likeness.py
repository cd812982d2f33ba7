"""Titles of another numbering are told from those of the items."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

from penchant.data.check import check
from penchant.data.dataset import Dataset
from penchant.data.likeness import words_shared
from penchant.data.split import leave_last_out
from penchant.evaluation.notes import protocol_notes


def test_by_hand() -> None:
    # Two users; the repeat and the step from one user to the other are no pairs.
    user, item = np.array([0, 0, 0, 1, 1]), np.array([0, 1, 1, 2, 0])
    shared = words_shared(user, item, ["Red wool hat", "red HAT!", "blue hat"])
    assert shared is not None
    # 0 and 1 have two words of three in common, 2 and 0 one of four. Drawn anew each keeps its second, or they change
    # them: 0 with itself, which is no pair, and 2 with 1, which share one word of three.
    assert shared.pairs == 2
    assert shared.near == pytest.approx((2 / 3 + 1 / 4) / 2)
    assert shared.chance in (pytest.approx(shared.near), pytest.approx(1 / 3))


def test_nobody_with_two_events_says_nothing() -> None:
    assert words_shared(np.array([0, 1]), np.array([0, 0]), ["a"]) is None


def _log(seed: int = 0) -> tuple[NDArray[np.int64], NDArray[np.int64], list[str]]:
    """300 users who stay with one of ten brands, 200 items."""
    rng = np.random.default_rng(seed)
    brands = rng.integers(0, 10, size=300)
    item = (rng.integers(0, 20, size=(300, 8)) * 10 + brands[:, None]).ravel()
    titles = [f"brand{i % 10} thing number{i} of nothing" for i in range(200)]
    return np.repeat(np.arange(300), 8), item, titles


def test_the_own_titles_are_not_strange_and_anothers_are() -> None:
    user, item, titles = _log()
    own = words_shared(user, item, titles)
    others = words_shared(user, item, np.random.default_rng(1).permutation(titles).tolist())
    assert own is not None
    assert others is not None
    assert not own.strange
    assert others.strange


def test_titles_without_a_word_in_common_are_not_strange() -> None:
    user, item, _ = _log()
    shared = words_shared(user, item, [f"t{i}" for i in range(200)])
    assert shared is not None
    assert not shared.strange


def _frames(shuffled: bool) -> tuple[pl.DataFrame, pl.DataFrame]:
    user, item, titles = _log()
    if shuffled:
        titles = np.random.default_rng(1).permutation(titles).tolist()
    log = pl.DataFrame({"user_id": user, "item_id": item, "timestamp": np.arange(len(item))})
    # Not in the order of users: the check must put them so.
    return log.sample(fraction=1.0, shuffle=True, seed=3), pl.DataFrame({"item_id": range(200), "title": titles})


@pytest.mark.parametrize(("shuffled", "verdict"), [(False, "PASS"), (True, "WARN")])
def test_check_warns(shuffled: bool, verdict: str) -> None:
    found = {rule.name: rule for rule in check(*_frames(shuffled))}["titles go with what follows what"]
    assert found.verdict == verdict
    assert ("another numbering" in found.detail) == shuffled


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_report_says_so(shuffled: bool) -> None:
    split = leave_last_out(Dataset.read(*_frames(shuffled)))
    notes = protocol_notes(split, split.test, "mask", None, None, "event")
    assert any("another numbering" in note for note in notes) == shuffled


def test_repeats_are_called_lost_where_they_are_masked_and_no_more() -> None:
    """The target is the event of two before it: masked with the whole history, free where only the last is."""
    events = pl.DataFrame({"user_id": ["u"] * 4, "item_id": ["1", "2", "3", "2"], "timestamp": [1, 2, 3, 4]})
    items = pl.DataFrame({"item_id": ["1", "2", "3"], "title": ["A", "B", "C"]})
    split = leave_last_out(Dataset.read(events, items))
    for last, said in (
        (None, "masked, they cannot be found"),
        (2, "masked, they cannot be found"),
        (1, "count like any"),
    ):
        told = [n for n in protocol_notes(split, split.test, "mask", last, None, "event") if "are repeats" in n]
        assert len(told) == 1
        assert said in told[0]
