"""What transformers says, vLLM says: in float32 within 1e-3 nats, on the real vLLM; and its failures are clear errors.

One engine serves most of these tests: a start takes 20 seconds.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr
from tests import tiny
from tests.training.helpers import fresh_accelerate, settings

from penchant.catalog_trie import CatalogTrie
from penchant.data.dataset import Dataset
from penchant.engine.asking import MOST_CHILDREN, Ask
from penchant.engine.loading import load_engine
from penchant.engine.transformers import TransformersEngine
from penchant.errors import ConfigError, DataError, ModelError
from penchant.rank import label_logprobs
from penchant.tokens import Prompt, Segment
from penchant.training.recipes import finetune

# Not importorskip: it would import vLLM before the engine has set up its log.
pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM has an environment of its own: make test-vllm")

NATS = 1e-3
BLOCK = 32
SMALL = {"kv_cache_gib": 0.25}
TITLES = [*tiny.TITLES, *(f"{title} II" for title in tiny.TITLES), tiny.TITLES[0], "Toy"]


@dataclass
class Pair:
    """The same model (and adapter) in both engines."""

    vllm: Any
    plain: TransformersEngine


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a generation_config that would cut all tokens but one off, if anybody followed it."""
    folder = tiny.save_model(tmp_path_factory.mktemp("base"), "byte", seed=3, head=32, spread=0.2)
    own = {"do_sample": True, "top_k": 1, "temperature": 0.1, "repetition_penalty": 1.9}
    (folder / "generation_config.json").write_text(json.dumps(own))
    return folder


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two of different ranks and layers."""
    folder = tmp_path_factory.mktemp("adapters")
    every = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return [
        tiny.save_adapter(base, folder / "books", seed=1, spread=0.2),
        tiny.save_adapter(base, folder / "films", seed=2, spread=0.1, r=8, target_modules=every),
    ]


@pytest.fixture(scope="module")
def pair(base: Path) -> Iterator[Pair]:
    """With room for 4,000 tokens only: blocks are thrown out of the cache all the time."""
    served = load_engine(base, dtype="float32", backend="vllm", options={"kv_cache_gib": 0.004})
    yield Pair(served, load_engine(base, dtype="float32", device="cpu"))
    served.close()


@pytest.fixture(scope="module")
def shared(base: Path) -> Iterator[Pair]:
    """The base, to which adapters come as requests."""
    served = load_engine(base, dtype="float32", backend="vllm", options=SMALL | {"max_lora_rank": 8})
    yield Pair(served, load_engine(base, dtype="float32", device="cpu"))
    served.close()


@pytest.fixture(scope="module")
def uncached(base: Path) -> Iterator[Pair]:
    """The same without a prefix cache."""
    options = SMALL | {"max_lora_rank": 8, "prefix_caching": False}
    served = load_engine(base, dtype="float32", backend="vllm", options=options)
    yield Pair(served, load_engine(base, dtype="float32", device="cpu"))
    served.close()


@pytest.fixture(scope="module")
def merged(base: Path, adapters: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """With an adapter merged, and without a prefix cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PENCHANT_CACHE", str(tmp_path_factory.mktemp("cache")))
        options = SMALL | {"prefix_caching": False}
        served = load_engine(base, adapters[1], dtype="float32", backend="vllm", options=options)
    yield Pair(served, load_engine(base, adapters[1], dtype="float32", device="cpu"))
    served.close()


def items(pair: Pair) -> list[tuple[int, ...]]:
    return pair.plain.codec.encode_items(TITLES, "\n")


def prompts(n: int = 6, seed: int = 0) -> list[Prompt | str]:
    """Histories of different lengths behind a common instruction."""
    rng = np.random.default_rng(seed)
    return [
        Prompt(
            (
                Segment("One user's history, in the order of time, one title a line:\n", False),
                *(Segment(f"{title}\n", True) for title in rng.choice(tiny.TITLES, size=1 + 3 * i)),
            )
        )
        for i in range(n)
    ]


def same(pair: Pair, asked: list[Prompt | str], lists: list[Any]) -> None:
    for got, want in zip(pair.vllm.score(asked, lists), pair.plain.score(asked, lists), strict=True):
        np.testing.assert_allclose(got, want, atol=NATS)


def of_length(pair: Pair, n: int) -> str:
    """A prompt of exactly n tokens."""
    text = "7" * n
    assert len(pair.plain.codec.encode(text)) == n
    return text


def test_scores(pair: Pair) -> None:
    same(pair, prompts(), [items(pair)] * 6)


