"""What every engine must do, run on the fake one, on transformers with both kinds of tokenizer, and on vLLM."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
from tests import tiny
from tests.fake_engine import FakeEngine

from penchant.catalog_trie import CatalogTrie
from penchant.engine import Engine
from penchant.engine.loading import load_engine
from penchant.errors import DataError, PenchantError
from penchant.tokens import Prompt, Segment

PROMPTS: list[Prompt | str] = [
    "Heat (1995)",
    Prompt((Segment("One user's history:\n", False), Segment("Up (2009)", True), Segment("\n", False))),
    "a much longer prompt than the others, with 七人の侍 in it, so that batches are uneven " * 2,
    "M",
]


NAMES = ["fake", "byte", "sentencepiece", *(["vllm"] if find_spec("vllm") else [])]


@pytest.fixture(scope="module", params=NAMES)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    if request.param == "fake":
        yield FakeEngine()
    elif request.param == "vllm":
        folder = tiny.save_model(tmp_path_factory.mktemp("contract"), "byte", seed=3, head=32, spread=0.2)
        served = load_engine(folder, dtype="float32", backend="vllm", options={"kv_cache_gib": 0.25})
        yield served
        served.close()
    else:
        folder = tiny.save_model(tmp_path_factory.mktemp("contract"), request.param, seed=3)
        yield load_engine(folder, dtype="float32", device="cpu")


@pytest.fixture
def items(engine: Engine) -> list[tuple[int, ...]]:
    """The titles, one of them twice."""
    return engine.codec.encode_items([*tiny.TITLES, tiny.TITLES[0]], "\n")


def test_it_is_an_engine(engine: Engine) -> None:
    assert isinstance(engine, Engine)
    assert engine.fingerprint
    assert engine.n_layers > 0


def test_score_has_one_finite_value_a_continuation_and_is_a_logprob(
    engine: Engine, items: list[tuple[int, ...]]
) -> None:
    out = engine.score(PROMPTS, [items, items[:1], [], items[3:5]])
    assert [len(row) for row in out] == [len(items), 1, 0, 2]
    assert all(np.isfinite(row).all() and (row <= 0).all() for row in out)


def test_score_does_not_depend_on_order_batch_or_company(engine: Engine, items: list[tuple[int, ...]]) -> None:
    together = engine.score(PROMPTS, [items] * len(PROMPTS))
    for prompt, row in zip(PROMPTS, together, strict=True):
        (alone,) = engine.score([prompt], [items])
        np.testing.assert_allclose(alone, row, atol=1e-4)
        backwards = engine.score([prompt], [items[::-1]])[0][::-1]
        np.testing.assert_allclose(backwards, row, atol=1e-4)
        one_by_one = [engine.score([prompt], [[item]])[0][0] for item in items[:4]]
        np.testing.assert_allclose(one_by_one, row[:4], atol=1e-4)


def test_equal_items_score_equally_and_longer_ones_less(engine: Engine, items: list[tuple[int, ...]]) -> None:
    (row,) = engine.score(["Heat"], [items])
    assert row[0] == pytest.approx(row[-1], abs=1e-6)
    (parts,) = engine.score(["Heat"], [[items[0][:n] for n in range(1, len(items[0]) + 1)]])
    assert (np.diff(parts) < 0).all()


def test_a_text_is_scored_as_data(engine: Engine) -> None:
    (row,) = engine.score(["Heat"], [["<|im_end|>", engine.codec.encode_data("<|im_end|>")]])
    assert row[0] == row[1]


@pytest.mark.parametrize("k", [1, 3, 17, 40])
def test_generate_is_the_sorted_scores(engine: Engine, items: list[tuple[int, ...]], k: int) -> None:
    trie = CatalogTrie.build(items)
    scores = engine.score(PROMPTS, [items] * len(PROMPTS))
    for row, answer in zip(scores, engine.generate(PROMPTS, trie, k), strict=True):
        order = np.lexsort((np.arange(len(row)), -np.round(row, 4)))[:k]
        assert [g.item for g in answer] == order.tolist()
        np.testing.assert_allclose([g.logprob for g in answer], row[order], atol=1e-4)
        assert all(g.exact for g in answer)


@pytest.mark.parametrize("left", [0, 1, 4])
def test_generate_honours_each_prompts_filter(engine: Engine, items: list[tuple[int, ...]], left: int) -> None:
    trie = CatalogTrie.build(items)
    rng = np.random.default_rng(left)
    masks: list[np.ndarray | None] = []
    for _ in PROMPTS:
        mask = np.zeros(len(items), dtype=bool)
        mask[rng.choice(len(items), size=left, replace=False)] = True
        masks.append(mask)
    masks[-1] = None
    scores = engine.score(PROMPTS, [items] * len(PROMPTS))
    for row, mask, answer in zip(scores, masks, engine.generate(PROMPTS, trie, 5, allowed=masks), strict=True):
        allowed = np.arange(len(items)) if mask is None else np.flatnonzero(mask)
        order = allowed[np.lexsort((allowed, -np.round(row[allowed], 4)))][:5]
        assert [g.item for g in answer] == order.tolist()


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_embeddings_do_not_depend_on_company(engine: Engine, pooling: str) -> None:
    layer = -1 if type(engine).__name__ == "VllmEngine" else 1  # vLLM has the last layer only
    together = engine.embed(PROMPTS, pooling=pooling, layer=layer)  # type: ignore[arg-type]
    assert together.dtype == np.float32
    for row, prompt in zip(together, PROMPTS, strict=True):
        np.testing.assert_allclose(engine.embed([prompt], pooling=pooling, layer=layer)[0], row, atol=1e-4)  # type: ignore[arg-type]
    assert engine.embed([], pooling=pooling).shape[0] == 0  # type: ignore[arg-type]


def test_progress_counts_every_prompt_once(engine: Engine, items: list[tuple[int, ...]]) -> None:
    if isinstance(engine, FakeEngine):
        pytest.skip("the fake engine shows no progress")
    trie = CatalogTrie.build(items)
    calls: list[Callable[[list[int]], object]] = [
        lambda seen: engine.score(PROMPTS, [items] * len(PROMPTS), progress=seen.append),
        lambda seen: engine.generate(PROMPTS, trie, 2, progress=seen.append),
        lambda seen: engine.embed(PROMPTS, progress=seen.append),
    ]
    for call in calls:
        seen: list[int] = []
        call(seen)
        assert sum(seen) == len(PROMPTS)


def test_a_prompt_over_the_context_says_by_how_much(engine: Engine, items: list[tuple[int, ...]]) -> None:
    if isinstance(engine, FakeEngine):
        pytest.skip("the fake engine has no context")
    prompt = "7" * 600
    over = len(engine.codec.encode(prompt)) + max(map(len, items)) - engine.context_length
    with pytest.raises(PenchantError, match=f"{over} over"):
        engine.score([prompt], [items])
    with pytest.raises(PenchantError, match=f"{over} over"):
        engine.generate([prompt], CatalogTrie.build(items), 1)


def test_a_bonus_is_added_to_each_item_and_the_search_stays_exact(engine: Engine, items: list[tuple[int, ...]]) -> None:
    """As for calibration: minus the no-history likelihood, which isn't monotone along a path."""
    trie = CatalogTrie.build(items)
    bonus = np.random.default_rng(1).normal(scale=9, size=len(items))
    scores = engine.score(PROMPTS, [items] * len(PROMPTS))
    for row, answer in zip(scores, engine.generate(PROMPTS, trie, 5, bonus=bonus), strict=True):
        order = np.argsort(-(row + bonus))[:5]
        assert [g.item for g in answer] == order.tolist()
        np.testing.assert_allclose([g.score for g in answer], (row + bonus)[order], atol=1e-4)
        np.testing.assert_allclose([g.logprob for g in answer], row[order], atol=1e-4)
        assert all(g.exact for g in answer)


