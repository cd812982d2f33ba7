"""The front door: what is fitted on what, what is recommended to whom, and the same again from disk."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import polars as pl
import pytest

from penchant.data.dataset import Dataset
from penchant.data.split import Split, global_time, leave_last_out
from penchant.engine.loading import load_engine
from penchant.engine.transformers import TransformersEngine
from penchant.errors import ConfigError, DataError, ModelError, PenchantWarning, StorageError
from penchant.fusion import Fusion
from penchant.interest.config import EncoderConfig
from penchant.recommend import Method, Recommender
from penchant.run_folder import FitConfig
from tests import tiny
from tests.conftest import toy_frames
from tests.fake_engine import FakeEngine

METHODS: tuple[Method, ...] = get_args(Method)
CANDIDATES = 5
ENCODER = EncoderConfig(
    dim=16, blocks=1, heads=2, dropout=0.1, max_length=12, epochs=6, batch_rows=8, learning_rate=1e-2
)
CONFIG = FitConfig(encoder=ENCODER, candidates=CANDIDATES, validation_users=12)
HALF = Fusion(0.5, 0.5)
COLUMNS = {
    "user_id": pl.String,
    "item_id": pl.String,
    "title": pl.String,
    "score": pl.Float64,
    "rank": pl.Int32,
    "stage": pl.String,
}


pytestmark = pytest.mark.usefixtures("module_cache")


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return Dataset.read(*toy_frames())


@pytest.fixture(scope="module")
def split(dataset: Dataset) -> Split:
    return leave_last_out(dataset)


@pytest.fixture(scope="module")
def fitted(split: Split) -> Recommender:
    return Recommender.fit(split, FakeEngine(), CONFIG)


@pytest.fixture(scope="module")
def real(split: Split, byte_engine: TransformersEngine) -> Recommender:
    """Fitted with the tiny Llama; its LLM has half the say."""
    return mixing(Recommender.fit(split, byte_engine, CONFIG), HALF, byte_engine)


def mixing(model: Recommender, fusion: Fusion, engine: Any = None) -> Recommender:
    """The same model with another mixture, an engine of its own and its own priors."""
    made = dataclasses.replace(model, fusion=fusion, prior=None if model.prior is None else model.prior.copy())
    made.use_engine(FakeEngine() if engine is None else engine)
    return made


def events(dataset: Dataset, user: str) -> list[str]:
    """Item ids of a user, oldest first, from the table itself."""
    return dataset.interactions.filter(pl.col("user_id") == user).sort("timestamp")["item_id"].to_list()


def ids(frame: pl.DataFrame) -> list[str]:
    return frame["item_id"].to_list()


def same(got: pl.DataFrame, expected: pl.DataFrame) -> None:
    """The same answers, but for the user's name; float32 sums taken in another order move a score a little."""
    columns = ["item_id", "title", "rank", "stage"]
    assert got.select(columns).rows() == expected.select(columns).rows()
    assert got["score"].to_list() == pytest.approx(expected["score"].to_list(), abs=1e-3)


def by_score(scored: dict[str, float]) -> list[str]:
    """Item ids best first; the ids of the toy are numbers in catalogue order."""
    return sorted(scored, key=lambda item: (-scored[item], int(item)))


def interest(model: Recommender, history: Sequence[str]) -> dict[str, float]:
    """The encoder's score of every item."""
    row = np.array([model.log.item_index[i] for i in history])
    scores = model.encoder.item_matrix() @ model.encoder.encode([row])[0]
    return dict(zip(model.log.item_ids, scores.tolist(), strict=True))


def likelihood(model: Recommender, history: Sequence[str], items: Sequence[str]) -> dict[str, float]:
    """log p of each item behind the history's prompt, from the engine and the templates alone."""
    title = dict(model.split.dataset.items.select("item_id", "title").iter_rows())
    newest = [{"text": title[i]} for i in history][-model.config.max_history :] if history else []
    prompt = model.templates.render("next_item", {"history": newest}).prompt
    codec = model.engine.codec
    tokens = [(*codec.encode_data(title[i]), *codec.encode_template("\n")) for i in items]
    return dict(zip(items, model.engine.score([prompt], [tokens])[0].tolist(), strict=True))