def test_scores_again_and_in_any_order(pair: Pair) -> None:
    """Candidates whose blocks are cached by now: vLLM no longer tells their log-probabilities."""
    rng = np.random.default_rng(1)
    asked, listed = prompts(seed=1), items(pair)
    for _ in range(3):
        order = rng.permutation(len(asked))
        same(pair, [asked[i] for i in order], [[listed[j] for j in rng.permutation(len(listed))] for _ in order])


@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 1, 2 * BLOCK, 2 * BLOCK + 1])
def test_prompts_around_a_blocks_edge(pair: Pair, length: int) -> None:
    """Candidates of one token, of a block and more, that begin each other, twice."""
    long = [5 + i % 40 for i in range(2 * BLOCK + 3)]
    lists = [[long[:n] for n in (1, 2, 30, 31, 32, 33, 63, 64, 65)] + [[9, *long[:40]], [9, *long[:40], 8]]]
    for _ in range(2):
        same(pair, [of_length(pair, length)], lists)


def test_scores_do_not_depend_on_what_was_generated_before(pair: Pair) -> None:
    asked, trie = prompts(seed=2), CatalogTrie.build(items(pair))
    pair.vllm.generate(asked, trie, 5)
    same(pair, asked, [items(pair)] * 6)
    assert [[g.item for g in answer] for answer in pair.vllm.generate(asked, trie, 5)] == [
        [g.item for g in answer] for answer in pair.plain.generate(asked, trie, 5)
    ]


@pytest.mark.parametrize("options", [{}, {"beams": 4}, {"bonus": True}, {"allowed": True}])
def test_the_same_items_are_generated(pair: Pair, options: dict[str, Any]) -> None:
    asked, trie, rng = prompts(seed=3), CatalogTrie.build(items(pair)), np.random.default_rng(3)
    if "bonus" in options:
        options = {"bonus": rng.normal(scale=9, size=len(TITLES))}
    if "allowed" in options:
        options = {"allowed": [rng.random(len(TITLES)) < 0.4 for _ in asked]}
    got, want = pair.vllm.generate(asked, trie, 7, **options), pair.plain.generate(asked, trie, 7, **options)
    for mine, theirs in zip(got, want, strict=True):
        assert [g.item for g in mine] == [g.item for g in theirs]
        np.testing.assert_allclose([g.logprob for g in mine], [g.logprob for g in theirs], atol=NATS)
        assert [g.gap for g in mine] == [g.gap for g in theirs]


def test_labels(pair: Pair) -> None:
    labels = list("ABCDEFGHIJ")
    asked = [Prompt((Segment(p.text, True),)) for p in prompts(seed=4) if isinstance(p, Prompt)]
    got, want = (label_logprobs(engine, asked, labels, prior=asked[0]) for engine in (pair.vllm, pair.plain))
    np.testing.assert_allclose(got, want, atol=NATS)


def test_a_shared_beginning_is_run_once_and_counted(pair: Pair) -> None:
    """An instruction and history of 192 and some tokens, 20 candidates: six blocks of it are never run again."""
    text, listed = "8" * 200, items(pair)[:20]
    pair.vllm.counts.clear()
    pair.vllm.score([text], [listed])
    counts = pair.vllm.counts
    assert counts.requests <= 21
    assert counts.cached == 192 * (counts.requests - 1)
    assert pair.vllm.tokens_run == counts.tokens - counts.cached


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_embeddings(shared: Pair, adapters: list[Path], base: Path, pooling: Any) -> None:
    asked = prompts(seed=5)
    views = [(shared.vllm, shared.plain)]
    views += [(shared.vllm.with_adapter(a), load_engine(base, a, dtype="float32", device="cpu")) for a in adapters]
    vectors = []
    for served, plain in views:
        got, want = served.embed(asked, pooling=pooling), plain.embed(asked, pooling=pooling)
        cosine = (got * want).sum(1) / np.linalg.norm(got, axis=1) / np.linalg.norm(want, axis=1)
        assert cosine.min() >= 0.9995
        np.testing.assert_allclose(got, want, atol=1e-3)
        np.testing.assert_allclose(served.embed(asked[::-1], pooling=pooling)[::-1], want, atol=1e-3)
        vectors.append(got)
    assert all(np.abs(vectors[0] - other).max() > 0.01 for other in vectors[1:])
    n = shared.vllm.context_length
    got, want = (engine.embed([of_length(shared, n)], pooling=pooling) for engine in (shared.vllm, shared.plain))
    np.testing.assert_allclose(got, want, atol=1e-3)
    with pytest.raises(DataError, match="1 over the model's context of 512"):
        shared.vllm.embed([of_length(shared, n + 1)])


