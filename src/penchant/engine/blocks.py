"""A model's blocks, and forwards that end at one of them."""

from __future__ import annotations

from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import nn


def blocks_of(model: nn.Module, n_blocks: int) -> nn.ModuleList | None:
    """The list of the model's ``n_blocks`` blocks; None where it keeps them otherwise."""
    return next((m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == n_blocks), None)


class _Reached(Exception):
    """Thrown through a forward by the block that it ends at, with what that block was given."""

    def __init__(self, states: torch.Tensor) -> None:
        super().__init__()
        self.states = states


class States:
    """Hidden states of a headless model of ``n_blocks`` blocks, which runs no block above those that are asked for.

    The hooks stay, and each thread has an end of its own: another one's forward goes on to the last block meanwhile. A
    model whose blocks aren't found, or get something else than its hidden states (which ``check`` sees), runs whole.
    """

    def __init__(self, base: Any, n_blocks: int) -> None:
        self.base, self.n_blocks = base, n_blocks
        self._end: ContextVar[int | None] = ContextVar("end", default=None)
        blocks = blocks_of(base, n_blocks)
        self._cut = blocks is not None
        for i, block in enumerate(blocks or ()):
            block.register_forward_pre_hook(partial(self._reach, i), with_kwargs=True)

    def _reach(self, i: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._end.get() == i:
            raise _Reached(args[0] if args else kwargs["hidden_states"])

    @torch.inference_mode()
    def check(self, ids: torch.Tensor) -> None:
        """Compare on a few ``ids`` (rows, tokens) what blocks are given with the hidden states that the model tells."""
        every = self.base(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
        self._cut = self._cut and all(torch.equal(self.at(i, input_ids=ids), every[i]) for i in range(self.n_blocks))

    def at(self, layer: int, **inputs: torch.Tensor | None) -> torch.Tensor:
        """``hidden_states[layer]``, (rows, tokens, hidden): 0 are the token embeddings, ``n_blocks`` what is behind the
        last block and the final norm.
        """
        states: torch.Tensor
        if layer == self.n_blocks:
            states = self.base(**inputs, use_cache=False).last_hidden_state
            return states
        if not self._cut:
            states = self.base(**inputs, use_cache=False, output_hidden_states=True).hidden_states[layer]
            return states
        token = self._end.set(layer)
        try:
            self.base(**inputs, use_cache=False)
        except _Reached as reached:
            return reached.states
        finally:
            self._end.reset(token)
        raise RuntimeError(f"{type(self.base).__name__} has no block {layer} on its way")
