"""The evaluation against plain loops: what every system's numbers must be, and what a report must say."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from tests.conftest import toy_frames
from tests.fake_engine import FakeEngine

from penchant.data.dataset import Dataset
from penchant.data.history import Targets
from penchant.data.split import Split, global_time, leave_last_out
from penchant.errors import ConfigError, DataError
from penchant.evaluation import evaluate as module
from penchant.evaluation.evaluate import evaluate
from penchant.evaluation.report import Report
from penchant.interest.encoder import EncoderConfig
from penchant.rank import Fusion
from penchant.recommend import Recommender
from penchant.run_folder import FitConfig

CANDIDATES = 5
CONFIG = FitConfig(
    encoder=EncoderConfig(dim=16, blocks=1, dropout=0.1, max_length=12, epochs=3, batch_rows=8, learning_rate=1e-2),
    candidates=CANDIDATES,
    validation_users=10,
)
FUSED = "llm+interest (weight 0.4, calibration 0.5)"
LLM_SYSTEMS = {
    "llm likelihood": (1.0, 0.0),
    "llm likelihood - no-history likelihood": (1.0, 1.0),
    FUSED: (0.4, 0.5),
}
LAST = "last item (LLM vectors)"


@pytest.fixture(autouse=True, scope="module")
def _quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of this module's own before anything is fitted; one thread, for models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PENCHANT_CACHE", str(tmp_path_factory.mktemp("module-cache")))
        yield
    torch.set_num_threads(before)


def fit(split: Split) -> Recommender:
    model = Recommender.fit(split, FakeEngine(), CONFIG)
    model.fusion = Fusion(0.4, 0.5)
    return model


@pytest.fixture(scope="module")
def model() -> Recommender:
    return fit(leave_last_out(Dataset.read(*toy_frames())))


@pytest.fixture(scope="module")
def whole() -> Recommender:
    """A global split of users with repeats: cold items, users without history, targets they had before."""
    interactions, items = toy_frames()
    moments = [datetime.fromtimestamp(1_000_000 + s, UTC) for s in (250, 420)]
    late = interactions.filter(~((pl.col("user_id") == "u3") & (pl.col("timestamp") < 1_000_430)))
    again = late.filter(pl.col("user_id").is_in(["u5", "u6"]) & (pl.col("timestamp") < 1_000_030)).with_columns(
        pl.col("timestamp") + 700
    )
    new = pl.DataFrame({"user_id": ["u1"], "item_id": ["17"], "timestamp": [1_000_900]})
    more = pl.DataFrame({"item_id": ["17", "18"], "title": ["New One", "Never"], "genres": ["", ""], "year": ["", ""]})
    dataset = Dataset.read(pl.concat([late, again, new]), pl.concat([items, more]))
    return fit(global_time(dataset, valid_from=moments[0], test_from=moments[1]))


# -- the same in plain loops -------------------------------------------------------------------


def rank(scores: Sequence[float], seen: Sequence[int], target: int) -> int:
    """Place of the target among the items not seen, ties before it; past the catalogue's end where it was seen."""
    if target in seen:
        return len(scores) + 1
    return 1 + sum(s >= scores[target] for j, s in enumerate(scores) if j not in seen and j != target)


def plain(model: Recommender, targets: Targets) -> dict[str, list[int]]:
    log = model.log
    counts = [0.0] * log.n_items
    for position in range(len(log.item)):
        counts[log.item[position]] += bool(model.split.train[position])
    vectors = np.array(model.vectors, dtype=np.float64)
    vectors = (vectors - vectors.mean(axis=0)) / np.maximum(vectors.std(axis=0), 1e-6)
    out: dict[str, list[int]] = {"encoder": [], "popularity": [], LAST: []}
    for i in range(len(targets)):
        position = int(targets.position[i])
        history = [int(log.item[p]) for p in range(position) if log.user[p] == log.user[position]]
        target = int(log.item[position])
        interest, similar = counts, counts
        if history:
            interest = (model.encoder.item_matrix() @ model.encoder.encode([np.array(history)])[0]).tolist()
            last = vectors[history[-1]]
            similar = [float(last @ v / np.linalg.norm(last) / np.linalg.norm(v)) for v in vectors]
        for name, scores in (("encoder", interest), ("popularity", counts), (LAST, similar)):
            out[name].append(rank(scores, history, target))
    return out


