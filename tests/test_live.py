"""What happens after the fit: events and items that come later are served at once, and are there after a crash."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from penchant.data.dataset import Dataset
from penchant.data.split import leave_last_out
from penchant.engine.loading import load_engine
from penchant.errors import ConfigError, DataError, ModelError, StorageError
from penchant.evaluation.evaluate import evaluate
from penchant.files import write_json
from penchant.fusion import Fusion
from penchant.interest.config import EncoderConfig
from penchant.journal import Journal
from penchant.live import LiveEvents, checked_items
from penchant.recommend import Recommender
from penchant.run_folder import JOURNAL, FitConfig, load_run
from tests.conftest import toy_frames
from tests.fake_engine import FakeEngine

ENCODER = {
    "dim": 16,
    "blocks": 1,
    "dropout": 0.1,
    "max_length": 12,
    "epochs": 6,
    "batch_rows": 8,
    "learning_rate": 1e-2,
}
KINDS = ["view", "buy"]


pytestmark = pytest.mark.usefixtures("module_cache")


class Asked(FakeEngine):
    """Counts the texts it is asked to embed."""

    embedded = 0

    def embed(self, texts: Any, **more: Any) -> Any:
        self.embedded += len(texts)
        return super().embed(texts, **more)


def dataset() -> Dataset:
    interactions, items = toy_frames()
    n = len(interactions)
    more = interactions.with_columns(
        pl.Series("event_type", [KINDS[i % 2] for i in range(n)]),
        pl.Series("rating", [float(1 + i % 5) for i in range(n)]),
        pl.Series("review", [f"as good as number {i % 7}" if i % 3 == 0 else None for i in range(n)], dtype=pl.String),
    )
    return Dataset.read(more, items)


def fit(**encoder: Any) -> Recommender:
    config = FitConfig(encoder=EncoderConfig.model_validate(ENCODER | encoder), candidates=5, validation_users=5)
    return Recommender.fit(leave_last_out(dataset()), Asked(), config)


@pytest.fixture(scope="module")
def base() -> Recommender:
    return fit(inputs=("event_type", "gap", "review"))


@pytest.fixture
def model(base: Recommender) -> Recommender:
    made = dataclasses.replace(base)
    made.use_engine(Asked())
    return made


def asked(model: Recommender) -> Asked:
    assert isinstance(model.engine, Asked)
    return model.engine


def vector(model: Recommender, user: str) -> np.ndarray:
    return model.interests(user)[0][0]


def events_of(model: Recommender, user: str) -> list[str]:
    return [model.items["item_id"][int(i)] for i in model.behaviour(user).item]


NEW = {"item_id": "new", "title": "Up Again (2030)", "genres": "Comedy"}


# -- events ------------------------------------------------------------------------------------


def test_an_update_is_served_at_once_without_the_llm(model: Recommender) -> None:
    before, had = vector(model, "u1"), events_of(model, "u1")
    answer = model.recommend(["u1"], 5, method="retrieve")
    taken = answer["item_id"][0]
    model.update("u1", [{"item_id": taken, "event_type": "buy"}])
    assert events_of(model, "u1") == [*had, taken]
    assert np.abs(vector(model, "u1") - before).max() > 1e-3
    assert taken not in model.recommend(["u1"], 16, method="retrieve")["item_id"].to_list()
    assert asked(model).embedded == 0
    # Nobody else is touched.
    other = dataclasses.replace(model, live=[])
    np.testing.assert_array_equal(vector(model, "u2"), vector(other, "u2"))


def test_what_is_popular_counts_events_since_the_fit_too(model: Recommender, tmp_path: Path) -> None:
    was = model.recommend(history=[], k=16)
    assert set(was["stage"]) == {"popularity"}
    model.add_items([NEW | {"title": "Seen By All (2031)"}])
    last = was["item_id"][-1]
    most = int(was["score"][0])
    model.update("u1", [{"item_id": last}] * (most + 1))
    model.update("somebody", [{"item_id": "new"}] * (most + 2))
    model.save(tmp_path / "run")
    for served in (model, Recommender.load(tmp_path / "run")):
        found = served.recommend(history=[], k=17)
        assert found["item_id"].to_list()[:2] == [last, "new"]  # the fit's log held the last one already
        counts = dict(zip(found["item_id"], found["score"], strict=True))
        assert counts["new"] == most + 2
        assert counts[last] == was["score"][-1] + most + 1


def test_an_updated_user_is_what_a_run_fitted_on_all_events_makes_of_them(
    base: Recommender, model: Recommender
) -> None:
    """The same codes, gaps and words as if the log had held the events: placed by time, whenever they come."""
    log, frame = base.log, base.split.dataset.interactions
    part = log.all_of(log.user_index["u3"])
    rows = frame[part].to_dicts()
    stranger = dataclasses.replace(model)
    stranger.use_engine(Asked())
    for row in (rows[4], *rows[:4], *rows[5:]):  # one comes too early: it finds its place
        event = {name: value for name, value in row.items() if name != "user_id" and value is not None}
        stranger.update("somebody", [event])
    one, two = stranger.behaviour("somebody"), base.reading.of(part)
    np.testing.assert_array_equal(one.item, two.item)
    np.testing.assert_array_equal(one.codes, two.codes)
    np.testing.assert_array_equal(one.words, two.words)
    np.testing.assert_allclose(vector(stranger, "somebody"), vector(base, "u3"), atol=1e-6)
    assert asked(stranger).embedded == 0  # the words are known


def test_new_words_are_embedded_once_and_read(model: Recommender) -> None:
    said = [{"item_id": "3", "review": "never again"}]
    model.update("a", [{"item_id": "3"}])
    model.update("b", said)
    model.update("c", said)
    assert asked(model).embedded == 1
    assert np.abs(vector(model, "a") - vector(model, "b")).max() > 1e-4
    np.testing.assert_allclose(vector(model, "b"), vector(model, "c"), atol=1e-6)


def test_times_may_be_given_in_several_ways(model: Recommender) -> None:
    moment = datetime(2030, 1, 2, tzinfo=UTC)
    model.update("t", [{"item_id": "5", "timestamp": moment}, {"item_id": "4", "timestamp": 1_000}])
    model.update("t", [{"item_id": "6", "timestamp": datetime(2030, 1, 3)}])
    model.update("t", pl.DataFrame({"item_id": ["7"], "timestamp": [2_000]}))
    assert events_of(model, "t") == ["4", "7", "5", "6"]


def test_one_event_without_a_time_does_not_let_seconds_in() -> None:
    interactions, items = toy_frames()
    late = pl.col("timestamp") * 1_000_000 + 1_600_000_000_000_000
    interactions = interactions.with_columns(timestamp=pl.when(pl.int_range(pl.len()) == 0).then(0).otherwise(late))
    made = Dataset.read(interactions, items, time_unit="us")
    config = FitConfig(encoder=EncoderConfig.model_validate(ENCODER), candidates=5, validation_users=5)
    model = Recommender.fit(leave_last_out(made), Asked(), config)
    with pytest.raises(DataError, match="January 1970"):
        model.update("u1", [{"item_id": "3", "timestamp": 1_700_000_000}])
    model.update("u1", [{"item_id": "3", "timestamp": np.int64(1_700_000_000_000_000)}])
    assert events_of(model, "u1")[-1] == "3"


@pytest.mark.parametrize("moment", [1_700_000_000, 1_700_000_000_000])
def test_seconds_and_milliseconds_are_refused_where_the_log_has_our_days(moment: int) -> None:
    columns = {"user_id": pl.String(), "item_id": pl.String(), "timestamp": pl.Int64()}
    of_our_days, counted = LiveEvents(columns, 1_600_000_000_000_000), LiveEvents(columns, 1)
    event = {"item_id": "1", "timestamp": moment}
    with pytest.raises(DataError, match=r"(?s)event 1: .*January 1970.*multiply seconds"):
        of_our_days.checked([event], {"1": 0}, "t")
    assert counted.checked([event], {"1": 0}, "t") == [event]
    event["timestamp"] = 1_700_000_000_000_000
    assert of_our_days.checked([event], {"1": 0}, "t") == [event]


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ([{"item_id": "nope"}], "unknown item 'nope'"),
        ([{"item_id": "1"}, {"title": "x"}], "event 2: has no item_id"),
        ([{"item_id": "1", "colour": "red"}], "unknown column 'colour'"),
        ([{"item_id": "1", "timestamp": "yesterday"}], "'yesterday' is no time"),
        ([{"item_id": "1", "timestamp": 1_700_000_000_000_000_000}], "after the year 2200"),
        ([{"item_id": "1", "rating": "good"}], "does not fit"),
        ([{"item_id": "1", "rating": float("nan")}], "rating is nan"),
    ],
)
def test_bad_events_are_named_and_none_is_taken(model: Recommender, events: Any, message: str) -> None:
    had = events_of(model, "u1")
    with pytest.raises(DataError, match=message):
        model.update("u1", [{"item_id": "1"}, *events] if "event 2" not in message else events)
    assert events_of(model, "u1") == had
    assert model.live == []
    with pytest.raises(ConfigError, match="no list"):
        model.update("u1", {"item_id": "1"})  # type: ignore[arg-type]


# -- items -------------------------------------------------------------------------------------


def test_a_new_item_is_served_at_once(model: Recommender) -> None:
    before = model.recommend(["u1"], 20, method="retrieve")
    model.add_items([NEW])
    assert asked(model).embedded == 1
    after = model.recommend(["u1"], 20, method="retrieve")
    assert "new" in after["item_id"].to_list()
    kept = after.filter(pl.col("item_id") != "new")
    assert kept["item_id"].to_list() == before["item_id"].to_list()
    np.testing.assert_allclose(kept["score"], before["score"], atol=1e-5)
    # Its score is R of the user's interest and the projection of its own text.
    raw = FakeEngine().embed([model.texts[-1]], layer=model.config.layer or 0)
    assert model.encoder.project is not None
    with torch.inference_mode():
        own = model.encoder.project(torch.from_numpy(model.scaling.apply(raw))).numpy()[0]
    expected = float(vector(model, "u1") @ own)
    assert after.filter(pl.col("item_id") == "new")["score"][0] == pytest.approx(expected, abs=1e-4)
    # In every method, in filters, in histories, by its title, and in updates.
    for method in ("rank", "generate"):
        model.fusion = Fusion(0.5, 0.5)
        assert "new" in model.recommend(["u1"], 20, method=method)["item_id"].to_list()  # type: ignore[arg-type]
    only = model.recommend(["u1"], 5, where=pl.col("title").str.contains("2030"), method="retrieve")
    assert only["item_id"].to_list() == ["new"]
    assert model.recommend(history_titles=["Up Again (2030)"], k=3, method="retrieve").height == 3
    model.update("u1", [{"item_id": "new"}])
    assert events_of(model, "u1")[-1] == "new"
    assert "new" not in model.recommend(["u1"], 20)["item_id"].to_list()


def test_an_item_like_another_stands_beside_it(model: Recommender) -> None:
    """The same text gives the same vector but for the ID."""
    title = model.items["title"][4]
    genres, year = model.items["genres"][4], model.items["year"][4]
    model.add_items([{"item_id": "twin", "title": title, "genres": genres, "year": year}])
    np.testing.assert_allclose(model.vectors[-1], model.vectors[4], atol=1e-5)
    both = model.recommend(["u1"], 20, method="retrieve", unique_titles=False, include_seen=True)["item_id"].to_list()
    assert {"5", "twin"} <= set(both)
    once = model.recommend(["u1"], 20, method="retrieve", include_seen=True)["item_id"].to_list()
    assert len({"5", "twin"} & set(once)) == 1


def test_values_of_new_items_are_written_as_the_catalogue_has_them() -> None:
    item = {
        "item_id": "1",
        "title": "Heat",
        "in_stock": True,
        "tags": ["a", None, "b"],
        "since": datetime(2024, 1, 31),
        "price": 1e20,
        "pages": 7,
        "maker": {"name": "x", "year": 1},
        "note": float("nan"),
    }
    log = pl.DataFrame({"user_id": ["u"], "item_id": ["1"], "timestamp": [1]})
    frame = pl.DataFrame([item]).with_columns(note=pl.lit(None, dtype=pl.String))
    read = Dataset.read(log, frame).items
    expected = read.drop("item_id").row(0)
    assert {"true", "a|b"} <= set(expected)
    again = frame.with_columns(item_id=pl.lit("2"))
    for given in ([item | {"item_id": 2}], again, again.to_dicts()):
        made = checked_items(given, read, {"1": 0})
        assert made["item_id"].to_list() == ["2"]
        assert made.drop("item_id").row(0) == expected


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"title": "x"}, "has no item_id"),
        ({"item_id": "1", "title": "x"}, "'1' is in the catalogue already"),
        ({"item_id": "n", "title": "  "}, "'n' has no title"),
        ({"item_id": "n", "title": "x", "colour": "red"}, "unknown column 'colour'"),
    ],
)
def test_bad_items_are_named_and_none_is_taken(model: Recommender, item: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        model.add_items([NEW, item])
    assert model.items.height == 16
    assert model.live == []


def test_a_field_that_a_new_item_lacks_is_the_mean_as_it_was_at_the_fit() -> None:
    config = FitConfig(encoder=EncoderConfig.model_validate(ENCODER), fields=("title", "genres"), validation_users=5)
    model = Recommender.fit(leave_last_out(dataset()), Asked(), config)
    model.add_items([{"item_id": "bare", "title": "Up Again (2030)"}])
    half = model.vectors.shape[1] // 2
    scaled = model.scaling.apply(model.vectors[-1:])[0]
    assert (scaled[half:] == 0).all()
    assert (scaled[:half] != 0).any()
    assert "bare" in model.recommend(["u1"], 20, method="retrieve")["item_id"].to_list()
    with pytest.raises(ConfigError, match="several fields"):
        model.recommend(text="a comedy")


def test_what_cannot_be_embedded_is_refused() -> None:
    ids = fit(use_text=False)
    with pytest.raises(ConfigError, match="IDs alone"):
        ids.add_items([NEW])

    class Other(Asked):
        def __init__(self) -> None:
            super().__init__()
            self.fingerprint = "another"

    ranked = fit().with_ranker(Other())
    with pytest.raises(ModelError, match="another model's"):
        ranked.add_items([NEW])

    ranked.use_embedder(Asked())
    ranked.add_items([NEW])
    assert "new" in ranked.with_ranker(Asked()).recommend(text="Up Again (2030)", k=17)["item_id"]


class Tuned(Asked):
    """Another model, which ranks in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.fingerprint = "tuned"

    def _logprob(self, prompt: Any, tokens: Any) -> float:
        return super()._logprob([*prompt, 7], tokens)


