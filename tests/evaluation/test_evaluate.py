"""The evaluation against plain loops: what every system's numbers must be, and what a report must say."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray
from tests.conftest import toy_frames
from tests.fake_engine import FakeEngine

from penchant.data.dataset import Dataset
from penchant.data.history import Targets
from penchant.data.split import Split, global_time, leave_last_out
from penchant.errors import ConfigError, DataError, PenchantError
from penchant.evaluation import evaluate as module
from penchant.evaluation import protocol
from penchant.evaluation.baselines.popularity import Popularity
from penchant.evaluation.evaluate import evaluate
from penchant.evaluation.leaks import check_run
from penchant.evaluation.ranking import rank_targets
from penchant.evaluation.report import Report
from penchant.evaluation.statistics import bootstrap_mean, holm, paired_permutation
from penchant.evaluation.systems import Queries
from penchant.fusion import Fusion
from penchant.interest.config import EncoderConfig
from penchant.rank import Ranker
from penchant.recommend import Recommender
from penchant.run_folder import FitConfig

CANDIDATES = 5
CONFIG = FitConfig(
    # Neighbours have tests of their own; the loops below have none.
    encoder=EncoderConfig(
        dim=16, blocks=1, dropout=0.1, max_length=12, epochs=1, batch_rows=8, learning_rate=1e-2, neighbours=0
    ),
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


pytestmark = pytest.mark.usefixtures("module_cache")


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
    """Place of the target among the items not seen, ties before it; not found where it was seen."""
    if target in seen:
        return len(scores) + 1_000
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
                out[name].append(max(behind, CANDIDATES + 1) if target in unseen else math.inf)
                continue
            mixed = (1 - weight) * z([scores[j] for j in candidates]) + weight * z(logp[0] - calibration * logp[1])
            own = mixed[candidates.index(target)]
            out[name].append(1 + sum(s >= own for j, s in zip(candidates, mixed, strict=True) if j != target))
    return out, choices


def recall(ranks: Sequence[float], k: int) -> float:
    return sum(r <= k for r in ranks) / len(ranks)


def ndcg(ranks: Sequence[float], k: int) -> float:
    return sum(1 / math.log2(r + 1) for r in ranks if r <= k) / len(ranks)


def mrr(ranks: Sequence[float], n_items: int) -> float:
    return sum(1 / r for r in ranks if r <= n_items) / len(ranks)


def check(report: Report, group: str, system: str, ranks: Sequence[float], k: int, *, users: int | None = None) -> None:
    """``users``: how many users the targets are of, where it is not one each."""
    row = report.find(system, group)
    assert row.metrics[f"Recall@{k}"].mean == pytest.approx(recall(ranks, k)), system
    assert row.metrics[f"NDCG@{k}"].mean == pytest.approx(ndcg(ranks, k)), system
    assert row.more[f"Precision@{k}"].mean == pytest.approx(recall(ranks, k) / k), system
    assert row.more[f"F1@{k}"].mean == pytest.approx(2 * recall(ranks, k) / (k + 1)), system
    assert row.more["Recall@20"].mean == pytest.approx(recall(ranks, 20)), system
    assert {e.n for e in row.metrics.values()} == {len(ranks) if users is None else users}
    n_items = 18 if users is not None else 16
    assert row.metrics["MRR"].mean == pytest.approx(mrr(ranks, n_items)), system


def groups(report: Report) -> list[str]:
    return list(dict.fromkeys(row.group for row in report.rows))


# -- the numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 10])
@pytest.mark.parametrize("part", ["test", "valid"])
@pytest.mark.parametrize("found_only", [False, True])
def test_every_system_has_the_numbers_of_a_plain_loop(k: int, part: str, found_only: bool, model: Recommender) -> None:
    targets = getattr(model.split, part)
    report = evaluate(model, targets, k=k, llm_users=1_000, llm_found_only=found_only)
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
    chance = [[place + 1 for place in range(n)] if n else [rank] for n, rank in zip(choices, ours[FUSED], strict=True)]
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
    n_users = len(set(targets.user.tolist()))
    assert n_users < len(targets)
    for system, ranks in expected.items():
        check(report, every, system, ranks, k, users=n_users)
    warm = np.array([i for i in range(len(targets)) if len(targets.history(i))])
    assert len(warm) == len(targets) - 1
    known = len(set(targets.user[warm].tolist()))
    for system, ranks in expected.items():
        check(report, sample, system, [ranks[i] for i in warm], k, users=known)
    for system, ranks in reranked(whole, targets.take(warm))[0].items():
        check(report, sample, system, ranks, k, users=known)


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


class Flat(FakeEngine):
    """Finds every item equally likely."""

    def score(self, prompts: Any, continuations: Any, **more: Any) -> Any:
        return [np.zeros(len(c)) for c in continuations]


def test_ties_of_the_llm_count_against_it(model: Recommender) -> None:
    """A likelihood that tells nothing puts the target last of its candidates, however good retrieval was."""
    flat = dataclasses.replace(model, prior=None)
    flat.use_engine(Flat())
    report = evaluate(flat, k=CANDIDATES - 1, llm_users=1_000)
    assert report.find("llm likelihood").metrics[f"Recall@{CANDIDATES - 1}"].mean == 0
    among = evaluate(flat, k=CANDIDATES, llm_users=1_000)
    assert among.find("llm likelihood").metrics[f"Recall@{CANDIDATES}"].mean > 0.5


def test_a_model_that_asks_another_question_is_shown_under_its_name(model: Recommender) -> None:
    chooser = dataclasses.replace(model, prior=None, config=CONFIG.model_copy(update={"question": "choose"}))
    chooser.use_engine(FakeEngine())
    report = evaluate(chooser, k=2, llm_users=1_000)
    names = [row.system for row in report.rows if row.system.startswith("llm")]
    assert names == ["llm choose", FUSED, "llm+interest minus encoder"]
    targets, found = chooser.split.test, []
    for i in range(len(targets)):
        history = targets.history(i)
        candidates = chooser.retrieve([history], CANDIDATES)[0][0]
        scores = chooser.ranker.letters([history], [candidates])[0]
        at = np.flatnonzero(candidates == targets.item[i])
        found.append(int((scores >= scores[at[0]]).sum()) if at.size else math.inf)
    assert report.find("llm choose").metrics["Recall@2"].mean == pytest.approx(recall(found, 2))


def test_blocks_of_targets_change_nothing(model: Recommender, monkeypatch: pytest.MonkeyPatch) -> None:
    before = evaluate(model, k=3, llm_users=0).rows
    for block in (1, 16 * 7):
        monkeypatch.setattr(protocol, "rank_targets", functools.partial(rank_targets, block=block))
        assert evaluate(model, k=3, llm_users=0).rows == before


# -- the sample --------------------------------------------------------------------------------


def test_every_system_is_shown_on_the_same_seeded_sample(model: Recommender) -> None:
    targets = model.split.test
    expected = plain(model, targets)
    seen: list[Targets] = []
    true_stage = module.run_llm_stage

    def spy(model: Recommender, part: Targets, *rest: Any, **more: Any) -> Any:
        seen.append(part)
        return true_stage(model, part, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "run_llm_stage", spy)
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


def test_asked_of_retrieved_targets_alone_the_llm_reads_no_other_history(
    monkeypatch: pytest.MonkeyPatch, model: Recommender
) -> None:
    targets = model.split.test
    choices = np.array(reranked(model, targets)[1])
    found, missed = np.flatnonzero(choices), np.flatnonzero(choices == 0)

    told: list[int] = []
    plain = Ranker.scores

    def spy(ranker: Ranker, histories: Any, candidates: Any, progress: Any = None) -> Any:
        told.append(len(histories))
        return plain(ranker, histories, candidates, progress)

    monkeypatch.setattr(Ranker, "scores", spy)

    def asked(rows: NDArray[np.integer], found_only: bool) -> tuple[int, Report]:
        told.clear()
        report = evaluate(model, targets.take(rows), llm_users=1_000, llm_found_only=found_only)
        return told[0], report  # those behind it are single requests, whose latency is measured

    every = np.arange(len(targets))
    n, report = asked(every, True)
    assert n == len(found) < len(targets) == asked(every, False)[0]
    assert any(f"asked of the {len(found)} targets among them that were retrieved" in note for note in report.notes)
    assert not [one for one in report.beyond if one["system"].startswith("llm")], "half of such lists are the encoder's"
    assert [one for one in asked(every, False)[1].beyond if one["system"].startswith("llm")]
    n, report = asked(missed, True)
    assert n == 0
    assert any("asked of the 0 targets among them" in note for note in report.notes)
    _, sample, _ = groups(report)
    for name in ("llm likelihood", FUSED):
        check(report, sample, name, reranked(model, targets.take(missed))[0][name], 10)


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


@pytest.mark.parametrize("bad", [{"k": 2.0}, {"llm_users": 5.0}, {"k": True}, {"seed": "1"}])
def test_settings_that_are_no_whole_numbers_are_refused(bad: dict[str, Any], model: Recommender) -> None:
    (name,) = bad
    with pytest.raises(ConfigError, match=f"{name} is {bad[name]!r}.*\n.*whole number"):
        evaluate(model, **bad)


@pytest.mark.parametrize("bad", [[[0, 1]] * 30, np.zeros((30, 2)), np.zeros(30, dtype=np.int64)])
def test_candidates_that_are_no_array_of_items_are_refused(bad: Any, model: Recommender) -> None:
    with pytest.raises(ConfigError, match="no array of whole numbers"):
        evaluate(model, candidates=bad)


@pytest.mark.parametrize("name", ["encoder", LAST, "llm likelihood", FUSED])
def test_a_baseline_with_the_name_of_a_system_of_ours_is_refused(name: str, model: Recommender) -> None:
    mine = dataclasses.replace(Popularity(np.ones(16, dtype=np.float32)), name=name)
    with pytest.raises(ConfigError, match=re.escape(f"two systems are called {name!r}")):
        evaluate(model, baselines=[mine], llm_users=0)
    mine = dataclasses.replace(mine, name="mine")
    with pytest.raises(ConfigError, match="two systems are called 'mine'"):
        evaluate(model, baselines=[mine, mine], llm_users=0)
    assert evaluate(model, baselines=[mine], llm_users=0).find("mine")


def test_popularity_as_a_baseline_stands_for_the_built_in_one(model: Recommender) -> None:
    ours = Popularity(model.split.train_counts.astype(np.float32))
    report = evaluate(model, baselines=[ours], llm_users=0)
    assert sum(row.system == "popularity" for row in report.rows) == 1
    assert report.find("encoder minus popularity").difference


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


# -- protocols ---------------------------------------------------------------------------------


@dataclasses.dataclass
class Guess:
    """A baseline for the tests: the seed decides the scores, the user's own index is added."""

    seed: int
    name: str = "guess"

    def scores(self, queries: Queries) -> np.ndarray:
        rng = np.random.default_rng(self.seed)
        table = rng.standard_normal((100, 16)).astype(np.float32)
        return table[queries.user]


