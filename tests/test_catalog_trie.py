"""The trie against a dictionary of prefixes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penchant.catalog_trie import CatalogTrie
from penchant.errors import DataError, StorageError

sequences = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5).map(tuple), min_size=1, max_size=14)


def paths(trie: CatalogTrie) -> list[tuple[int, ...]]:
    out: list[tuple[int, ...]] = [()]
    for node in range(1, trie.n_nodes):
        out.append((*out[int(trie.parent[node])], int(trie.token[node])))
    return out


@given(sequences)
def test_nodes_are_the_distinct_prefixes_in_depth_first_order(items: list[tuple[int, ...]]) -> None:
    trie = CatalogTrie.build(items)
    prefixes = sorted({item[:n] for item in items for n in range(len(item) + 1)})
    assert paths(trie) == prefixes
    assert trie.depth.tolist() == [len(p) for p in prefixes]
    for node, path in enumerate(prefixes):
        below = [n for n, p in enumerate(prefixes) if p[: len(path)] == path]
        assert (below[0], below[-1] + 1) == (node, int(trie.end[node]))
        assert [prefixes[c] for c in trie.children(node)] == [
            p for p in prefixes if len(p) == len(path) + 1 and p[:-1] == path
        ]


@given(sequences, st.data())
def test_items_below_and_children_agree_with_brute_force(items: list[tuple[int, ...]], data: st.DataObject) -> None:
    trie = CatalogTrie.build(items)
    for node, path in enumerate(paths(trie)):
        assert trie.ending_at(node).tolist() == [i for i, item in enumerate(items) if item == path]
        below = trie.item_order[trie.first_item[node] : trie.last_item[node]]
        assert sorted(below.tolist()) == [i for i, item in enumerate(items) if item[: len(path)] == path]
    for i, item in enumerate(items):
        assert tuple(trie.sequence(i)) == item
    nodes = np.array(data.draw(st.lists(st.integers(0, trie.n_nodes - 1), max_size=6)), dtype=np.int64)
    position, child = trie.children_of(nodes)
    assert [(int(p), int(c)) for p, c in zip(position, child, strict=True)] == [
        (p, int(c)) for p, node in enumerate(nodes) for c in trie.children(int(node))
    ]


@given(sequences, st.lists(st.tuples(st.integers(0, 40), st.integers(0, 4)), max_size=20))
def test_a_step_leads_where_a_dictionary_says(items: list[tuple[int, ...]], asked: list[tuple[int, int]]) -> None:
    trie = CatalogTrie.build(items)
    known = {path: node for node, path in enumerate(paths(trie))}
    where = paths(trie)
    asked = [(node % trie.n_nodes, token) for node, token in asked]
    got = trie.step(np.array([n for n, _ in asked], dtype=np.int64), np.array([t for _, t in asked], dtype=np.int64))
    assert got.tolist() == [known.get((*where[node], token), -1) for node, token in asked]


def test_removed_items_are_marked_and_everything_else_is_shared() -> None:
    trie = CatalogTrie.build([(1, 2), (1, 3), (4,)])
    fewer = trie.without([1])
    assert fewer.alive.tolist() == [True, False, True]
    assert trie.alive.all()
    assert fewer.token is trie.token


def test_equal_titles_share_a_node_in_catalogue_order() -> None:
    trie = CatalogTrie.build([(5, 1), (2,), (5, 1), (5,)])
    assert trie.ending_at(int(trie.item_node[0])).tolist() == [0, 2]
    assert trie.n_nodes == 4


def test_saved_and_memory_mapped_it_is_the_same(tmp_path: Path) -> None:
    items = [(1, 2, 3), (1, 2), (4,)]
    CatalogTrie.build(items).save(tmp_path / "trie")
    loaded = CatalogTrie.load(tmp_path / "trie")
    assert [tuple(loaded.sequence(i)) for i in range(3)] == items
    assert isinstance(loaded.token, np.memmap)
    (tmp_path / "trie" / "child.npy").write_bytes(b"torn")
    with pytest.raises(StorageError, match=r"child\.npy"):
        CatalogTrie.load(tmp_path / "trie")


@pytest.mark.parametrize("items", [[], [(1,), ()]])
def test_an_item_without_tokens_is_refused(items: list[tuple[int, ...]]) -> None:
    with pytest.raises(DataError):
        CatalogTrie.build(items)
