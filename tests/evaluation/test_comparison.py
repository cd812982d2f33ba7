"""A task run by parts: what is finished is not made again, what changed is, and the result says what it was made of."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from tests.conftest import toy_frames
from tests.fake_engine import FakeEngine

from penchant.errors import ConfigError, DataError
from penchant.evaluation import comparison as module
from penchant.evaluation import prepared
from penchant.evaluation.baselines import Grids
from penchant.evaluation.baselines.item_knn import ItemKNNConfig
from penchant.evaluation.baselines.sasrec import SASRec
from penchant.evaluation.comparison import BOTH, Comparison
from penchant.evaluation.ranking import Ranked, rank_targets
from penchant.evaluation.spread import spread
from penchant.evaluation.store import Finished, Store, key_of
from penchant.evaluation.tasks import Task
from penchant.interest.config import EncoderConfig
from penchant.interest.encoder import InterestEncoder
from penchant.interest.match import Chosen, Trials
from penchant.interest.train import train_encoder
from penchant.interest.vectors import Scaling

SMALL = ["popularity", "item_knn", "sasrec"]
SASREC = "SASRec (cross entropy)"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    interactions, items = toy_frames()
    (tmp_path / "toy").mkdir()
    interactions.write_csv(tmp_path / "toy/events.csv")
    items.write_csv(tmp_path / "toy/items.csv")
    return tmp_path


def task(**changes: Any) -> Task:
    encoder = {"dim": 16, "blocks": 1, "max_length": 12, "epochs": 2, "batch_rows": 8, "learning_rate": 0.01}
    fields = {
        "version": 1,
        "about": "a toy",
        "data": {"kind": "tables", "folder": "toy", "interactions": "events.csv", "items": "items.csv"},
        "split": {"kind": "leave-last-out"},
        "fit": {"encoder": encoder, "candidates": 5, "validation_users": 5},
        "llm_users": 8,
        "budget": {"trials": 1, "seconds": 60},
    }
    return Task.model_validate(fields | changes)


def comparison(data: Path, systems: list[str], made: Task | None = None, **more: Any) -> Comparison:
    return Comparison("toy", made or task(), data / "results", FakeEngine, data, systems, **more)


def weights_of(made: Comparison, name: str) -> Path:
    found = made.finished(name, 0)
    assert found is not None
    return made.trained.weights(found.record["trained"])


def test_the_encoder_is_the_task_s_and_sasrec_stays_sasrec(data: Path) -> None:
    settings = task().fit.encoder.model_dump() | {"inputs": ("gap",), "interests": 2, "loss": "sampled", "negatives": 8}
    fit = {
        "encoder": settings,
        "candidates": 5,
        "validation_users": 5,
        "fields": ["title", "genres"],
        "scale": "whiten",
    }
    made = comparison(data, ["sasrec", "encoder: ids + text", "full"], task(fit=fit))
    assert made.raw_vectors.shape[1] == 2 * FakeEngine().embed(["a"]).shape[1]  # two fields side by side
    whitened = Scaling.fit(made.raw_vectors, "whiten").apply(made.raw_vectors)
    assert np.array_equal(made.vectors, whitened)
    rows = made.run()["runs"][0]["rows"]
    assert any("llm+interest" in row["system"] for row in rows)
    chosen = {name: made.finished(name, 0).record["fit"]["chosen"]["config"] for name in ("sasrec", BOTH)}  # type: ignore[union-attr]
    assert (chosen[BOTH]["inputs"], chosen[BOTH]["interests"], chosen[BOTH]["loss"]) == (["gap"], 2, "sampled")
    assert (chosen["sasrec"]["inputs"], chosen["sasrec"]["interests"], chosen["sasrec"]["loss"]) == ([], 1, "auto")
    assert chosen["sasrec"]["dim"] == 16  # of the task's it has the sizes
    # The inputs count: the same weights without them rank otherwise.
    encoder = InterestEncoder.load(
        weights_of(made, BOTH), EncoderConfig.model_validate(chosen[BOTH]), 16, made.vectors, columns=[32]
    )
    history = made.events[1].before([int(made.split.test.position[0])])
    assert not np.allclose(encoder.encode(history), encoder.encode([history[0].item]))


def test_the_text_match_is_ours_alone_and_is_kept_with_the_weights(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = Chosen(0.5, 1.0, 1.0, None)
    monkeypatch.setattr(Trials, "best", lambda self, n, price: told)
    fit = {"encoder": task().fit.encoder.model_dump() | {"match": 6, "cold_price": 0.2}, "candidates": 5}
    made = comparison(data, ["sasrec", "encoder: text", BOTH, "full"], task(fit=fit | {"validation_users": 5}))
    rows = made.run()["runs"][0]["rows"]
    assert any("llm+interest" in row["system"] for row in rows)
    chosen = {name: made.finished(name, 0).record["fit"]["chosen"]["config"] for name in ("sasrec", BOTH)}  # type: ignore[union-attr]
    assert (chosen[BOTH]["match"], chosen["sasrec"]["match"], chosen["sasrec"]["cold_price"]) == (6, 0, 0.0)
    config = EncoderConfig.model_validate(chosen[BOTH])
    encoder = InterestEncoder.load(weights_of(made, BOTH), config, 16, made.vectors)
    assert encoder.width == 16 + 2 + 6
    # The ranks are those of both scores.
    ranked = rank_targets(
        SASRec(encoder, encoder.item_matrix(), made.split.train_counts.astype(np.float32)), made.asked.targets, k=10
    )
    assert ranked.rank.tolist() == made.finished(BOTH, 0).ranked.rank.tolist()  # type: ignore[union-attr]


def test_a_task_that_learns_values_is_refused(data: Path) -> None:
    fit = {"encoder": task().fit.encoder.model_dump() | {"loss": "mse"}}
    with pytest.raises(ConfigError, match="compares rankings"):
        comparison(data, ["popularity"], task(fit=fit))


class Counted:
    """Which systems were fitted, and a crash after so many."""

    def __init__(self, patch: pytest.MonkeyPatch, crash_after: int | None = None) -> None:
        self.names: list[str] = []
        true_fit = Comparison._fit

        def fit(this: Comparison, name: str, seed: int, chosen: Any) -> Any:
            if crash_after is not None and len(self.names) >= crash_after:
                raise KeyboardInterrupt
            self.names.append(f"{name} {seed}")
            return true_fit(this, name, seed, chosen)

        patch.setattr(Comparison, "_fit", fit)


def fitted(data: Path, systems: list[str], made: Task | None = None, crash_after: int | None = None) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        counted = Counted(patch, crash_after)
        if crash_after is None:
            comparison(data, systems, made).run()
        else:
            with pytest.raises(KeyboardInterrupt):
                comparison(data, systems, made).run()
    return counted.names


def test_a_run_that_was_cut_off_goes_on_where_it_was(data: Path) -> None:
    assert fitted(data, SMALL, crash_after=1) == ["popularity 0"]
    assert fitted(data, SMALL) == ["item_knn 0", "sasrec 0"]
    assert fitted(data, SMALL) == []
    # More systems: only those are made.
    assert fitted(data, [*SMALL, "ease"]) == ["ease 0"]


ENCODERS = ["sasrec", "encoder: text", "encoder: ids", BOTH]


def test_a_task_that_only_asks_others_takes_the_encoders_that_were_trained(data: Path) -> None:
    two = {"seeds": [3, 4], "budget": {"trials": 2, "seconds": 60}}
    first = comparison(data, ENCODERS, task(**two), stamp={"commit": "old"})
    ranked = {(name, seed): first.finished(name, seed) for name in ENCODERS for seed in (3, 4)}
    for path in (data / "results" / "encoders").glob("*.json"):  # so tiny a training takes no time that would show
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | {"origin": record["origin"] | {"seconds": 7.0}}))
    # Lists of others are ranked, and means are over users: another task of another name.
    other = Comparison("other", task(**two, average="user", k=3), data / "results", FakeEngine, data, ENCODERS)
    other.stamp = {"commit": "new"}
    with pytest.MonkeyPatch.context() as patch:
        counted = Counted(patch)
        result = other.run()
    assert counted.names == []
    made = {(one["name"], one["seed"]): one for one in result["systems"]}
    for (name, seed), one in ranked.items():
        again = other.finished(name, seed)
        assert one is not None
        assert again is not None
        assert again.ranked.rank.tolist() == one.ranked.rank.tolist()
        assert again.record["fit"] == one.record["fit"]
        assert made[name, seed]["commit"] == "new"
        assert made[name, seed]["trained"]["commit"] == "old"
    # What a table took is with the training, whoever paid for it.
    took = sum(one["seconds"] for one in made.values()) + 7.0 * len(ranked)
    assert result["seconds"] == pytest.approx(took, abs=0.06)
    # What trains otherwise is trained anew, and so is what was torn.
    assert fitted(data, [BOTH], task(**two, seen_last=3)) == [f"{BOTH} 3", f"{BOTH} 4"]
    weights = weights_of(comparison(data, [BOTH], task()), BOTH)
    weights.write_bytes(weights.read_bytes()[:-8] + b"12345678")
    assert fitted(data, [BOTH], task(k=3)) == [f"{BOTH} 0"]


def test_with_ids_alone_ours_is_what_sasrec_learnt_and_what_stands_beside_it(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[EncoderConfig] = []

    def spy(sequences: Any, n_items: int, text: Any, config: EncoderConfig, *rest: Any, **more: Any) -> Any:
        trained.append(config)
        return train_encoder(sequences, n_items, text, config, *rest, **more)

    monkeypatch.setattr("penchant.evaluation.encoders.train_encoder", spy)
    fit = {"encoder": task().fit.encoder.model_dump() | {"neighbours": 5}, "candidates": 5, "validation_users": 5}
    two = {"fit": fit, "seeds": [0, 1], "budget": {"trials": 2, "seconds": 60}}
    alone = comparison(data, ["encoder: ids"], task(**two))
    alone.run()
    assert len(trained) == 3, "two configurations, and with the other seed the better one"
    apart = [alone.finished("encoder: ids", seed) for seed in (0, 1)]
    trained.clear()
    beside = Comparison("toy", task(**two), data / "others", FakeEngine, data, ["sasrec", "encoder: ids"])
    beside.run()
    assert len(trained) <= 2, "of the first seed the one that SASRec did not choose; if it is the better, again"
    for seed, own in enumerate(apart):
        found, plain = (beside.finished(name, seed) for name in ("encoder: ids", "sasrec"))
        assert found is not None
        assert plain is not None
        assert own is not None
        assert found.ranked.rank.tolist() == own.ranked.rank.tolist()
        chosen, sasrec = found.record["fit"]["chosen"], plain.record["fit"]["chosen"]
        assert (chosen["config"], chosen["config"]["neighbours"]) == (own.record["fit"]["chosen"]["config"], 5)
        if chosen["config"]["dropout"] == sasrec["config"]["dropout"]:
            assert chosen["fit_seconds"] > sasrec["fit_seconds"], "what another paid for is counted"


def test_a_ranking_is_never_beside_other_weights_than_those_it_was_made_with(data: Path) -> None:
    one = comparison(data, [BOTH])
    first = one.finished(BOTH, 0)
    assert first is not None
    key = first.record["trained"]
    config = EncoderConfig.model_validate(first.record["fit"]["chosen"]["config"])
    other = InterestEncoder.load(one.trained.weights(key), config, 16, one.vectors)
    assert other.ids is not None
    other.ids.weight.data.add_(torch.randn(other.ids.weight.shape, generator=torch.Generator().manual_seed(0)))
    one.trained.save(key, other, {"fit": first.record["fit"], "origin": {}})  # a run beside this one was faster
    again = comparison(data, [BOTH]).finished(BOTH, 0)
    assert again is not None
    assert again.record["weights"] != first.record["weights"]
    assert again.ranked.rank.tolist() != first.ranked.rank.tolist()


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"budget": {"trials": 2, "seconds": 60}},
        {"seen_last": 3},
        {"fit": {"encoder": {"dim": 8, "epochs": 1}}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_changed_task_is_run_anew(data: Path, change: dict[str, Any]) -> None:
    assert fitted(data, ["popularity"]) == ["popularity 0"]
    assert fitted(data, ["popularity"], task(**change)) == ["popularity 0"]


def test_changed_data_or_version_are_run_anew(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted(data, ["popularity"])
    events = data / "toy/events.csv"
    events.write_text(events.read_text() + "u0,3,2000000\n")
    assert fitted(data, ["popularity"]) == ["popularity 0"]
    monkeypatch.setattr(module, "__version__", "9.9.9")
    assert fitted(data, ["popularity"]) == ["popularity 0"]
    # What is said about a task, its limits and other people's numbers change nothing.
    same = task(about="other words", seconds=1e6, published=[])
    assert fitted(data, ["popularity"], same) == []


def test_other_candidates_are_asked_anew_and_what_others_published_is_as_the_task_has_it(data: Path) -> None:
    lines = [f"u{n}\t{' '.join(str(i) for i in range(1, 17))}" for n in range(10)]
    (data / "toy/candidates").write_text("\n".join(lines) + "\n")
    entry = {"system": "x", "source": "a paper", "protocol": "the same", "metrics": {"NDCG@10": 0.1}}
    asked = task(candidates={"file": "candidates", "n": 8}, published=[entry])
    first = comparison(data, ["popularity"], asked).run()["runs"][0]
    assert fitted(data, ["popularity"], asked) == []
    (data / "toy/candidates").write_text("\n".join(lines[:5]) + "\n")
    assert fitted(data, ["popularity"], asked) == ["popularity 0"], "the file is another, whatever its name"
    second = comparison(data, ["popularity"], asked).run()["runs"][0]
    assert [rows[0]["group"].split()[1] for rows in (first["rows"], second["rows"])] == ["10", "5"]
    other = task(candidates={"file": "candidates", "n": 8}, published=[entry | {"metrics": {"NDCG@10": 0.9}}])
    assert fitted(data, ["popularity"], other) == []
    published = comparison(data, ["popularity"], other).run()["runs"][0]["published"]
    assert [one["metrics"] for one in published] == [{"NDCG@10": 0.9}]


def test_time_that_is_spent_before_the_first_system_is_one_error(data: Path) -> None:
    with pytest.raises(ConfigError, match="were spent before any system of seed 0"):
        comparison(data, SMALL, task(seconds=1e-9)).run()


def test_a_cheap_baseline_whose_grid_is_another_is_made_anew(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    systems = ["popularity", "item_knn", "ease", "sasrec"]
    fitted(data, systems)
    monkeypatch.setattr(module, "Grids", partial(Grids, item_knn=[ItemKNNConfig(last=2)]))
    assert fitted(data, systems) == ["item_knn 0"]


def test_the_llm_is_asked_of_the_same_targets_with_every_seed(data: Path) -> None:
    runs = comparison(data, [BOTH, "popularity", "full"], task(seeds=[4, 3])).run()["runs"]
    found = []
    for run in runs:
        rows = [row for row in run["rows"] if row["group"].startswith("the same 8 of them (seed 4)")]
        found.append({row["system"]: row["metrics"]["NDCG@10"] for row in rows})
    assert found[0]["popularity"] == found[1]["popularity"]
    assert found[0][BOTH] != found[1][BOTH], "the encoder is the seed's"
    assert [run["settings"]["seed"] for run in runs] == [4, 3]


def test_several_targets_of_a_user_are_said(data: Path) -> None:
    made = task(split={"kind": "global-time", "options": {"test_share": 0.5}}, llm_users=0)
    one = comparison(data, ["popularity", BOTH], made)
    (run,) = one.run()["runs"]
    targets = one.asked.targets
    users = len(set(targets.user.tolist()))
    assert users < len(targets)
    assert run["rows"][0]["group"].startswith(f"all {len(targets)} test targets of {users} users, whole catalogue")


def test_differences_are_of_the_means_over_the_seeds(data: Path) -> None:
    made = task(seeds=[3, 4, 5], llm_users=0)
    one = comparison(data, ["popularity", "sasrec", "encoder: text", "encoder: ids", BOTH], made)
    found = one.run()["differences"]
    assert {row["group"] for row in found["rows"]} == {"all 30 test targets"}
    others = ("popularity", SASREC, "encoder: text", "encoder: ids")
    assert [row["system"] for row in found["rows"]] == [f"{BOTH} minus {other}" for other in others]

    def ndcg(name: str, seed: int) -> np.ndarray:
        made = one.finished(name, seed)
        assert made is not None
        return np.where(made.ranked.rank <= 10, 1 / np.log2(made.ranked.rank + 1), 0)

    for row in found["rows"]:
        ours, other = ({"popularity": "popularity", SASREC: "sasrec"}.get(n, n) for n in row["system"].split(" minus "))
        each = [(ndcg(ours, seed) - ndcg(other, seed)).mean() for seed in made.seeds]
        assert row["metrics"]["NDCG@10"]["mean"] == pytest.approx(np.mean(each))
        assert row["metrics"]["NDCG@10"]["n"] == 30
    assert "Holm-corrected over the 4 differences" in found["notes"][0]
    assert len(found["notes"]) == 1


def test_a_system_that_lacks_a_seed_has_no_difference_and_is_named(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spent = ("sasrec, seed 4", f"{BOTH}, seed 4")
    monkeypatch.setattr(Comparison, "_time_left", lambda self, what: what not in spent)
    made = task(seeds=[3, 4], llm_users=0)
    found = comparison(data, ["popularity", "sasrec", "encoder: ids", BOTH], made).run()["differences"]
    assert [row["system"] for row in found["rows"]] == ["encoder: ids minus popularity"]
    assert found["notes"][1:] == [
        f"{name} is left out of the differences: it was made with 1 of 2 seeds" for name in (SASREC, BOTH)
    ]


def test_targets_in_ties_and_cold_ones_have_differences_of_their_own(data: Path) -> None:
    """Every other user's last two events are of one second; a quarter's last item is one that nobody had before."""
    rows = [(f"u{u}", str(1 + (u + e) % 9), 100 * e + u) for u in range(80) for e in range(6)]
    rows = [(user, item, t - 100 if t >= 500 and int(user[1:]) % 2 else t) for user, item, t in rows]
    rows = [(user, "16" if t >= 500 and int(user[1:]) % 4 == 0 else item, t) for user, item, t in rows]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    frame.write_csv(data / "toy/events.csv")
    one = comparison(data, ["popularity", "encoder: ids", BOTH], task(llm_users=0))
    groups = {row["group"] for row in one.run()["differences"]["rows"]}
    assert groups == {"all 80 test targets", "the 40 test targets at a time of their own"}, "20 cold ones are few"


def test_cold_users_have_differences_of_their_own(data: Path) -> None:
    """40 users before the test and 35 in it alone, of whose six events the second to the fourth are a cold user's."""
    old = [(f"u{u}", str(1 + (u + e) % 9), 100 * e + u) for u in range(40) for e in range(10)]
    new = [(f"v{u}", str(1 + (u + e) % 9), 2000 + 100 * e + u) for u in range(35) for e in range(6)]
    frame = pl.DataFrame(old + new, schema=["user_id", "item_id", "timestamp"], orient="row")
    frame.write_csv(data / "toy/events.csv")
    options = {"valid_from": "1970-01-01T00:13:20Z", "test_from": "1970-01-01T00:33:20Z"}
    made = task(split={"kind": "global-time", "options": options}, llm_users=0)
    one = comparison(data, ["popularity", "encoder: ids", BOTH], made)
    found = one.run()["differences"]["rows"]
    short = "the 105 test targets of 35 users with 1 to 3 events before them (cold users)"
    assert {row["group"] for row in found} == {"all 210 test targets of 35 users", short}
    (row,) = [row for row in found if row["group"] == short and row["system"].endswith("popularity")]
    ranks = {}
    for name in (BOTH, "popularity"):
        finished = one.finished(name, 0)
        assert finished is not None
        ranks[name] = finished.ranked.rank.reshape(35, 6)[:, 1:4]
    gain = {name: np.where(rank <= 10, 1 / np.log2(rank + 1), 0).mean() for name, rank in ranks.items()}
    assert row["metrics"]["NDCG@10"]["mean"] == pytest.approx(gain[BOTH] - gain["popularity"])


