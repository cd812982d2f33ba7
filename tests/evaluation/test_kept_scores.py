"""An engine that scores nothing twice, for this run and others; what it took is counted as when it was scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.fake_engine import FakeEngine

from penchant.errors import StorageError
from penchant.evaluation.kept_scores import KeptScores

PROMPTS = ["a", "b", "c", "d", "e"]
ITEMS = [[(1, 2), (3,)], [(4,)], [], [(1, 2), (5, 6), (7,)], [(3,)]]


class Counting(FakeEngine):
    """Notes what it is asked, counts tokens, and dies at the call of that number."""

    def __init__(self, dies: int = 100) -> None:
        super().__init__()
        self.asked: list[list[int]] = []
        self.tokens_run = 0
        self.dies = dies

    def score(self, prompts: Any, continuations: Any, *, progress: Any = None) -> Any:
        if len(self.asked) + 1 == self.dies:
            raise KeyboardInterrupt
        self.asked.append([len(row) for row in continuations])
        self.tokens_run += 10 * sum(map(len, continuations))
        for _ in prompts if progress else []:
            progress(1)
        return super().score(prompts, continuations)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penchant.evaluation.kept_scores._CHUNK", 2)


def same(found: Any, items: Any = ITEMS) -> None:
    for one, other in zip(found, FakeEngine().score(PROMPTS, items), strict=True):
        np.testing.assert_array_equal(one, other)


def test_nothing_is_scored_twice_and_all_is_as_the_engine_says(tmp_path: Path) -> None:
    first = Counting()
    told: list[int] = []
    kept = KeptScores(first, tmp_path / "deep" / "scores.sqlite")
    same(kept.score(PROMPTS, ITEMS, progress=told.append))
    assert sum(told) == len(PROMPTS)
    assert sum(map(sum, first.asked)) == 7
    assert (kept.fingerprint, kept.tokens_run) == (first.fingerprint, 70)

    second = Counting()
    again, told = KeptScores(second, tmp_path / "deep" / "scores.sqlite"), []
    same(again.score(PROMPTS, ITEMS, progress=told.append))
    assert (second.asked, sum(told), again.tokens_run) == ([], len(PROMPTS), 70)
    assert again.seconds_kept > 0 == kept.seconds_kept
    more = [[*row, (8,)] for row in ITEMS]
    same(again.score(PROMPTS, more), more)
    assert sum(map(sum, second.asked)) == 5


def test_what_was_cut_off_goes_on(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        KeptScores(Counting(dies=2), tmp_path / "s").score(PROMPTS, ITEMS)
    engine = Counting()
    same(KeptScores(engine, tmp_path / "s").score(PROMPTS, ITEMS))
    assert engine.asked == [[3], [1]]


def test_another_engine_or_prompt_knows_nothing_of_it(tmp_path: Path) -> None:
    KeptScores(Counting(), tmp_path / "s").score(["a"], [[(1, 2)]])
    other = Counting()
    other.fingerprint = "another"
    KeptScores(other, tmp_path / "s").score(["a"], [[(1, 2)]])
    assert other.asked == [[1]]
    engine = Counting()
    KeptScores(engine, tmp_path / "s").score(["ab"], [[(1, 2)]])
    assert engine.asked == [[1]]


def test_what_is_no_number_is_not_kept(tmp_path: Path) -> None:
    class Broken(Counting):
        def score(self, prompts: Any, continuations: Any, *, progress: Any = None) -> Any:
            return [np.full(len(row), np.nan) for row in continuations]

    assert np.isnan(KeptScores(Broken(), tmp_path / "s").score(["a"], [[(1,)]])[0]).all()
    engine = Counting()
    KeptScores(engine, tmp_path / "s").score(["a"], [[(1,)]])
    assert engine.asked == [[1]]


def test_a_file_that_is_no_table_says_so(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("no table")
    with pytest.raises(StorageError, match="kept scores cannot be read"):
        KeptScores(Counting(), tmp_path / "s").score(["a"], [[(1,)]])
