"""Exact search against a full sort in plain Python."""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.interest.test_top import Answer, full_sort, paired

from penchant.errors import ConfigError, DataError, ModelError, StorageError
from penchant.interest import index as module
from penchant.interest.index import ExactIndex


def expected(
    queries: np.ndarray,
    vectors: np.ndarray,
    k: int,
    exclude: list[np.ndarray] | None = None,
    allowed: np.ndarray | None = None,
) -> list[Answer]:
    """A full sort of the dot products, each summed in plain Python."""
    out = []
    for i, query in enumerate(queries):
        scores = [float(sum(float(a) * float(b) for a, b in zip(query, v, strict=True))) for v in vectors]
        for j in range(len(vectors)):
            if (exclude is not None and j in exclude[i]) or (allowed is not None and not allowed[j]):
                scores[j] = -math.inf
        out.append(full_sort(scores, k))
    return out


def whole_numbers(rng: np.random.Generator, n: int, d: int) -> np.ndarray:
    """Small whole numbers: their products are exact in float32, and ties are many."""
    return rng.integers(-2, 3, size=(n, d)).astype(np.float32)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 7),
    m=st.integers(1, 20),
    k=st.integers(1, 25),
    filtered=st.booleans(),
    masked=st.booleans(),
)
def test_search_is_a_full_sort_of_dot_products(seed: int, n: int, m: int, k: int, filtered: bool, masked: bool) -> None:
    rng = np.random.default_rng(seed)
    queries, vectors = whole_numbers(rng, n, 4), whole_numbers(rng, m, 4)
    allowed = rng.random(m) < 0.5 if filtered else None
    exclude = [rng.integers(m, size=rng.integers(0, m + 1)) for _ in range(n)] if masked else None
    got = ExactIndex(vectors).search(queries, k, exclude=exclude, allowed=allowed)
    assert paired(*got) == expected(queries, vectors, k, exclude, allowed)


@pytest.mark.parametrize("left", [0, 1, 9, 10, 11])
def test_a_filter_that_leaves_few_items_gives_those_and_padding(left: int, rng: np.random.Generator) -> None:
    queries, vectors = whole_numbers(rng, 3, 4), whole_numbers(rng, 40, 4)
    allowed = np.zeros(40, dtype=bool)
    allowed[rng.choice(40, size=left, replace=False)] = True
    items, values = ExactIndex(vectors).search(queries, 10, allowed=allowed)
    assert paired(items, values) == expected(queries, vectors, 10, None, allowed)
    assert ((items >= 0).sum(axis=1) == min(left, 10)).all()
    assert allowed[items[items >= 0]].all()


@pytest.mark.parametrize("per_block", [1, 2, 3, 5])
def test_blocks_of_queries_give_the_same_answer(
    per_block: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries, vectors = whole_numbers(rng, 7, 4), whole_numbers(rng, 12, 4)
    exclude = [rng.choice(12, size=i, replace=False) for i in range(7)]  # each query its own
    allowed = rng.random(12) < 0.8
    monkeypatch.setattr(module, "_BLOCK", per_block * 12)
    monkeypatch.setattr(module, "_QUERIES", per_block)
    got = ExactIndex(vectors).search(queries, 5, exclude=exclude, allowed=allowed)
    assert paired(*got) == expected(queries, vectors, 5, exclude, allowed)


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), block=st.integers(1, 60), k=st.integers(1, 25), share=st.floats(0, 1))
def test_blocks_of_items_give_the_same_answer(seed: int, block: int, k: int, share: float) -> None:
    """Ties across blocks too; of a small share the vectors are gathered, of a large one the others are masked."""
    rng = np.random.default_rng(seed)
    queries, vectors = whole_numbers(rng, 3, 4), whole_numbers(rng, 20, 4)
    exclude = [rng.integers(20, size=i) for i in range(3)]
    allowed = rng.random(20) < share
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK", block)
        got = ExactIndex(vectors).search(queries, k, exclude=exclude, allowed=allowed)
    assert paired(*got) == expected(queries, vectors, k, exclude, allowed)


def test_a_query_with_everything_excluded_gets_padding_and_others_do_not_notice() -> None:
    vectors = np.eye(3, dtype=np.float32)
    items, values = ExactIndex(vectors).search(vectors[:2], 2, exclude=[np.arange(3), np.array([1])])
    assert items.tolist() == [[-1, -1], [0, 2]]
    assert values[0].tolist() == [-math.inf, -math.inf]


def test_nobody_asks() -> None:
    items, values = ExactIndex(np.eye(3, dtype=np.float32)).search(np.zeros((0, 3), dtype=np.float32), 5)
    assert items.shape == values.shape == (0, 5)