def test_a_torn_file_is_made_again(data: Path) -> None:
    fitted(data, ["popularity"])
    stored = data / "results/toy/popularity-seed0.npz"
    stored.write_bytes(stored.read_bytes()[:50])
    assert fitted(data, ["popularity"]) == ["popularity 0"]
    (data / "results/toy/popularity-seed0.json").write_text("{")
    assert fitted(data, ["popularity"]) == ["popularity 0"]


def test_seeded_systems_are_made_for_every_seed_and_the_others_once(data: Path) -> None:
    two = task(seeds=[3, 4])
    assert fitted(data, SMALL, two) == ["popularity 3", "item_knn 3", "sasrec 3", "sasrec 4"]
    result = comparison(data, SMALL, two).run()
    assert [run["settings"]["seed"] for run in result["runs"]] == [3, 4]
    rows = [next(r for r in run["rows"] if r["system"] == SASREC) for run in result["runs"]]
    (found,) = [row for row in result["spread"] if row["system"] == SASREC]
    means = [row["metrics"]["NDCG@10"]["mean"] for row in rows]
    assert found["metrics"]["NDCG@10"]["mean"] == pytest.approx(np.mean(means))
    assert found["metrics"]["NDCG@10"]["sd"] == pytest.approx(np.std(means, ddof=1))
    assert found["metrics"]["NDCG@10"]["n"] == 2
    (flat,) = [row for row in result["spread"] if row["system"] == "popularity"]
    assert flat["metrics"]["NDCG@10"]["sd"] == 0


