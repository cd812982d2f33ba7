"""How good single predictions are: probabilities of yes against the answers, predicted values against the true ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from penchant import metrics
from penchant.data.history import Targets
from penchant.evaluation.report import Row
from penchant.evaluation.statistics import Estimate, bootstrap_by_user
from penchant.interest.fit import predict
from penchant.recommend import Recommender

Floats = NDArray[np.floating]
Users = NDArray[np.integer]

_RESAMPLES = 1_000
MEAN = "the mean of the training events"


def answer_metrics(
    score: Floats, probability: Floats, label: NDArray[np.generic], user: Users | None, seed: int = 0
) -> dict[str, Estimate]:
    """AUC of the scores, GAUC where users are known and anybody has both answers, log loss (nats) and accuracy.

    ``score`` orders the events, ``probability`` is that of yes; all arguments are (n,), the intervals draw whole
    users again (events where ``user`` is None).
    """
    out = {"AUC": _auc(score, label, np.arange(len(score)) if user is None else user, seed)}
    if user is not None:
        users, value, _ = metrics.user_auc(score, label, user)
        of_event = value[np.searchsorted(users, user)]
        kept = ~np.isnan(of_event)
        if kept.any():  # a mean over events: each user weighs as many as they have
            out["GAUC"] = bootstrap_by_user(of_event[kept], user[kept], seed)
    whose = np.arange(len(score)) if user is None else user
    out["log loss"] = bootstrap_by_user(metrics.log_loss(probability, label), whose, seed)
    out["accuracy"] = bootstrap_by_user(metrics.accuracy(probability, label), whose, seed)
    return out


def value_metrics(predicted: Floats, true: Floats, user: Users, seed: int = 0) -> dict[str, Estimate]:
    """RMSE and MAE in the values' unit; the intervals draw whole users again."""
    squared = bootstrap_by_user(metrics.squared_error(predicted, true), user, seed)
    root = replace(squared, mean=squared.mean**0.5, low=squared.low**0.5, high=squared.high**0.5)
    return {"RMSE": root, "MAE": bootstrap_by_user(metrics.absolute_error(predicted, true), user, seed)}


def value_rows(model: Recommender, targets: Targets, seed: int = 0) -> list[Row]:
    """What an encoder that learns values makes of the targets' own, beside the training mean; none for other encoders.

    Asked are the targets that have a value and a history.
    """
    config, value = model.config.encoder, model.reading.value
    if config.value_column is None or value is None:
        return []
    histories = model.reading.before(targets.position)
    true = value[targets.position]
    asked = np.array([i for i, h in enumerate(histories) if len(h) and not np.isnan(true[i])], dtype=np.int64)
    if not len(asked):
        return []
    predicted = predict(model.encoder, [histories[i] for i in asked], targets.item[asked])
    mean = np.full(len(asked), np.nanmean(value[model.split.train]))
    group = f"{config.value_column} of the {len(asked):,} test targets that have one, and a history"
    made = {"encoder": predicted, MEAN: mean}
    if config.loss == "mse":
        found = {name: value_metrics(p, true[asked], targets.user[asked], seed) for name, p in made.items()}
    else:
        found = {name: answer_metrics(p, p, true[asked], targets.user[asked], seed) for name, p in made.items()}
    return [Row(group, name, metrics) for name, metrics in found.items()]


def _auc(score: Floats, label: NDArray[np.generic], user: Users, seed: int) -> Estimate:
    """AUC with the 95% interval of whole users drawn again; resamples without both answers are left out."""
    whole = metrics.auc(score, label)
    code = np.unique(user, return_inverse=True)[1]
    n = int(code.max(initial=-1)) + 1
    if n < 2 or np.isnan(whole):
        return Estimate(whole, float("nan"), float("nan"), n)
    # Events of one score stand together: a resample only changes how much each event weighs.
    run = np.unique(score, return_inverse=True)[1]
    positive = np.asarray(label).astype(bool)
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(_RESAMPLES):
        weight = np.bincount(rng.integers(n, size=n), minlength=n)[code].astype(np.float64)
        yes, no = np.bincount(run, weight * positive), np.bincount(run, weight * ~positive)
        pairs = yes.sum() * no.sum()
        if pairs > 0:
            drawn.append(float((yes * (np.cumsum(no) - no / 2)).sum() / pairs))
    low, high = np.percentile(drawn, [2.5, 97.5]) if drawn else (np.nan, np.nan)
    return Estimate(whole, float(low), float(high), n)