def test_another_layer_is_refused(pair: Pair) -> None:
    with pytest.raises(ConfigError, match="layer 1 asked for, and vLLM gives the last one only"):
        pair.vllm.embed(["Heat"], layer=1)


def view(served: Pair, base: Path, adapter: Path) -> Pair:
    """An adapter as a request, and in the transformers engine."""
    return Pair(served.vllm.with_adapter(adapter), load_engine(base, adapter, dtype="float32", device="cpu"))


@pytest.mark.parametrize("name", ["shared", "uncached"])
def test_several_adapters_on_one_base(
    name: str, request: pytest.FixtureRequest, adapters: list[Path], base: Path
) -> None:
    """In turns, and the base between them: each says what it says alone."""
    served: Pair = request.getfixturevalue(name)
    served.vllm.counts.clear()
    asked, listed = prompts(3, seed=6), items(served)[:16]  # few: without a cache each request runs all of its prompt
    trie = CatalogTrie.build(listed)
    views = [view(served, base, adapter) for adapter in adapters]
    for _ in range(2):
        for each in [served, *views]:
            assert each.vllm.fingerprint == each.plain.fingerprint
            same(each, asked, [listed] * 3)
            for mine, theirs in zip(
                each.vllm.generate(asked, trie, 5), each.plain.generate(asked, trie, 5), strict=True
            ):
                assert [g.item for g in mine] == [g.item for g in theirs]
    first, second = (each.plain.score(asked, [listed] * 3)[0] for each in views)
    assert np.abs(first - second).max() > 0.1
    assert (served.vllm.counts.cached > 0) == (name == "shared")