def test_the_budget_is_spent_with_the_first_seed_and_the_others_train_what_it_chose(data: Path) -> None:
    one = comparison(data, ["sasrec", "encoder: ids + text"], task(seeds=[3, 4], budget={"trials": 3, "seconds": 60}))
    first, second = one.run()["runs"]
    for run, trials in ((first, 3), (second, 1)):
        for system in (SASREC, "encoder: ids + text"):
            assert sum(trial["system"] == system for trial in run["trials"]) == trials
    for system in (SASREC, "encoder: ids + text"):
        tried = [trial for trial in first["trials"] if trial["system"] == system]
        best = max(tried, key=lambda trial: trial["valid_ndcg@10"])
        (again,) = [trial for trial in second["trials"] if trial["system"] == system]
        assert again["config"] == best["config"] | {"seed": 4}
    # SASRec is our encoder without text and neighbours: the same grid, but for that.
    ours = [t["config"] for t in first["trials"] if t["system"] == "encoder: ids + text"]
    theirs = [t["config"] for t in first["trials"] if t["system"] == SASREC]
    assert {config["neighbours"] for config in theirs} == {0}
    assert [config | {"use_text": True, "neighbours": None} for config in theirs] == ours
    assert any("the other seeds train what it chose" in note for note in second["notes"])


