"""What to ask behind a prompt: against an engine of blocks that knows no log-probability of what it had cached."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.blocks import Blocks, logprob

from penchant.catalog_trie import CatalogTrie
from penchant.engine.asking import MOST_CHILDREN, Known
from penchant.engine.base import Generation
from penchant.engine.search import Beams, BestFirst

sequences = st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=9), min_size=1, max_size=12)


def expected(prompt: Sequence[int], sequence: Sequence[int]) -> float:
    return sum(logprob([*prompt, *sequence[:j]], sequence[j]) for j in range(len(sequence)))


def scores(blocks: Blocks, prompt: list[int], trie: CatalogTrie) -> np.ndarray:
    known = Known(prompt, trie)
    blocks.teach(known, known.everything())
    blocks.teach(known, known.rest(deep=True))
    blocks.teach(known, known.rest(deep=False))
    return trie.path_sums(known.edges())[trie.item_node]


@settings(max_examples=200)
@given(
    items=sequences, prompts=st.lists(st.integers(1, 20), min_size=1, max_size=4), block=st.sampled_from([1, 2, 4, 8])
)
def test_every_edge_is_learnt_whatever_is_cached(items: list[list[int]], prompts: list[int], block: int) -> None:
    """Prompts that begin each other, at and around a block's edge; candidates twice, and those that begin others."""
    blocks = Blocks(block)
    trie = CatalogTrie.build(items)
    for length in [*prompts, *prompts]:
        prompt = [7] * length
        want = [expected(prompt, item) for item in items]
        np.testing.assert_allclose(scores(blocks, prompt, trie), want, atol=1e-9)


@settings(max_examples=100)
@given(items=sequences, length=st.integers(1, 20), block=st.sampled_from([1, 2, 4, 8]), deep=st.booleans())
def test_a_search_ends_with_the_best_whatever_is_cached(
    items: list[list[int]], length: int, block: int, deep: bool
) -> None:
    blocks, prompt, trie = Blocks(block), [7] * length, CatalogTrie.build(items)
    want = np.sort([expected(prompt, item) for item in items])[::-1][:3]

    def search() -> list[Generation]:
        known, best = Known(prompt, trie), BestFirst(trie, 3)
        while nodes := best.take(2):
            for node in nodes:
                for _ in range(3):
                    if not known.complete(node):
                        blocks.teach(known, known.next(node, deep=deep))
                best.feed(node, known.children(node))
        return best.result()

    for _ in range(2):
        np.testing.assert_allclose([g.logprob for g in search()], want, atol=1e-9)


def test_a_fresh_prompt_costs_one_request_a_candidate_and_itself_once() -> None:
    """40 tokens, blocks of 8, candidates of 4 tokens: a request for each, which runs the 3 before the last."""
    blocks = Blocks(8)
    items = [[t, 1, 2, 3] for t in range(20, 30)]
    scores(blocks, [7] * 40, CatalogTrie.build(items))
    assert len(blocks.asks) == 11
    assert blocks.run == 40 + 10 * 3


def test_the_same_candidates_again_run_the_prompt_once_more_not_once_a_candidate() -> None:
    """35 of 40 tokens are in blocks of 8 with the candidates' first 5: none of those are told the second time."""
    blocks = Blocks(8)
    items = [[t, *range(1, 10)] for t in range(20, 30)]
    trie = CatalogTrie.build(items)
    scores(blocks, [7] * 35, trie)
    once, asked = blocks.run, len(blocks.asks)
    scores(blocks, [7] * 35, trie)
    assert blocks.run - once < 2 * once
    assert len(blocks.asks) - asked <= 2 * asked


def test_labels_are_one_request_without_a_path() -> None:
    blocks = Blocks(8)
    scores(blocks, [7] * 9, CatalogTrie.build([[1], [2]]))
    assert [(ask.tokens, ask.path) for ask in blocks.asks] == [([1, 2], 0)]


@pytest.mark.parametrize("children", [MOST_CHILDREN, MOST_CHILDREN + 1, 3 * MOST_CHILDREN - 1])
def test_many_children_are_asked_for_in_parts(children: int) -> None:
    blocks = Blocks(8)
    items = [[t, 1] for t in range(10, 10 + children)]
    got = scores(blocks, [7], CatalogTrie.build(items))
    np.testing.assert_allclose(got, [expected([7], item) for item in items], atol=1e-9)
    assert sum(ask.node == 0 for ask in blocks.asks) == -(-children // MOST_CHILDREN)


def test_the_chain_of_a_title_is_one_request() -> None:
    blocks, trie = Blocks(64), CatalogTrie.build([list(range(1, 12)), [1, 30]])
    known = Known([7, 7], trie)
    blocks.teach(known, known.next(0, deep=True))
    assert known.complete(0)
    after = int(trie.children(1)[0])
    blocks.teach(known, known.next(after, deep=True))
    assert known.complete(after)
    assert not np.isnan(known.edges()[after:]).all()
    assert len(blocks.asks) == 2


@pytest.mark.parametrize(
    ("allowed", "bonus"),
    [([True, False, True], None), ([True, False, False], [-0.5, 0.0, 0.0])],
)
def test_beams_end_where_an_item_begins_one_that_is_hidden(allowed: list[bool], bonus: list[float] | None) -> None:
    trie = CatalogTrie.build([[1], [1, 2], [3]])
    search = Beams(trie, 2, 1, np.array(allowed), None if bonus is None else np.array(bonus))
    for _ in range(5):
        nodes = search.take(8)
        for node in nodes:
            search.feed(node, np.full(len(trie.children(node)), -1.0))
    assert nodes == []
    assert 0 in [one.item for one in search.result()]