def test_a_fit_with_a_ranker_is_a_fit_whose_ranker_was_changed(tmp_path: Path) -> None:
    config = FitConfig(encoder=EncoderConfig.model_validate(ENCODER), candidates=5, validation_users=5)
    split, embeds, ranks = leave_last_out(dataset()), Asked(), Tuned()
    fitted = Recommender.fit(split, embeds, config, ranker=ranks)
    assert (embeds.scored, ranks.embedded) == (0, 0)
    changed = Recommender.fit(split, Asked(), config).with_ranker(Tuned())
    for model in (fitted, changed):
        model.fusion = Fusion(0.5, 0.5)
    assert fitted.recommend(["u1", "u2"], 5).equals(changed.recommend(["u1", "u2"], 5))
    assert (fitted.fingerprint, fitted.embedder) == (changed.fingerprint, changed.embedder)
    fitted.add_items([NEW])  # the one that embeds is at hand
    changed.save(tmp_path / "run")
    loaded = Recommender.load(tmp_path / "run", Tuned())
    assert loaded.recommend(["u1", "u2"], 5).equals(changed.recommend(["u1", "u2"], 5))
    with pytest.raises(ModelError, match="another model's"):
        loaded.add_items([NEW])  # these fakes can't say how to load them


def test_the_model_that_made_the_vectors_is_loaded_when_it_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = FitConfig(encoder=EncoderConfig.model_validate(ENCODER), candidates=5, validation_users=5)
    embeds: Any = Asked()
    embeds.source = {"model": "a model", "adapter": None, "dtype": "float32"}
    Recommender.fit(leave_last_out(dataset()), embeds, config, ranker=Tuned()).save(tmp_path / "run")
    given: list[dict[str, Any]] = []

    def load(**source: Any) -> Asked:
        given.append(source)
        return Asked()

    monkeypatch.setattr("penchant.engine.loading.load_engine", load)
    model = Recommender.load(tmp_path / "run", Tuned())
    model.recommend(["u1"], 5)
    assert given == []
    model.add_items([NEW])
    model.recommend(text="a comedy", k=3)
    assert given == [embeds.source]


