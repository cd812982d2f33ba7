"""Forwards that end early: the same states, and only the blocks that they need."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from transformers import (
    GemmaConfig,
    GemmaModel,
    GPT2Config,
    GPT2Model,
    GPTNeoXConfig,
    GPTNeoXModel,
    LlamaConfig,
    LlamaModel,
    OPTConfig,
    OPTModel,
)

from penchant.engine.blocks import States

SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
KINDS: dict[str, Any] = {
    "llama": lambda: LlamaModel(LlamaConfig(**SMALL, intermediate_size=32)),
    "gemma": lambda: GemmaModel(GemmaConfig(**SMALL, intermediate_size=32, num_key_value_heads=1, head_dim=8)),
    "gpt2": lambda: GPT2Model(GPT2Config(vocab_size=50, n_embd=16, n_layer=3, n_head=2, n_positions=32)),
    "neox": lambda: GPTNeoXModel(GPTNeoXConfig(**SMALL, intermediate_size=32)),
    "opt": lambda: OPTModel(OPTConfig(**SMALL, ffn_dim=32, word_embed_proj_dim=16)),
}
IDS = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 0]])
INPUTS = {"input_ids": IDS, "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])}


@pytest.fixture(params=sorted(KINDS))
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return KINDS[request.param]().eval()


def _note(ran: list[int], i: int, *given: Any) -> None:
    ran.append(i)


def counted(model: Any) -> list[int]:
    """Takes up which blocks have run."""
    ran: list[int] = []
    blocks = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 3)
    for i, block in enumerate(blocks):
        block.register_forward_hook(partial(_note, ran, i))
    return ran


def test_states_are_the_models_own_and_cost_no_block_above_them(model: Any) -> None:
    states, ran = States(model, 3), counted(model)
    with torch.inference_mode():
        wanted = model(**INPUTS, output_hidden_states=True).hidden_states
        assert torch.equal(states.at(0, **INPUTS), wanted[0])  # it has looked
        for layer in range(4):
            ran.clear()
            assert torch.equal(states.at(layer, **INPUTS), wanted[layer])
            assert ran == list(range(layer))
        # What else runs the model is not cut.
        assert torch.equal(model(**INPUTS).last_hidden_state, wanted[3])


def whole(model: Any, states: States) -> None:
    """The states are right, and every block was run."""
    ran = counted(model)
    with torch.inference_mode():
        wanted = model(**INPUTS, output_hidden_states=True).hidden_states
        states.at(1, **INPUTS)
        ran.clear()
        assert torch.equal(states.at(1, **INPUTS), wanted[1])
    assert ran == [0, 1, 2]


def test_blocks_that_are_given_something_else_run_whole(model: Any) -> None:
    blocks = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 3)
    # The second block is given twice what the model tells.
    blocks[1].register_forward_pre_hook(
        lambda module, args, kwargs: (tuple(2 * a for a in args[:1]) + args[1:], kwargs), with_kwargs=True
    )
    whole(model, States(model, 3))


def test_a_list_of_another_length_is_not_the_blocks(model: Any) -> None:
    whole(model, States(model, 5))


def test_of_two_lists_the_one_on_the_way_is_taken() -> None:
    torch.manual_seed(0)
    model = KINDS["llama"]()
    other = torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(3)])
    model._modules = {"tower": other, **model._modules}
    states = States(model.eval(), 3)
    ran: list[int] = []
    for i, block in enumerate(model.layers):
        block.register_forward_hook(partial(_note, ran, i))
    with torch.inference_mode():
        wanted = model(**INPUTS, output_hidden_states=True).hidden_states
        states.at(0, **INPUTS)
        ran.clear()
        assert torch.equal(states.at(2, **INPUTS), wanted[2])
    assert ran == [0, 1]


def test_engines_over_one_model_share_its_hooks_and_hold_nothing() -> None:
    model = KINDS["llama"]().eval()
    for _ in range(3):
        States(model, 3).at(1, **INPUTS)
    assert [len(block._forward_pre_hooks) for block in model.layers] == [1, 1, 1]
    copy.deepcopy(States(model, 3)).at(1, **INPUTS)
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_another_threads_forward_is_not_cut() -> None:
    torch.manual_seed(0)
    model = KINDS["llama"]().eval()
    states = States(model, 3)
    inside, go_on = threading.Event(), threading.Event()

    def wait(*given: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            go_on.wait(10)

    next(iter(model.layers)).register_forward_pre_hook(wait)
    found: list[torch.Tensor] = []

    def cut() -> None:
        with torch.inference_mode():
            found.append(states.at(1, **INPUTS))

    other = threading.Thread(target=cut)
    other.start()
    assert inside.wait(10)
    with torch.inference_mode():
        wanted = model(**INPUTS, output_hidden_states=True).hidden_states
    go_on.set()
    other.join()
    assert len(wanted) == 4
    assert torch.equal(found[0], wanted[1])