def z(values: list[float]) -> np.ndarray:
    row = np.array(values)
    return (row - row.mean()) / row.std() if len(set(values)) > 1 else np.zeros(len(row))


# -- fitting -----------------------------------------------------------------------------------


def _with_items_changed(which: str) -> Split:
    """The toy split where every user's event of that part is of another item; times stay."""
    interactions, items = toy_frames()
    back = {"test": 1, "valid": 2, "train": 5}[which]
    place = (pl.int_range(pl.len()).over("user_id") + back) == pl.len().over("user_id")
    other = ((pl.col("item_id").cast(pl.Int64) + 6) % len(tiny.TITLES) + 1).cast(pl.String)
    changed = interactions.with_columns(pl.when(place).then(other).otherwise(pl.col("item_id")).alias("item_id"))
    return leave_last_out(Dataset.read(changed, items))


def _learnt(model: Recommender) -> tuple[dict[str, list[Any]], Fusion, list[float], list[float], list[float]]:
    assert model.prior is not None
    return (
        {name: value.tolist() for name, value in model.encoder.state_dict().items()},
        model.fusion,
        [row["loss"] for row in model.training],
        [row["valid"] for row in model.training],
        np.nan_to_num(model.prior).tolist(),
    )


def test_a_fit_never_looks_at_the_test_events(split: Split, fitted: Recommender) -> None:
    changed = _with_items_changed("test")
    assert (changed.test.item != split.test.item).all()
    assert changed.valid.item.tolist() == split.valid.item.tolist()
    assert _learnt(Recommender.fit(changed, FakeEngine(), CONFIG)) == _learnt(fitted)


def test_a_fit_does_look_at_training_and_validation_events(fitted: Recommender) -> None:
    weights, _, loss, scores, _ = _learnt(fitted)
    other = _learnt(Recommender.fit(_with_items_changed("valid"), FakeEngine(), CONFIG))
    assert other[2] == loss
    assert other[3] != scores
    other = _learnt(Recommender.fit(_with_items_changed("train"), FakeEngine(), CONFIG))
    assert other[2] != loss
    assert other[0] != weights


def test_the_same_fit_twice_is_the_same_model(split: Split, fitted: Recommender) -> None:
    assert _learnt(Recommender.fit(split, FakeEngine(), CONFIG)) == _learnt(fitted)


def test_a_dataset_alone_holds_out_only_its_own_validation_events(dataset: Dataset) -> None:
    model = Recommender.fit(dataset, FakeEngine(), CONFIG)
    assert len(model.split.test) == 0
    assert len(model.split.valid) == 30
    assert int(model.split.train.sum()) == 30 * 8
    assert [model.log.item_ids[i] for i in model.split.valid.item] == [
        events(dataset, u)[-1] for u in model.log.user_ids
    ]


def test_the_encoder_learnt_the_circle(fitted: Recommender, split: Split) -> None:
    assert fitted.training[-1]["valid"] > 0.6  # one in 16 at random would be near 0.3
    assert fitted.training[-1]["loss"] < fitted.training[0]["loss"] < np.log(len(tiny.TITLES)) + 0.5
    assert fitted.fusion.n_users == 12
    assert fitted.fusion.valid_ndcg is not None
    assert fitted.fusion.interest_ndcg is not None
    assert fitted.fusion.valid_ndcg >= fitted.fusion.interest_ndcg


def test_stages_and_epochs_are_told_and_timed(split: Split) -> None:
    told: dict[str, list[int]] = {}
    epochs: list[int] = []

    def stages(name: str, size: int | None) -> Any:
        told[name] = []
        return told[name].append

    model = Recommender.fit(
        split, FakeEngine(), CONFIG, stages=stages, on_epoch=lambda epoch, loss, score: epochs.append(epoch)
    )
    assert epochs == [row["epoch"] for row in model.training]
    assert sum(told["train encoder"]) == len(epochs)
    assert {"embed items", "LLM on validation users", "LLM without history"} <= told.keys()
    assert set(model.seconds) == {"embed items", "train encoder", "choose the fusion"}
    assert min(model.seconds.values()) >= 0