def test_users_count_alike_where_asked(whole: Recommender) -> None:
    targets = whole.split.test
    by_user = evaluate(whole, k=3, llm_users=0, average="user").find("encoder").metrics["Recall@3"]
    ranks = plain(whole, targets)["encoder"]
    own: dict[int, list[float]] = {}
    for user, r in zip(targets.user.tolist(), ranks, strict=True):
        own.setdefault(user, []).append(float(r <= 3))
    assert by_user.mean == pytest.approx(np.mean([np.mean(v) for v in own.values()]))
    assert by_user.n == len(own)
    assert by_user.mean != pytest.approx(recall(ranks, 3))


def test_repeats_can_be_found_where_seen_items_are_kept(whole: Recommender) -> None:
    targets = whole.split.test
    repeats = np.array([i for i in range(len(targets)) if targets.item[i] in targets.history(i)])
    some = targets.take(repeats)
    for name in ("encoder", "popularity", "llm likelihood"):
        assert evaluate(whole, some, k=18).find(name).metrics["Recall@18"].mean == 0
        assert evaluate(whole, some, k=18, seen="keep").find(name).metrics["Recall@18"].mean > 0
    notes = "\n".join(evaluate(whole, some, llm_users=0, seen="keep").notes)
    assert "2 targets are repeats of an item the user has already; they count like any other" in notes
    assert "repeats count, seen items are not masked" in notes