def test_searching_changes_neither_vectors_nor_queries(rng: np.random.Generator) -> None:
    queries, vectors = whole_numbers(rng, 3, 4), whole_numbers(rng, 6, 4)
    before = queries.copy(), vectors.copy()
    index = ExactIndex(vectors)
    index.search(queries, 2, exclude=[np.array([0])] * 3, allowed=np.arange(6) > 2)
    assert (queries == before[0]).all()
    assert (index.vectors == before[1]).all()


def test_the_worked_dot_product() -> None:
    interest = np.array([[0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0]], dtype=np.float32)
    item = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0, 0, 0, 0, 0], dtype=np.float32)
    # .81 + .64 + .49 + .36 + .25
    items, values = ExactIndex(np.stack([np.zeros(10, dtype=np.float32), item])).search(interest, 1)
    assert items.tolist() == [[1]]
    assert values[0, 0] == pytest.approx(2.55, abs=1e-6)


# -- changing ------------------------------------------------------------------------------------


def test_added_replaced_and_deleted_it_answers_as_an_index_built_anew(rng: np.random.Generator) -> None:
    vectors, queries = whole_numbers(rng, 30, 4), whole_numbers(rng, 5, 4)
    given, kept = vectors.copy(), vectors.copy()
    index = ExactIndex(given)
    for step in range(4):
        new, other = whole_numbers(rng, 1 + 7 * step, 4), whole_numbers(rng, 3, 4)
        assert index.add(new) == len(kept)
        kept = np.concatenate([kept, new])
        at = rng.choice(np.arange(20, len(kept)), size=3, replace=False)
        index.replace(at, other)
        kept[at] = other
        index.delete(np.array([step, 10 + step]))
        left = np.ones(len(kept), dtype=bool)
        left[[*range(step + 1), *range(10, 11 + step)]] = False
        assert (index.n_items, len(index)) == (len(kept), left.sum())
        assert (index.vectors == kept).all()
        assert paired(*index.search(queries, 40)) == expected(queries, kept, 40, None, left)
    assert (given == vectors).all()  # the caller's array is not written to


def test_a_deleted_item_is_not_returned_even_where_it_is_allowed() -> None:
    index = ExactIndex(np.eye(3, dtype=np.float32))
    index.delete(np.array([1]))
    items, _ = index.search(np.ones((1, 3), np.float32), 3, allowed=np.ones(3, dtype=bool))
    assert items.tolist() == [[0, 2, -1]]
    assert index.add(np.ones((1, 3), np.float32)) == 3  # and its index is not used again


# -- bad input -----------------------------------------------------------------------------------


def poisoned(n: int, value: float) -> np.ndarray:
    vectors = np.ones((n, 3), dtype=np.float64)
    vectors[n - 1, 1] = value
    return vectors


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300])
def test_a_vector_that_is_not_finite_is_refused_by_its_item(value: float) -> None:
    with pytest.raises(DataError, match="the vector of item 3 is not finite"):
        ExactIndex(poisoned(4, value))
    index = ExactIndex(np.ones((5, 3), dtype=np.float32))
    with pytest.raises(DataError, match="the vector of item 6 is not finite"):
        index.add(poisoned(2, value))
    with pytest.raises(DataError, match="the vector of item 4 is not finite"):
        index.replace(np.array([0, 4]), poisoned(2, value))
    assert (index.vectors == 1).all()
    with pytest.raises(DataError, match="query 1 is not finite"):
        index.search(poisoned(2, value), 1)


ONE = np.ones((1, 3), dtype=np.float32)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda i: i.search(np.ones((1, 4), np.float32), 1), DataError, r"shape \(1, 4\) for items of 3 dimensions"),
        (lambda i: i.search(np.ones(3, np.float32), 1), DataError, "for items of 3 dimensions"),
        (lambda i: i.search(ONE, 0), ConfigError, "k is 0"),
        (lambda i: i.search(ONE, 1, allowed=np.ones(4, dtype=bool)), DataError, "a filter bool of shape"),
        (lambda i: i.search(ONE, 1, allowed=np.ones(5)), DataError, "a filter float64 of shape"),
        (lambda i: i.search(ONE, 1, exclude=[]), DataError, "0 lists of items to exclude for 1 queries"),
        (lambda i: i.search(ONE, 1, exclude=[np.array([0, 5])]), DataError, "exclude: there is no item 5"),
        (lambda i: i.search(ONE, 1, exclude=[np.array([-1])]), DataError, "exclude: there is no item -1"),
        (lambda i: i.add(np.ones((2, 4), np.float32)), DataError, r"shape \(2, 4\), and not \(2, 3\)"),
        (lambda i: i.replace(np.array([0, 1]), ONE), DataError, r"shape \(1, 3\), and not \(2, 3\)"),
        (lambda i: i.replace(np.array([5]), ONE), DataError, "there is no item 5"),
        (lambda i: i.replace(np.array([1, 1]), np.ones((2, 3))), DataError, "named twice"),
        (lambda i: i.replace(np.array([2]), ONE), DataError, "item 2 was deleted"),
        (lambda i: i.delete(np.array([2])), DataError, "item 2 was deleted"),
        (lambda i: i.delete(np.array([-1])), DataError, "there is no item -1"),
    ],
)
def test_what_does_not_fit_is_one_clear_error(
    call: Callable[[ExactIndex], Any], error: type[Exception], says: str
) -> None:
    index = ExactIndex(np.ones((5, 3), dtype=np.float32))
    index.delete(np.array([2]))
    with pytest.raises(error, match=says):
        call(index)
    assert (index.n_items, len(index)) == (5, 4)