def z(values: Sequence[float]) -> np.ndarray:
    row = np.array(values)
    return (row - row.mean()) / row.std() if len(set(values)) > 1 else np.zeros(len(row))


def reranked(model: Recommender, targets: Targets) -> tuple[dict[str, list[float]], list[int]]:
    """Ranks of the LLM's systems (the encoder's own behind the candidates), and candidates a target is among."""
    out: dict[str, list[float]] = {name: [] for name in LLM_SYSTEMS}
    choices = []
    codec, engine = model.engine.codec, FakeEngine()
    for i in range(len(targets)):
        history, target = targets.history(i), int(targets.item[i])
        scores = (model.encoder.item_matrix() @ model.encoder.encode([history])[0]).tolist()
        unseen = [j for j in range(model.log.n_items) if j not in history]
        candidates = sorted(unseen, key=lambda j: (-scores[j], j))[:CANDIDATES]
        choices.append(len(candidates) if target in candidates else 0)
        logp = []
        for past in (history, history[:0]):
            prompt = model.templates.render("next_item", {"history": [{"text": model.texts[j]} for j in past]}).prompt
            tokens = [(*codec.encode_data(model.texts[j]), *codec.encode_template("\n")) for j in candidates]
            logp.append(engine.score([prompt], [tokens])[0])
        for name, (weight, calibration) in LLM_SYSTEMS.items():
            if target not in candidates:
                behind = sum(scores[j] >= scores[target] for j in unseen)
                out[name].append(max(behind, CANDIDATES + 1))
                continue
            mixed = (1 - weight) * z([scores[j] for j in candidates]) + weight * z(logp[0] - calibration * logp[1])
            own = mixed[candidates.index(target)]
            out[name].append(1 + sum(s >= own for j, s in zip(candidates, mixed, strict=True) if j != target))
    return out, choices


def recall(ranks: Sequence[float], k: int) -> float:
    return sum(r <= k for r in ranks) / len(ranks)


def ndcg(ranks: Sequence[float], k: int) -> float:
    return sum(1 / math.log2(r + 1) for r in ranks if r <= k) / len(ranks)


def check(report: Report, group: str, system: str, ranks: Sequence[float], k: int) -> None:
    found = report.find(system, group).metrics
    assert found[f"Recall@{k}"].mean == pytest.approx(recall(ranks, k)), system
    assert found[f"NDCG@{k}"].mean == pytest.approx(ndcg(ranks, k)), system
    assert found[f"Recall@{k}"].n == found[f"NDCG@{k}"].n == len(ranks)


def groups(report: Report) -> list[str]:
    return list(dict.fromkeys(row.group for row in report.rows))


# -- the numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 10])
@pytest.mark.parametrize("part", ["test", "valid"])
def test_every_system_has_the_numbers_of_a_plain_loop(k: int, part: str, model: Recommender) -> None:
    targets = getattr(model.split, part)
    report = evaluate(model, targets, k=k, llm_users=1_000)
    every, sample, difference = groups(report)
    expected = plain(model, targets)
    for system, ranks in expected.items():
        check(report, every, system, ranks, k)
        check(report, sample, system, ranks, k)  # all have a history here
    ours, choices = reranked(model, targets)
    assert 0 < choices.count(0) < len(choices)
    for system, ranks in ours.items():
        check(report, sample, system, ranks, k)
    row = report.find("llm+interest minus encoder", difference).metrics
    assert row[f"Recall@{k}"].mean == pytest.approx(recall(ours[FUSED], k) - recall(expected["encoder"], k))
    assert row[f"NDCG@{k}"].mean == pytest.approx(ndcg(ours[FUSED], k) - ndcg(expected["encoder"], k))
    # A random order puts a target at each place of its candidates equally often.
    row = report.find("the candidates in random order (expected)", sample).metrics
    chance = [[math.inf if n == 0 else place + 1 for place in range(max(n, 1))] for n in choices]
    assert row[f"Recall@{k}"].mean == pytest.approx(np.mean([recall(places, k) for places in chance]))
    assert row[f"NDCG@{k}"].mean == pytest.approx(np.mean([ndcg(places, k) for places in chance]))