def test_a_split_with_users_who_have_no_history_yet_can_be_fitted(dataset: Dataset) -> None:
    interactions, items = toy_frames()
    late = interactions.filter(~(pl.col("user_id").is_in(["u3", "u4"]) & (pl.col("timestamp") < 1_000_300)))
    moments = [datetime.fromtimestamp(1_000_000 + s, UTC) for s in (300, 420)]
    split = global_time(Dataset.read(late, items), valid_from=moments[0], test_from=moments[1])
    cold = [i for i in range(len(split.valid)) if not len(split.valid.history(i))]
    assert len(cold) == 2
    config = CONFIG.model_copy(update={"validation_users": 1_000})
    model = Recommender.fit(split, FakeEngine(), config)
    assert model.fusion.n_users == len(split.valid) - 2


def test_a_templates_folder_decides_the_item_texts(split: Split, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    header = "{#\npurpose: title and year\nversion: 1\nformat: plain\nvariables: [title, year]\n#}\n"
    (tmp_path / "mine" / "item.jinja").write_text(header + "{{ title }}, {{ year }}\n")
    model = Recommender.fit(split, FakeEngine(), CONFIG, prompts=tmp_path / "mine")
    assert model.texts[0] == "Heat (1995), 1950"
    model.save(tmp_path / "run")
    shutil.rmtree(tmp_path / "mine")
    # The run carries its templates.
    again = Recommender.load(tmp_path / "run", FakeEngine())
    assert again.texts == model.texts
    assert again.templates.sources == model.templates.sources


def test_texts_that_were_cut_are_a_counted_warning() -> None:
    interactions, items = toy_frames()
    long = pl.when(pl.col("item_id").is_in(["1", "2"])).then(pl.col("title") + " word" * 60).otherwise(pl.col("title"))
    model = Recommender.fit(Dataset.read(interactions, items.with_columns(long.alias("title"))), FakeEngine(), CONFIG)
    assert model.warnings == ["2 item texts were cut to their first 200 characters"]


# -- what an answer looks like -----------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_the_answer_has_its_columns_its_types_and_ranks_from_1(
    method: Method, real: Recommender, dataset: Dataset
) -> None:
    users = ["u7", "u0", "u12"]
    got = real.recommend(users=users, k=4, method=method)
    assert dict(got.schema) == COLUMNS
    assert got["user_id"].to_list() == [u for u in users for _ in range(4)]
    assert got["rank"].to_list() == [1, 2, 3, 4] * 3
    titles = dict(dataset.items.select("item_id", "title").iter_rows())
    assert got["title"].to_list() == [titles[i] for i in ids(got)]
    for part in got.partition_by("user_id"):
        assert part["item_id"].n_unique() == 4
        assert part["score"].to_list() == sorted(part["score"], reverse=True)  # one stage each here


@pytest.mark.parametrize("method", METHODS)
def test_an_empty_answer_has_the_same_columns(method: Method, real: Recommender) -> None:
    for got in (
        real.recommend(users=[], method=method),
        real.recommend(users=["u0", "u1"], method=method, allow=[]),
        real.recommend(history=[], method=method, allow=[]),
    ):
        assert got.height == 0
        assert dict(got.schema) == COLUMNS


@pytest.mark.parametrize("method", METHODS)
def test_a_users_own_items_are_left_out_unless_asked_for(method: Method, real: Recommender, dataset: Dataset) -> None:
    users = [f"u{n}" for n in range(6)]
    got = real.recommend(users=users, k=50, method=method)
    everything = real.recommend(users=users, k=50, method=method, include_seen=True)
    for user in users:
        # The test event counts as seen: serving is from every event the model was given.
        unseen = set(dataset.items["item_id"]) - set(events(dataset, user))
        assert set(ids(got.filter(pl.col("user_id") == user))) == unseen
        mine = ids(everything.filter(pl.col("user_id") == user))
        assert sorted(mine) == sorted(dataset.items["item_id"])


@pytest.mark.parametrize("method", METHODS)
def test_history_titles_and_user_agree(method: Method, real: Recommender, dataset: Dataset) -> None:
    history = events(dataset, "u5")
    titles = dict(dataset.items.select("item_id", "title").iter_rows())
    user = real.recommend(users=["u5"], k=6, method=method)
    by_ids = real.recommend(history=history, k=6, method=method)
    by_titles = real.recommend(history_titles=[titles[i] for i in history], k=6, method=method)
    same(by_ids, user)
    same(by_titles, user)
    assert by_ids["user_id"].to_list() == [None] * 6
    # The order is part of a history.
    other = real.recommend(history=history[::-1], k=6, method=method)
    assert other["score"].to_list() != pytest.approx(user["score"].to_list(), abs=1e-2)