def test_sampled_candidates_are_named_so_in_every_table(model: Recommender) -> None:
    targets = model.split.test
    rng = np.random.default_rng(5)
    candidates = np.array([[*rng.choice([i for i in range(16) if i != t], 3, replace=False), t] for t in targets.item])
    report = evaluate(model, k=2, llm_users=1_000, candidates=candidates, baselines=[Guess(1)])
    heads = [lines.split("\n")[0] for lines in report.to_text().split("\n\n")[:-1]]
    assert len(heads) == len({row.group for row in report.rows}) == 4
    assert all("sampled candidates (4)" in head for head in heads)
    every, _, sample, _ = groups(report)
    assert "sampled candidates (4)" in every
    assert "sampled candidates (4)" in sample
    assert "ranked among sampled candidates only (4 a target), nothing masked" in report.notes[0]
    assert report.settings["candidates"] == 4
    matrix = model.encoder.item_matrix()
    expected = []
    for i, row in enumerate(candidates):
        scores = matrix @ model.encoder.encode([targets.history(i)])[0]
        expected.append(1 + sum(scores[j] >= scores[targets.item[i]] for j in row if j != targets.item[i]))
    assert report.find("encoder", every).metrics["Recall@2"].mean == pytest.approx(recall(expected, 2))
    assert report.find("llm likelihood", sample).metrics["Recall@2"].mean > 0
    # The target is one of four: in random order half of them are among two.
    assert report.find("the candidates in random order (expected)").metrics["Recall@2"].mean == 0.5
    assert evaluate(model, k=4, llm_users=9, candidates=candidates).find(FUSED).metrics["Recall@4"].mean == 1