@pytest.mark.parametrize("k", [1, 5])
def test_repeats_cold_items_and_users_without_history_count_as_plain_loops_count_them(
    k: int, whole: Recommender
) -> None:
    targets = whole.split.test
    report = evaluate(whole, k=k, llm_users=1_000)
    every, sample, _ = groups(report)
    expected = plain(whole, targets)
    for system, ranks in expected.items():
        check(report, every, system, ranks, k)
    warm = np.array([i for i in range(len(targets)) if len(targets.history(i))])
    assert len(warm) == len(targets) - 1
    for system, ranks in expected.items():
        check(report, sample, system, [ranks[i] for i in warm], k)
    for system, ranks in reranked(whole, targets.take(warm))[0].items():
        check(report, sample, system, ranks, k)


def test_fewer_candidates_than_asked_for_make_chance_better(model: Recommender) -> None:
    """Nine of sixteen items are seen: a list of all the rest, in whatever order, always holds the target."""
    wide = dataclasses.replace(model, config=CONFIG.model_copy(update={"candidates": 500}))
    wide.use_engine(FakeEngine())
    report = evaluate(wide, k=10, llm_users=1_000)
    chance = report.find("the candidates in random order (expected)").metrics["Recall@10"]
    assert (chance.mean, chance.low, chance.high) == (1.0, 1.0, 1.0)
    assert report.find("llm likelihood").metrics["Recall@10"].mean == 1.0


def test_popularity_counts_training_events_only() -> None:
    interactions, items = toy_frames()
    # Everybody's last event is of one item that nobody trains on: known to the test alone.
    place = (pl.int_range(pl.len()).over("user_id") + 1) == pl.len().over("user_id")
    hit = interactions.with_columns(pl.when(place).then(pl.lit("17")).otherwise("item_id").alias("item_id"))
    more = pl.DataFrame({"item_id": ["17"], "title": ["The Hit"], "genres": [""], "year": [""]})
    model = fit(leave_last_out(Dataset.read(hit, pl.concat([items, more]))))
    report = evaluate(model, k=1, llm_users=0)
    assert report.find("popularity").metrics["Recall@1"].mean == 0
    assert "30 targets are items without any training event" in report.notes


def test_ties_count_against_every_system(model: Recommender) -> None:
    flat = dataclasses.replace(model)
    flat.use_engine(FakeEngine())
    flat.index.vectors[:] = 0  # the encoder ties everywhere
    report = evaluate(flat, k=6, llm_users=0)
    # Of sixteen items eight are seen, so the target is the last of eight.
    assert report.find("encoder").metrics["Recall@6"].mean == 0
    assert evaluate(flat, k=8, llm_users=0).find("encoder").metrics["Recall@8"].mean == 1


def test_blocks_of_targets_change_nothing(model: Recommender, monkeypatch: pytest.MonkeyPatch) -> None:
    before = evaluate(model, k=3, llm_users=0).rows
    for block in (1, 16 * 7):
        monkeypatch.setattr(module, "_BLOCK", block)
        assert evaluate(model, k=3, llm_users=0).rows == before


# -- the sample --------------------------------------------------------------------------------


