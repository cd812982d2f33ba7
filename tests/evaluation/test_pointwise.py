"""Single predictions: metrics by hand and by plain loops, and the encoder that learns values in the report."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from tests.conftest import toy_frames
from tests.fake_engine import FakeEngine

from penchant import metrics
from penchant.data.dataset import Dataset
from penchant.data.split import leave_last_out
from penchant.errors import DataError
from penchant.evaluation.evaluate import evaluate
from penchant.evaluation.pointwise import MEAN, answer_metrics, value_metrics, value_rows
from penchant.evaluation.readers import YesNoRow
from penchant.evaluation.yes_no import LLM, answer_margins, taste_margins, yes_no_report
from penchant.interest.config import EncoderConfig
from penchant.interest.fit import predict
from penchant.prompt import Templates
from penchant.recommend import Recommender
from penchant.resources import shipped
from penchant.run_folder import FitConfig

pytestmark = pytest.mark.usefixtures("module_cache")


def test_answers_by_plain_loops(rng: np.random.Generator) -> None:
    score, user = np.round(rng.normal(size=60), 1), rng.integers(8, size=60)
    label = (score + rng.normal(size=60) > 0).astype(int)
    p = 1 / (1 + np.exp(-score))
    found = answer_metrics(score, p, label, user)
    pairs = [(a > b) + (a == b) / 2 for a in score[label == 1] for b in score[label == 0]]
    assert found["AUC"].mean == pytest.approx(np.mean(pairs))
    assert found["GAUC"].mean == pytest.approx(metrics.gauc(score, label, user).value)
    assert found["log loss"].mean == pytest.approx(-np.mean(np.log(np.where(label, p, 1 - p))))
    assert found["accuracy"].mean == np.mean((p > 0.5) == label)
    for one in found.values():
        assert one.low < one.mean < one.high
    assert "GAUC" not in answer_metrics(score, p, label, None)


def test_the_interval_of_auc_is_that_of_resampled_users(rng: np.random.Generator) -> None:
    score, user = np.round(rng.normal(size=80), 1), np.repeat(np.arange(20), 4)
    label = (score + 2 * rng.normal(size=80) > 0).astype(int)
    found = answer_metrics(score, 1 / (1 + np.exp(-score)), label, user)["AUC"]
    drawn = []
    for _ in range(400):
        rows = np.concatenate([np.flatnonzero(user == u) for u in rng.integers(20, size=20)])
        drawn.append(metrics.auc(score[rows], label[rows]))
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])), abs=0.05)
    assert found.n == 20


def test_one_class_has_no_auc_and_all_else() -> None:
    found = answer_metrics(np.array([0.1, 0.9]), np.array([0.1, 0.9]), np.array([1, 1]), np.array([0, 1]))
    assert math.isnan(found["AUC"].mean)
    assert "GAUC" not in found
    assert found["accuracy"].mean == 0.5


def test_values_by_hand() -> None:
    found = value_metrics(np.array([1.0, 2.0, 5.0]), np.array([2.0, 2.0, 2.0]), np.array([0, 1, 2]))
    assert found["RMSE"].mean == pytest.approx(math.sqrt(10 / 3))
    assert found["MAE"].mean == pytest.approx(4 / 3)
    assert found["RMSE"].low <= found["RMSE"].mean <= found["RMSE"].high


@pytest.mark.parametrize(("loss", "names"), [("mse", ["RMSE", "MAE"]), ("bce", ["AUC", "log loss", "accuracy"])])
def test_an_encoder_that_learns_values_is_judged_by_them(loss: str, names: list[str]) -> None:
    interactions, items = toy_frames()
    number = np.arange(len(interactions)) * 7 % 5
    rating = number + 1 if loss == "mse" else number % 2
    given = [None if i % 11 == 0 else float(r) for i, r in enumerate(rating)]
    dataset = Dataset.read(interactions.with_columns(pl.Series("rating", given)), items)
    encoder = EncoderConfig(
        dim=16, blocks=1, max_length=12, epochs=1, batch_rows=8, loss=loss, value="rating"  # type: ignore[arg-type]
    )  # fmt: skip
    model = Recommender.fit(
        leave_last_out(dataset), FakeEngine(), FitConfig(encoder=encoder, candidates=5, validation_users=5)
    )
    report = evaluate(model, llm_users=0)
    rows = [row for row in report.rows if row.group.startswith("rating of the ")]
    assert [row.system for row in rows] == ["encoder", MEAN]
    assert set(names) <= set(rows[0].metrics)
    targets, value = model.split.test, model.reading.value
    assert value is not None
    asked = np.flatnonzero(~np.isnan(value[targets.position]))
    assert f"of the {len(asked)} test targets" in rows[0].group
    assert 0 < len(asked) < len(targets)
    histories = model.reading.before(targets.position[asked])
    predicted = predict(model.encoder, histories, targets.item[asked])
    true = value[targets.position[asked]]
    mean = np.nanmean(value[model.split.train])
    for row, p in zip(rows, (predicted, np.full(len(true), mean)), strict=True):
        if loss == "mse":
            assert row.metrics["RMSE"].mean == pytest.approx(metrics.rmse(p, true))
        else:
            assert row.metrics["AUC"].mean == pytest.approx(metrics.auc(p, true))
            assert row.metrics["log loss"].mean == pytest.approx(metrics.log_loss(p, true).mean())


def test_an_encoder_that_ranks_has_no_such_rows(toy: Dataset) -> None:
    config = FitConfig(encoder=EncoderConfig(dim=16, blocks=1, epochs=1, max_length=12), validation_users=5)
    model = Recommender.fit(leave_last_out(toy), FakeEngine(), config)
    assert value_rows(model, model.split.test) == []


def test_a_row_is_asked_with_likes_first_and_its_margin_is_yes_minus_no(tmp_path: Path) -> None:
    # The tiny tokenizer has no single tokens for yes and no.
    text = (shipped("prompts") / "yes_no.jinja").read_text(encoding="utf-8")
    (tmp_path / "yes_no.jinja").write_text(text.replace('["Yes", "No"]', '["A", "B"]'), encoding="utf-8")
    engine, templates = FakeEngine(), Templates(tmp_path)
    rows = [
        YesNoRow(("A", "B"), ("C",), "D", True, "u1"),
        YesNoRow((), ("E",), "F", False, "u1"),
        YesNoRow(("A",), (), "F", True, "u2"),
    ]
    margins = answer_margins(engine, templates, rows, prompt_tokens=400)
    history = [{"text": "A", "liked": True}, {"text": "B", "liked": True}, {"text": "C", "liked": False}]
    prompt = templates.render("yes_no", {"history": history, "item": {"text": "D"}}).prompt
    yes, no = (engine.score([prompt], [[tuple(engine.codec.encode_template(label))]])[0][0] for label in "AB")
    assert margins[0] == pytest.approx(yes - no)


def test_likes_minus_dislikes_are_two_likelihoods_of_the_title() -> None:
    engine, templates = FakeEngine(), Templates()
    rows = [
        YesNoRow(("A", "B"), ("C",), "D", True),
        YesNoRow((), ("E",), "A", False),
        YesNoRow(("A",), (), "D", True),
        YesNoRow((), (), "D", True),
    ]
    margins = taste_margins(engine, templates, rows, prompt_tokens=400)
    end = templates.headers["next_item"].terminator

    def said(history: tuple[str, ...], title: str) -> float:
        prompt = templates.render("next_item", {"history": [{"text": t} for t in history]}).prompt
        return float(engine.score([prompt], [engine.codec.encode_items([title], end)])[0][0])

    wanted = [said(row.liked, row.target) - said(row.disliked, row.target) for row in rows]
    assert margins == pytest.approx(wanted)
    assert margins[3] == 0, "nothing is known of this user"
    assert margins[0] != margins[2] != 0


def test_the_report_of_answers_stands_beside_the_training_share() -> None:
    rows = [YesNoRow(("A",), (), "t", i % 2 == 0, f"u{i % 4}" if i < 40 else "u9") for i in range(60)]
    margins = np.array([3.0 if row.label else -3.0 for row in rows])
    report = yes_no_report({LLM: margins}, rows, rows[:9])
    llm, _, _, share = report.rows
    assert (llm.metrics["AUC"].mean, llm.metrics["accuracy"].mean) == (1.0, 1.0)
    assert llm.metrics["GAUC"].mean == 1.0
    assert llm.metrics["log loss"].mean == pytest.approx(math.log1p(math.exp(-3)))
    assert share.metrics["AUC"].mean == 0.5
    assert share.metrics["log loss"].mean == pytest.approx(-(math.log(5 / 9) + math.log(4 / 9)) / 2)
    nobody = [YesNoRow(row.liked, row.disliked, row.target, row.label) for row in rows]
    assert "GAUC" not in yes_no_report({LLM: margins}, nobody, rows[:9]).rows[0].metrics
    with pytest.raises(DataError, match="no rows"):
        yes_no_report({LLM: margins[:0]}, [], rows)