@pytest.mark.parametrize("method", METHODS)
def test_who_else_is_asked_for_and_the_batch_size_change_nothing(method: Method, real: Recommender) -> None:
    users = [f"u{n}" for n in (3, 14, 3, 9, 0, 21, 3)]  # some twice
    whole = real.recommend(users=users, k=5, method=method)
    assert whole["user_id"].to_list() == [u for u in users for _ in range(5)]
    for batch in (1, 2, 3, 100):
        same(real.recommend(users=users, k=5, method=method, batch=batch), whole)
    alone = [real.recommend(users=[u], k=5, method=method) for u in users]
    same(pl.concat(alone), whole)


# -- filters -----------------------------------------------------------------------------------


def _allowed(model: Recommender, dataset: Dataset, **filters: Any) -> set[str]:
    return set(ids(model.recommend(users=["u2"], k=50, include_seen=True, **filters)))


@pytest.mark.parametrize("method", METHODS)
def test_allow_deny_and_where_all_hold(method: Method, real: Recommender, dataset: Dataset) -> None:
    everything = set(dataset.items["item_id"])
    evens = {i for i in everything if int(i) % 2 == 0}
    for filters, expected in (
        ({"allow": ["3", "1", "9", "3"]}, {"1", "3", "9"}),
        ({"deny": ["3", "1"]}, everything - {"1", "3"}),
        ({"deny": []}, everything),
        ({"where": pl.col("genres").str.contains("Drama")}, evens),
        ({"where": pl.col("genres") == "Thriller", "deny": ["1"]}, everything - evens - {"1"}),
        ({"allow": ["1", "2", "4"], "deny": ["2"], "where": pl.col("genres") != "Thriller"}, {"4"}),
    ):
        assert _allowed(real, dataset, method=method, **filters) == expected


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("left", [0, 1, 9, 10])
def test_a_filter_that_leaves_few_gives_those_few(
    method: Method, left: int, real: Recommender, dataset: Dataset
) -> None:
    allow = [str(n) for n in range(1, left + 1)]
    got = real.recommend(users=["u2", "u3"], k=10, method=method, allow=allow, include_seen=True)
    for user in ("u2", "u3"):
        mine = got.filter(pl.col("user_id") == user)
        assert set(ids(mine)) == set(allow)
        assert mine["rank"].to_list() == list(range(1, left + 1))


@pytest.mark.parametrize("method", METHODS)
def test_what_one_user_has_seen_is_left_out_for_that_user_alone(
    method: Method, real: Recommender, dataset: Dataset
) -> None:
    users = [f"u{n}" for n in range(10)]
    allow = events(dataset, "u2")[:4]  # nothing is left for u2
    got = real.recommend(users=users, k=10, method=method, allow=allow)
    left = {user: set(allow) - set(events(dataset, user)) for user in users}
    assert left["u2"] == set()
    assert len({len(items) for items in left.values()}) > 2
    for user, items in left.items():
        assert set(ids(got.filter(pl.col("user_id") == user))) == items


def test_filters_ask_the_llm_about_what_is_left_only(fitted: Recommender) -> None:
    engine = FakeEngine()
    model = mixing(fitted, Fusion(1.0, 0.0), engine)
    model.recommend(users=["u2"], k=10, allow=["1", "2", "3"], include_seen=True)
    assert engine.scored == 3
    model.recommend(users=["u2"], k=10, allow=[])
    assert engine.scored == 3


