"""Filters: what a condition means, that it is never a pattern or a program, and which items a mask leaves."""

from __future__ import annotations

import math

import numpy as np
import polars as pl
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from penchant.errors import ConfigError, DataError
from penchant.filters import indices, item_mask, parse_condition

ITEMS = pl.DataFrame(
    {
        "item_id": ["a", "b", "c", "d", "e"],
        "title": ["Heat (1995)", "Up.*", "七人の侍", "a=b", "^x$"],
        "genres": ["Crime|Drama", "Comedy", None, "comedy", ""],
        "year": ["1995", "2009", "1954", "n/a", None],
        "price": ["10", "9.5", "-1", "NaN", "1e1"],
        "in stock": ["yes", "no", "yes", "yes", "no"],
        "^t.*$": ["1", "2", "3", "4", "5"],
    }
)
INDEX = {name: n for n, name in enumerate(ITEMS["item_id"])}


def passing(text: str, items: pl.DataFrame = ITEMS) -> str:
    """The ids that pass, joined."""
    index = {name: n for n, name in enumerate(items["item_id"])}
    mask = item_mask(items, index, where=parse_condition(text))
    assert mask is not None
    return "".join(items["item_id"].filter(pl.Series(mask)))


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("genres=Comedy", "b"),
        ("genres!=Comedy", "ade"),  # a null says nothing of itself
        ("genres~omed", "bd"),
        ("genres!~omed", "ae"),
        ("genres=", "e"),
        ("genres~", "abde"),
        ("year>1994", "ab"),
        ("year>=1995", "ab"),
        ("year<2009", "ac"),
        ("year<=1954", "c"),
        ("year=1995", "a"),
        ("year==1995", "a"),
        ("year == 1995", "a"),
        ("price>=10", "ae"),  # as numbers: 9.5 is less than 10, 1e1 is 10, NaN is no price
        ("price<10", "bc"),
        ("price>-1e9", "abce"),
        ("price<inf", "abce"),
        ("price=10", "a"),  # as text: 1e1 is another text
        ("price=10.0", "a"),
        ("  year  >=  1995  ", "ab"),
        ("in stock=yes", "acd"),
        ("title=a=b", "d"),
        ("title~=", "d"),
        ("title~(1995)", "a"),
        ("title~.*", "b"),
        ("title~^", "e"),
        ("title=七人の侍", "c"),
        ("title=nobody", ""),
        ("^t.*$=3", "c"),
    ],
)
def test_what_a_condition_means(condition: str, expected: str) -> None:
    assert passing(condition) == expected


def test_a_number_may_have_blanks_around_it() -> None:
    assert passing("year>=1990", ITEMS.with_columns(year=pl.lit(" 1995 "))) == "abcde"


@pytest.mark.parametrize("text", ["", "   ", "genres", "=", "=x", "~x", ">5", "!x"])
def test_what_is_no_condition(text: str) -> None:
    with pytest.raises(ConfigError, match="cannot read the condition") as caught:
        parse_condition(text)
    assert repr(text) in str(caught.value)
    assert "genres~Comedy" in (caught.value.remedy or "")


@pytest.mark.parametrize("value", ["", "abc", "nan", "NaN", "1,5", "0x10", "1995 or 1=1", "--1"])
@pytest.mark.parametrize("operator", ["<", "<=", ">", ">="])
def test_numbers_are_compared_with_numbers(operator: str, value: str) -> None:
    with pytest.raises(ConfigError, match="is not a number") as caught:
        parse_condition(f"year{operator}{value}")
    assert f"year{operator}{value}" in (caught.value.where or "")


@pytest.mark.parametrize("column", ["nope", "*", "^g.*$", "^.*$", "Genres", "genres;", "__import__('os')", "n" * 3000])
def test_a_column_is_a_name_and_the_error_lists_those_there_are(column: str) -> None:
    with pytest.raises(ConfigError, match="cannot be applied") as caught:
        item_mask(ITEMS, INDEX, where=parse_condition(f"{column}=x"))
    assert "genres, year, price" in (caught.value.remedy or "")


