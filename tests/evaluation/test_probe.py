"""The memorisation probe: neutral names carry nothing, and a model that knows titles by heart is found out exactly."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.conftest import SHARED_DATA, toy_frames
from tests.fake_engine import FakeEngine
from tests.tiny import TITLES

from penchant.data.dataset import Dataset
from penchant.data.split import leave_last_out
from penchant.engine.transformers import TransformersEngine
from penchant.errors import ConfigError, DataError
from penchant.evaluation.evaluate import evaluate
from penchant.evaluation.probe import (
    memorisation,
    neutral_dataset,
    neutral_names,
    paired_rows,
    probe,
    title_recall,
    year_recall,
)
from penchant.evaluation.ranking import Ranked
from penchant.evaluation.recall import _bare, _recited, _rest
from penchant.evaluation.rows import Table
from penchant.interest.config import EncoderConfig
from penchant.recommend import Recommender
from penchant.run_folder import FitConfig
from penchant.tokens import Prompt

FIRST = ["Quiet", "Long", "Blue", "Hidden", "Second", "Broken", "Golden", "Empty", "Silver", "Narrow"]
REST = ["River", "Summer Night", "Letter", "Heart", "Garden", "Witness", "Journey Home", "House"]
FILMS = [f"{a} {b} ({1960 + 3 * i + j})" for i, a in enumerate(FIRST) for j, b in enumerate(REST)]


class Reciter(FakeEngine):
    """Knows some lines by heart: behind any beginning of one of them, its next token has ``sure`` of the probability.

    Everywhere else, and for what is left, each token has a fixed share by its number.
    """

    def __init__(self, known: Sequence[str], sure: float = 0.9) -> None:
        super().__init__()
        self.size = len(self.codec.tokenizer)
        self.sure = sure
        self.next: dict[tuple[int, ...], int] = {}
        end = self.codec.encode_template("\n")
        for line in known:
            ids = (*self.codec.encode_data(line), *end)
            for at in range(1, len(ids)):
                self.next[ids[:at]] = ids[at]
        self.longest = max(map(len, self.next), default=0)
        weight = np.random.default_rng(0).random(self.size) + 0.5
        self.base = weight / weight.sum()

    def _token_logprob(self, before: Sequence[int], token: int) -> float:
        ids = tuple(before)
        ends = (ids[start:] for start in range(max(0, len(ids) - self.longest), len(ids)))
        known = next((self.next[end] for end in ends if end in self.next), None)
        if known is None:
            return math.log(self.base[token])
        return math.log(self.sure) if token == known else math.log((1 - self.sure) * self.base[token])

    def score(self, prompts: Any, continuations: Any, *, progress: Any = None) -> list[NDArray[np.float64]]:
        out = []
        for prompt, candidates in zip(prompts, continuations, strict=True):
            ids = self.codec.encode(prompt)
            out.append(np.array([self._of(ids, tuple(tokens)) for tokens in candidates]))
        return out

    def _of(self, ids: list[int], tokens: tuple[int, ...]) -> float:
        return sum(self._token_logprob([*ids, *tokens[:at]], token) for at, token in enumerate(tokens))


# -- neutral names -----------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.lists(st.text(max_size=12), min_size=1, max_size=40), st.integers(0, 5))
def test_names_are_a_renaming(texts: list[str], seed: int) -> None:
    names = neutral_names(texts, seed)
    assert len(names) == len(texts)
    assert len(set(names)) == len(set(texts))
    assert len(set(zip(texts, names, strict=True))) == len(set(texts))
    assert len({len(name) for name in names}) == 1
    words = {word.casefold() for text in texts for word in text.split()}
    for name in names:
        assert re.fullmatch(r"Item ([B-Z][AEIOU])+", name)
        assert name.split()[1].casefold() not in words
        assert name not in texts


def test_a_name_follows_from_text_and_seed_alone() -> None:
    names = neutral_names(FILMS, 3)
    shuffled = np.random.default_rng(0).permutation(len(FILMS))
    assert neutral_names([FILMS[i] for i in shuffled], 3) == [names[i] for i in shuffled]
    assert neutral_names(FILMS, 3) == names
    some = neutral_names(FILMS[::2], 3)
    assert sum(a == b for a, b in zip(some, names[::2], strict=True)) >= len(some) - 1
    assert sum(a == b for a, b in zip(neutral_names(FILMS, 4), names, strict=True)) <= 2


def test_a_code_that_is_a_real_word_is_passed_over() -> None:
    first = neutral_names(["x"], 0)[0]
    code = first.split()[1]
    for real in (code, f"The {code.lower()} of it", first):
        names = neutral_names(["x", real], 0)
        assert code not in {name.split()[1] for name in names}


def test_with_a_codec_all_names_have_one_number_of_tokens(tiny_engine: TransformersEngine) -> None:
    codec = tiny_engine.codec
    assert len({len(codec.encode_data(name)) for name in neutral_names(FILMS, 1, codec=codec)}) == 1
    # And it changed something, or the test says nothing.
    assert len({len(codec.encode_data(name)) for name in neutral_names(FILMS, 1)}) >= 1


def test_many_items_get_longer_names() -> None:
    short, long = neutral_names(["a"]), neutral_names([str(i) for i in range(18_000)])
    assert len(set(long)) == 18_000
    assert len(long[0]) > len(short[0])


def test_the_neutral_dataset_is_the_same_but_for_its_texts() -> None:
    interactions, items = toy_frames()
    interactions = interactions.with_columns(
        pl.lit(4.0).alias("rating"), pl.lit("loved Heat").alias("review"), pl.lit("view").alias("event_type")
    )
    dataset = Dataset.read(interactions, items)
    neutral = neutral_dataset(dataset, 7)
    assert neutral.items.columns == ["item_id", "title"]
    assert neutral.items["item_id"].to_list() == dataset.items["item_id"].to_list()
    assert neutral.items["title"].to_list() == neutral_names(dataset.items["title"].to_list(), 7)
    assert neutral.interactions.equals(dataset.interactions.drop("review"))
    text = json.dumps([neutral.items.to_dicts(), neutral.interactions.to_dicts()])
    assert not any(title.split()[0] in text for title in TITLES if len(title.split()[0]) > 3)
    assert neutral.report["neutral"] == {
        "of": dataset.content_hash,
        "seed": 7,
        "one_number_of_tokens": False,
        "distinct_titles": 16,
        "left_out": {"items": ["genres", "year"], "interactions": ["review"]},
    }
    assert neutral.content_hash != dataset.content_hash
    assert "neutral" not in dataset.report
    a, b = leave_last_out(dataset), leave_last_out(neutral)
    assert (a.log.item == b.log.item).all()
    assert (a.test.position == b.test.position).all()


def test_the_neutral_dataset_can_be_saved_and_loaded(tmp_path: Any, toy: Dataset) -> None:
    neutral = neutral_dataset(toy)
    assert Dataset.load(neutral.save(tmp_path / "neutral")).content_hash == neutral.content_hash


# -- titles ------------------------------------------------------------------------------------


def known_share(names: Sequence[str], known: set[str]) -> float:
    return sum(name in known for name in names) / len(names)


@pytest.mark.parametrize("known", [0, 1, 30, 80])
def test_a_model_that_knows_some_titles_is_found_out_with_the_exact_rate(known: int) -> None:
    bare = [_bare(film) for film in FILMS]
    # One title for each beginning at most can be known: behind "Quiet" only one word can come first.
    by_start = {title.split()[0]: title for title in bare[:known]}
    engine = Reciter(list(by_start.values()))
    found = title_recall(engine, FILMS, n=1_000, shots=0)
    assert found.eligible == found.recited.n == len(FILMS)
    assert found.recited.mean == known_share(bare, set(by_start.values()))
    assert found.recited.low <= found.recited.mean <= found.recited.high
    assert set(found.titles) <= set(by_start.values())
    assert len(found.titles) == min(20, len(by_start))
    # The known halves have nine tenths a token, the others next to nothing.
    sure = [0.9 ** len(_rest(engine.codec, start, title) or ()) for start, title in by_start.items()]
    assert found.probability.mean == pytest.approx(sum(sure) / len(FILMS), abs=1e-4)


def test_a_sure_token_needs_no_search_and_an_unsure_one_is_searched_for() -> None:
    """With a tenth of the probability the known token is still the first of 420; with a thousandth it is not."""
    bare = _bare(FILMS[0])
    for sure, share in ((0.9, 1 / 80), (0.1, 1 / 80), (0.0001, 0.0)):
        assert title_recall(Reciter([bare], sure), FILMS, n=1_000, shots=0).recited.mean == share


def test_what_is_recited_is_what_greedy_decoding_gives(byte_engine: TransformersEngine) -> None:
    """Against decoding over the whole vocabulary token by token, of rests made from the model's own first choices."""
    codec, size = byte_engine.codec, len(byte_engine.codec.tokenizer)

    def first_choice(prompt: str, tokens: tuple[int, ...]) -> int:
        return int(np.argmax(byte_engine.score([prompt], [[(*tokens, v) for v in range(size)]])[0]))

    prompts, rests, expected = [], [], []
    for start in ("Heat", "Toy", "M", "Up"):
        own: tuple[int, ...] = ()
        for _ in range(3):
            own = (*own, first_choice(start, own))
        for rest in (own, own[:1], (*own[:2], (own[2] + 1) % size), ((own[0] + 1) % size, *own[1:])):
            prompts.append(start)
            rests.append(rest)
            expected.append(all(first_choice(start, rest[:i]) == rest[i] for i in range(len(rest))))
    sums = byte_engine.score(prompts, [[r[: i + 1] for i in range(len(r))] for r in rests])
    parts = [np.diff(row, prepend=0.0) for row in sums]
    assert expected.count(True) >= 8
    assert expected.count(False) >= 8
    asked: Sequence[Prompt] = prompts  # type: ignore[assignment]  # an engine takes both
    assert _recited(byte_engine, asked, rests, parts) == expected
    assert codec is byte_engine.codec


