"""A model's blocks, and forwards that end at one of them."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

# Of this thread's forward: the block that it ends at, and what each block is given, where somebody wants to see it.
_END: ContextVar[nn.Module | None] = ContextVar("end", default=None)
_GIVEN: ContextVar[list[tuple[nn.Module, Any]] | None] = ContextVar("given", default=None)
# Engines come and go over the same blocks: each has one hook, which holds on to nothing.
_HOOKED: WeakSet[nn.Module] = WeakSet()


class _Reached(Exception):
    """Thrown through a forward by the block that it ends at, with what that block was given."""

    def __init__(self, states: torch.Tensor) -> None:
        super().__init__()
        self.states = states


def _reach(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    end, given = _END.get(), _GIVEN.get()
    if end is not block and given is None:
        return
    states: Any = args[0] if args else kwargs.get("hidden_states")
    if given is not None:
        given.append((block, states))
    if end is block:
        raise _Reached(states)


def context_of(config: Any) -> int:
    """How many tokens of a text model's configuration fit, where an additive mask of ours replaces the model's own:
    past the window of one that looks back only so far they would differ.
    """
    context = int(getattr(config, "max_position_embeddings", None) or 2**31)
    window = getattr(config, "sliding_window", None)
    return min(context, int(window)) if window and getattr(config, "use_sliding_window", True) else context


def lists_of(model: nn.Module, n_blocks: int) -> list[nn.ModuleList]:
    """The model's lists of so many modules: its blocks, and in some models others too (a vision tower's, experts)."""
    return [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == n_blocks]


class States:
    """Hidden states of a headless model of ``n_blocks`` blocks, which runs no block above those that are asked for.

    Before the first cut it is seen, on two tokens, that blocks are given what the model tells as its hidden states.
    Where none are found, or they get something else, it runs whole.
    """

    def __init__(self, base: Any, n_blocks: int) -> None:
        self.base, self.n_blocks = base, n_blocks
        self._blocks: list[nn.Module] | None = None
        self._looked = False

    def at(self, layer: int, **inputs: torch.Tensor | None) -> torch.Tensor:
        """``hidden_states[layer]``, (rows, tokens, hidden): 0 are the token embeddings, ``n_blocks`` what is behind the
        last block and the final norm.
        """
        if layer < self.n_blocks and not self._looked:
            self._look()
        if layer == self.n_blocks or self._blocks is None:
            states: torch.Tensor = self.base(**inputs, use_cache=False, output_hidden_states=True).hidden_states[layer]
            return states
        token = _END.set(self._blocks[layer])
        try:
            self.base(**inputs, use_cache=False)
        except _Reached as reached:
            return reached.states
        finally:
            _END.reset(token)
        raise RuntimeError(f"{type(self.base).__name__} has no block {layer} on its way")

    @torch.no_grad()
    def _look(self) -> None:
        """Find the blocks: those of a list that are given the hidden states one after the other."""
        lists = lists_of(self.base, self.n_blocks)
        for block in (block for blocks in lists for block in blocks):
            if block not in _HOOKED:
                block.register_forward_pre_hook(_reach, with_kwargs=True)
                _HOOKED.add(block)
        given: list[tuple[nn.Module, Any]] = []
        token = _GIVEN.set(given)
        device = next(self.base.parameters()).device
        # Token 0 may be padding, whose states are zeros: anybody's would be the same.
        ids = torch.tensor([[1, 2]], device=device)
        try:
            # A model in training draws its dropout: as if nobody had looked.
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                told = self.base(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states or ()
        finally:
            _GIVEN.reset(token)
        for blocks in lists:
            took = [(block, states) for block, states in given if any(block is one for one in blocks)]
            if (
                len(told) == self.n_blocks + 1
                and [id(block) for block, _ in took] == [id(block) for block in blocks]
                and all(_same(states, told[i]) for i, (_, states) in enumerate(took))
            ):
                self._blocks = list(blocks)
                break
        self._looked = True


def _same(states: Any, told: Any) -> bool:
    return isinstance(states, torch.Tensor) and isinstance(told, torch.Tensor) and torch.equal(states, told)