def test_vectors_are_a_matrix() -> None:
    with pytest.raises(DataError, match=r"vectors of shape \(3,\)"):
        ExactIndex(np.ones(3, dtype=np.float32))


# -- saving --------------------------------------------------------------------------------------


def is_mapped(array: np.ndarray | None) -> bool:
    """Whether an array reads from a file, through whatever views."""
    while isinstance(array, np.ndarray):
        array = array.base
    return isinstance(array, mmap.mmap)


@pytest.fixture
def saved(rng: np.random.Generator, tmp_path: Path) -> tuple[ExactIndex, Path]:
    index = ExactIndex(whole_numbers(rng, 20, 4), model="abc")
    index.delete(np.array([3, 7]))
    index.save(tmp_path / "index")
    return index, tmp_path / "index"


@pytest.mark.parametrize("mapped", [True, False])
def test_what_was_saved_is_loaded(saved: tuple[ExactIndex, Path], mapped: bool, rng: np.random.Generator) -> None:
    index, folder = saved
    loaded = ExactIndex.load(folder, model="abc", mmap=mapped)
    assert is_mapped(loaded.vectors) == mapped
    assert (loaded.model, loaded.n_items, len(loaded)) == ("abc", 20, 18)
    queries = whole_numbers(rng, 3, 4)
    assert paired(*loaded.search(queries, 20)) == paired(*index.search(queries, 20))


@pytest.mark.parametrize("change", ["add", "replace"])
def test_mapped_vectors_are_copied_when_they_change(
    saved: tuple[ExactIndex, Path], change: str, rng: np.random.Generator
) -> None:
    index, folder = saved
    before = (folder / "vectors.npy").read_bytes()
    loaded = ExactIndex.load(folder, model="abc")
    loaded.delete(np.array([0]))
    assert is_mapped(loaded.vectors)
    for i in (index, loaded):
        i.add(ONE[:, :1] * np.arange(4)) if change == "add" else i.replace(np.array([5]), np.ones((1, 4)))
    index.delete(np.array([0]))
    assert not is_mapped(loaded.vectors)
    assert (folder / "vectors.npy").read_bytes() == before
    queries = whole_numbers(rng, 3, 4)
    assert paired(*loaded.search(queries, 20)) == paired(*index.search(queries, 20))
    loaded.save(folder)  # over the files it came from
    assert (ExactIndex.load(folder, model="abc").vectors == loaded.vectors).all()


def test_an_index_of_another_model_is_refused(saved: tuple[ExactIndex, Path]) -> None:
    with pytest.raises(ModelError, match="vectors of the model abc, and the queries come from xyz"):
        ExactIndex.load(saved[1], model="xyz")


def test_an_index_that_names_no_model_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="which model made its vectors"):
        ExactIndex(ONE).save(tmp_path / "index")
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize("name", ["vectors.npy", "live.npy", "manifest.json"])
@pytest.mark.parametrize("torn", [True, False])
def test_a_torn_or_missing_file_is_named(saved: tuple[ExactIndex, Path], name: str, torn: bool) -> None:
    path = saved[1] / name
    path.write_bytes(path.read_bytes()[:-20]) if torn else path.unlink()
    with pytest.raises(StorageError, match=name):
        ExactIndex.load(saved[1], model="abc")


def test_a_folder_that_is_no_index_is_refused_and_not_replaced(saved: tuple[ExactIndex, Path]) -> None:
    index, folder = saved
    with pytest.raises(StorageError, match="no such index"):
        ExactIndex.load(folder / "nowhere", model="abc")
    other = folder.parent / "other"
    other.mkdir()
    (other / "manifest.json").write_text("{}")
    with pytest.raises(StorageError, match="is not an index"):
        ExactIndex.load(other, model="abc")
    for path in (other, other / "manifest.json"):
        with pytest.raises(StorageError, match="holds something that is no index"):
            index.save(path)
    assert (other / "manifest.json").read_text() == "{}"
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"index": "hnsw"}))
    with pytest.raises(StorageError, match="'hnsw' of format 1, not 'exact'"):
        ExactIndex.load(folder, model="abc")