def test_the_true_half_is_chosen_where_it_is_the_likelier() -> None:
    bare = [_bare(film) for film in FILMS]
    by_start = {title.split()[0]: title for title in bare}
    found = title_recall(Reciter(list(by_start.values())), FILMS, n=1_000, shots=0, choices=3)
    assert found.chance == pytest.approx(1 / 3)
    assert found.chosen.mean >= len(by_start) / len(FILMS)
    # Whose tokens all weigh the same knows nothing, and no tie counts as known.
    flat = Reciter([])
    flat.base = np.full(flat.size, 1 / flat.size)
    equal = [f"{a} {b}" for a in FIRST for b in "XYZ"]
    assert len({len(flat.codec.encode_data(f" {b}")) for b in "XYZ"}) == 1
    assert title_recall(flat, equal, n=1_000, shots=0).chosen.mean == 0


@pytest.mark.parametrize(
    ("title", "bare"),
    [
        ("Godfather, The (1972)", "The Godfather"),
        ("Heat (1995)", "Heat"),
        ("Bronx Tale, A (1993)", "A Bronx Tale"),
        ("Miserables, Les (1995)", "Les Miserables"),
        ("Good, the Bad and the Ugly, The (1966)", "The Good, the Bad and the Ugly"),
        ("2001: A Space Odyssey", "2001: A Space Odyssey"),
        ("unknown", "unknown"),
        ("(500) Days (of Summer)", "(500) Days (of Summer)"),
    ],
)
def test_titles_lose_their_year_and_get_their_article_back(title: str, bare: str) -> None:
    assert _bare(title) == bare