class LastLayer(Asked):
    """As vLLM: it embeds at its last layer only."""

    def embed(self, texts: Any, *, layer: int = -1, **more: Any) -> Any:
        if layer not in (-1, self.n_layers):
            raise ConfigError(f"layer {layer} asked for, and there is the last one only")
        return super().embed(texts, layer=layer, **more)


def test_an_engine_without_the_fitted_layer_serves_beside_one_that_embeds(model: Recommender, tmp_path: Path) -> None:
    item = NEW | {"title": "One that is in no cache (2031)"}
    model.fusion = Fusion(0.5, 0.5)
    model.save(tmp_path / "run")
    model.save(tmp_path / "its own, for its updates")
    alone = Recommender.load(tmp_path / "run", LastLayer())
    assert alone.recommend(["u1"], 5).equals(model.recommend(["u1"], 5))
    for call in (lambda: alone.recommend(text="a comedy"), lambda: alone.add_items([item])):
        with pytest.raises(ConfigError, match="the last one only"):
            call()
    other = Asked()
    other.fingerprint = "another"
    with pytest.raises(ModelError, match="the item vectors are the model fake's, and this engine is another"):
        Recommender.load(tmp_path / "run", LastLayer(), embedder=other)
    beside = Asked()
    served = Recommender.load(tmp_path / "run", LastLayer(), embedder=beside)
    for one in (served, model):
        one.add_items([item])
        one.update("u1", [{"item_id": "new", "event_type": "buy", "review": "never heard before"}])
    assert served.recommend(text="a comedy", k=5).equals(model.recommend(text="a comedy", k=5))
    assert served.recommend(["u1"], 5).equals(model.recommend(["u1"], 5))
    np.testing.assert_array_equal(served.vectors, model.vectors)
    assert (beside.embedded, asked(served).embedded) == (3, 0)
    ranked = served.with_ranker(LastLayer())  # asked for once, it stays
    ranked.add_items([item | {"item_id": "newer", "title": "Nor this one (2032)"}])