def test_popularity_stands_beside_the_one_that_counts_the_test_items_too(data: Path) -> None:
    one = comparison(data, ["popularity", "item_knn"])
    (run,) = one.run()["runs"]
    ordered, wrong = [row for row in run["rows"] if "(wrong)" in row["system"]]
    assert ordered["group"] == wrong["group"] == module.MISTAKE
    counts = np.bincount(one.split.log.item, minlength=one.split.log.n_items)
    ranks = []
    for i in range(len(one.split.test)):
        target, seen = one.split.test.item[i], one.split.test.history(i)
        others = np.setdiff1d(np.arange(len(counts)), [*seen, target])
        ranks.append(1 + (counts[others] >= counts[target]).sum())
    assert wrong["metrics"]["Recall@10"]["mean"] == pytest.approx(np.mean(np.array(ranks) <= 10))


def test_the_result_says_what_it_was_made_of(data: Path) -> None:
    systems = ["popularity", "nearest", "sasrec", "encoder: ids + text", "full"]
    published = [{"system": "X", "source": "a paper", "protocol": "same", "metrics": {"NDCG@10": 0.1}}]
    one = comparison(data, systems, task(published=published), stamp={"commit": "abc"})
    result = json.loads(json.dumps(one.run(), allow_nan=False))
    assert result["commit"] == "abc"
    assert result["data"] == one.split.dataset.content_hash
    assert result["environment"]["versions"]["numpy"] == np.__version__
    (run,) = result["runs"]
    every = [row["system"] for row in run["rows"] if row["group"].startswith("all 30")]
    assert every == ["encoder: ids + text", "popularity", "newest items (LLM vectors)", SASREC]
    assert run["settings"]["config"]["encoder"]["use_text"]
    assert {"llm likelihood", "the candidates in random order (expected)"} <= {row["system"] for row in run["rows"]}
    assert {trial["system"] for trial in run["trials"]} == set(every)
    assert all(0 <= trial["valid_ndcg@10"] <= 1 for trial in run["trials"])
    assert run["published"] == published
    assert run["examples"] == []  # rows of the data are no part of a result
    notes = "\n".join(run["notes"])
    assert "leak check: " in notes
    assert "each system with the task's settings, untuned (a budget of 1 configuration)" in notes
    assert "tuned on validation" not in notes
    assert "leave-last-out: whatever is trained on all users has seen" in notes
    named = {row["system"] for row in run["rows"] if row["group"].startswith("paired differences on all 30")}
    assert named == {f"encoder: ids + text minus {other}" for other in (SASREC, "newest items (LLM vectors)")}
    ours = [row for row in run["rows"] if row["difference"]]
    assert {row["system"].partition(" minus ")[0] for row in ours} == {"encoder: ids + text", "llm+interest"}
    assert all(row["p"] is not None for row in ours)
    costs = {cost["system"]: cost for cost in run["costs"]}
    assert costs["popularity"]["fit_seconds"] is not None
    # The whole report, LLM stage included, is not made again either.
    again = comparison(data, systems, task(published=published))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "Recommender", lambda *a, **b: pytest.fail("it was made again"))
        assert again.run()["runs"] == result["runs"]


