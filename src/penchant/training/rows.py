"""A training row: tokens, what is supervised in them, and the events they came from.

A row is a trunk (a rendered prompt or history) with, for some recipes, branches: candidate items that
hang behind a point of the trunk, see the trunk up to there and themselves, and not each other. One
forward of the row then gives what a forward of every path would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penchant.engine.base import Pooling
from penchant.errors import DataError

Ints = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Row:
    """One packed unit; every array is one-dimensional.

    ``tokens``, ``position`` (in its path), ``branch`` (0: trunk) and ``start`` (position at which the
    token's branch leaves the trunk; 0 in the trunk) have one entry a token. Supervision: the state at
    token ``at[j]`` must predict ``label[j]``, with weight ``weight[j]``, as part of candidate
    ``sequence[j]``; ``group[s]`` is the target that candidate s stands for, and the first candidate of a
    group is the true one; ``lead[s]``, in nats, is what another model thinks of it already. ``choices`` are
    the label tokens a choice is made among (empty: the whole vocabulary). Where texts are embedded
    (contrastive), the states at ``at`` times ``weight`` sum to the vector of text ``sequence[j]``, and
    ``label[j]`` is the item it stands for, -1 for a history. Provenance: ``user``, and positions in the
    event log of all ``inputs`` and ``targets``.
    """

    tokens: Ints
    position: Ints
    branch: Ints
    start: Ints
    at: Ints
    label: Ints
    weight: NDArray[np.float32]
    sequence: Ints
    group: Ints
    lead: NDArray[np.float32]
    choices: Ints
    user: int
    inputs: NDArray[np.int64]
    targets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def n_targets(self) -> int:
        """Supervised targets: items or answers, not tokens."""
        return len(np.unique(self.group))


ARRAYS = ("tokens", "position", "branch", "start", "at", "label", "weight", "sequence", "group", "lead", "choices")
FLOATS = ("weight", "lead")  # the others are integers
_NONE = np.zeros(0, dtype=np.int64)


class RowBuilder:
    """Builds one row from a trunk and the candidates hung behind it."""

    def __init__(self, trunk: Sequence[int], *, user: int = -1, choices: Sequence[int] = ()) -> None:
        if not len(trunk):
            raise DataError("a training row without a prompt", where="training", remedy="check the template")
        self._tokens = list(trunk)
        self._position = list(range(len(trunk)))
        self._branch = [0] * len(trunk)
        self._start = [0] * len(trunk)
        self._at: list[int] = []
        self._label: list[int] = []
        self._weight: list[float] = []
        self._sequence: list[int] = []
        self._group: list[int] = []
        self._lead: list[float] = []
        self._n_branches = 0
        self._n_groups = 0
        self._n_trunk = len(trunk)
        self._user, self._choices = user, tuple(choices)

    def supervise(self, first: int, n: int, *, weight: float = 1.0, lead: float = 0.0) -> int:
        """The ``n`` trunk tokens from index ``first`` on are a target; returns its group."""
        if first < 1 or n < 1 or first + n > self._n_trunk:
            raise DataError(f"no such target: tokens {first} to {first + n} of {self._n_trunk}", where="training row")
        return self._add(list(range(first - 1, first + n - 1)), self._tokens[first : first + n], weight, None, lead)

    def answer(self, label: int, *, weight: float = 1.0) -> int:
        """The token after the trunk's last is a target that is not itself an input; returns its group."""
        return self._add([self._n_trunk - 1], [label], weight, None)

    def branch(self, behind: int, tokens: Sequence[int], group: int, *, lead: float = 0.0) -> None:
        """A rival of ``group``'s target: ``tokens`` follow the first ``behind`` tokens of the trunk."""
        if not 1 <= behind <= self._n_trunk or not len(tokens):
            raise DataError(f"no such branch: behind {behind} of {self._n_trunk} tokens", where="training row")
        self._n_branches += 1
        first = len(self._tokens)
        # The last token predicts nothing more: it is a label, never an input.
        inside = list(tokens[:-1])
        self._tokens += inside
        self._position += list(range(behind, behind + len(inside)))
        self._branch += [self._n_branches] * len(inside)
        self._start += [behind] * len(inside)
        self._add([behind - 1, *range(first, first + len(inside))], list(tokens), 1.0, group, lead)

    def embed(self, item: int, tokens: Sequence[int] = (), *, pooling: Pooling) -> None:
        """A text whose states are pooled to one vector: ``tokens`` run on their own, or where there are none the trunk.

        All texts of a row are one group. ``item`` is what the text stands for, -1 for a history.
        """
        first, n = (len(self._tokens), len(tokens)) if len(tokens) else (0, self._n_trunk)
        if len(tokens):
            self._n_branches += 1
            self._tokens += tokens
            self._position += range(n)
            self._branch += [self._n_branches] * n
            self._start += [0] * n  # it leaves the trunk before its first token: it sees nothing of it
        at = list(range(first, first + n)) if pooling == "mean" else [first + n - 1]
        self._add(at, [item] * len(at), 1 / len(at), 0 if self._group else None)

    def _add(self, at: list[int], label: list[int], weight: float, group: int | None, lead: float = 0.0) -> int:
        if group is None:
            group = self._n_groups
            self._n_groups += 1
        self._sequence += [len(self._group)] * len(at)
        self._group.append(group)
        self._lead.append(lead)
        self._at += at
        self._label += label
        self._weight += [weight] * len(at)
        return group

    def build(self, inputs: NDArray[np.int64] = _NONE, targets: NDArray[np.int64] = _NONE) -> Row:
        """The finished row; DataError where nothing in it is supervised."""
        if not self._at:
            raise DataError(
                "a training row in which every token is masked: nothing could be learnt from it",
                where="training",
                remedy="give histories with at least one target",
            )
        arrays: dict[str, Any] = {
            name: np.array(getattr(self, f"_{name}"), dtype=np.float32 if name in FLOATS else np.int32)
            for name in ARRAYS
        }
        return Row(**arrays, user=self._user, inputs=inputs, targets=targets)