def test_an_evaluation_is_of_the_fit_whatever_came_after(model: Recommender) -> None:
    plain = evaluate(model, llm_users=10, slices=False)
    model.add_items([NEW])
    model.update("u1", [{"item_id": "new"}])
    later = evaluate(model, llm_users=10, slices=False)
    assert [r.metrics["NDCG@10"].mean for r in later.rows] == [r.metrics["NDCG@10"].mean for r in plain.rows]


@pytest.mark.parametrize("method", ["rank", "retrieve", "generate"])
def test_a_removed_item_is_never_recommended_but_read(model: Recommender, method: Any, tmp_path: Path) -> None:
    model.fusion = Fusion(0.5, 0.5)
    before = vector(model, "u1")
    gone = [*model.recommend(["u1"], 2, method=method)["item_id"], events_of(model, "u1")[0]]
    model.save(tmp_path / "run")
    model.remove_items(gone)
    again = Recommender.load(tmp_path / "run", Asked())
    for one in (model, again):
        for asked_for in ({"users": ["u1"]}, {"history": []}, {"text": "a comedy"}):
            answer = one.recommend(**asked_for, k=20, method=method, include_seen=True)  # type: ignore[arg-type]
            assert not set(gone) & set(answer["item_id"])
        assert one.recommend(["u1"], 20, allow=gone, method=method).is_empty()
        np.testing.assert_array_equal(vector(one, "u1"), before)
    with pytest.raises(DataError, match="unknown item 'nope'"):
        model.remove_items(["nope"])


@pytest.mark.parametrize("method", ["rank", "retrieve", "generate"])
def test_a_list_is_filled_from_behind_where_the_rules_took_too_many(model: Recommender, method: Any) -> None:
    model.fusion = Fusion(0.5, 0.5)
    # Every genre once: far down the list, and the LLM is asked about the candidates once.
    whole = model.recommend(["u1"], 16, method=method)
    engine = asked(model)
    engine.scored = 0
    got = model.recommend(["u1"], 3, method=method, caps={"year": 1, "genres": 1})
    genres = dict(model.items.select("item_id", "genres").iter_rows())
    expected, taken = [], set[str]()
    for item in whole["item_id"]:
        labels = set((genres[item] or "").split("|"))
        if not labels & taken:
            expected.append(item)
            taken |= labels
    assert got["item_id"].to_list() == expected[:3]
    if method == "rank":
        assert engine.scored <= 2 * model.config.candidates


