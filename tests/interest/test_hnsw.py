"""Search through the graph against exact search: what it finds, what it must never return, and what is kept of it."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.interest.test_index import expected, is_mapped, poisoned, whole_numbers
from tests.interest.test_top import paired

from penchant.errors import ConfigError, DataError, ModelError, StorageError
from penchant.interest.hnsw import HNSWConfig, HNSWIndex
from penchant.interest.index import ExactIndex

# Small graphs that are walked whatever a filter leaves.
GRAPH = HNSWConfig(m=16, ef_construction=100, ef_search=100, exact_share=0)


def clustered(rng: np.random.Generator, n: int, d: int = 16, clusters: int = 40) -> np.ndarray:
    centres = np.random.default_rng(1).standard_normal((clusters, d))
    return (centres[rng.integers(clusters, size=n)] + 0.4 * rng.standard_normal((n, d))).astype(np.float32)


def share_found(got: np.ndarray, best: np.ndarray) -> float:
    return float(np.mean([np.isin(b[b >= 0], g).mean() for g, b in zip(got, best, strict=True)]))


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    return clustered(np.random.default_rng(0), 2_000)


@pytest.fixture(scope="module")
def built(vectors: np.ndarray) -> HNSWIndex:
    """Not to be changed."""
    return HNSWIndex(vectors, HNSWConfig(ef_search=60), model="abc")


@pytest.fixture
def queries(rng: np.random.Generator) -> np.ndarray:
    return clustered(rng, 30)


def test_it_finds_nearly_all_of_the_exact_best_with_their_scores(
    built: HNSWIndex, vectors: np.ndarray, queries: np.ndarray
) -> None:
    items, values = built.search(queries, 20)
    best, scores = ExactIndex(vectors).search(queries, 20)
    assert share_found(items, best) > 0.95
    assert built.recall(queries, 20) == pytest.approx(share_found(items, best))
    assert built.measured == {"recall": built.recall(queries, 20), "k": 20, "queries": 30}
    np.testing.assert_allclose(values, np.take_along_axis(queries @ vectors.T, items, axis=1), rtol=1e-5)
    assert (np.diff(values) <= 0).all()
    same = (items == best).all(axis=1)
    np.testing.assert_allclose(values[same], scores[same], rtol=1e-5)


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), m=st.integers(0, 60), k=st.integers(1, 70), share=st.floats(0, 1))
def test_a_graph_that_is_walked_whole_answers_as_a_full_sort(seed: int, m: int, k: int, share: float) -> None:
    """With ties, filters, exclusion and more asked than is left: what the walk misses is searched exactly."""
    rng = np.random.default_rng(seed)
    queries, vectors = whole_numbers(rng, 3, 4), whole_numbers(rng, m, 4)
    exclude = [rng.integers(m, size=i) for i in range(3)] if m and seed % 2 else None
    allowed = rng.random(m) < share if seed % 3 else None
    index = HNSWIndex(vectors, HNSWConfig(exact_share=share, ef_search=200))
    items, values = index.search(queries, k, exclude=exclude, allowed=allowed)
    wanted = expected(queries, vectors, k, exclude, allowed)
    # Of items with equal scores at the end of the list the walk may take others than exact search.
    assert values.tolist() == [[score for _, score in row] for row in wanted]
    for i, row in enumerate(paired(items, values)):
        assert row == sorted(row, key=lambda pair: (-pair[1], pair[0] if pair[0] >= 0 else math.inf))
        found = [item for item, _ in row if item >= 0]
        assert len(set(found)) == len(found)
        assert [float(vectors[item] @ queries[i]) for item in found] == [score for _, score in row[: len(found)]]
        assert allowed is None or allowed[found].all()
        assert exclude is None or not np.isin(found, exclude[i]).any()


@pytest.mark.parametrize("share", [0.0, 0.02, 0.4, 0.9])
@pytest.mark.parametrize("config", [GRAPH, HNSWConfig()])
def test_filters_are_never_violated_and_cost_no_answers(
    config: HNSWConfig, share: float, vectors: np.ndarray, queries: np.ndarray, rng: np.random.Generator
) -> None:
    allowed = rng.random(len(vectors)) < share
    # The seen ones are the best there are.
    exclude = list(ExactIndex(vectors).search(queries, 100)[0][:, : 1 + 10 * rng.integers(10)])
    index = HNSWIndex(vectors, config)
    for out in (None, exclude):
        items, _ = index.search(queries, 30, exclude=out, allowed=allowed)
        best, _ = ExactIndex(vectors).search(queries, 30, exclude=out, allowed=allowed)
        assert allowed[items[items >= 0]].all()
        assert ((items >= 0) == (best >= 0)).all()
        assert out is None or not any(np.isin(i, o).any() for i, o in zip(items, out, strict=True))
        if share:
            assert share_found(items, best) > 0.9


def test_few_allowed_items_are_searched_exactly(
    built: HNSWIndex, vectors: np.ndarray, queries: np.ndarray, rng: np.random.Generator
) -> None:
    allowed = rng.random(len(vectors)) < 0.2
    got, best = (i.search(queries, 50, allowed=allowed) for i in (built, ExactIndex(vectors)))
    assert paired(*got) == paired(*best)


def test_added_replaced_and_deleted_it_answers_as_an_index_built_anew(queries: np.ndarray) -> None:
    rng = np.random.default_rng(5)
    kept = clustered(rng, 500)
    index = HNSWIndex(kept, GRAPH)
    index.recall(queries, 5)
    new = 3 * clustered(rng, 60)  # larger than what the graph was scaled to
    assert index.add(new) == 500
    assert index.measured is None
    kept = np.concatenate([kept, new])
    for _ in range(2):  # replaced twice, the items have two dead rows
        at = rng.choice(np.arange(100, 560), size=200, replace=False)
        other = clustered(rng, 200)
        index.replace(at, other)
        kept[at] = other
    index.delete(np.arange(100))
    left = np.arange(560) >= 100
    assert (index.n_items, len(index)) == (560, 460)
    assert (index.vectors == kept).all()
    items, _ = index.search(queries, 20)
    best, scores = ExactIndex(kept).search(queries, 20, allowed=left)
    assert left[items[items >= 0]].all()
    assert share_found(items, best) > 0.95
    items, values = index.search(queries, 600)
    assert ((items >= 0).sum(axis=1) == 460).all()
    np.testing.assert_allclose(values[:, :20], scores, rtol=1e-5)
    excluded, _ = index.search(queries, 20, exclude=list(best))
    assert not any(np.isin(i, b).any() for i, b in zip(excluded, best, strict=True))


def test_vectors_of_any_scale_keep_their_order(vectors: np.ndarray, queries: np.ndarray) -> None:
    """Half precision holds neither of these as they are."""
    best, _ = ExactIndex(vectors).search(queries, 20)
    for scale in (1e-30, 1e15):
        index = HNSWIndex(vectors * np.float32(scale), HNSWConfig(ef_search=60))
        assert share_found(index.search(queries, 20)[0], best) > 0.95


@pytest.mark.parametrize("mapped", [True, False])
def test_what_was_saved_is_loaded_and_can_grow(
    vectors: np.ndarray, queries: np.ndarray, tmp_path: Path, mapped: bool
) -> None:
    index = HNSWIndex(vectors[:500], GRAPH, model="abc")
    index.replace(np.array([5, 6]), vectors[500:502])
    index.delete(np.array([3]))
    recall = index.recall(queries, 10)
    index.save(tmp_path / "index")
    loaded = HNSWIndex.load(tmp_path / "index", model="abc", mmap=mapped)
    assert is_mapped(loaded.vectors) == mapped
    assert (loaded.config, loaded.model, loaded.n_items, len(loaded)) == (GRAPH, "abc", 500, 499)
    assert loaded.measured == {"recall": recall, "k": 10, "queries": 30}
    assert paired(*loaded.search(queries, 10)) == paired(*index.search(queries, 10))
    for i in (index, loaded):
        assert i.add(vectors[600:650]) == 500
        i.delete(np.array([4]))
    assert share_found(loaded.search(queries, 10)[0], loaded.exact.search(queries, 10)[0]) > 0.9
    assert ((loaded.search(queries, 10)[0] == index.search(queries, 10)[0]).mean()) > 0.9


@pytest.mark.parametrize("name", ["vectors.npy", "graph.faiss", "item.npy"])
def test_a_torn_file_is_named(built: HNSWIndex, tmp_path: Path, name: str) -> None:
    built.save(tmp_path / "index")
    path = tmp_path / "index" / name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(StorageError, match=f"{name}: is corrupt"):
        HNSWIndex.load(tmp_path / "index", model="abc")


def test_another_models_index_and_another_kind_are_refused(built: HNSWIndex, tmp_path: Path) -> None:
    built.save(tmp_path / "index")
    with pytest.raises(ModelError, match="vectors of the model abc, and the queries come from xyz"):
        HNSWIndex.load(tmp_path / "index", model="xyz")
    with pytest.raises(StorageError, match="'hnsw' of format 1, not 'exact'"):
        ExactIndex.load(tmp_path / "index", model="abc")
    path = tmp_path / "index" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"config": {"m": 0}}))
    with pytest.raises(StorageError, match="its manifest cannot be read"):
        HNSWIndex.load(tmp_path / "index", model="abc")


def test_what_is_not_finite_or_does_not_fit_is_refused_and_changes_nothing(queries: np.ndarray) -> None:
    with pytest.raises(DataError, match="the vector of item 3 is not finite"):
        HNSWIndex(poisoned(4, math.nan))
    index = HNSWIndex(np.ones((5, 3), dtype=np.float32), GRAPH)
    index.delete(np.array([2]))
    for call, says in (
        (lambda: index.add(poisoned(2, math.nan)), "the vector of item 6 is not finite"),
        (lambda: index.replace(np.array([0, 4]), poisoned(2, math.inf)), "the vector of item 4 is not finite"),
        (lambda: index.replace(np.array([2]), np.ones((1, 3))), "item 2 was deleted"),
        (lambda: index.delete(np.array([2])), "item 2 was deleted"),
        (lambda: index.search(poisoned(2, math.nan), 1), "query 1 is not finite"),
        (lambda: index.search(queries, 1), "for items of 3 dimensions"),
        (lambda: index.search(np.ones((1, 3)), 1, allowed=np.ones(4, dtype=bool)), "a filter bool of shape"),
        (lambda: index.search(np.ones((1, 3)), 1, exclude=[np.array([9])]), "there is no item 9"),
    ):
        with pytest.raises(DataError, match=says):
            call()
    assert index.search(np.ones((1, 3), np.float32), 9)[0].tolist() == [[0, 1, 3, 4, -1, -1, -1, -1, -1]]


def test_without_faiss_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ConfigError, match=r"pip install 'penchant\[faiss\]'"):
        HNSWIndex(np.ones((2, 3), np.float32))
