"""What rows are made of: a split's events, the items' texts and tokens, and the templates, as serving has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penchant.data.split import Split
from penchant.errors import DataError
from penchant.prompt import Templates
from penchant.rank import label_tokens
from penchant.tokens import TextCodec

Positions = NDArray[np.int64]


@dataclass(eq=False)
class Corpus:
    """A split ready to be rendered for one tokenizer. ``texts`` has one entry an item, in catalogue order."""

    split: Split
    templates: Templates
    codec: TextCodec
    texts: list[str]
    truncated: int
    dropped: int = 0  # oldest events that did not fit a prompt

    @classmethod
    def of(cls, split: Split, templates: Templates, codec: TextCodec) -> Corpus:
        rendered = templates.item_texts(split.dataset.items.to_dict(as_series=False), split.log.item_ids)
        return cls(split, templates, codec, rendered.texts, rendered.truncated)

    @cached_property
    def item_tokens(self) -> list[tuple[int, ...]]:
        """One token sequence an item, terminator included: the trie's, the scorer's, and the training label's."""
        return self.codec.encode_items(self.texts, self.templates.headers["next_item"].terminator)

    @cached_property
    def opening(self) -> list[int]:
        """The next-item prompt without history; items' tokens follow it one after another (it is prefix-closed)."""
        return self.codec.encode(self.templates.render("next_item", {"history": []}).prompt)

    @cached_property
    def train_positions(self) -> list[Positions]:
        """Each user's training events as positions in the log, oldest first."""
        log, train = self.split.log, self.split.train
        return [np.flatnonzero(train[a:b]) + a for a, b in zip(log.start[:-1], log.start[1:], strict=True)]

    def render(
        self, name: str, positions: Positions, *, max_history: int, budget: int, liked: float | None = None, **more: Any
    ) -> tuple[list[int], Positions]:
        """A prompt's tokens, and the positions of the events that fitted: the newest ``max_history`` of those given."""
        kept = positions[-max_history:]
        history = [self.event(int(p), liked) for p in kept]
        rendered = self.templates.render(
            name, {"history": history, **more}, count=lambda p: len(self.codec.encode(p)), budget=budget
        )
        self.dropped += rendered.dropped
        return self.codec.encode(rendered.prompt), kept[rendered.dropped :]

    def event(self, position: int, liked: float | None = None) -> dict[str, Any]:
        """One event as templates see it; ``liked`` is the rating from which it counts as liked."""
        event: dict[str, Any] = {"text": self.texts[int(self.split.log.item[position])]}
        if liked is not None:
            event["liked"] = bool(self.ratings[position] >= liked)
        return event

    @cached_property
    def ratings(self) -> NDArray[np.float64]:
        """The rating of every event of the log; DataError where the data has none."""
        events = self.split.dataset.interactions
        if "rating" not in events.columns or events["rating"].null_count():
            raise DataError(
                "not every event has a rating",
                where="column rating",
                remedy="map the rating's column in `penchant prepare`, or leave like_threshold out",
            )
        return events["rating"].cast(float).to_numpy()

    def labels(self, labels: Sequence[str]) -> list[int]:
        """The single token of each label; ConfigError where one has several or two share one."""
        return label_tokens(self.codec, labels)

    def require_past(self, rows_inputs: Positions, rows_targets: Positions) -> None:
        """Guard: DataError where an event is held out, or later than what it helps to predict."""
        log, train = self.split.log, self.split.train
        used = np.concatenate([rows_inputs, rows_targets])
        held = used[~train[used]]
        if held.size:
            raise DataError(
                "a validation or test event stands in a training row",
                where=f"user {log.user_ids[log.user[held[0]]]}, item {log.item_ids[log.item[held[0]]]}",
                remedy="build rows from training events alone",
            )
        if len(np.unique(log.user[used])) > 1:
            raise DataError("events of several users stand in one training row", where="training row")
        if rows_inputs.size and rows_targets.size and log.time[rows_inputs].max() > log.time[rows_targets].max():
            raise DataError(
                "an event later than every target stands in a training row",
                where=f"user {log.user_ids[log.user[used[0]]]}",
                remedy="build rows from `history` alone",
            )