def test_ours_is_tested_against_the_best_baseline_with_holm(model: Recommender) -> None:
    targets = model.split.test
    perfect = Popularity(np.zeros(16, np.float32), "useless")
    report = evaluate(model, k=5, llm_users=1_000, baselines=[perfect, Guess(1)])
    guess, encoder = report.find("guess"), report.find("encoder")
    assert guess.metrics["NDCG@5"].mean > report.find("useless").metrics["NDCG@5"].mean
    differences = [row for row in report.rows if row.difference]
    assert [row.system for row in differences] == [
        "encoder minus guess",
        "llm+interest minus encoder",
        "llm+interest minus guess",
    ]
    first = differences[0]
    assert first.metrics["NDCG@5"].mean == pytest.approx(encoder.metrics["NDCG@5"].mean - guess.metrics["NDCG@5"].mean)
    # The p values are those of plain tests on the ranks, corrected over the three.
    scores = Guess(1).scores(Queries.of(targets))
    theirs = [rank(scores[i].tolist(), targets.history(i).tolist(), int(targets.item[i])) for i in range(len(targets))]
    ours = plain(model, targets)["encoder"]
    fused = reranked(model, targets)[0][FUSED]

    def gains(ranks: Sequence[float]) -> np.ndarray:
        return np.array([1 / math.log2(r + 1) if r <= 5 else 0.0 for r in ranks])

    pairs = ((ours, theirs), (fused, ours), (fused, theirs))
    expected = holm([paired_permutation(gains(a), gains(b), 0).p for a, b in pairs])
    assert [row.p for row in differences] == pytest.approx(expected.tolist())
    assert "Holm-corrected over the 3 differences of this report" in "\n".join(report.notes)
    assert f"p {first.p:.2g}" in report.to_text()