# -- on disk -----------------------------------------------------------------------------------


def test_both_survive_saving_and_loading(model: Recommender, tmp_path: Path) -> None:
    model.add_items([NEW])
    model.update("u1", [{"item_id": "new", "review": "what a thing"}])
    model.save(tmp_path / "run")
    model.update("u2", [{"item_id": "new"}])  # after saving it goes straight to the disk
    again = Recommender.load(tmp_path / "run", Asked())
    for user in ("u1", "u2", "u5"):
        np.testing.assert_array_equal(vector(again, user), vector(model, user))
    wanted, found = (m.recommend(["u1", "u2"], 20, method="retrieve") for m in (model, again))
    assert found.equals(wanted)
    assert asked(again).embedded == 0
    # A copy saved elsewhere has all of it too, and goes its own way.
    model._journal.close()  # type: ignore[union-attr]
    again.save(tmp_path / "copy")
    again.update("u5", [{"item_id": "1"}])
    assert len(Recommender.load(tmp_path / "copy").live) == 4
    assert len(Recommender.load(tmp_path / "run").live) == 3


def test_two_models_of_the_same_parts_do_not_share_what_came_after(base: Recommender) -> None:
    one, two = (dataclasses.replace(base) for _ in range(2))
    one.use_engine(Asked())
    one.add_items([NEW])
    assert (one.items.height, two.items.height, base.items.height) == (17, 16, 16)
    assert (len(one.index.vectors), len(two.index.vectors), len(base.index.vectors)) == (17, 16, 16)
    three = dataclasses.replace(one)
    assert three.items.height == 17
    np.testing.assert_array_equal(three.index.vectors, one.index.vectors)


@pytest.mark.parametrize("cut", [1, 20, 200])
def test_a_line_cut_off_by_a_crash_is_left_out_and_said(model: Recommender, tmp_path: Path, cut: int) -> None:
    model.save(tmp_path / "run")
    model.update("u1", [{"item_id": "1"}])
    model.update("u2", [{"item_id": "2", "review": "x" * 300}])
    model._journal.close()  # type: ignore[union-attr]
    path = tmp_path / "run" / JOURNAL
    data = path.read_bytes()
    path.write_bytes(data[:-cut])
    again = Recommender.load(tmp_path / "run", Asked())
    assert [record["user"] for record in again.live] == ["u1"]
    assert any("cut off" in warning for warning in again.warnings)
    again.update("u3", [{"item_id": "3"}])
    again._journal.close()  # type: ignore[union-attr]
    assert [record["user"] for record in Recommender.load(tmp_path / "run").live] == ["u1", "u3"]


def test_a_journal_altered_in_its_middle_is_refused(model: Recommender, tmp_path: Path) -> None:
    model.save(tmp_path / "run")
    model.update("u1", [{"item_id": "1"}])
    model.update("u1", [{"item_id": "2"}])
    model._journal.close()  # type: ignore[union-attr]
    path = tmp_path / "run" / JOURNAL
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + lines[1].replace('"u1"', '"u7"') + lines[2])
    with pytest.raises(StorageError, match=r"line 2.*corrupt|corrupt.*line 2"):
        Recommender.load(tmp_path / "run")


def test_a_journal_that_is_gone_is_missed(model: Recommender, tmp_path: Path) -> None:
    model.save(tmp_path / "run")
    (tmp_path / "run" / JOURNAL).unlink()
    with pytest.raises(StorageError, match="all updates since the fit"):
        Recommender.load(tmp_path / "run")


def test_saving_over_a_run_loses_no_update(model: Recommender, tmp_path: Path) -> None:
    run = tmp_path / "run"
    model.save(run)
    model.update("u1", [{"item_id": "3"}])
    model.remove_items(["9"])
    model._journal.close()  # type: ignore[union-attr]  # as if its process had ended
    other = dataclasses.replace(model, live=[])
    other.use_engine(Asked())
    for item in ("5", "6", "7"):
        other.update("u2", [{"item_id": item}])  # more of them, and not the same
    with pytest.raises(StorageError, match="came after the fit"):
        other.save(run)
    again = Recommender.load(run, Asked())
    assert [set(record) for record in again.live] == [{"user", "events"}, {"removed"}]
    again.update("u3", [{"item_id": "2"}])
    again.save(run)  # all of them are its own, and the lock is too
    again.update("u3", [{"item_id": "4"}])
    assert len(Recommender.load(run).live) == 4