def test_the_sample_is_seeded_distinct_and_without_what_was_shown() -> None:
    engine = Reciter([])
    seen: list[list[str]] = []
    true = engine.score

    def spy(prompts: Any, continuations: Any, *, progress: Any = None) -> Any:
        seen.append([prompt.text for prompt in prompts])
        return true(prompts, continuations)

    engine.score = spy  # type: ignore[method-assign]
    runs, first = [], []
    for seed in (1, 1, 2):
        first.append(len(seen))  # what is asked of generate comes after it
        runs.append(title_recall(engine, FILMS + FILMS, n=10, seed=seed, shots=3))
    seen = [seen[at] for at in first]
    assert runs[0] == runs[1]
    assert seen[0] == seen[1] != seen[2]
    assert len(set(seen[0])) == 10
    shown = {line for text in seen[0] for line in text.split("\n")[1:-1]}
    assert len(shown) == 3
    bare = {_bare(film) for film in FILMS}
    assert shown <= bare
    for text in seen[0]:
        start = text.split("\n")[-1]
        assert start not in shown
        assert any(title.startswith(f"{start} ") for title in bare - shown)


def test_titles_without_a_second_half_are_counted() -> None:
    found = title_recall(Reciter([]), ["Heat (1995)", "Heat (1986)", "Alien", *FILMS], n=5)
    assert found.left_out == {"one word": 2, "halves merge in tokens": 0}
    with pytest.raises(DataError, match="0 titles have a second half"):
        title_recall(Reciter([]), ["Heat", "Alien"])
    for bad in ({"n": 0}, {"shots": -1}, {"choices": 1}):
        with pytest.raises(ConfigError, match=f"{next(iter(bad))} is"):
            title_recall(Reciter([]), FILMS, **bad)


