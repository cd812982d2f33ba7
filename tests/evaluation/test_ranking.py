"""Ranks and top lists against a sort in plain Python: ties, seen items, candidates, and whatever a system returns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from penchant.data.history import EventLog, Targets
from penchant.errors import ConfigError, DataError, ModelError
from penchant.evaluation.ranking import rank_targets
from penchant.evaluation.systems import Queries
from penchant.interest.top import top_k


@dataclass
class Fixed:
    """A system whose scores are known: row i of the matrix for the i-th query it is asked."""

    matrix: NDArray[np.floating]
    name: str = "fixed"
    asked: list[Queries] = field(default_factory=list)
    at: int = 0

    def scores(self, queries: Queries) -> NDArray[np.float32]:
        self.asked.append(queries)
        part = self.matrix[self.at : self.at + len(queries)]
        self.at += len(queries)
        return part  # type: ignore[return-value]


def log_of(histories: Sequence[Sequence[int]], n_items: int) -> Targets:
    """One user a history, whose last item is the target."""
    start = np.cumsum([0, *map(len, histories)])
    item = np.array([i for h in histories for i in h], dtype=np.int32)
    log = EventLog(
        [f"u{i}" for i in range(len(histories))],
        [str(i) for i in range(n_items)],
        start.astype(np.int64),
        item,
        np.arange(len(item), dtype=np.int64),
    )
    return Targets(log, start[1:].astype(np.int64) - 1)


def by_hand(scores: Sequence[float], allowed: set[int], target: int, k: int, n_items: int) -> tuple[int, list[int]]:
    """The target's place behind its equals, and the k best by (score, index)."""
    live = [i for i in allowed if scores[i] != -math.inf]
    top = sorted(live, key=lambda i: (-scores[i], i))[:k]
    top += [-1] * (k - len(top))
    if target not in live:
        return n_items + 1, top
    return sum(scores[i] >= scores[target] for i in live), top


# Few values, so that ties are everywhere; -inf is "never".
FEW = st.sampled_from([-math.inf, -1.0, 0.0, 0.5, 2.0])


@st.composite
def cases(draw: st.DrawFn, values: st.SearchStrategy[float] = FEW):  # type: ignore[no-untyped-def]
    n_items = draw(st.integers(1, 70))
    histories = draw(st.lists(st.lists(st.integers(0, n_items - 1), min_size=1, max_size=9), min_size=1, max_size=4))
    scores = draw(
        st.lists(st.lists(values, min_size=n_items, max_size=n_items), min_size=len(histories), max_size=len(histories))
    )
    return log_of(histories, n_items), np.array(scores, dtype=np.float32)


@settings(max_examples=150)
@given(
    cases(), st.integers(1, 80), st.integers(1, 400), st.sampled_from(["mask", "keep"]), st.sampled_from([None, 0, 2])
)
def test_ranks_and_lists_are_those_of_a_plain_sort(case, k, block, seen, last) -> None:  # type: ignore[no-untyped-def]
    targets, scores = case
    n_items = targets.log.n_items
    before = scores.copy()
    found = rank_targets(Fixed(scores), targets, k=k, block=block, seen=seen, seen_last=last)
    np.testing.assert_array_equal(scores, before)  # the system may keep its array
    for i in range(len(targets)):
        history = targets.history(i).tolist()
        out = (
            set()
            if seen == "keep"
            else set(history if last is None else history[len(history) - last :] if last else [])
        )
        allowed = set(range(n_items)) - out
        rank, top = by_hand(before[i].tolist(), allowed, int(targets.item[i]), k, n_items)
        assert found.rank[i] == rank
        assert found.top[i].tolist() == top


@settings(max_examples=150)
@given(st.data(), cases(), st.integers(1, 12))
def test_candidates_are_ranked_among_themselves_each_once(data, case, k) -> None:  # type: ignore[no-untyped-def]
    targets, scores = case
    n_items = targets.log.n_items
    row = st.lists(st.integers(-1, n_items - 1), min_size=5, max_size=5)
    candidates = np.array(data.draw(st.lists(row, min_size=len(targets), max_size=len(targets))), dtype=np.int32)
    found = rank_targets(Fixed(scores), targets, k=k, candidates=candidates)
    for i in range(len(targets)):
        allowed = {int(c) for c in candidates[i] if c >= 0}
        rank, top = by_hand(scores[i].tolist(), allowed, int(targets.item[i]), k, n_items)
        assert found.rank[i] == rank
        assert found.top[i].tolist() == top