def test_slices_are_the_metrics_of_their_targets(whole: Recommender) -> None:
    targets = whole.split.test
    report = evaluate(whole, k=3, llm_users=0, item_columns=["genres"])
    expected = plain(whole, targets)["encoder"]
    length = [len(targets.history(i)) for i in range(len(targets))]
    (row,) = [r for r in report.slices if (r.slice, r.value, r.system) == ("history length", "4-10", "encoder")]
    inside = [r for r, n in zip(expected, length, strict=True) if 4 <= n <= 10]
    assert row.n == len(inside)
    assert row.metrics["Recall@3"].mean == pytest.approx(recall(inside, 3))
    assert {"history length", "item coldness", "item popularity", "item genres"} == {r.slice for r in report.slices}
    users = pl.DataFrame({"user_id": [f"u{i}" for i in range(30)], "job": ["a", "b"] * 15})
    by_job = [r for r in evaluate(whole, llm_users=0, users=users).slices if r.slice == "user job"]
    assert {r.value for r in by_job} == {"a", "b"}
    assert evaluate(whole, llm_users=0, slices=False).slices == []


class Counting(FakeEngine):
    """Counts every token of every prompt and continuation."""

    tokens_run = 0

    def score(self, prompts: Any, continuations: Any, **more: Any) -> Any:
        for prompt, candidates in zip(prompts, continuations, strict=True):
            self.tokens_run += len(self.codec.encode(prompt)) + sum(map(len, candidates))
        return super().score(prompts, continuations, **more)


def test_costs_are_for_a_thousand_users(model: Recommender, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "request_milliseconds", lambda *args, **more: [])  # they run tokens of their own
    counted = dataclasses.replace(model, prior=np.zeros(16))  # no-history likelihoods cost nothing now
    engine = Counting()
    counted.use_engine(engine)
    report = evaluate(counted, llm_users=8)
    costs = {cost.system: cost for cost in report.costs}
    assert list(costs) == ["encoder", "popularity", LAST, *LLM_SYSTEMS]
    assert engine.tokens_run > 0
    assert costs["llm likelihood"].tokens_per_1000_users == pytest.approx(engine.tokens_run * 1000 / 8)
    assert costs["encoder"].tokens_per_1000_users == 0
    assert costs[FUSED].seconds_per_1000_users > costs["encoder"].seconds_per_1000_users > 0
    # An engine that does not count says nothing rather than 0.
    assert {c.tokens_per_1000_users for c in evaluate(model, llm_users=8).costs} == {0.0, None}


def test_beyond_accuracy_is_of_the_same_targets_for_every_system(model: Recommender) -> None:
    report = evaluate(model, k=3, llm_users=8)
    assert [row["system"] for row in report.beyond] == ["encoder", "popularity", LAST, *LLM_SYSTEMS]
    assert {row["invalid"] for row in report.beyond} == {0.0}
    assert {row["duplicates"] for row in report.beyond} == {0.0}
    popular = next(row for row in report.beyond if row["system"] == "popularity")
    assert popular["popularity_lift"] == max(row["popularity_lift"] for row in report.beyond)
    assert all(row["genre_calibration"] is not None for row in report.beyond)


# -- examples ----------------------------------------------------------------------------------


