"""What a user did, as the encoder reads it: items, and what else is known of each event."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Behaviour:
    """n events of one user, oldest first.

    ``item`` (n,) are item indices. ``codes`` (n, c) hold a value of each of the encoder's c input columns, 0 where it
    is unknown; ``words`` (n, w) rows of the encoder's table of texts, -1 for none; ``value`` (n,) what is to be
    predicted where that isn't the item, NaN where unknown. c, w and value may be absent.
    """

    item: NDArray[np.int32]
    codes: NDArray[np.int32] | None = None
    words: NDArray[np.int32] | None = None
    value: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.item)

    def __getitem__(self, part: slice) -> Behaviour:
        return Behaviour(
            self.item[part],
            None if self.codes is None else self.codes[part],
            None if self.words is None else self.words[part],
            None if self.value is None else self.value[part],
        )

    @classmethod
    def of(cls, history: History) -> Behaviour:
        """Item indices alone as a behaviour of which nothing else is known."""
        return history if isinstance(history, Behaviour) else cls(np.asarray(history, dtype=np.int32))


# A history as functions take it: item indices, or those with more about each event.
History = Behaviour | NDArray[np.integer]


@dataclass(frozen=True, eq=False)
class Batch:
    """n histories, right-padded to the longest, L: ``item`` (n, L), ``length`` (n,), ``codes`` (n, L, c) with 0 and
    ``words`` (n, L, w) with -1 where nothing is known, ``value`` (n, L) with NaN. None where no column is asked for.
    """

    item: torch.Tensor
    length: torch.Tensor
    codes: torch.Tensor | None = None
    words: torch.Tensor | None = None
    value: torch.Tensor | None = None

    @property
    def real(self) -> torch.Tensor:
        """(n, L): which positions hold an event."""
        return torch.arange(self.item.shape[1]) < self.length[:, None]

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        codes, words, value = (None if x is None else x.to(device) for x in (self.codes, self.words, self.value))
        return Batch(self.item.to(device), self.length.to(device), codes, words, value)


def pad(rows: Sequence[History], n_codes: int = 0, n_words: int = 0, *, value: bool = False) -> Batch:
    """Histories as one batch; columns that a history does not have are unknown."""
    behaviours = [Behaviour.of(row) for row in rows]
    n, longest = len(behaviours), max(map(len, behaviours))
    item = np.zeros((n, longest), dtype=np.int64)
    codes = np.zeros((n, longest, n_codes), dtype=np.int64)
    words = np.full((n, longest, n_words), -1, dtype=np.int64)
    values = np.full((n, longest), np.nan, dtype=np.float32)
    for i, row in enumerate(behaviours):
        item[i, : len(row)] = row.item
        if n_codes and row.codes is not None:
            codes[i, : len(row)] = row.codes
        if n_words and row.words is not None:
            words[i, : len(row)] = row.words
        if value and row.value is not None:
            values[i, : len(row)] = row.value
    return Batch(
        torch.from_numpy(item),
        torch.tensor([len(row) for row in behaviours]),
        torch.from_numpy(codes) if n_codes else None,
        torch.from_numpy(words) if n_words else None,
        torch.from_numpy(values) if value else None,
    )