# -- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "error", "says"),
    [
        ({"users": ["u1", "u77"]}, DataError, r"no user 'u77' \(near: u7"),
        ({"history": ["1", "99", "98"]}, DataError, "unknown item '99', '98'"),
        ({"history_titles": ["Heat (1994)"]}, DataError, r"no item has the title 'Heat \(1994\)' \(near: Heat"),
        ({"users": ["u1"], "allow": ["99"]}, DataError, "unknown item '99'"),
        ({"users": ["u1"], "deny": ["99"]}, DataError, "unknown item '99'"),
        ({"users": ["u1"], "where": pl.col("price") > 3}, ConfigError, "filter cannot be applied"),
        ({}, ConfigError, "given: none"),
        ({"users": ["u1"], "history": ["1"]}, ConfigError, "given: users, history"),
        ({"users": "u1"}, ConfigError, "one text, not a list"),
        ({"history": "1"}, ConfigError, "one text, not a list"),
        ({"history_titles": "Heat (1995)"}, ConfigError, "one text, not a list"),
        ({"users": ["u1"], "allow": "1"}, ConfigError, "one text, not a list"),
        ({"users": ["u1"], "k": 0}, ConfigError, "k is 0"),
        ({"users": ["u1"], "batch": 0}, ConfigError, "batch is 0"),
        ({"users": ["u1"], "method": "guess"}, ConfigError, "unknown method 'guess'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_answered_says_why(
    asked: dict[str, Any], error: type[Exception], says: str, fitted: Recommender
) -> None:
    with pytest.raises(error, match=says):
        fitted.recommend(**asked)


def test_a_title_of_several_items_is_refused_with_their_ids() -> None:
    interactions, items = toy_frames()
    twice = items.with_columns(
        pl.when(pl.col("item_id") == "9").then(pl.lit("Up (2009)")).otherwise("title").alias("title")
    )
    model = Recommender.fit(Dataset.read(interactions, twice), FakeEngine(), CONFIG)
    with pytest.raises(DataError, match=r"2 items have the title 'Up \(2009\)': 9, 13"):
        model.recommend(history_titles=["Up (2009)"])


def test_ids_that_are_numbers_may_be_given_as_numbers() -> None:
    interactions, items = toy_frames()
    interactions = interactions.with_columns(pl.col("user_id").str.strip_prefix("u"))
    model = Recommender.fit(Dataset.read(interactions, items), FakeEngine(), CONFIG)
    numbers: list[Any] = [3, 10]
    got = model.recommend(users=numbers, k=3)
    assert got["user_id"].to_list() == ["3"] * 3 + ["10"] * 3
    same(got, model.recommend(users=["3", "10"], k=3))
    same(model.recommend(history=numbers), model.recommend(history=["3", "10"]))


# -- stages ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_nothing_to_go_on_is_answered_by_popularity_over_all_events(
    method: Method, fitted: Recommender, dataset: Dataset
) -> None:
    counts = {i: float(dataset.interactions["item_id"].to_list().count(i)) for i in dataset.items["item_id"]}
    got = fitted.recommend(history=[], k=5, method=method)
    assert ids(got) == by_score(counts)[:5]
    assert got["score"].to_list() == [counts[i] for i in ids(got)]
    assert got["stage"].to_list() == ["popularity"] * 5
    denied = ids(got)[:2]
    left = {i: n for i, n in counts.items() if i not in denied}
    assert ids(fitted.recommend(history_titles=[], k=50, method=method, deny=denied)) == by_score(left)


def test_retrieve_is_the_encoders_full_sort(fitted: Recommender, dataset: Dataset) -> None:
    for user in ("u0", "u8", "u29"):
        history = events(dataset, user)
        unseen = {i: s for i, s in interest(fitted, history).items() if i not in history}
        got = fitted.recommend(users=[user], k=5, method="retrieve")
        assert ids(got) == by_score(unseen)[:5]
        assert got["score"].to_list() == pytest.approx([unseen[i] for i in ids(got)], abs=1e-4)
        assert got["stage"].to_list() == ["interest"] * 5


