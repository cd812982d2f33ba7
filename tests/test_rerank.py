"""Variety, caps and titles, by brute force and by hand."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penchant.errors import ConfigError
from penchant.rerank import Rules

ITEMS = pl.DataFrame(
    {
        "item_id": [str(i) for i in range(8)],
        "title": ["A", "B", "a ", "C", "D", "B", "E", "F"],
        "genres": ["x|y", "x", "x", "y", None, "", "y|z", "z"],
        "year": ["1990", "1990", "1990", "1991", "1991", "1992", "1992", "1992"],
    }
)
ORDER = [3, 0, 2, 1, 5, 4, 6, 7]


def chosen(k: int, vectors: np.ndarray | None = None, **rules: object) -> list[int]:
    made = Rules.of(ITEMS, **rules)  # type: ignore[arg-type]
    return [ORDER[place] for place in made.choose(ORDER, vectors, k)]


def test_without_rules_the_order_stays() -> None:
    assert chosen(8, unique=False) == ORDER
    assert chosen(3, unique=False) == ORDER[:3]
    assert Rules.of(ITEMS, caps={"genres": 1}).pool(3) == 3
    assert Rules.of(ITEMS, diversity=0.1).pool(3) == 100


def test_a_title_comes_once_whatever_its_case() -> None:
    assert chosen(8) == [3, 0, 1, 4, 6, 7]  # 2 is the A again, 5 the B


def test_a_value_is_the_same_with_blanks_around_it_and_counts_once() -> None:
    items = pl.DataFrame({"item_id": list("abcd"), "title": list("ABCD")})
    items = items.with_columns(genres=pl.Series(["Comedy | Drama", "Drama", "Comedy|Comedy", "War"]))
    made = Rules.of(items, caps={"genres": 1})
    assert made.choose([0, 1, 2, 3], None, 4) == [0, 3]
    made = Rules.of(items, caps={"genres": 2})
    assert made.choose([2, 0, 1, 3], None, 4) == [0, 1, 2, 3]


def test_caps_by_hand() -> None:
    # Every label of an item counts, and an item without one is capped by nothing.
    assert chosen(8, caps={"genres": 1}, unique=False) == [3, 2, 5, 4, 7]
    assert chosen(8, caps={"genres": 2}, unique=False) == [3, 0, 2, 5, 4, 7]
    assert chosen(8, caps={"genres": 2, "year": 1}, unique=False) == [3, 0, 5]


@settings(max_examples=100)
@given(seed=st.integers(0, 2**16), n=st.integers(1, 12), k=st.integers(1, 14), diversity=st.floats(0, 1))
def test_maximal_marginal_relevance_by_plain_loops(seed: int, n: int, k: int, diversity: float) -> None:
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((n, 3)).astype(np.float32)
    items = pl.DataFrame({"item_id": [str(i) for i in range(n)], "title": [f"t{i}" for i in range(n)]})
    got = Rules.of(items, diversity=diversity).choose(list(range(n)), vectors, k)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    left, expected = list(range(n)), []
    while left and len(expected) < k:
        values = []
        for i in left:
            likeness = max((float(unit[i] @ unit[j]) for j in expected), default=-1.0)
            values.append((1 - diversity) * (1 - i / n) - diversity * (likeness if diversity else 0.0))
        best = int(np.argmax(values))
        near = [i for i, v in zip(left, values, strict=True) if abs(v - values[best]) < 1e-5]
        if got[len(expected)] not in near:
            pytest.fail(f"{got} where one of {near} belongs after {expected}")
        expected.append(got[len(expected)])
        left.remove(expected[-1])
    assert got == expected


def test_variety_grows_with_diversity() -> None:
    rng = np.random.default_rng(0)
    groups = rng.standard_normal((4, 8))
    vectors = (groups[np.repeat(np.arange(4), 10)] + 0.05 * rng.standard_normal((40, 8))).astype(np.float32)
    items = pl.DataFrame({"item_id": [str(i) for i in range(40)], "title": [f"t{i}" for i in range(40)]})
    found = []
    for diversity in (0.0, 0.3, 0.9):
        places = Rules.of(items, diversity=diversity).choose(list(range(40)), vectors, 4)
        found.append(len({place // 10 for place in places}))
    assert found[0] == 1
    assert found[-1] == 4
    assert found == sorted(found)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"diversity": 1.1}, "diversity is"),
        ({"caps": {"colour": 1}}, "no column"),
        ({"caps": {"genres": 0}}, "cap of"),
        ({"caps": {"genres": "2"}}, "cap of 'genres' is '2'"),
    ],
)
def test_rules_that_cannot_be_kept_are_refused(rules: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Rules.of(ITEMS, **rules)  # type: ignore[arg-type]
