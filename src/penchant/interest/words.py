"""The users' own words (reviews, searches) as vectors from the LLM, one for each distinct text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from penchant.data.split import Split
from penchant.interest.config import EncoderConfig
from penchant.interest.inputs import Columns, Reading
from penchant.interest.vectors import Scaling


@dataclass(frozen=True, eq=False)
class Words:
    """Scaled vectors (n_texts, d) of the texts in the order in which the log has them, and how new ones are scaled."""

    vectors: NDArray[np.float32]
    scaling: Scaling

    def save(self, path: Path) -> None:
        """Write the arrays into a file of a folder that is being made."""
        np.savez(path, vectors=self.vectors, mean=self.scaling.mean, map=self.scaling.map)

    @classmethod
    def load(cls, path: Path) -> Words:
        """What ``save`` wrote."""
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as found:
            return cls(found["vectors"], Scaling(found["mean"], found["map"]))


def read_events(
    split: Split, config: EncoderConfig, embed: Callable[[Sequence[str]], NDArray[np.float32]]
) -> tuple[Columns, Reading, Words | None]:
    """The split's events as the configuration asks for them; ``embed`` gives vectors (n, d) of the users' words.

    Columns and scalings are learnt from training events alone.
    """
    columns = Columns.fit(split.dataset.interactions.filter(split.train), config)
    reading, texts = reading_of(split, columns)
    if reading.words is None:
        return columns, reading, None
    # A log without a single word still has a table, of one row that no event points to.
    vectors = embed(texts or [" "])
    known = np.unique(reading.words[split.train])
    known = known[known >= 0]
    scaling = Scaling.fit(vectors[known] if len(known) else vectors)
    return columns, reading, Words(scaling.apply(vectors), scaling)


def reading_of(split: Split, columns: Columns) -> tuple[Reading, list[str]]:
    """The split's events through columns that were learnt, and the distinct texts that their words point to."""
    log, events = split.log, split.dataset.interactions
    if not columns.words:
        return Reading(log, columns.codes(events), None, columns.values(events)), []
    texts = columns.texts(events)
    distinct = list(dict.fromkeys(text for column in texts for text in column if text is not None))
    place = {text: i for i, text in enumerate(distinct)}
    rows = np.array([[-1 if text is None else place[text] for text in column] for column in texts], dtype=np.int32)
    return Reading(log, columns.codes(events), rows.T, columns.values(events)), distinct