@pytest.mark.parametrize("fusion", [Fusion(0.5, 0.5), Fusion(0.3, 1.0), Fusion(1.0, 0.0), Fusion(1.0, 1.0)])
def test_rank_reorders_the_candidates_by_the_mixture_and_the_rest_follows(
    fusion: Fusion, fitted: Recommender, dataset: Dataset
) -> None:
    model = mixing(fitted, fusion)
    for user in ("u0", "u8", "u29"):
        history = events(dataset, user)
        unseen = {i: s for i, s in interest(model, history).items() if i not in history}
        order = by_score(unseen)
        head = order[:CANDIDATES]
        llm, alone = likelihood(model, history, head), likelihood(model, [], head)
        mixed = (1 - fusion.weight) * z([unseen[i] for i in head]) + fusion.weight * z(
            [llm[i] - fusion.calibration * alone[i] for i in head]
        )
        expected = by_score(dict(zip(head, mixed.tolist(), strict=True)))
        got = model.recommend(users=[user], k=50)
        assert ids(got) == [*expected, *order[CANDIDATES:]]
        assert got["score"].to_list()[:CANDIDATES] == pytest.approx(sorted(mixed, reverse=True), abs=1e-4)
        stage = "llm" if fusion.weight == 1 else "llm+interest"
        assert got["stage"].to_list() == [stage] * CANDIDATES + ["interest"] * (len(order) - CANDIDATES)
        # Fewer than candidates: the best of the reranked ones, not the rerank of fewer.
        assert ids(model.recommend(users=[user], k=2)) == expected[:2]


def test_the_mixture_changes_the_order_at_all(fitted: Recommender) -> None:
    users = [f"u{n}" for n in range(30)]
    lists = [ids(mixing(fitted, Fusion(w, 0.0)).recommend(users=users, k=5)) for w in (0.0, 0.5, 1.0)]
    assert lists[0] != lists[1] != lists[2] != lists[0]


@pytest.mark.parametrize(("weight", "method"), [(0.0, "rank"), (0.5, "retrieve"), (0.5, "rank")])
def test_the_llm_is_asked_only_where_it_has_a_say(weight: float, method: Method, fitted: Recommender) -> None:
    engine = FakeEngine()
    model = mixing(fitted, Fusion(weight, 0.0), engine)
    got = model.recommend(users=["u1", "u2"], k=10, method=method)
    if weight and method == "rank":
        assert engine.scored == 2 * CANDIDATES
    else:
        assert engine.scored == 0
        assert set(got["stage"]) == {"interest"}
        same(got, fitted.recommend(users=["u1", "u2"], k=10, method="retrieve"))


def test_an_items_prior_is_computed_once_for_all_users(fitted: Recommender) -> None:
    engine = FakeEngine()
    model = dataclasses.replace(fitted, fusion=Fusion(0.5, 1.0), prior=None)
    model.use_engine(engine)
    users = [f"u{n}" for n in range(10)]
    distinct = set(ids(model.recommend(users=users, k=CANDIDATES)))
    assert engine.scored == 10 * CANDIDATES + len(distinct)
    model.recommend(users=users, k=CANDIDATES)
    assert engine.scored == 2 * 10 * CANDIDATES + len(distinct)


