"""Single requests and what a thousand users cost."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.fake_engine import FakeEngine

from penchant.data.dataset import Dataset
from penchant.data.split import leave_last_out
from penchant.errors import ConfigError
from penchant.evaluation import latency as module
from penchant.evaluation.evaluate import evaluate
from penchant.evaluation.page import to_html, to_markdown
from penchant.evaluation.report import Cost
from penchant.interest.config import EncoderConfig
from penchant.recommend import Recommender
from penchant.run_folder import FitConfig

CONFIG = FitConfig(
    encoder=EncoderConfig(dim=16, blocks=1, max_length=12, epochs=1, batch_rows=8), candidates=5, validation_users=5
)


def test_the_percentiles_are_of_single_requests(toy: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that each request moves on: the first, unmeasured one is as dear as all others together."""
    model = Recommender.fit(leave_last_out(toy), FakeEngine(), CONFIG)
    asked: list[int] = []
    clock = [0.0]

    def ask(model: Any, history: Any, *, llm: bool) -> None:
        clock[0] += 1000.0 if not asked else 0.001 * len(asked)
        asked.append(len(history))

    monkeypatch.setattr(module, "_ask", ask)
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    took = module.request_milliseconds(model, model.split.test, llm=True)
    assert took == pytest.approx(list(range(1, 11)))
    lengths = model.split.test.position - model.log.start[model.split.test.user]
    assert asked == [lengths[0], *lengths[:10]]
    asked.clear()
    assert len(module.request_milliseconds(model, model.split.test, llm=False)) == 30  # all there are


def test_costs_have_latency_and_money_only_where_there_are_any() -> None:
    costs = [Cost("a", 7.2, None), Cost("b", 3600.0, 5.0, 2.0)]
    first, second = module.with_latency(costs, {"a": [1.0, 2.0, 3.0]}, None)
    assert (first.p50_ms, second.p50_ms, first.price_per_1000_users) == (2.0, None, None)
    assert first.p99_ms == pytest.approx(np.percentile([1, 2, 3], 99))
    first, second = module.with_latency(costs, {}, 2.5)
    assert (first.price_per_1000_users, second.price_per_1000_users) == (pytest.approx(0.005), 2.5)
    assert second.fit_seconds == 2.0


def test_the_report_and_its_page_show_them(toy: Dataset) -> None:
    model = Recommender.fit(leave_last_out(toy), FakeEngine(), CONFIG)
    report = evaluate(model, llm_users=4, price_per_hour=1.5)
    costs = {cost.system: cost for cost in report.costs}
    (fused,) = [name for name in costs if name.startswith("llm+interest")]
    for name in ("encoder", fused):
        assert 0 < (costs[name].p50_ms or 0) <= (costs[name].p99_ms or 0)
    assert costs["popularity"].p50_ms is None
    for cost in report.costs:
        assert cost.price_per_1000_users == pytest.approx(cost.seconds_per_1000_users / 2400)
    for page in (to_html(report.to_dict()), to_markdown(report.to_dict())):
        assert "one request, p99 ms" in page
        assert "price per 1,000 users" in page
    plain = evaluate(model, llm_users=0)
    assert sum(cost.p50_ms is not None for cost in plain.costs) == 1
    assert "price per 1,000 users" not in to_markdown(plain.to_dict())
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="a price of"):
            evaluate(model, price_per_hour=wrong)
