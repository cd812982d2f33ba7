"""From a shard's rows to histories that can be answered: checked, looked up, and put in the order they are asked in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import polars as pl
from numpy.typing import NDArray

from penchant.batch.columns import HISTORY, NOT_TEXT
from penchant.batch.options import BatchOptions
from penchant.batch.quarantine import Bad, Reason
from penchant.errors import DataError
from penchant.interest.behaviour import Behaviour
from penchant.recommend import Recommender
from penchant.schema import ITEM, USER

# Tokens within which prompts count as equally long: among those, prompts that begin alike stand together.
_LENGTH = 32


@dataclass(eq=False)
class Prepared:
    """A shard whose good rows are ready for the model, in the order of the input.

    ``rows`` are the numbers of the good rows in the input, and ``users``, ``histories``, ``items`` (index of the row's
    item, -1 where the job has none) and ``tokens`` (of the prompt, 0 where none was made) go with them. ``order`` are
    places among them in the order of asking. ``cut`` counts histories of which the model does not read all, and
    ``unknown`` items of histories that the catalogue doesn't have.
    """

    shard: int
    n_rows: int
    rows: list[int] = field(default_factory=list)
    users: list[str | None] = field(default_factory=list)
    histories: list[Behaviour] = field(default_factory=list)
    items: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    bad: list[Bad] = field(default_factory=list)
    cut: int = 0
    unknown: int = 0


class Preparer:
    """Prepares shards for one model and job; asks no LLM, but renders the prompts it will be asked."""

    def __init__(self, model: Recommender, options: BatchOptions, duplicates: NDArray[np.int64]) -> None:
        self._model = model
        self._options = options
        self._duplicates = duplicates
        likely = model.config.question == "likelihood" and (model.fusion.weight > 0 or options.job == "score")
        prompts = options.asks_llm and (options.method == "generate" or likely)
        self._ranker = model.ranker if prompts else None
        self._catalogue = pl.DataFrame(
            {HISTORY: list(model.item_index), "index": np.fromiter(model.item_index.values(), dtype=np.int32)},
            schema_overrides={HISTORY: pl.String},
        )

    def __call__(self, shard: int, start: int, frame: pl.DataFrame) -> Prepared:
        """``frame`` are the rows from number ``start`` on."""
        out = Prepared(shard, len(frame))
        low, high = np.searchsorted(self._duplicates, [start, start + len(frame)])
        again = {int(row) - start for row in self._duplicates[low:high]}
        own = self._histories(frame)
        texts = [frame[name].to_list() if name in frame.columns else [None] * len(frame) for name in (USER, ITEM)]
        unreadable = frame[NOT_TEXT].to_list() if NOT_TEXT in frame.columns else [False] * len(frame)
        for place, (user, item) in enumerate(zip(*texts, strict=True)):
            reason: Reason | None = "not_text" if unreadable[place] else "duplicate" if place in again else None
            history, index, unknown = Behaviour(np.zeros(0, dtype=np.int32)), -1, 0
            if reason is None and self._options.job in ("score", "embed-items"):
                reason, index = self._item(item)
            if reason is None and self._options.job != "embed-items":
                reason, history, unknown = self._history(user, own[place])
            if reason is not None:
                out.bad.append(Bad(start + place, user, item, reason))
                continue
            out.rows.append(start + place)
            out.users.append(user)
            out.histories.append(history)
            out.items.append(index)
            out.unknown += unknown
        self._measure(out)
        return out

    def _item(self, item: str | None) -> tuple[Reason | None, int]:
        if not item:
            return "no_item", -1
        index = self._model.item_index.get(item, -1)
        if index >= 0 and self._options.job == "embed-items" and self._model.removed[index]:
            return "removed_item", index
        return (None if index >= 0 else "unknown_item"), index

    def _history(
        self, user: str | None, own: tuple[NDArray[np.int32], int] | None
    ) -> tuple[Reason | None, Behaviour, int]:
        """Why there is none, or the history and how many of its items are unknown."""
        items, unknown = own or (np.zeros(0, dtype=np.int32), 0)
        behaviour = Behaviour(items)
        if own is not None:
            if unknown and not len(items):
                return "no_known_item", behaviour, unknown
            empty = not len(items) and self._options.job != "recommend"
            return ("empty_history" if empty else None), behaviour, unknown
        if not user:
            return "no_user", behaviour, 0
        if not self._model.knows(user):
            return "unknown_user", behaviour, 0
        return None, self._model.behaviour(user), 0

    def _histories(self, frame: pl.DataFrame) -> list[tuple[NDArray[np.int32], int] | None]:
        """Of each row: the items of its own history that the catalogue has, and how many others there were; None where
        the row has no history of its own.
        """
        if HISTORY not in frame.columns:
            return [None] * len(frame)
        lengths = frame[HISTORY].list.len().fill_null(0).to_numpy().astype(np.int64)
        given = frame[HISTORY].is_not_null().to_list()
        flat = frame.filter(pl.col(HISTORY).list.len() > 0).select(pl.col(HISTORY).explode())
        index = flat.join(self._catalogue, on=HISTORY, how="left", maintain_order="left")["index"]
        found = index.fill_null(-1).to_numpy()
        known = found >= 0
        count = np.concatenate([[0], np.cumsum(known)])
        ends = np.cumsum(lengths)
        stops, starts = count[ends], count[ends - lengths]
        items = found[known]
        return [
            (items[a:b], int(n - (b - a))) if there else None
            for a, b, n, there in zip(starts.tolist(), stops.tolist(), lengths.tolist(), given, strict=True)
        ]

    def _measure(self, out: Prepared) -> None:
        """Count what is cut, make the prompts ahead of the engine, and order the rows: like lengths together, and
        among them prompts that begin alike.
        """
        config = self._model.config
        keys = []
        for place, history in enumerate(out.histories):
            n = len(history)
            read = min(n, config.max_history if self._options.asks_llm else config.encoder.max_length)
            tokens, dropped = 0, max(0, n - config.encoder.max_length)
            if self._ranker is not None:
                try:
                    prompt = self._ranker.prompt(history.item)
                    tokens, dropped = prompt.n_tokens or 0, max(dropped, prompt.dropped)
                except DataError:
                    tokens = 0  # the engine says the same of this row when it is asked, and it is quarantined there
            out.tokens.append(tokens)
            out.cut += dropped > 0
            keys.append(((tokens or read) // (_LENGTH if tokens else 1), history.item[n - read :].tobytes(), place))
        out.order = [key[-1] for key in sorted(keys)]


def batches(prepared: Prepared, size: int) -> Iterator[list[int]]:
    """Places of the good rows, ``size`` at a time, in the order of asking: a function of the shard alone."""
    for start in range(0, len(prepared.order), size):
        yield prepared.order[start : start + size]
