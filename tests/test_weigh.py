"""Whom the LLM's weight is chosen on, against a draw by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from penchant.data.dataset import Dataset
from penchant.data.split import leave_last_out
from penchant.fusion import Fusion
from penchant.interest.config import EncoderConfig
from penchant.recommend import Recommender
from penchant.run_folder import FitConfig
from penchant.weigh import weighed_on
from tests.conftest import toy_frames
from tests.fake_engine import FakeEngine

ENCODER = EncoderConfig(dim=8, blocks=1, max_length=8, epochs=1, batch_rows=8)


class Asked(FakeEngine):
    """An engine that remembers how many prompts had candidates to score."""

    def __init__(self) -> None:
        super().__init__()
        self.users = 0

    def score(self, prompts: Any, candidates: Any, **more: Any) -> Any:
        self.users += len(prompts)
        return super().score(prompts, candidates, **more)


def fit(engine: FakeEngine, **config: Any) -> Recommender:
    settings = FitConfig(encoder=ENCODER, **({"candidates": 4, "validation_users": 5} | config))
    return Recommender.fit(leave_last_out(Dataset.read(*toy_frames())), engine, settings)


@pytest.mark.parametrize("wanted", [1, 5, 1_000])
def test_users_are_drawn_until_so_many_targets_were_found(wanted: int) -> None:
    model = fit(FakeEngine(), validation_users=wanted)
    on, valid = weighed_on(model), model.split.valid
    order = np.random.default_rng(model.config.seed).permutation(len(valid))
    drawn, found = [], 0
    for row in order.tolist():
        if found == wanted:
            break
        drawn.append(row)
        items, _ = model.retrieve([valid.history(row)], 4)
        found += int(valid.item[row] in items[0])
    assert 0 < found < len(valid)  # some are missed: else nothing is tested
    assert on.targets.position.tolist() == valid.position[drawn].tolist()
    assert len(on.found) == found
    for i, place in enumerate(on.place.tolist()):
        assert (
            (on.candidates[i][place] == on.targets.item[i])
            if place >= 0
            else on.targets.item[i] not in on.candidates[i]
        )
        assert len(on.interest[i]) == len(on.candidates[i])
    assert model.fusion.n_users == len(drawn)


def test_the_llm_is_asked_about_found_targets_alone() -> None:
    engine = Asked()
    model = fit(engine, candidates=2)
    assert len(weighed_on(model).found) == 5
    assert engine.users - 1 == 5  # and once about no history at all
    # The figures are of all who were drawn: what was missed counts as missed.
    share = 5 / model.fusion.n_users
    assert share < 1
    assert model.fusion.interest_ndcg is not None
    assert 0 < model.fusion.interest_ndcg <= share


def test_no_more_than_ten_are_drawn_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fit(FakeEngine())
    found = Recommender.retrieve

    def nothing(self: Recommender, histories: Any, k: int, **more: Any) -> Any:
        items, scores = found(self, histories, k, **more)
        return np.full_like(items, -1), scores

    monkeypatch.setattr(Recommender, "retrieve", nothing)
    model.config = model.config.model_copy(update={"validation_users": 2})
    assert len(weighed_on(model).targets) == 20
    again = model.with_ranker(FakeEngine())
    assert again.fusion == Fusion(0.0, 0.0, 0.0, 0.0, 20)
