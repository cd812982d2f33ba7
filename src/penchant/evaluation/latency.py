"""How long one user waits, and what a thousand cost: requests asked one at a time, and seconds times a price."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from penchant.data.history import Targets
from penchant.errors import ConfigError
from penchant.evaluation.report import Cost
from penchant.interest.behaviour import Behaviour
from penchant.recommend import Recommender

# Users asked one at a time: enough for a 99th percentile of a kind, few enough to cost no time.
USERS, LLM_USERS = 50, 10


def request_milliseconds(model: Recommender, targets: Targets, *, llm: bool) -> list[float]:
    """What single requests took, in milliseconds: encoder and search, with ``llm`` its ranking of the candidates too.

    Asked are the first targets that have a history, up to USERS of them, or LLM_USERS; the first one is asked
    once before, unmeasured.
    """
    n = LLM_USERS if llm else USERS
    warm = np.flatnonzero(targets.position > targets.log.start[targets.user])[:n]
    histories = model.reading.before(targets.position[warm])
    took = []
    for history in [*histories[:1], *histories]:
        begun = time.perf_counter()
        _ask(model, history, llm=llm)
        took.append(1000 * (time.perf_counter() - begun))
    return took[1:]


def _ask(model: Recommender, history: Behaviour, *, llm: bool) -> None:
    items, _ = model.retrieve([history], model.config.candidates)
    if llm:
        model.ranker.scores([history.item], [items[0][items[0] >= 0]])


def with_latency(costs: Sequence[Cost], took: dict[str, list[float]], price_per_hour: float | None) -> list[Cost]:
    """The costs with p50 and p99 of the requests of each system that has any, and money where a price is given."""
    out = []
    for cost in costs:
        found = took.get(cost.system)
        p50, p99 = (float(v) for v in np.percentile(found, [50, 99])) if found else (None, None)
        money = None if price_per_hour is None else cost.seconds_per_1000_users / 3600 * price_per_hour
        out.append(replace(cost, p50_ms=p50, p99_ms=p99, price_per_1000_users=money))
    return out


def check_price(price_per_hour: float | None) -> None:
    """ConfigError for a price that is none."""
    if price_per_hour is not None and not 0 <= price_per_hour < float("inf"):
        raise ConfigError(
            f"a price of {price_per_hour} an hour", where="evaluate, price_per_hour", remedy="give 0 or more"
        )