def plain(text: str) -> str:
    """A whole number that was written with a point, without it."""
    head, point, zeros = text.partition(".")
    bare = head.removeprefix("-")
    whole = bare.isascii() and bare.isdigit() and (bare == "0" or bare[0] != "0")
    return head if point and whole and not zeros.strip("0") else text


VALUE = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).map(str.strip)


@given(st.lists(VALUE | st.none(), min_size=1, max_size=8), VALUE)
@example(["a|b", "(", None, ".", ""], ".")
@example(["{title}", "a\nb", "$1"], "\n".strip())
def test_a_value_is_compared_letter_by_letter(values: list[str | None], wanted: str) -> None:
    items = pl.DataFrame(
        {"item_id": [chr(97 + n) for n in range(len(values))], "x": values}, schema_overrides={"x": pl.String}
    )

    def ids(passed: list[bool]) -> str:
        return "".join(name for name, ok in zip(items["item_id"], passed, strict=True) if ok)

    assert passing(f"x=={wanted}", items) == ids([v is not None and plain(v) == plain(wanted) for v in values])
    assert passing(f"x= {wanted}", items) == ids([v is not None and plain(v) == plain(wanted) for v in values])
    assert passing(f"x!={wanted}", items) == ids([v is not None and plain(v) != plain(wanted) for v in values])
    assert passing(f"x~{wanted}", items) == ids([v is not None and wanted in v for v in values])
    assert passing(f"x!~{wanted}", items) == ids([v is not None and wanted not in v for v in values])


def test_a_table_with_a_gap_writes_whole_numbers_with_a_point() -> None:
    items = ITEMS.with_columns(year=pl.Series(["1955.0", "1956.0", " 1955. ", None, "n/a"]))
    assert passing("year=1955", items) == "ac"
    assert passing("year!=1955", items) == "be"
    assert passing("year=1955.0", items) == passing("year=1955.", items) == "ac"
    codes = ITEMS.with_columns(year=pl.Series(["007", "7", "7.0", "7e0", "007.0"]))
    assert passing("year=7", codes) == "bc"  # a code is its letters
    assert passing("year=007", codes) == "a"
    versions = ITEMS.with_columns(year=pl.Series(["1.1", "1.10", "1e5", "1234e567", "9007199254740993.0"]))
    assert passing("year=1.1", versions) == "a"
    assert passing("year=100000", versions) == ""
    assert passing("year=5320e917", versions) == ""
    assert passing("year=9007199254740992", versions) == ""


def test_what_is_no_predicate_is_refused() -> None:
    with pytest.raises(ConfigError, match="'year>=1990' is no predicate"):
        item_mask(ITEMS, INDEX, where="year>=1990")  # type: ignore[arg-type]


NUMBER = st.floats(allow_nan=False, width=32)


@given(st.lists(NUMBER | st.just(math.nan) | st.none(), min_size=1, max_size=8), NUMBER)
def test_numbers_are_ordered_as_numbers_and_nothing_else_passes(values: list[float | None], wanted: float) -> None:
    texts = [None if v is None else repr(v) for v in values]
    items = pl.DataFrame(
        {"item_id": [chr(97 + n) for n in range(len(values))], "x": texts}, schema_overrides={"x": pl.String}
    )
    for operator, holds in (
        (">", lambda v: v > wanted),
        (">=", lambda v: v >= wanted),
        ("<", lambda v: v < wanted),
        ("<=", lambda v: v <= wanted),
    ):
        expected = "".join(n for n, v in zip(items["item_id"], values, strict=True) if v is not None and holds(v))
        assert passing(f"x{operator}{wanted!r}", items) == expected


@given(st.text(max_size=30))
@example("^x$=1")
@example("*~")
@example("a" * 10 + "\0=b")
def test_any_text_is_a_condition_or_an_error_of_ours(text: str) -> None:
    try:
        mask = item_mask(ITEMS, INDEX, where=parse_condition(text))
    except ConfigError:
        return
    assert mask is not None
    assert mask.shape == (5,)