def test_each_system_says_which_commit_made_it_and_what_it_took(data: Path) -> None:
    old = {"commit": "old", "changed": False}
    comparison(data, ["popularity"], stamp=old).run()
    result = comparison(data, ["popularity", "item_knn"], stamp={"commit": "new", "changed": True}).run()
    assert result["commit"] == "new"
    made = {(one["name"], one["seed"]): one for one in result["systems"]}
    assert set(made) == {("popularity", 0), ("item_knn", 0), ("table", 0)}
    assert (made["popularity", 0]["commit"], made["popularity", 0]["changed"]) == ("old", False)
    assert (made["item_knn", 0]["commit"], made["table", 0]["commit"]) == ("new", "new")
    assert result["seconds"] == pytest.approx(sum(one["seconds"] for one in made.values()), abs=0.06)
    stored = json.loads((data / "results/toy/popularity-seed0.json").read_text())["origin"]
    assert stored["environment"]["numpy"] == np.__version__
    # A record that does not say is still taken, and nothing is made up for it.
    path = data / "results/toy/item-knn-seed0.json"
    path.write_text(json.dumps({n: v for n, v in json.loads(path.read_text()).items() if n != "origin"}))
    again = comparison(data, ["popularity", "item_knn"], stamp=old).run()
    made = {one["name"]: one for one in again["systems"]}
    assert (made["item_knn"]["commit"], made["item_knn"]["seconds"]) == (None, None)
    assert made["table"]["commit"] == "new"