# -- years -------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [0, 20, 80])
def test_a_model_that_knows_some_years_is_found_out_with_the_exact_rate(known: int) -> None:
    found = year_recall(Reciter(FILMS[:known]), FILMS, n=1_000, shots=0)
    assert found is not None
    assert found.correct.n == len(FILMS)
    # Who knows nothing of a title says the same year of all of them, which is right for a few.
    assert known / len(FILMS) <= found.correct.mean <= known / len(FILMS) + 4 / len(FILMS)
    assert (found.first, found.last) == (1960, 1960 + 27 + 7)
    assert found.above_base.mean == pytest.approx(found.correct.mean - found.base.mean)
    assert found.within_one.mean >= found.correct.mean


def test_the_base_is_the_commonest_year() -> None:
    films = [f"{a} {b} (1990)" for a in FIRST[:3] for b in REST] + [f"{FIRST[3]} {b} (1991)" for b in REST]
    found = year_recall(Reciter([]), films, n=1_000, shots=0)
    assert found is not None
    assert found.commonest == 1990
    assert found.base.mean == 24 / 32


def test_equal_years_are_a_miss() -> None:
    engine = Reciter([])
    engine.base = np.full(engine.size, 1 / engine.size)
    found = year_recall(engine, FILMS, n=1_000, shots=0)
    assert found is not None
    assert found.correct.mean == 0


def test_titles_without_a_year_or_with_several_are_left_out() -> None:
    more = ["Heat (1995)", "Heat (1986)", "No Year"]
    found = year_recall(Reciter([]), FILMS + more, n=1_000)
    assert found is not None
    assert found.left_out == {"no year": 1, "several years": 2, "the year merges with the title's tokens": 0}
    assert found.correct.n == len(FILMS) - 4
    assert year_recall(Reciter([]), [_bare(film) for film in FILMS]) is None
    assert year_recall(Reciter([]), FILMS[:3], shots=4) is None


# -- all of it ---------------------------------------------------------------------------------