def test_examples_are_real_users_with_facts(model: Recommender) -> None:
    targets = model.split.test
    report = evaluate(model, k=5, llm_users=1_000, seed=3)
    assert len(report.examples) == 10
    assert report.examples == evaluate(model, k=5, llm_users=1_000, seed=3).examples
    expected, (ours, choices) = plain(model, targets)["encoder"], reranked(model, targets)
    row_of = {model.log.user_ids[u]: row for row, u in enumerate(targets.user)}
    titles = model.split.dataset.items["title"].to_list()
    stories = set()
    for example in [*report.examples, *evaluate(model, k=5, llm_users=1_000, seed=4).examples]:
        row = row_of[example.user]
        before, after = expected[row], int(ours[FUSED][row])
        assert example.target == titles[targets.item[row]]
        assert example.history == [titles[i] for i in targets.history(row)]
        assert example.target_rank == {"encoder": before, FUSED: after}
        assert not set(example.recommended[FUSED]) & set(example.history)
        if after <= 5:
            assert example.recommended[FUSED][after - 1] == example.target
        if not choices[row]:
            fact = f"the target was retrieved at {before}, outside the 5 candidates"
        elif after != before:
            fact = f"the LLM moved the target from {before} to {after}"
        else:
            fact = f"the LLM left the target at {after}"
        assert fact in example.why
        assert example.why.startswith("right") == (after == 1)
        stories.add(fact.partition(" target ")[2][:5])
    assert len(stories) >= 2


def test_examples_name_cold_targets_repeats_and_users_without_history(whole: Recommender) -> None:
    targets = whole.split.test
    cold = next(i for i in range(len(targets)) if whole.split.train_counts[targets.item[i]] == 0)
    repeat = next(i for i in range(len(targets)) if targets.item[i] in targets.history(i))
    nobody = next(i for i in range(len(targets)) if not len(targets.history(i)))
    one = [targets.take(np.array([row])) for row in (cold, repeat, nobody)]
    whys = [evaluate(whole, target, llm_users=0).examples[0].why for target in one]
    assert "the target is cold" in whys[0]
    assert "repeats an item of the history" in whys[1]
    assert "no history, so popularity answers" in whys[2]


# -- what is refused ---------------------------------------------------------------------------


def test_training_events_are_no_targets(model: Recommender) -> None:
    learnt = Targets(model.log, np.concatenate([model.split.test.position[:3], np.flatnonzero(model.split.train)[5:7]]))
    with pytest.raises(DataError, match="2 of 5 targets are events the model was trained on"):
        evaluate(model, learnt)


@pytest.mark.parametrize("change", ["item", "users", "more", "outside"])
def test_targets_of_another_log_are_refused(change: str, model: Recommender) -> None:
    interactions, items = toy_frames(n_users=32 if change == "more" else 30)
    if change == "item":  # the same shape, but for one item of one history
        other = pl.when(pl.col("item_id") == "3").then(pl.lit("4")).otherwise(pl.col("item_id"))
        first = (pl.int_range(pl.len()) < 40) & (pl.col("item_id") == "3")
        interactions = interactions.with_columns(
            pl.when(first).then(other).otherwise(pl.col("item_id")).alias("item_id")
        )
    if change == "users":
        interactions = interactions.with_columns(pl.concat_str(pl.lit("x"), "user_id").alias("user_id"))
    targets = leave_last_out(Dataset.read(interactions, items)).test
    if change == "outside":
        targets = Targets(model.log, np.array([len(model.log.item)], dtype=np.int64))
    with pytest.raises(DataError, match="the targets are not events of the data that was fitted on"):
        evaluate(model, targets, llm_users=0)


def test_targets_of_an_equal_log_are_taken(model: Recommender) -> None:
    again = leave_last_out(Dataset.read(*toy_frames())).test
    assert again.log is not model.log
    assert evaluate(model, again, llm_users=0).rows == evaluate(model, llm_users=0).rows


