"""The same dataset with names that mean nothing: what a system still does on it, it has learnt from behaviour."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import polars as pl

from penchant.data.dataset import Dataset
from penchant.errors import DataError
from penchant.schema import EVENT, ITEM, RATING, TIME, TITLE, USER

if TYPE_CHECKING:
    from penchant.tokens import TextCodec

_CONSONANTS = "BDFGKLMNPRSTVZ"
_VOWELS = "AEIOU"
_SYLLABLES = [c + v for c in _CONSONANTS for v in _VOWELS]
# The names that could be are at least so many times those that are needed, so that few are tried twice.
_SPARE = 20
# Names looked at to find the commonest number of tokens, and tried for one text before giving up.
_LOOKED_AT = 2_000
_TRIES = 10_000
# What an item or an event is without any word about it.
_KEPT = (USER, ITEM, TIME, EVENT, RATING)


def neutral_names(texts: Sequence[str], seed: int = 0, *, codec: TextCodec | None = None) -> list[str]:
    """A made-up name for every text: "Item BOKUTA", as many syllables for all; equal texts get equal names.

    A renaming and nothing else: different texts get different names, and no name, nor its word, stands in any of the
    texts. A name follows from its text and the seed alone (but for the rare second try where two fall together),
    never from the text's place, so it is the same for the same item in every catalogue of up to 17,000 titles;
    larger ones get a syllable more. With ``codec`` all names have one number of tokens in that vocabulary.
    """
    distinct = sorted(set(texts))
    syllables = 3
    while len(_SYLLABLES) ** syllables < _SPARE * len(distinct):
        syllables += 1
    real = {word.casefold() for text in distinct for word in text.split()} | {text.casefold() for text in distinct}
    length = None if codec is None else _commonest_length(codec, seed, syllables)
    names: dict[str, str] = {}
    taken: set[str] = set()
    for text in distinct:
        for code in _codes(text, seed, syllables):
            name = f"Item {code}"
            fits = length is None or codec is None or len(codec.encode_data(name)) == length
            if code not in taken and fits and code.casefold() not in real and name.casefold() not in real:
                break
        else:
            raise DataError(
                f"no neutral name was found for {text[:60]!r} in {_TRIES:,} tries",
                where="neutral names",
                remedy="leave the codec out, so that names may differ in tokens",
            )
        taken.add(code)
        names[text] = name
    return [names[text] for text in texts]


def _codes(text: str, seed: int, syllables: int) -> Iterator[str]:
    """Codes of a text, one a try: the first is nearly always free."""
    for attempt in range(_TRIES):
        key = f"{seed}\0{attempt}\0{text}".encode("utf-8", "surrogatepass")
        value = int.from_bytes(hashlib.blake2b(key, digest_size=16).digest(), "little")
        code = ""
        for _ in range(syllables):
            value, at = divmod(value, len(_SYLLABLES))
            code += _SYLLABLES[at]
        yield code


def _commonest_length(codec: TextCodec, seed: int, syllables: int) -> int:
    names = (f"Item {next(_codes(str(i), seed, syllables))}" for i in range(_LOOKED_AT))
    return Counter(len(codec.encode_data(name)) for name in names).most_common(1)[0][0]


def neutral_dataset(dataset: Dataset, seed: int = 0, *, codec: TextCodec | None = None) -> Dataset:
    """The same users, items and events with neutral titles and no other text; fit and evaluate it unchanged.

    Of the items the id and the title stay, of the events user, item, time, type and rating: genres, reviews and the
    like name an item too. Ids stay, since no prompt holds them. ``report["neutral"]`` says what it was made of and
    what was left out. A template that uses other columns than the title does not render on it.
    """
    items = dataset.items
    titles = items[TITLE].to_list()
    renamed = pl.DataFrame({ITEM: items[ITEM], TITLE: neutral_names(titles, seed, codec=codec)})
    events = dataset.interactions.select(name for name in dataset.interactions.columns if name in _KEPT)
    provenance = {
        "of": dataset.content_hash,
        "seed": seed,
        "one_number_of_tokens": codec is not None,
        "distinct_titles": len(set(titles)),
        "left_out": {
            "items": [name for name in items.columns if name not in (ITEM, TITLE)],
            "interactions": [name for name in dataset.interactions.columns if name not in _KEPT],
        },
    }
    return Dataset(events, renamed, {**dataset.report, "neutral": provenance})
