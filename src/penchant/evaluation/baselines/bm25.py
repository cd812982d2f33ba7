"""Items whose text has the words of the newest items' texts: BM25 with the history as the query."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from penchant.errors import DataError
from penchant.evaluation.baselines.events import newest, popular_behind, popular_where_empty
from penchant.evaluation.baselines.extras import needed
from penchant.evaluation.systems import Queries


class BM25Config(BaseModel):
    """What is tuned; the formula is Lucene's (Kamphuis et al. 2020, table 1), computed by bm25s."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    last: int | None = Field(default=1, ge=1, description="newest items whose texts are the query; None: all")
    k1: float = Field(default=1.5, ge=0, description="how soon a repeated word stops to count")
    b: float = Field(default=0.75, ge=0, le=1, description="how much a long text is held against an item")


@dataclass(frozen=True, eq=False)
class BM25:
    """score(item) = sum over the query's words, repeats counted, of their BM25 weight in the item's text.

    Items without a word of the query stand behind all others, in order of popularity from training; so does the
    whole catalogue for an empty history. A cold item is scored by its text like any other.
    ``words`` holds the word ids of each item's text.
    """

    index: Any
    words: list[NDArray[np.int32]]
    counts: NDArray[np.float32]
    last: int | None
    name: str = "newest titles (BM25)"

    def scores(self, queries: Queries) -> NDArray[np.float32]:
        out = np.zeros((len(queries), len(self.words)), dtype=np.float32)
        for row, history in enumerate(newest(queries.history, self.last)):
            query = np.concatenate([self.words[i] for i in history]) if len(history) else np.zeros(0, dtype=np.int32)
            out[row] = self.index.get_scores_from_ids(query)
        return popular_where_empty(popular_behind(out, self.counts), queries, self.counts)


def fit_bm25(texts: Sequence[str], counts: NDArray[np.float32], config: BM25Config) -> BM25:
    """Index the items' texts (n_items): lower case, every run of letters and digits a word, none left out."""
    bm25s = needed("bm25s", "bm25")
    tokens = bm25s.tokenize(list(texts), token_pattern=r"(?u)\w+", stopwords=[], return_ids=False, show_progress=False)
    if not any(tokens):
        raise DataError("no item text has a word", where="baseline bm25", remedy="leave bm25 out, or give titles")
    index = bm25s.BM25(k1=config.k1, b=config.b, method="lucene")
    index.index(tokens, show_progress=False)
    words = [np.array(index.get_tokens_ids(t), dtype=np.int32) for t in tokens]
    return BM25(index, words, counts, config.last)