def test_the_full_model_is_the_encoder_that_validation_chose(data: Path) -> None:
    """No training of its own: it has had the budget that all have had, and is not made twice."""
    made = task(budget={"trials": 2, "seconds": 60})
    one = comparison(data, ["full"], made)
    with pytest.MonkeyPatch.context() as patch:
        counted = Counted(patch)
        (run,) = one.run()["runs"]
    assert counted.names == ["encoder: ids + text 0"]
    assert len(run["trials"]) == 2
    best = max(run["trials"], key=lambda trial: trial["valid_ndcg@10"])["config"]
    assert run["settings"]["config"]["encoder"] == best
    # Its encoder ranks as the stored variant does.
    stored = one.finished("encoder: ids + text", 0)
    assert stored is not None
    config = EncoderConfig.model_validate(best)
    weights = weights_of(one, BOTH)
    encoder = InterestEncoder.load(weights, config, one.split.log.n_items, one.vectors)
    system = SASRec(encoder, encoder.item_matrix(), np.ones(16, np.float32), "again")
    again = one.asked.protocol(made).rank(system, one.asked.targets)
    np.testing.assert_array_equal(again.rank, stored.ranked.rank)
    # Weights that are not those it was ranked with are made again.
    weights.write_bytes(weights.read_bytes()[:-8] + b"12345678")
    assert fitted(data, ["full"], made) == ["encoder: ids + text 0"]