@pytest.mark.parametrize(
    "config",
    [
        {"r": 4, "use_rslora": True},
        {"r": 4, "lora_alpha": 3},
        {"r": 4, "alpha_pattern": {"q_proj": 64}},
        {"r": 4, "rank_pattern": {"v_proj": 8}},
    ],
)
def test_adapters_of_any_scale_as_requests(shared: Pair, base: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    scaled = view(shared, base, tiny.save_adapter(base, tmp_path / "a", spread=0.1, **config))
    same(scaled, prompts(2, seed=9), [items(shared)] * 2)


def test_an_adapter_trained_again_in_its_folder(shared: Pair, base: Path, tmp_path: Path) -> None:
    asked, listed = prompts(2, seed=10), [items(shared)] * 2
    old = view(shared, base, tiny.save_adapter(base, tmp_path / "a", seed=1, spread=0.2))
    same(old, asked, listed)
    new = view(shared, base, tiny.save_adapter(base, tmp_path / "a", seed=2, spread=0.2))
    for _ in range(2):
        same(new, asked, listed)
        same(old, asked, listed)


@pytest.mark.filterwarnings("ignore:no validation", "ignore:nothing learnt")  # a few steps need not help
def test_an_adapter_that_a_recipe_left(shared: Pair, base: Path, toy: Dataset, tmp_path: Path) -> None:
    """As it is published, on one block of two, with the scale of its rank's root."""
    config = settings(base, lora={"r": 8, "alpha": 16, "rslora": True, "last_layers": 1}, pack_tokens=512, max_steps=6)
    with fresh_accelerate():
        finetune("next_item", config, toy, tmp_path / "run")
    left = view(shared, base, tmp_path / "run")
    asked, listed = prompts(2, seed=12), [items(shared)] * 2
    same(left, asked, listed)
    assert np.abs(left.plain.score(asked, listed)[0] - shared.plain.score(asked, listed)[0]).max() > 0.1


def test_more_first_tokens_than_one_request_may_name(pair: Pair) -> None:
    rng = np.random.default_rng(11)
    listed = [(token, *rng.integers(5, 380, size=3).tolist()) for token in range(5, 380)]
    trie = CatalogTrie.build(listed)
    assert len(trie.children(0)) > 2 * MOST_CHILDREN
    asked = prompts(3, seed=11)
    same(pair, asked, [listed] * 3)
    for mine, theirs in zip(pair.vllm.generate(asked, trie, 9), pair.plain.generate(asked, trie, 9), strict=True):
        assert [g.item for g in mine] == [g.item for g in theirs]
        np.testing.assert_allclose([g.logprob for g in mine], [g.logprob for g in theirs], atol=NATS)


def test_an_adapter_merged_and_no_prefix_cache(merged: Pair) -> None:
    assert merged.vllm.fingerprint == merged.plain.fingerprint
    asked, listed = prompts(seed=7), items(merged)
    for _ in range(2):
        same(merged, asked, [listed] * 6)
    assert merged.vllm.counts.cached == 0
    trie = CatalogTrie.build(listed)
    assert [[g.item for g in answer] for answer in merged.vllm.generate(asked, trie, 5)] == [
        [g.item for g in answer] for answer in merged.plain.generate(asked, trie, 5)
    ]


# -- what goes wrong ---------------------------------------------------------------------------


def test_a_prompt_over_the_context_is_refused_and_one_token_less_is_not(pair: Pair) -> None:
    n = pair.vllm.context_length
    longest = [5] * 10
    (row,) = pair.vllm.score([of_length(pair, n - 10)], [[longest]])
    np.testing.assert_allclose(row, pair.plain.score([of_length(pair, n - 10)], [[longest]])[0], atol=NATS)
    with pytest.raises(DataError, match="1 over the model's context of 512"):
        pair.vllm.score([of_length(pair, n - 9)], [[longest]])


def test_adapters_that_would_kill_the_engine_are_refused(shared: Pair, base: Path, tmp_path: Path) -> None:
    wide = tiny.save_adapter(base, tmp_path / "wide", r=16)
    with pytest.raises(ModelError, match="has rank 16, and the engine was started for 8 at most"):
        shared.vllm.with_adapter(wide)
    same(shared, prompts(2), [items(shared)] * 2)


def test_a_request_that_vllm_refuses_leaves_the_engine_as_it_was(pair: Pair) -> None:
    runner = pair.vllm._runners.generating()
    good, bad = (Ask([5, 6], [token], 0, None, 0, 0) for token in (7, 999_999))
    with pytest.raises(ModelError, match=r"refused a request: .*999999"):
        runner.ask([good, bad, good])
    assert pair.vllm._runners.generating() is runner
    same(pair, prompts(2), [items(pair)] * 2)


def test_an_engine_without_room_for_adapters_says_so(pair: Pair, merged: Pair, adapters: list[Path]) -> None:
    with pytest.raises(ConfigError, match="takes no adapters"):
        pair.vllm.with_adapter(adapters[0])
    with pytest.raises(ConfigError, match="there is an adapter already"):
        merged.vllm.with_adapter(adapters[0])


def test_memory_that_is_not_there(base: Path) -> None:
    with pytest.raises(ModelError, match=r"(?s)out of memory: the engine did not start: ValueError.*kv_cache_gib"):
        load_engine(base, dtype="float32", backend="vllm", options={"kv_cache_gib": 100_000.0})


def test_a_model_that_vllm_cannot_run(tmp_path: Path) -> None:
    """Its attention on a CPU knows no heads of 8 dimensions, and says so with its death at the first request."""
    folder = tiny.save_model(tmp_path / "small", "byte")
    with pytest.raises(ModelError, match=r"(?s)the engine died .* unanswered: RuntimeError: .*head_dim=8"):
        load_engine(folder, dtype="float32", backend="vllm", options=SMALL)


@pytest.mark.parametrize("stopped", [False, True])
def test_a_dead_engine_in_mid_batch_is_an_error_and_the_next_call_starts_another(merged: Pair, stopped: bool) -> None:
    """It kills the engine's process while requests are sent, or, stopped, when all have been and answers are waited
    for.
    """
    core = merged.vllm._runners.generating()._llm.llm_engine.engine_core.resources.engine_manager.processes[0].pid

    def kill() -> None:
        time.sleep(1)
        os.kill(core, signal.SIGKILL)

    if stopped:
        os.kill(core, signal.SIGSTOP)
    killer = threading.Thread(target=kill)
    killer.start()
    rng = np.random.default_rng(0)
    n = 3 if stopped else 400
    many = [[rng.integers(5, 300, size=12).tolist() for _ in range(n)] for _ in range(20)]
    with pytest.raises(ModelError, match=r"the engine died with \d+ requests unanswered"):
        merged.vllm.score(["Heat"] * 20, many)
    killer.join()
    same(merged, prompts(2), [items(merged)] * 2)


@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_ranks_agree_in_bfloat16(base: Path, pair: Pair, dtype: Any) -> None:
    """Scores of 16 bits move with the layout of a batch; the order they give hardly does."""
    served = load_engine(base, dtype=dtype, backend="vllm", options=SMALL)
    asked, listed = prompts(seed=8), items(pair)
    got, want = served.score(asked, [listed] * 6), pair.plain.score(asked, [listed] * 6)
    served.close()
    assert np.mean([spearmanr(a, b).statistic for a, b in zip(got, want, strict=True)]) >= 0.99