@pytest.mark.parametrize("most", [2, 16])
def test_lists_that_the_search_could_not_prove_are_warned_of(
    most: int, real: Recommender, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = real.engine.generate
    monkeypatch.setattr(real.engine, "generate", partial(whole, max_expansions=most))
    with pytest.warns(PenchantWarning, match="generated lists are the best that was found") as told:
        found = real.recommend(users=["u0", "u1"], k=6, method="generate")
    assert len(told) == 1
    assert len(found) < 12, "so few expansions do not find them all"
    monkeypatch.undo()
    real.recommend(users=["u0", "u1"], k=6, method="generate")  # warnings are errors: the whole search is proved
    real.recommend(users=["u0"], k=6, method="generate", allow=events(dataset, "u0"))  # seen, all of them: none is left


@pytest.mark.parametrize("filters", [{}, {"deny": ["1", "5"]}, {"allow": ["2", "3", "11"]}, {"include_seen": True}])
def test_generate_is_a_full_sort_of_the_llms_scores(
    filters: dict[str, Any], real: Recommender, dataset: Dataset
) -> None:
    for user in ("u0", "u8", "u29"):
        history = events(dataset, user)
        scores = likelihood(real, history, real.log.item_ids)
        left = {
            i: s
            for i, s in scores.items()
            if i in filters.get("allow", scores)
            and i not in filters.get("deny", ())
            and (filters.get("include_seen") or i not in history)
        }
        got = real.recommend(users=[user], k=6, method="generate", **filters)
        assert ids(got) == by_score(left)[:6]
        assert got["score"].to_list() == pytest.approx([left[i] for i in ids(got)], abs=1e-3)
        assert set(got["stage"]) <= {"llm-generate"}


def test_items_of_one_title_are_told_apart_by_every_method(byte_engine: TransformersEngine) -> None:
    interactions, items = toy_frames()
    twice = items.with_columns(
        pl.when(pl.col("item_id") == "9").then(pl.lit("Up (2009)")).otherwise("title").alias("title")
    )
    model = Recommender.fit(Dataset.read(interactions, twice), byte_engine, CONFIG)
    model.fusion = HALF
    for method in METHODS:
        got = model.recommend(history=["1", "2"], k=20, method=method, unique_titles=False)
        assert sorted(ids(got), key=int) == [str(n) for n in range(3, 17)]
        # Otherwise the better of the two stands for both.
        once = model.recommend(history=["1", "2"], k=20, method=method)
        order = ids(got)
        worse = max(["9", "13"], key=order.index)
        assert ids(once) == [i for i in order if i != worse]
        if method == "generate":
            nine, thirteen = (got.filter(pl.col("item_id") == i)["score"][0] for i in ("9", "13"))
            assert nine == thirteen


@pytest.mark.parametrize("context", [72, 100])
def test_a_model_of_a_short_context_still_fits_and_serves(
    context: int, split: Split, dataset: Dataset, tmp_path: Path
) -> None:
    """The oldest events leave the prompt until it and the longest item go in together."""
    folder = tiny.save_model(tmp_path / "short", "byte", max_positions=context)
    engine = load_engine(folder, dtype="float32", device="cpu")
    model = Recommender.fit(split, engine, CONFIG)
    model.fusion = HALF
    for method in METHODS:
        assert model.recommend(users=["u1"], k=3, method=method).height == 3
    history = np.array([model.log.item_index[i] for i in events(dataset, "u1")])
    assert model.ranker.prompt(history).dropped > 0


# -- the engine --------------------------------------------------------------------------------


def test_an_engine_of_another_fingerprint_is_refused(fitted: Recommender, tmp_path: Path) -> None:
    other = FakeEngine()
    other.fingerprint = "another"
    model = mixing(fitted, HALF)
    before = model.recommend(users=["u1"], k=5)
    with pytest.raises(ModelError, match="fitted with the model fake, and this engine is another"):
        model.use_engine(other)
    same(model.recommend(users=["u1"], k=5), before)  # the one in use stays
    model.save(tmp_path / "run")
    with pytest.raises(ModelError, match="fitted with the model fake"):
        Recommender.load(tmp_path / "run", other)


def test_a_run_whose_source_became_another_model_is_refused(split: Split, tmp_path: Path) -> None:
    engine = load_engine(tiny.save_model(tmp_path / "model", "byte"), dtype="float32", device="cpu")
    Recommender.fit(split, engine, CONFIG).save(tmp_path / "run")
    shutil.rmtree(tmp_path / "model")
    tiny.save_model(tmp_path / "model", "byte", seed=1)
    again = Recommender.load(tmp_path / "run")
    assert again.recommend(users=["u1"], k=3, method="retrieve").height == 3  # needs no LLM
    with pytest.raises(ModelError, match="this engine is"):
        again.recommend(users=["u1"], k=3, method="generate")


# -- saving ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(real: Recommender, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "real"
    real.save(folder)
    return folder


@pytest.mark.parametrize("handed", [True, False])
def test_a_loaded_run_recommends_the_same_with_and_without_the_engine_handed_to_it(
    handed: bool, run: Path, real: Recommender, byte_engine: TransformersEngine
) -> None:
    again = Recommender.load(run, byte_engine if handed else None)
    users = ["u4", "u5", "u6"]
    for method in METHODS:
        for filters in ({}, {"deny": ["1"]}, {"include_seen": True}):
            asked = {"users": users, "k": 8, "method": method, **filters}
            same(again.recommend(**asked), real.recommend(**asked))
    assert again.config == real.config
    assert again.config.layer == 1  # the layer that was used, not the wish for a default
    assert again.fusion == real.fusion
    assert (again.training, again.warnings, again.texts) == (real.training, real.warnings, real.texts)
    assert again.split.spec == real.split.spec
    assert again.split.test.position.tolist() == real.split.test.position.tolist()
    np.testing.assert_array_equal(again.prior, np.load(run / "prior.npy"))


def test_saving_what_was_loaded_gives_the_same_run(run: Path, tmp_path: Path, byte_engine: TransformersEngine) -> None:
    Recommender.load(run, byte_engine).save(tmp_path / "copy")
    for name in ("vectors.npy", "prior.npy", "manifest.json", "split.json", "encoder.safetensors"):
        assert (tmp_path / "copy" / name).read_bytes() == (run / name).read_bytes()


def test_a_run_that_says_auto_is_loaded_with_the_numbers_of_its_fingerprint(run: Path, tmp_path: Path) -> None:
    """Auto was the checkpoint's own dtype once."""
    shutil.copytree(run, tmp_path / "run")
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["engine"]["dtype"] == "float32"
    manifest["engine"]["dtype"] = "auto"
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest))
    again = Recommender.load(tmp_path / "run")
    assert again.engine_source is not None
    assert again.engine_source["dtype"] == "float32"
    assert again.engine.fingerprint == manifest["fingerprint"]