@pytest.mark.parametrize("k", [1, 10, 100, 3_000])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_lists_of_a_large_catalogue_are_those_of_the_index(k: int, kind: type, rng: np.random.Generator) -> None:
    """Catalogues of more than one group of groups; half the scores of a few values, half all different."""
    for m in (2_999, 4_096):
        scores = rng.standard_normal((7, m)).astype(kind)
        scores[3:] = rng.integers(0, 5, (4, m))
        targets = log_of([[int(i)] for i in rng.integers(0, m, 7)], m)
        found = rank_targets(Fixed(scores), targets, k=k)
        np.testing.assert_array_equal(found.top, top_k(scores, k)[0])
        own = scores[np.arange(7), targets.item]
        np.testing.assert_array_equal(found.rank, (scores >= own[:, None]).sum(axis=1))


def test_everything_tied_puts_the_target_last() -> None:
    targets = log_of([[0, 1, 2], [3, 4]], 6)
    found = rank_targets(Fixed(np.zeros((2, 6), np.float32)), targets, k=2)
    assert found.rank.tolist() == [4, 5]  # two seen of six, then one
    assert found.top.tolist() == [[2, 3], [0, 1]]


def test_a_repeated_target_is_found_only_where_seen_items_are_kept() -> None:
    targets = log_of([[5, 1, 5]], 6)
    scores = np.array([[0, 1, 2, 3, 4, 5]], np.float32)
    assert rank_targets(Fixed(scores), targets).rank.tolist() == [7]
    assert rank_targets(Fixed(scores), targets, seen="keep").rank.tolist() == [1]
    assert rank_targets(Fixed(scores), targets, seen_last=1).rank.tolist() == [1]  # only item 1 is masked


def test_queries_hold_what_came_before_and_no_answer() -> None:
    targets = log_of([[0, 1, 2], [3]], 6)
    system = Fixed(np.zeros((2, 6), np.float32))
    rank_targets(system, targets, block=1)
    assert [q.history[0].tolist() for q in system.asked] == [[0, 1], []]
    assert [q.user.tolist() for q in system.asked] == [[0], [1]]
    assert [q.time.tolist() for q in system.asked] == [[2], [3]]
    assert {f for q in system.asked for f in vars(q)} == {"user", "history", "time"}


def test_read_only_scores_are_ranked_too() -> None:
    view = np.broadcast_to(np.array([3, 2, 1], np.float32), (2, 3))
    found = rank_targets(Fixed(view), log_of([[0, 1], [1, 2]], 3), k=3)
    assert found.rank.tolist() == [1, 2]
    assert found.top.tolist() == [[1, 2, -1], [0, 2, -1]]


@pytest.mark.parametrize(
    "scores",
    [np.zeros((1, 5), np.float32), np.zeros(6, np.float32), np.zeros((1, 6), np.int64)],
    ids=["narrow", "flat", "integers"],
)
def test_scores_of_another_shape_are_refused(scores: np.ndarray) -> None:
    with pytest.raises(ModelError, match=r"fixed: gave scores"):
        rank_targets(Fixed(scores), log_of([[1, 0]], 6))


@pytest.mark.parametrize("at", [0, 1, 2, 5])
def test_not_a_number_is_refused_wherever_it_stands(at: int) -> None:
    """In the target's place, in a seen item's, and in any other."""
    scores = np.zeros((1, 6), np.float32)
    scores[0, at] = np.nan
    with pytest.raises(ModelError, match="not a number"):
        rank_targets(Fixed(scores), log_of([[1, 2, 0]], 6))
    with pytest.raises(ModelError, match="not a number"):
        rank_targets(Fixed(scores), log_of([[1, 2, 0]], 6), candidates=np.array([[0, 1, 2, 5]]))


def test_wrong_arguments_are_refused() -> None:
    targets, system = log_of([[1, 0]], 6), Fixed(np.zeros((1, 6), np.float32))
    for wrong in ({"k": 0}, {"block": 0}, {"seen": "hide"}, {"seen_last": -1}):
        with pytest.raises(ConfigError):
            rank_targets(system, targets, **wrong)  # type: ignore[arg-type]
    for candidates in (np.array([[6]]), np.array([[-2]]), np.array([1]), np.zeros((2, 1), int)):
        with pytest.raises(DataError):
            rank_targets(system, targets, candidates=candidates)


def test_no_targets_give_empty_ranks() -> None:
    found = rank_targets(Fixed(np.zeros((0, 6), np.float32)), log_of([[1, 0]], 6).take(np.zeros(0, int)), k=4)
    assert found.rank.shape == (0,)
    assert found.top.shape == (0, 4)
