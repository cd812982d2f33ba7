"""How many threads the numbers are made with: sums taken in another order differ in their last digits."""

from __future__ import annotations

import torch


def threads() -> int:
    """Threads of one operation of torch's on the CPU."""
    return torch.get_num_threads()


def use_threads(n: int) -> None:
    """Let torch take n threads for one operation."""
    torch.set_num_threads(n)