def test_known_priors_come_back_with_the_run(fitted: Recommender, tmp_path: Path) -> None:
    mixing(fitted, Fusion(1.0, 1.0)).save(tmp_path / "run")
    engine = FakeEngine()
    again = Recommender.load(tmp_path / "run", engine)
    assert fitted.prior is not None
    known = [i for i, p in zip(fitted.log.item_ids, fitted.prior, strict=True) if not np.isnan(p)]
    assert known
    again.recommend(users=["u1"], k=5, allow=known[:3], include_seen=True)
    assert engine.scored == 3  # the likelihoods alone


def test_a_run_without_a_source_asks_for_its_engine(fitted: Recommender, tmp_path: Path) -> None:
    mixing(fitted, HALF).save(tmp_path / "run")
    again = Recommender.load(tmp_path / "run")
    assert again.recommend(users=["u1"], k=3, method="retrieve").height == 3
    with pytest.raises(ModelError, match="does not say how to load its model"):
        again.recommend(users=["u1"], k=3)
    again.use_engine(FakeEngine())
    assert again.recommend(users=["u1"], k=3).height == 3


def test_nothing_in_a_run_is_a_pickle(run: Path) -> None:
    files = [p for p in run.rglob("*") if p.is_file()]
    assert {p.suffix for p in files} <= {".json", ".jsonl", ".npy", ".npz", ".safetensors", ".parquet", ".jinja"}
    for path in files:
        if path.suffix == ".npy":
            assert np.load(path, allow_pickle=False).dtype != object
        elif path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                assert all(arrays[name].dtype != object for name in arrays.files)
        assert path.read_bytes()[:1] != b"\x80"  # how a pickle begins


@pytest.mark.parametrize(
    "name",
    ["split.npz", "encoder.safetensors", "vectors.npy", "prior.npy", "prompts/item.jinja", "dataset/items.parquet"],
)
@pytest.mark.parametrize("how", ["altered", "missing"])
def test_a_run_with_a_file_altered_or_missing_is_refused(name: str, how: str, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / name
    if how == "missing":
        path.unlink()
    else:
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(StorageError):
        Recommender.load(tmp_path / "run")


def test_a_run_over_another_dataset_is_refused(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "dataset")
    Dataset.read(*toy_frames(seed=1)).save(tmp_path / "run" / "dataset")  # as many events
    with pytest.raises(StorageError, match="another dataset"):
        Recommender.load(tmp_path / "run")


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no such run"):
        Recommender.load(tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    with pytest.raises(StorageError):
        Recommender.load(tmp_path / "other")


def test_a_run_is_not_saved_over_what_it_would_lose(fitted: Recommender, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fitted.save(run)
    fitted.save(run)
    (run / "recs").mkdir()
    with pytest.raises(StorageError, match=r"holds other things \(recs\)"):
        fitted.save(run)
    (run / "recs").rmdir()
    served = mixing(Recommender.load(run), HALF)
    served.attach(run)
    served.update("u0", [{"item_id": "1"}])
    served.save(run)  # its own additions are saved with it
    with pytest.raises(StorageError, match="came after the fit"):
        dataclasses.replace(fitted, live=[]).save(run)
    assert len(Recommender.load(run).live) == 1