def test_every_system_is_shown_on_the_same_seeded_sample(model: Recommender) -> None:
    targets = model.split.test
    expected = plain(model, targets)
    seen: list[Targets] = []
    true_ranks = module._llm_ranks

    def spy(model: Recommender, part: Targets, *rest: Any) -> Any:
        seen.append(part)
        return true_ranks(model, part, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_llm_ranks", spy)
        first, again, other = (evaluate(model, k=3, llm_users=8, seed=seed) for seed in (1, 1, 2))
    assert first.rows == again.rows
    assert seen[0].position.tolist() == seen[1].position.tolist() != seen[2].position.tolist()
    for report, part in ((first, seen[0]), (other, seen[2])):
        rows = [targets.position.tolist().index(p) for p in part.position]
        assert len(set(rows)) == 8
        _, sample, difference = groups(report)
        for system, ranks in expected.items():
            check(report, sample, system, [ranks[i] for i in rows], 3)
        for system, ranks in reranked(model, part)[0].items():
            check(report, sample, system, ranks, 3)
        assert {e.n for row in report.rows if row.group in (sample, difference) for e in row.metrics.values()} == {8}


def test_without_llm_users_the_llm_is_not_asked(model: Recommender) -> None:
    quiet = dataclasses.replace(model)
    engine = FakeEngine()
    quiet.use_engine(engine)
    report = evaluate(quiet, llm_users=0)
    assert engine.scored == 0
    assert [row.system for row in report.rows] == ["encoder", "popularity", LAST]


# -- notes, errors, the report -----------------------------------------------------------------


def test_notes_count_repeats_cold_items_and_targets_without_history(whole: Recommender, model: Recommender) -> None:
    targets = whole.split.test
    repeats = sum(targets.item[i] in targets.history(i) for i in range(len(targets)))
    cold = sum(whole.split.train_counts[i] == 0 for i in targets.item)
    assert repeats == 2
    assert cold >= 1
    notes = "\n".join(evaluate(whole, llm_users=0).notes)
    assert f"{repeats} targets are repeats of an item the user has already" in notes
    assert f"{cold} targets are items without any training event" in notes
    assert "1 targets have no history: popularity stands in" in notes
    assert "leave-last-out" not in notes
    plain_notes = "\n".join(evaluate(model, llm_users=0).notes)
    assert "leave-last-out: whatever is trained on all users has seen" in plain_notes
    assert not any(word in plain_notes for word in ("repeats of", "without any training event", "no history:"))


def test_targets_without_any_history_are_ranked_by_popularity_and_the_llm_is_left_out(whole: Recommender) -> None:
    targets = whole.split.test
    cold = targets.take(np.array([i for i in range(len(targets)) if not len(targets.history(i))]))
    report = evaluate(whole, cold, k=5, llm_users=10)
    assert {row.metrics["Recall@5"].mean for row in report.rows} == {report.find("popularity").metrics["Recall@5"].mean}
    assert len(report.rows) == 3
    assert "no target has a history, so the LLM stage ran on none" in report.notes


def test_a_model_without_test_targets_says_how_to_get_some() -> None:
    model = fit(leave_last_out(Dataset.read(*toy_frames()), test=False))
    with pytest.raises(DataError, match="no targets to evaluate on"):
        evaluate(model)
    assert evaluate(model, model.split.valid, llm_users=0).find("encoder").metrics["NDCG@10"].n == 30


@pytest.mark.parametrize("bad", [{"k": 0}, {"llm_users": -1}, {"seed": -1}])
def test_settings_out_of_range_are_refused(bad: dict[str, int], model: Recommender) -> None:
    (name,) = bad
    with pytest.raises(ConfigError, match=f"{name} is {bad[name]}"):
        evaluate(model, **bad)


@pytest.mark.parametrize("n", [1, 30])
def test_a_report_is_plain_json_and_says_what_makes_it_again(n: int, model: Recommender) -> None:
    report = evaluate(model, model.split.test.take(np.arange(n)), k=3, llm_users=5, seed=4)
    # No NaN either: strict readers refuse it. One user has no interval.
    back = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert [row["system"] for row in back["rows"]] == [row.system for row in report.rows]
    estimate = back["rows"][0]["metrics"]["NDCG@3"]
    assert estimate["mean"] == report.rows[0].metrics["NDCG@3"].mean
    assert (estimate["low"] is None) == (n == 1)
    wanted = {"k": 3, "llm_users": 5, "seed": 4, "model": "fake", "split": model.split.spec}
    assert wanted.items() <= back["settings"].items()
    assert back["settings"]["fusion"]["weight"] == 0.4
    assert FitConfig.model_validate(back["settings"]["config"]) == model.config
    assert back["settings"]["data"] == model.split.dataset.content_hash
    assert back["environment"]["versions"]["numpy"] == np.__version__


def test_the_table_names_every_system_once_a_group_and_signs_the_difference(model: Recommender) -> None:
    report = evaluate(model, k=3, llm_users=10)
    text = report.to_text()
    for row in report.rows:
        assert text.count(f"  {row.system}  ") >= 1
        assert f"{row.metrics['Recall@3'].mean:.4f}" in text
    for group in groups(report):
        assert text.count(group) == 1
    for note in report.notes:
        assert f"* {note}" in text
    with pytest.raises(KeyError):
        report.find("no such system")
