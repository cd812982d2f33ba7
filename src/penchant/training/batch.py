"""Packs to tensors: tokens, positions, the additive mask that keeps rows and branches apart, and what is supervised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from penchant.errors import DataError
from penchant.training.rows import Row


@dataclass(frozen=True, eq=False)
class Layout:
    """What of a batch belongs together, each (b, length): the row of a token (-1: padding), its branch and where in
    the trunk that leaves.
    """

    row: torch.Tensor
    branch: torch.Tensor
    start: torch.Tensor
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Batch:
    """One forward. ``tokens`` and ``position`` (b, length); ``layout`` None: every row of ``tokens`` is one sequence.

    Supervision, flat over the batch: ``at`` (m,) indexes the b * length states, ``label``, ``weight`` and
    ``sequence`` (m,) as in Row; ``group`` and ``lead`` (s,) of each candidate sequence; ``choices`` (c,) label tokens;
    ``targets`` the rows' targets as positions in the event log.
    """

    tokens: torch.Tensor
    position: torch.Tensor
    layout: Layout | None
    at: torch.Tensor
    label: torch.Tensor
    weight: torch.Tensor
    sequence: torch.Tensor
    group: torch.Tensor
    lead: torch.Tensor
    choices: torch.Tensor
    targets: NDArray[np.int64]
    n_targets: int
    n_tokens: int  # real ones, padding not counted

    @property
    def mask(self) -> torch.Tensor | None:
        """The additive mask (b, 1, length, length), made anew: of all a batch holds it alone grows with length ** 2,
        and all batches of a step are held at once.
        """
        return None if self.layout is None else _mask(self.layout, self.position)


def collate(packs: Sequence[Sequence[Row]], dtype: torch.dtype, device: torch.device | str = "cpu") -> Batch:
    """Lay packs out as rows of one tensor, right-padded to the longest; the mask is block-diagonal between rows."""
    length = max(sum(map(len, rows)) for rows in packs)
    shape = (len(packs), length)
    tokens, position = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    row_of = np.full(shape, -1, dtype=np.int64)
    branch, start = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    at, label, weight, sequence, group, lead = [], [], [], [], [], []
    n_sequences = n_groups = number = 0
    choices: tuple[int, ...] | None = None
    for p, rows in enumerate(packs):
        offset = 0
        for row in rows:
            where = (p, slice(offset, offset + len(row)))
            tokens[where], position[where], branch[where], start[where] = (
                row.tokens,
                row.position,
                row.branch,
                row.start,
            )
            row_of[where] = number
            at.append(row.at + (p * length + offset))
            label.append(row.label)
            weight.append(row.weight)
            sequence.append(row.sequence + n_sequences)
            group.append(row.group + n_groups)
            lead.append(row.lead)
            n_sequences += len(row.group)
            n_groups += int(row.group.max()) + 1
            if choices is not None and choices != tuple(row.choices):
                raise DataError("rows with different label sets in one batch", where="training")
            choices = tuple(row.choices.tolist())
            number += 1
            offset += len(row)

    def tensor(parts: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts)).to(device)

    return Batch(
        torch.from_numpy(tokens).to(device),
        torch.from_numpy(position).to(device),
        Layout(tensor([row_of]), tensor([branch]), tensor([start]), dtype),
        tensor(at).long(),
        tensor(label).long(),
        tensor(weight),
        tensor(sequence).long(),
        tensor(group).long(),
        tensor(lead),
        torch.tensor(choices or (), dtype=torch.long, device=device),
        np.concatenate([row.targets for rows in packs for row in rows]),
        n_groups,
        int((row_of >= 0).sum()),
    )


def _mask(layout: Layout, position: torch.Tensor) -> torch.Tensor:
    """Token i sees j of the same row where j is earlier in i's own branch, or in the trunk before i's branch leaves."""

    def pair(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return a.unsqueeze(2), b.unsqueeze(1)

    row, dtype = layout.row, layout.dtype
    row_i, row_j = pair(row, row)
    branch_i, branch_j = pair(layout.branch, layout.branch)
    position_i, position_j = pair(position, position)
    start_i, _ = pair(layout.start, layout.start)
    own = (branch_i == branch_j) & (position_j <= position_i)
    trunk = (branch_j == 0) & (position_j < start_i)
    sees = (row_i == row_j) & (row_i >= 0) & (own | trunk)
    # Padding sees itself, so that no row of the softmax is empty.
    sees |= torch.eye(row.shape[1], dtype=torch.bool, device=row.device) & (row_i < 0)
    # Additive, not bool: eager attention fed a bool mask is silently wrong.
    mask = torch.zeros(sees.shape, dtype=dtype, device=row.device)
    return mask.masked_fill_(~sees, torch.finfo(dtype).min).unsqueeze(1)
