"""Rows into packs of one length, and packs into steps: a function of seed and epoch, not of who runs them."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from penchant.errors import ConfigError

# Rows are shuffled, then packed within windows: a window this long packs tightly, and its make-up changes each epoch.
_WINDOW = 4096


def pack(lengths: Sequence[int] | NDArray[np.integer], size: int, rng: np.random.Generator) -> list[list[int]]:
    """Row numbers by pack: every row once, no pack over ``size`` tokens; best fit decreasing in shuffled windows."""
    length = np.asarray(lengths, dtype=np.int64)
    _require_room(length, size)
    order = rng.permutation(len(length))
    packs: list[list[int]] = []
    for begin in range(0, len(order), _WINDOW):
        part = order[begin : begin + _WINDOW]
        packs += _best_fit(part[np.argsort(-length[part], kind="stable")], length, size)
    return [packs[i] for i in rng.permutation(len(packs))]


def _require_room(length: NDArray[np.int64], size: int) -> None:
    if len(length) and length.max() > size:
        row = int(length.argmax())
        raise ConfigError(
            f"row {row} has {length[row]} tokens and a pack only {size}: a target would be cut off",
            where="packing",
            remedy="raise pack_tokens, or lower max_history, window, negatives or prompt_tokens",
        )


def _best_fit(rows: NDArray[np.int64], length: NDArray[np.int64], size: int) -> list[list[int]]:
    """Each row into the fullest pack that still holds it."""
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, pack), ascending
    for row in rows:
        n = int(length[row])
        at = bisect_left(room, (n, -1))
        if at < len(room):
            left, chosen = room.pop(at)
            packs[chosen].append(int(row))
        else:
            left, chosen = size, len(packs)
            packs.append([int(row)])
        if left > n:
            insort(room, (left - n, chosen))
    return packs


class Plan:
    """Which rows make up each optimiser step: ``step(s)`` gives its packs, the same whatever runs them.

    A process of a parallel run takes every n-th pack of a step, so one process and eight take the same steps.
    """

    def __init__(self, lengths: NDArray[np.int64], *, pack_tokens: int, packs_per_step: int, seed: int) -> None:
        _require_room(lengths, pack_tokens)  # before anything is trained or measured
        self._lengths, self._size, self._seed = lengths, pack_tokens, seed
        self._epoch = -1
        self._packs: list[list[int]] = []
        # No shuffle needs fewer packs than this, so no epoch has a step without any.
        least = -(-int(lengths.sum()) // pack_tokens)
        self.steps_per_epoch = max(1, least // packs_per_step)
        self.fewest = min(least, packs_per_step)  # packs that every step has at least

    def _of(self, epoch: int) -> list[list[int]]:
        if epoch != self._epoch:
            rng = np.random.default_rng([self._seed, epoch])
            self._packs, self._epoch = pack(self._lengths, self._size, rng), epoch
        return self._packs

    def step(self, number: int) -> list[list[int]]:
        """The packs (lists of row numbers) of step ``number``, from 0; an epoch's packs are spread evenly."""
        epoch, inside = divmod(number, self.steps_per_epoch)
        packs = self._of(epoch)
        edge = [len(packs) * (inside + i) // self.steps_per_epoch for i in (0, 1)]
        return packs[edge[0] : edge[1]]

    def padding(self) -> float:
        """Share of the first epoch's tokens that would be padding, were every pack run at its full length."""
        packs = self._of(0)
        return 1.0 - float(self._lengths.sum()) / (len(packs) * self._size) if packs else 0.0