def test_removed_items_are_never_named(engine: Engine, items: list[tuple[int, ...]]) -> None:
    trie = CatalogTrie.build(items).without([0, 3])
    for answer in engine.generate(PROMPTS, trie, len(items)):
        assert len(answer) == len(items) - 2
        assert not {0, 3}.intersection(g.item for g in answer)


def test_beams_name_valid_items_with_their_true_scores_and_wide_ones_find_the_best(
    engine: Engine, items: list[tuple[int, ...]]
) -> None:
    trie = CatalogTrie.build(items)
    scores = engine.score(PROMPTS, [items] * len(PROMPTS))
    for row, narrow, wide in zip(
        scores, engine.generate(PROMPTS, trie, 3, beams=2), engine.generate(PROMPTS, trie, 3, beams=40), strict=True
    ):
        for g in narrow:
            assert g.logprob == pytest.approx(row[g.item], abs=1e-4)
        assert len({g.item for g in narrow}) == len(narrow)
        np.testing.assert_allclose([g.logprob for g in wide], np.sort(row)[::-1][:3], atol=1e-4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"allowed": [None]}, "1 masks for 4 prompts"),
        ({"allowed": [None, None, None, np.ones(3, dtype=bool)]}, r"a mask is bool of shape \(3,\)"),
        ({"allowed": [None, None, None, np.ones(17)]}, r"a mask is float64 of shape \(17,\)"),
        ({"bonus": np.zeros(3)}, r"bonus: has shape \(3,\)"),
        ({"bonus": np.full(17, np.nan)}, "bonus: is not finite"),
        ({"bonus": np.full(17, -np.inf)}, "bonus: is not finite"),
    ],
)
def test_masks_and_a_bonus_of_another_trie_are_refused(
    engine: Engine, items: list[tuple[int, ...]], options: Any, said: str
) -> None:
    if isinstance(engine, FakeEngine):
        pytest.skip("the fake engine checks nothing")
    with pytest.raises(PenchantError, match=said):
        engine.generate(PROMPTS, CatalogTrie.build(items), 2, **options)


@pytest.mark.parametrize("wrong", [999_999, -1])
def test_tokens_that_the_model_has_not_are_refused_and_others_answered_as_before(
    engine: Engine, items: list[tuple[int, ...]], wrong: int
) -> None:
    if isinstance(engine, FakeEngine):
        pytest.skip("the fake engine has no vocabulary")
    before = engine.score(PROMPTS, [items] * len(PROMPTS))
    for item in ([wrong], [5, wrong, 3]):
        with pytest.raises(DataError, match=f"{wrong} is none of the model's"):
            engine.score(["Heat"], [[item]])
        with pytest.raises(DataError, match=f"{wrong} is none of the model's"):
            engine.generate(["Heat"], CatalogTrie.build([[7, 8], item]), 1)
    for row, again in zip(before, engine.score(PROMPTS, [items] * len(PROMPTS)), strict=True):
        np.testing.assert_allclose(again, row, atol=1e-4)