def while_saving(monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> None:
    """Do some work when a run is all but written."""

    def slow(path: Path, value: Any) -> None:
        if path.name == "manifest.json":
            work()
        write_json(path, value)

    monkeypatch.setattr("penchant.run_folder.write_json", slow)


def refused(model: Recommender, heard: list[str]) -> None:
    """An update that another process's lock keeps out."""
    with pytest.raises(StorageError, match="another process is updating") as caught:
        model.update("u1", [{"item_id": "3"}])
    heard.append(str(caught.value))


def test_a_run_takes_no_update_while_another_is_written_in_its_place(
    model: Recommender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    model.save(run)
    serving, heard = Recommender.load(run, Asked()), list[str]()
    while_saving(monkeypatch, lambda: refused(serving, heard))
    dataclasses.replace(model, live=[]).save(run)
    assert len(heard) == 1
    with pytest.raises(StorageError, match="was replaced"):
        serving.update("u1", [{"item_id": "3"}])
    assert Recommender.load(run).live == []


def test_a_model_with_another_ranker_is_saved_where_its_updates_are(model: Recommender, tmp_path: Path) -> None:
    run = tmp_path / "run"
    model.save(run)
    model.update("u1", [{"item_id": "3"}])  # and has the lock from now on
    tuned = model.with_ranker(Asked())
    tuned.save(run)
    tuned.update("u1", [{"item_id": "4"}])
    with pytest.raises(StorageError, match="was replaced"):
        model.update("u1", [{"item_id": "5"}])
    assert len(Recommender.load(run).live) == 2


def test_an_update_of_another_model_of_this_process_while_a_run_is_written(
    model: Recommender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    model.save(run)
    model.update("u1", [{"item_id": "3"}])
    tuned = model.with_ranker(Asked())
    while_saving(monkeypatch, lambda: model.update("u1", [{"item_id": "4"}]))
    with pytest.raises(StorageError, match="came after the fit"):
        tuned.save(run)
    assert len(Recommender.load(run).live) == 2


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_there_are_no_locks_runs_are_saved_and_not_updated(
    number: int, model: Recommender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*arguments: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("penchant.journal.fcntl.flock", no_locks)
    model.save(tmp_path / "run")
    model.save(tmp_path / "run")
    with pytest.raises(StorageError, match="cannot be locked"):
        model.update("u1", [{"item_id": "3"}])
    assert model.live == []


def test_a_run_that_was_replaced_while_its_lock_was_got_is_locked_anew(
    model: Recommender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, lock = tmp_path / "run", fcntl.flock
    model.save(run)
    calls, heard = list[int](), list[str]()

    def late(handle: Any, operation: int) -> None:
        calls.append(operation)
        if len(calls) == 1:  # the one who had it gives it free by replacing the run
            shutil.copytree(run, tmp_path / "new")
            shutil.rmtree(run)
            (tmp_path / "new").rename(run)
        lock(handle, operation)

    monkeypatch.setattr("penchant.journal.fcntl.flock", late)
    while_saving(monkeypatch, lambda: refused(Recommender.load(run, Asked()), heard))
    dataclasses.replace(model).save(run)
    assert len(heard) == 1


def test_a_fork_and_its_parent_do_not_both_append(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "a.jsonl", follows=0)
    journal.append({"n": 1})
    process = multiprocessing.get_context("fork").Process(target=journal.append, args=({"n": 2},))
    process.start()
    process.join()
    with pytest.raises(StorageError, match="was written to by another process"):
        journal.append({"n": 3})
    assert [record["n"] for record in Journal(journal.path).read()] == [1, 2]


def test_a_run_and_its_model_may_be_moved_together(tmp_path: Path, byte_folder: Path, base: Recommender) -> None:
    was = tmp_path / "was"
    shutil.copytree(byte_folder, was / "models" / "mine")
    engine = load_engine(was / "models" / "mine", dtype="float32", device="cpu")
    model = dataclasses.replace(base, engine_source=engine.source, fingerprint=engine.fingerprint)
    model.save(was / "runs" / "one")
    assert Recommender.load(was / "runs" / "one").engine_source == engine.source
    (tmp_path / "other").mkdir()
    shutil.copytree(was / "runs" / "one", tmp_path / "other" / "alone")
    assert Recommender.load(tmp_path / "other" / "alone").engine.fingerprint == engine.fingerprint
    was.rename(tmp_path / "now")
    moved = Recommender.load(tmp_path / "now" / "runs" / "one")
    assert moved.engine.fingerprint == engine.fingerprint
    moved.save(tmp_path / "other" / "again")
    assert Recommender.load(tmp_path / "other" / "again").engine.fingerprint == engine.fingerprint


def test_a_journal_is_of_its_run(model: Recommender, tmp_path: Path) -> None:
    model.save(tmp_path / "one")
    model.add_items([NEW])
    model._journal.close()  # type: ignore[union-attr]
    other = fit(inputs=("event_type", "gap", "review"), dim=8)
    other.save(tmp_path / "two")
    shutil.copy(tmp_path / "one" / JOURNAL, tmp_path / "two" / JOURNAL)
    with pytest.raises(StorageError, match="the updates of another run"):
        Recommender.load(tmp_path / "two")
    (tmp_path / "two" / JOURNAL).write_bytes(b"")  # the remedy
    emptied = Recommender.load(tmp_path / "two", Asked())
    emptied.add_items([NEW])
    emptied._journal.close()  # type: ignore[union-attr]
    shutil.copy(tmp_path / "two" / JOURNAL, tmp_path / "one" / JOURNAL)
    with pytest.raises(StorageError, match="the updates of another run"):
        Recommender.load(tmp_path / "one")
    shutil.copytree(tmp_path / "two", tmp_path / "copy")
    assert len(Recommender.load(tmp_path / "copy").live) == 1


def test_a_run_that_was_replaced_while_it_was_opened_takes_no_update(
    model: Recommender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save(tmp_path / "run")
    new = fit(inputs=("event_type", "gap", "review"), dim=8)

    def overlapped(folder: Path) -> Any:
        found = load_run(folder)
        new.save(folder)  # the nightly fit ends here
        return found

    with monkeypatch.context() as patch:
        patch.setattr("penchant.recommend.load_run", overlapped)
        old = Recommender.load(tmp_path / "run", Asked())
    with pytest.raises(StorageError, match="was replaced"):
        old.update("u1", [{"item_id": "3"}])
    assert Recommender.load(tmp_path / "run").live == []


def test_an_update_finds_its_run_from_wherever_the_process_works(
    model: Recommender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model.save("run")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    model.update("u1", [{"item_id": "3"}])
    assert len(Recommender.load("../run").live) == 1


def test_one_process_at_a_time_updates_a_run(model: Recommender, tmp_path: Path) -> None:
    model.save(tmp_path / "run")
    other = Recommender.load(tmp_path / "run", Asked())
    model.update("u1", [{"item_id": "1"}])
    with pytest.raises(StorageError, match="another process"):
        other.update("u1", [{"item_id": "1"}])
    assert other.live == []


def _write_forever(path: Path, told: Any) -> None:
    journal = Journal(path)
    for number in range(100_000):
        journal.append({"number": number, "rest": "x" * 500})
        told.send(number)


def test_a_kill_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for round_ in range(3):
        path = tmp_path / f"{round_}.jsonl"
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_write_forever, args=(path, there))
        process.start()
        last = -1
        while last < 20 + 5 * round_:
            last = here.recv()
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        while here.poll():
            last = here.recv()
        numbers = [record["number"] for record in Journal(path).read()]
        assert numbers == list(range(len(numbers)))
        assert len(numbers) >= last + 1
        again = Journal(path)
        again.append({"number": len(numbers)})
        assert len(again.read()) == len(numbers) + 1


def test_a_full_disk_leaves_the_journal_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path / "a.jsonl")
    journal.append({"n": 1})
    with monkeypatch.context() as patch:

        def full(handle: int) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr("penchant.journal.os.fsync", full)
        with pytest.raises(StorageError, match="No space left"):
            journal.append({"n": 2})
    journal.append({"n": 3})
    assert [record["n"] for record in Journal(tmp_path / "a.jsonl").read()] == [1, 3]


# -- a wish --------------------------------------------------------------------------------------


def by_hand(model: Recommender, text: str, base: np.ndarray, weight: float) -> list[str]:
    def z(values: np.ndarray) -> np.ndarray:
        return (values - values.mean()) / values.std()

    wish = model.scaling.apply(FakeEngine().embed([text], layer=model.config.layer or 0))[0]
    items = model.scaling.apply(model.vectors)
    near = np.array([v @ wish / np.linalg.norm(v) / np.linalg.norm(wish) for v in items])
    scores = (1 - weight) * z(base) + weight * z(near)
    return [model.items["item_id"][int(i)] for i in np.argsort(-scores, kind="stable")]


def test_a_wish_of_somebody_unknown_is_blended_with_popularity(model: Recommender) -> None:
    counts = np.bincount(model.log.item, minlength=16).astype(float)
    for weight in (0.0, 0.5, 1.0):
        found = model.recommend(text="slow science fiction", k=16, text_weight=weight, unique_titles=False)
        assert found["item_id"].to_list() == by_hand(model, "slow science fiction", np.log1p(counts), weight)
    assert set(found["stage"]) == {"text"}
    assert found["user_id"].to_list() == [None] * 16


def test_a_wish_of_a_known_user_is_blended_with_their_interest(model: Recommender) -> None:
    model.add_items([NEW])
    interest = model.encoder.scores(vector(model, "u1")[None], model.index.vectors)[0].astype(float)
    history = model.behaviour("u1")
    bonus = model.encoder.bonus([history], vector(model, "u1")[None])
    assert bonus is not None
    interest += bonus.toarray()[0]
    seen = set(events_of(model, "u1"))
    expected = [i for i in by_hand(model, "a comedy", interest, 0.3) if i not in seen]
    found = model.recommend(["u1"], 20, text="a comedy", text_weight=0.3, unique_titles=False)
    assert found["item_id"].to_list() == expected
    some = model.recommend(["u1"], 3, text="a comedy", text_weight=0.3, where=pl.col("genres") == "Thriller")
    thrillers = set(model.items.filter(pl.col("genres") == "Thriller")["item_id"])
    assert some["item_id"].to_list() == [i for i in expected if i in thrillers][:3]


def test_wishes_that_cannot_be_heard_are_refused(model: Recommender) -> None:
    with pytest.raises(DataError, match="text is empty"):
        model.recommend(text="  ")
    with pytest.raises(ConfigError, match="text_weight"):
        model.recommend(text="x", text_weight=1.5)
    with pytest.raises(ConfigError, match="or text alone"):
        model.recommend()


# -- interests -------------------------------------------------------------------------------------


def test_interests_are_named_by_their_nearest_items() -> None:
    two = fit(interests=2)
    vectors, frame = two.interests("u1", 4)
    assert vectors.shape == (2, 16)
    assert frame["interest"].to_list() == [0] * 4 + [1] * 4
    scores = vectors @ two.index.vectors.T
    for k in range(2):
        best = np.argsort(-scores[k], kind="stable")[:4]
        part = frame.filter(pl.col("interest") == k)
        assert part["item_id"].to_list() == [two.items["item_id"][int(i)] for i in best]
        np.testing.assert_allclose(part["score"], scores[k][best], atol=1e-5)
    assert two.recommend(["u1"], 3).height == 3
    with pytest.raises(DataError, match="history is empty"):
        two.interests(history=[])


# -- a graph as the index ------------------------------------------------------------------------------


def test_a_graph_is_saved_loaded_and_grown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss")
    plain = fit()
    config = plain.config.model_copy(update={"index": "hnsw"})
    graph = dataclasses.replace(plain, config=config)
    graph.use_engine(Asked())
    wanted = plain.recommend(["u1", "u2"], 8, method="retrieve")
    assert graph.recommend(["u1", "u2"], 8, method="retrieve")["item_id"].equals(wanted["item_id"])
    assert graph.index_recall() == 1.0
    assert plain.index_recall() is None
    graph.save(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr("penchant.serving.index_of", lambda *a: pytest.fail("the graph was built again"))
        again = Recommender.load(tmp_path / "run", Asked())
    assert again.recommend(["u1", "u2"], 8, method="retrieve")["item_id"].equals(wanted["item_id"])
    again.add_items([NEW])
    assert "new" in again.recommend(["u1"], 20, method="retrieve")["item_id"].to_list()
    twice = Recommender.load(tmp_path / "run", Asked())
    answers = [m.recommend(["u1"], 20, method="retrieve") for m in (again, twice)]
    assert answers[1]["item_id"].equals(answers[0]["item_id"])
    np.testing.assert_allclose(answers[1]["score"], answers[0]["score"], atol=1e-5)
    twice.save(tmp_path / "other")  # a graph that has grown is built again from the journal
    third = Recommender.load(tmp_path / "other", Asked())
    assert third.recommend(["u1"], 20, method="retrieve")["item_id"].equals(
        again.recommend(["u1"], 20, method="retrieve")["item_id"]
    )
    # A graph of other weights is refused.
    manifest = tmp_path / "run" / "index" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"model": "', '"model": "0'))
    with pytest.raises(ModelError, match="the index holds vectors of the model 0"):
        Recommender.load(tmp_path / "run")


def test_a_network_on_both_cannot_be_searched_through_a_graph() -> None:
    plain = fit(relevance="mlp", loss="sampled", negatives=4)
    assert plain.recommend(["u1"], 3, method="retrieve").height == 3
    with pytest.raises(ConfigError, match="relevance mlp is none"):
        dataclasses.replace(plain, config=plain.config.model_copy(update={"index": "hnsw"}))


def test_what_a_full_disk_refused_is_not_written_later(tmp_path: Path) -> None:
    import resource

    journal = Journal(tmp_path / "a.jsonl", follows=0)
    journal.append({"n": 1})
    size = journal.path.stat().st_size
    limits, was = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, limits[1]))
        with pytest.raises(StorageError, match="cannot be written"):
            journal.append({"n": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, was)
    assert journal.path.stat().st_size == size
    journal.append({"n": 3})
    assert [record["n"] for record in Journal(journal.path).read()] == [1, 3]


def test_an_update_never_goes_into_a_run_that_another_process_changed(model: Recommender, tmp_path: Path) -> None:
    run = tmp_path / "run"
    model.save(run)
    stale, other = Recommender.load(run, Asked()), Recommender.load(run, Asked())
    other.add_items([NEW])
    other._journal.close()  # type: ignore[union-attr]  # as if its process had ended
    with pytest.raises(StorageError, match="was written to by another process"):
        stale.add_items([NEW])
    with pytest.raises(StorageError, match="came after the fit"):
        stale.save(run)
    served = Recommender.load(run)
    served.update("u1", [{"item_id": "new"}])
    (run / JOURNAL).unlink()
    dataclasses.replace(model, live=[]).save(run)  # a nightly fit in its place
    with pytest.raises(StorageError, match="was replaced by another process"):
        served.update("u1", [{"item_id": "1"}])
    late = Recommender.load(run)
    dataclasses.replace(model, live=[]).save(run)
    with pytest.raises(StorageError, match="was replaced by another process"):
        late.update("u1", [{"item_id": "1"}])
    assert Recommender.load(run).live == []


@pytest.mark.parametrize(
    ("user", "events", "said"),
    [
        ("u1", [{"item_id": "1", "user_id": "u2"}], "is of user 'u2'"),
        (None, [{"item_id": "1"}], "None is no user id"),
        (" ", [{"item_id": "1"}], "' ' is no user id"),
        ("caf\udce9", [{"item_id": "1"}], "is no user id"),
    ],
)
def test_events_of_nobody_or_somebody_else_are_refused(model: Recommender, user: Any, events: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        model.update(user, events)


def test_new_items_are_read_as_tables_are(model: Recommender) -> None:
    for wrong in (NEW, 3):
        with pytest.raises(ConfigError, match="items are no list"):
            model.add_items(wrong)  # type: ignore[arg-type]
    for item, said in (
        (None, "has no item_id"),
        (NEW | {"item_id": " "}, "has no item_id"),
        (NEW | {"title": float("nan")}, "has no title"),
        (NEW | {"title": "\ud800"}, "half a surrogate pair"),
    ):
        with pytest.raises(DataError, match=said):
            model.add_items([item])  # type: ignore[list-item]
    model.add_items([NEW | {"genres": ["Comedy", "Drama"]}, NEW | {"item_id": "other", "genres": float("nan")}])
    assert model.items["genres"].to_list()[-2:] == ["Comedy|Drama", None]