@pytest.mark.parametrize("kind", [pl.Int64, pl.Float64, pl.Boolean, pl.Categorical])
def test_columns_of_other_kinds_are_compared_as_text_or_numbers(kind: type[pl.DataType]) -> None:
    """Items are read as text; a frame of one's own may hold anything."""
    ones = [1, 0, None] if kind != pl.Categorical else ["1", "0", None]
    items = pl.DataFrame({"item_id": ["a", "b", "c"], "x": pl.Series(ones).cast(kind)})
    one = items["x"].cast(pl.String)[0]
    assert passing(f"x={one}", items) == "a"
    assert passing(f"x!={one}", items) == "b"
    if kind != pl.Categorical:
        assert passing("x>0", items) == "a"


# -- masks -------------------------------------------------------------------------------------


def ids(mask: np.ndarray | None) -> str:
    assert mask is not None
    assert mask.dtype == bool
    return "".join(name for name, ok in zip(ITEMS["item_id"], mask, strict=True) if ok)


def test_no_filter_is_no_mask() -> None:
    assert item_mask(ITEMS, INDEX) is None


@pytest.mark.parametrize(
    ("allow", "deny", "where", "expected"),
    [
        (["a", "b"], None, None, "ab"),
        ([], None, None, ""),
        (None, ["a"], None, "bcde"),
        (None, [], None, "abcde"),
        (["a", "b", "a"], ["b"], None, "a"),
        (["a", "c"], None, "year>1990", "a"),
        (None, ["a"], "year>1990", "b"),
        (["a"], ["a"], "year>1990", ""),
    ],
)
def test_filters_together_are_all_kept(
    allow: list[str] | None, deny: list[str] | None, where: str | None, expected: str
) -> None:
    condition = None if where is None else parse_condition(where)
    assert ids(item_mask(ITEMS, INDEX, allow=allow, deny=deny, where=condition)) == expected


@pytest.mark.parametrize("name", ["allow", "deny"])
def test_unknown_ids_are_named_but_not_by_the_thousand(name: str) -> None:
    with pytest.raises(DataError, match="unknown item 'x'") as caught:
        item_mask(ITEMS, INDEX, **{name: ["a", "x"]})  # type: ignore[arg-type]
    assert caught.value.where == f"{name}, column item_id"
    with pytest.raises(DataError, match="'x0', 'x1', 'x2', 'x3', 'x4' and 995 more"):
        item_mask(ITEMS, INDEX, **{name: [f"x{n}" for n in range(1000)]})  # type: ignore[arg-type]


def test_a_text_in_place_of_a_list_is_an_error() -> None:
    """'ab' would else be the items a and b."""
    with pytest.raises(ConfigError, match="one text, not a list"):
        item_mask(ITEMS, INDEX, allow="ab")


def test_indices_keep_order_and_repeats() -> None:
    assert indices(["c", "a", "c"], INDEX, "history").tolist() == [2, 0, 2]
    assert indices([], INDEX, "history").tolist() == []
    assert indices([], INDEX, "history").dtype == np.int32


@pytest.mark.parametrize(
    ("where", "said"),
    [
        (pl.col("nope") == 1, "cannot be applied"),
        (pl.lit(True), "no value an item"),
        (pl.col("year").filter(pl.col("year").is_not_null()) == "1995", "no value an item"),
        (pl.col("title"), "cannot be applied"),
        (pl.col("year").cast(pl.Int64) > 5, "cannot be applied"),
    ],
    ids=["no such column", "a constant", "fewer rows", "not a condition", "a cast that fails"],
)
def test_a_predicate_that_is_none_is_an_error(where: pl.Expr, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        item_mask(ITEMS, INDEX, where=where)


def test_ids_that_can_be_read_but_once_are_read() -> None:
    index = {"a": 0, "b": 1}
    assert indices(iter(["b", "a"]), index, "deny").tolist() == [1, 0]  # type: ignore[arg-type]