def test_memorisation_is_plain_json(byte_engine: TransformersEngine, toy: Dataset) -> None:
    """On a real, untrained model: it knows nothing by heart, and both halves of the answer are there."""
    found = memorisation(byte_engine, toy, n=1)
    back = json.loads(json.dumps(found, allow_nan=False))
    assert back["data"] == toy.content_hash
    assert back["titles"]["recited"]["mean"] == 0
    assert back["titles"]["recited"]["low"] is None  # one title has no interval
    assert set(back["years"]) >= {"correct", "base", "above_base", "within_one"}


def test_what_is_left_of_each_system_is_a_paired_difference(toy: Dataset) -> None:
    """Popularity reads no title, so nothing of it is lost; every other row agrees with evaluating each model."""
    config = FitConfig(
        encoder=EncoderConfig(dim=16, blocks=1, max_length=12, epochs=1, batch_rows=8), candidates=5, validation_users=5
    )
    models = [
        Recommender.fit(leave_last_out(one), FakeEngine(), config) for one in (toy, neutral_dataset(toy, codec=None))
    ]
    report = probe(models[0], models[1], llm_users=8)
    every, some = dict.fromkeys(row.group for row in report.rows)
    assert "all 30 test targets, whole catalogue of 16" in every
    assert "the same 8 of them (seed 0)" in some
    lost = report.find("popularity: neutral minus real", every)
    assert (lost.metrics["NDCG@10"].mean, lost.metrics["NDCG@10"].high, lost.p) == (0.0, 0.0, 1.0)
    assert report.find("llm+interest: neutral minus real", some).difference
    for model, name in zip(models, ("real titles", "neutral names"), strict=True):
        alone = evaluate(model, llm_users=8)
        for row in alone.rows:
            if not row.difference and "random order" not in row.system:
                group = every if "all 30" in row.group else some
                assert report.find(f"{row.system}, {name}", group).metrics == row.metrics
    json.dumps(report.to_dict(), allow_nan=False)
    with pytest.raises(DataError, match="not of the same events"):
        probe(models[0], Recommender.fit(leave_last_out(Dataset.read(*toy_frames(29))), FakeEngine(), config))


def test_paired_rows_know_that_the_users_are_the_same(rng: np.random.Generator) -> None:
    rank = rng.integers(1, 60, size=400)
    worse = rank + (rng.random(400) < 0.3)

    def ranked(name: str, ranks: NDArray[np.int64]) -> Ranked:
        return Ranked(name, ranks, np.zeros((len(ranks), 0), dtype=np.int32), 0.0)

    table = Table(10, 100, np.arange(400))
    rows = paired_rows(
        "g", [ranked("f (weight 0.4, c)", rank), ranked("x", rank)], [ranked("f (weight 0, c)", worse)], table
    )
    assert [row.system for row in rows] == [
        "f (weight 0.4, c), real titles",
        "f (weight 0, c), neutral names",
        "f: neutral minus real",
    ]
    difference = rows[2].metrics["NDCG@10"]
    assert difference.mean == pytest.approx(rows[1].metrics["NDCG@10"].mean - rows[0].metrics["NDCG@10"].mean)
    assert difference.high < 0
    assert rows[2].p is not None
    assert rows[2].p < 0.01
    with pytest.raises(DataError, match="400 targets with real titles, 3"):
        paired_rows("g", [ranked("x", rank)], [ranked("x", rank[:3])], table)


@pytest.mark.skipif(not (SHARED_DATA / "ml-100k" / "u.item").is_file(), reason="MovieLens-100K is not there")
def test_real_titles_are_nearly_all_usable() -> None:
    lines = (SHARED_DATA / "ml-100k" / "u.item").read_text(encoding="latin-1").splitlines()
    titles = [line.split("|")[1] for line in lines]
    names = neutral_names(titles)
    assert len(set(names)) == len(set(titles))
    assert not {name.split()[1].casefold() for name in names} & {w.casefold() for t in titles for w in t.split()}
    found = title_recall(Reciter([]), titles, n=2)
    assert found.eligible > 1_200
    assert found.left_out["halves merge in tokens"] < 20