def test_targets_whose_histories_hold_more_than_the_past_are_refused(model: Recommender) -> None:
    class Knowing(Targets):
        def history(self, i: int) -> np.ndarray:
            return np.append(super().history(i), self.item[i])

        def take(self, rows: np.ndarray) -> Targets:
            return Knowing(self.log, self.position[rows])

    with pytest.raises(DataError, match="a given history is not the events before its target"):
        evaluate(model, Knowing(model.log, model.split.test.position), llm_users=0)


@pytest.mark.parametrize(
    ("columns", "users", "what"),
    [
        ({"item_columns": ["colour"]}, None, "no column 'colour'"),
        ({}, ["u1", "u1"], "user 'u1' stands there twice"),
    ],
)
def test_a_wrong_slice_is_found_before_the_llm_is_asked(
    columns: dict[str, Any], users: list[str] | None, what: str, model: Recommender
) -> None:
    table = None if users is None else pl.DataFrame({"user_id": users, "age": [1, 2]})
    engine = FakeEngine()
    asked = dataclasses.replace(model)
    asked.use_engine(engine)
    with pytest.raises(PenchantError, match=what):
        evaluate(asked, users=table, **columns)
    assert engine.scored == 0


def test_every_prompt_of_the_llm_stage_is_read_for_its_answer(
    model: Recommender, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "19 prompts, all that the LLM is asked, were rendered" in "\n".join(evaluate(model, llm_users=9).notes)
    kind, honest, last = type(model.ranker), type(model.ranker).prompt, model.split.test.history(29)

    def prompt(self: Any, history: np.ndarray) -> Any:
        return honest(self, np.append(history, model.split.test.item[29]) if np.array_equal(history, last) else history)

    monkeypatch.setattr(kind, "prompt", prompt)
    monkeypatch.setattr(kind, "scores", lambda *a: pytest.fail("the LLM was asked"))
    with pytest.raises(DataError, match="names its own answer"):
        evaluate(model, llm_users=30)


@pytest.mark.parametrize("question", ["choose", "yes_no"])
def test_prompts_of_other_questions_are_read_without_their_candidates(question: Any, model: Recommender) -> None:
    asked = dataclasses.replace(model, config=model.config.model_copy(update={"question": question}))
    asked.use_engine(FakeEngine())
    history = model.split.test.history(0)
    text = "".join(segment.text for segment in asked.ranker.question_of(history).segments)
    assert ("Candidates:" if question == "choose" else "Answer Yes or No.") in text
    assert model.texts[history[-1]] in text
    assert check_run(asked, asked=model.split.test).texts == 40


def test_a_leak_fails_the_run_before_anything_is_scored(model: Recommender, monkeypatch: pytest.MonkeyPatch) -> None:
    split = model.split
    train = split.train.copy()
    train[split.valid.position[4]] = True  # learnt from what validation holds out
    leaky = dataclasses.replace(model, split=dataclasses.replace(split, train=train))
    leaky.use_engine(FakeEngine())
    monkeypatch.setattr(protocol, "rank_targets", lambda *a, **b: pytest.fail("it was scored"))
    with pytest.raises(DataError, match="leak check"):
        evaluate(leaky)


def test_the_leak_check_is_on_record(model: Recommender) -> None:
    assert "leak check: 60 prompts and 30 training rows" in "\n".join(evaluate(model, llm_users=0).notes)


def test_a_mean_over_events_draws_whole_users(whole: Recommender) -> None:
    """Forty events of one user are no forty independent observations: the interval is wider than theirs."""
    targets = whole.split.test
    ranks = np.array(plain(whole, targets)["popularity"])
    naive = bootstrap_mean((ranks <= 3).astype(np.float64))
    found = evaluate(whole, k=3, llm_users=0).find("popularity").metrics["Recall@3"]
    assert found.mean == pytest.approx(naive.mean)
    assert (found.low, found.high) != (naive.low, naive.high)