def test_nobody_to_ask_is_no_weight_to_choose(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def weighed(*given: Any) -> None:
        raise AssertionError("the LLM's weight was chosen")

    monkeypatch.setattr(Comparison, "_full", weighed)
    rows = comparison(data, ["popularity", BOTH, "full"], task(llm_users=0)).run()["runs"][0]["rows"]
    assert {"popularity", BOTH} <= {row["system"] for row in rows}
    assert not any("llm" in row["system"] for row in rows)


def test_another_llm_ranks_behind_the_vectors_of_the_first(data: Path) -> None:
    class Tuned(FakeEngine):
        def __init__(self) -> None:
            super().__init__()
            self.fingerprint = "tuned"

        def _logprob(self, prompt: Any, tokens: Any) -> float:
            return 0.5 * super()._logprob([*prompt, 7], tokens)

        def embed(self, *_: Any, **__: Any) -> Any:
            raise AssertionError("the vectors are the first one's")

    plain, tuned = comparison(data, ["full"]), comparison(data, ["full"], load_ranker=Tuned)
    (one,), (other,) = plain.run()["runs"], tuned.run()["runs"]
    assert other["settings"]["model"] == "tuned"
    assert any("an adapter: its card does not say" in note for note in other["notes"])

    def llm(run: dict[str, Any]) -> list[float]:
        return [r["metrics"]["NDCG@10"]["mean"] for r in run["rows"] if r["system"].startswith("llm")]

    def encoder(run: dict[str, Any]) -> list[float]:
        return [r["metrics"]["NDCG@10"]["mean"] for r in run["rows"] if r["system"].startswith("encoder")]

    assert encoder(one) == encoder(other)
    assert llm(one) != llm(other)
    # Each is stored under its own key: the first is not taken for the second, nor the second for the first.
    assert comparison(data, ["full"]).run()["runs"][0]["rows"] == one["rows"]


def test_the_limit_of_time_leaves_systems_out_and_says_so(data: Path) -> None:
    said: list[str] = []
    quick = comparison(data, SMALL, task(seconds=1e-9))
    fitted(data, ["popularity"])
    quick.say = said.append
    result = quick.run()
    (run,) = result["runs"]
    names = {row["system"].partition(",")[0] for row in run["rows"]}
    assert names == {"popularity"}  # it was there already
    assert any("item_knn, seed 0 was left out" in note for note in run["notes"])
    assert any("sasrec, seed 0 was left out" in line for line in said)


def test_a_run_that_fits_nothing_shows_what_is_there_and_names_the_rest(data: Path) -> None:
    made = task(seeds=[3, 4])
    fitted(data, ["popularity", BOTH], made)
    fitted(data, ["sasrec"], task(seeds=[3]))
    other = Comparison("other", made, data / "results", FakeEngine, data, ["popularity", "sasrec", BOTH, "full"])
    other.train = False
    with pytest.MonkeyPatch.context() as patch:
        counted = Counted(patch)
        result = other.run()
    assert counted.names == []
    (note,) = {note for run in result["runs"] for note in run["notes"] if "sasrec, seed" in note}
    assert note == "sasrec, seed 4 was left out: it is not made yet, and this run fitted nothing"
    assert any("popularity, seed 3 was left out" in note for note in result["runs"][0]["notes"])
    assert all(any("llm+interest" in row["system"] for row in run["rows"]) for run in result["runs"])


def leaky(made: Comparison) -> Comparison:
    """The same, and its split trains on a test event."""
    train = made.split.train.copy()
    train[made.split.test.position[-1]] = True
    made.split = dataclasses.replace(made.split, train=train)
    return made


def test_a_leak_stops_a_comparison_before_anything_is_fitted(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Comparison, "_fit", lambda *a: pytest.fail("it was fitted"))
    with pytest.raises(DataError, match="leak check"):
        leaky(comparison(data, ["popularity"])).run()
    with pytest.raises(DataError, match="leak check"):
        leaky(comparison(data, ["full"])).run()


def test_every_table_says_what_was_checked(data: Path) -> None:
    for systems, words in (["popularity"], ""), (["full"], "; 13 prompts, all that the LLM is asked, were rendered"):
        (run,) = comparison(data, systems).run()["runs"]
        (note,) = [note for note in run["notes"] if note.startswith("leak check")]
        assert "60 prompts and 30 training rows" in note
        assert words in note
        assert bool(words) == ("rendered" in note)


def test_what_an_encoder_of_a_comparison_reads_is_checked(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = task().fit.encoder.model_dump() | {"inputs": ("gap",)}
    fit = {"encoder": encoder, "candidates": 5, "validation_users": 5}
    made = comparison(data, ["encoder: text"], task(fit=fit))
    honest = prepared.read_events

    def shifted(*args: Any) -> Any:
        columns, reading, words = honest(*args)
        return columns, dataclasses.replace(reading, codes=np.roll(reading.codes, -1, axis=0)), words

    monkeypatch.setattr(prepared, "read_events", shifted)
    with pytest.raises(DataError, match="the codes that the encoder reads"):
        made.run()


def test_an_adapter_that_was_trained_on_another_split_is_refused_before_it_embeds(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = comparison(data, ["nearest"])
    card = {"data": made.split.dataset.content_hash, "split": made.split.spec, "config": {}}
    (data / "adapter").mkdir()

    def load() -> FakeEngine:
        engine = FakeEngine()
        engine.source = {"model": "fake", "adapter": str(data / "adapter")}  # type: ignore[assignment]
        return engine

    def run_with(card: dict[str, Any] | None, folder: str) -> list[str]:
        if card is not None:
            (data / "adapter/penchant.json").write_text(json.dumps(card))
        again = Comparison("toy", task(), data / folder, load, data, ["nearest"])
        return [note for note in again.run()["runs"][0]["notes"] if "adapter" in note]

    assert "does not say what it was trained on" in run_with(None, "unknown")[0]
    assert run_with(card, "own") == []
    monkeypatch.setattr(FakeEngine, "embed", lambda *a: pytest.fail("it embedded"))
    with pytest.raises(ConfigError, match="under another split"):
        run_with(card | {"split": {"kind": "global time"}}, "other")


def test_wrong_systems_are_refused(data: Path) -> None:
    with pytest.raises(ConfigError, match="unknown system 'magic'"):
        comparison(data, ["popularity", "magic"])


def test_a_store_gives_back_what_it_was_given_and_nothing_of_another_key(tmp_path: Path) -> None:
    store = Store(tmp_path / "x")
    ranked = Ranked("encoder: ids", np.array([1, 9]), np.array([[1, 2], [3, -1]], np.int32), 1.5)
    store.save("encoder: ids", 0, "k", Finished(ranked, {"fit": {"a": 1}}))
    found = store.load("encoder: ids", 0, "k")
    assert found is not None
    assert found.ranked.system == "encoder: ids"
    assert found.ranked.seconds == 1.5
    assert found.ranked.rank.tolist() == [1, 9]
    assert found.ranked.top.tolist() == [[1, 2], [3, -1]]
    assert found.record["fit"] == {"a": 1}
    assert store.load("encoder: ids", 0, "other") is None
    assert store.load("encoder: ids", 1, "k") is None
    assert key_of(a=1, b=[2]) == key_of(b=[2], a=1) != key_of(a=1, b=[3])


def test_spread_leaves_out_what_not_every_seed_has() -> None:
    def run(*rows: tuple[str, str, float]) -> dict[str, Any]:
        made = [
            {"group": g, "system": s, "difference": s.startswith("d"), "metrics": {"M": {"mean": m}}}
            for g, s, m in rows
        ]
        return {"rows": made}

    first = run(("same 8 of them (seed 0) x", "llm+interest (weight 0.1)", 1.0), ("g", "only", 2.0), ("g", "d", 1.0))
    second = run(("same 8 of them (seed 1) x", "llm+interest (weight 0.4)", 3.0), ("g", "d", 1.0))
    (row,) = spread([first, second])
    assert (row["metrics"]["M"]["mean"], row["metrics"]["M"]["low"], row["metrics"]["M"]["high"]) == (2.0, 1.0, 3.0)
