"""The model in training: base weights (quantised or not), the adapter on them, and its forward over a batch."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from penchant.engine.adapters import require_own_base, with_adapter
from penchant.engine.blocks import States, lists_of
from penchant.engine.device import resolve_device, resolve_dtype, warn_of_emulation
from penchant.engine.folders import resolve_adapter, resolve_model
from penchant.engine.loading import move
from penchant.engine.weights import load_weights
from penchant.errors import ConfigError, ModelError
from penchant.interest.vectors import default_layer
from penchant.training.batch import Batch
from penchant.training.config import ContrastiveConfig, TrainConfig
from penchant.training.losses import token_logprobs

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Student(nn.Module):
    """A causal LM whose forward gives what the losses need, and not the logits of every position.

    With a ``layer`` (1 to the number of blocks) it is trained to embed: forward pools the states of that layer.
    ``computes`` is what a forward's matrices are multiplied in, where that is not what the weights are kept in.
    """

    def __init__(self, model: nn.Module, layer: int | None = None, computes: torch.dtype | None = None) -> None:
        super().__init__()
        self.model, self.layer, self._computes = model, layer, computes
        if layer is not None:
            base: Any = self.causal_lm.base_model
            self._states = States(base, int(base.config.get_text_config().num_hidden_layers))

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The Hugging Face model itself, the adapter's layers inside it."""
        model: Any = self.model
        return model.get_base_model() if isinstance(model, PeftModel) else model

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are kept in, and the mask: autocast takes both to what attention computes in."""
        return self.causal_lm.get_input_embeddings().weight.dtype

    def forward(self, batch: Batch) -> torch.Tensor:
        """log p of the labels (m,) float32; with choices their logits (m, c); with a layer texts' vectors (s, d)."""
        device = batch.tokens.device.type
        mixed = self._computes is not None and self._computes != self.dtype
        with torch.autocast(device, dtype=self._computes, enabled=mixed):
            return self._forward(batch)

    def _forward(self, batch: Batch) -> torch.Tensor:
        model = self.causal_lm
        base: Any = model.base_model
        inputs = {"input_ids": batch.tokens, "position_ids": batch.position, "attention_mask": batch.mask}
        if self.layer is not None:
            states = self._states.at(self.layer, **inputs)
            weighted = states.flatten(0, 1)[batch.at].float() * batch.weight.unsqueeze(1)
            vectors = torch.zeros(len(batch.group), weighted.shape[1], device=weighted.device)
            return vectors.index_add(0, batch.sequence, weighted)
        chosen = base(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)[batch.at]
        head: Any = model.get_output_embeddings()
        if len(batch.choices):
            bias = getattr(head, "bias", None)
            return nn.functional.linear(
                chosen, head.weight[batch.choices], None if bias is None else bias[batch.choices]
            ).float()
        return token_logprobs(chosen, head, batch.label)

    @contextmanager
    def adapter_off(self) -> Iterator[None]:
        """The reference: the same weights with the adapter switched off, and without the dropout of training."""
        if not isinstance(self.model, PeftModel):
            raise ConfigError(
                "there is no adapter to switch off, and so no reference", where="training", remedy="use method lora"
            )
        learns = self._learns()
        training = self.training
        self.eval()
        try:
            with self.model.disable_adapter():
                yield
        finally:
            self.train(training)
            self._learn(learns)  # peft lets all of the adapter learn again

    @contextmanager
    def as_saved(self, folder: Path) -> Iterator[None]:
        """The same base with the adapter that was saved in ``folder``, read back by stock peft as a second one."""
        model: Any = self.model
        learns = self._learns()
        with warnings.catch_warnings():  # peft only warns of keys that are missing
            warnings.simplefilter("error", UserWarning)
            model.load_adapter(str(folder), adapter_name="saved")
        model.set_adapter("saved")
        try:
            yield
        finally:
            model.set_adapter("default")
            model.delete_adapter("saved")
            self._learn(learns)

    def _learns(self) -> dict[str, bool]:
        return {name: p.requires_grad for name, p in self.model.named_parameters()}

    def _learn(self, learns: Mapping[str, bool]) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(learns[name])

    def save(self, folder: Path) -> None:
        """Plain peft (or, method full, a plain model) as safetensors."""
        model: Any = self.model
        model.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card

    def trainable(self) -> dict[str, nn.Parameter]:
        """The weights that learn, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


def load_student(config: TrainConfig) -> Student:
    """Base, quantised where asked, with a new adapter or ``start_from``'s; the adapter's own weights are float32."""
    folder = resolve_model(config.model)
    device = resolve_device(config.device)
    numbers = resolve_dtype(config.dtype, device)
    warn_of_emulation(numbers, device)
    dtype = getattr(torch, numbers)
    extra: dict[str, Any] = {}
    if config.quantization != "none":
        _require_bitsandbytes()
        extra["quantization_config"] = (
            BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
            )
            if config.quantization == "nf4"
            else BitsAndBytesConfig(load_in_8bit=True)
        )
        extra["device_map"] = {"": device}
    # Weights that learn are float32: in 16 bits a step of less than 1/256 of a weight is lost, and that is most steps.
    model: Any = load_weights(folder, torch.float32 if config.method == "full" else dtype, **extra)
    if config.quantization == "none":
        model = move(model, device)
    else:
        # Not peft's prepare_model_for_kbit_training: its float32 norms would meet a head in bfloat16.
        model.requires_grad_(False)
        _keep_backward(model)
    _check_head(model)
    n_blocks = int(model.config.get_text_config().num_hidden_layers)
    layer = _vector_layer(config, n_blocks) if isinstance(config, ContrastiveConfig) else None
    if config.gradient_checkpointing:
        _recompute(model)
    if config.method == "lora":
        with warnings.catch_warnings():  # peft 0.21 asks transformers 5.23 for a name on its way out
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            warnings.filterwarnings("ignore", ".*tie_word_embeddings", UserWarning)  # refused below
            head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
            shared = head.weight is embeddings.weight
            model = _adapted(model, config, layer or n_blocks, folder)
            if model.get_base_model().get_output_embeddings() is not head:
                raise ConfigError(
                    "the adapter changes the head, which the losses take as one plain matrix",
                    where="lora",
                    remedy="leave the head out of lora.targets, or start from another adapter",
                )
            if shared and model.get_base_model().get_input_embeddings() is not embeddings:
                raise ConfigError(
                    "the adapter changes the token embeddings, which this model shares with its head",
                    where="lora",
                    remedy="leave them out of lora.targets, or start from another adapter",
                )
    student = Student(model, layer, dtype)
    if layer is not None:
        _freeze_above(student.causal_lm, layer, n_blocks)
    return student


def _vector_layer(config: ContrastiveConfig, n_blocks: int) -> int:
    """The layer whose states become vectors, from 1: layer 0 are the token embeddings, which no adapter moves."""
    layer = default_layer(n_blocks) if config.layer is None else config.layer
    layer = layer if layer >= 0 else n_blocks + 1 + layer
    if not 1 <= layer <= n_blocks:
        raise ConfigError(
            f"layer {config.layer} of a model with {n_blocks}",
            where="contrastive",
            remedy=f"use 1 to {n_blocks}, or -1 for the last",
        )
    return layer


def _freeze_above(model: Any, layer: int, n_blocks: int) -> None:
    """Train nothing that has no part in a vector of ``layer``: many processes would wait for its gradient.

    Also the upper blocks of an adapter that training goes on from: they stay as they are.
    """
    blocks = next(iter(lists_of(model, n_blocks)), None)
    if blocks is None:
        raise ModelError(
            f"has no list of its {n_blocks} blocks to be found",
            where=type(model).__name__,
            remedy="use a model of a common kind (Llama, Qwen, Mistral, SmolLM, ...)",
        )
    part = {*model.get_input_embeddings().parameters(), *(p for block in blocks[:layer] for p in block.parameters())}
    for parameter in model.parameters():
        if parameter not in part:
            parameter.requires_grad_(False)


def _adapted(model: Any, config: TrainConfig, top: int, base: Path) -> PeftModel:
    """A new adapter, or ``start_from``'s, on the blocks below ``top``: those above have no part in what is trained."""
    if config.start_from is not None:
        adapter = resolve_adapter(config.start_from)
        require_own_base(adapter, base)
        return with_adapter(model, adapter, trainable=True)
    settings = config.lora
    targets: Any = settings.targets
    layers = None
    n_blocks = int(model.config.get_text_config().num_hidden_layers)
    if settings.last_layers is not None or top < n_blocks:
        count = top if settings.last_layers is None else settings.last_layers
        if count > top:
            raise ConfigError(f"last_layers is {count} of a model with {top}", where="lora")
        layers = list(range(top - count, top))
        if targets == "all-linear":
            targets = sorted(
                {
                    name.rpartition(".")[2]
                    for name, module in model.base_model.named_modules()
                    if isinstance(module, nn.Linear | Conv1D)
                }
            )
    try:
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            adapted = get_peft_model(
                model,
                LoraConfig(
                    task_type="CAUSAL_LM",
                    r=settings.r,
                    lora_alpha=settings.alpha,
                    lora_dropout=settings.dropout,
                    use_rslora=settings.rslora,
                    target_modules=targets,
                    layers_to_transform=layers,
                ),
            )
    except ValueError as error:
        raise ConfigError(
            f"no such adapter on this model: {error}", where="lora", remedy="check lora.targets"
        ) from error
    reached: Any = adapted.base_model.targeted_module_names
    for name in [] if isinstance(targets, str) else targets:
        if not any(module == name or module.endswith(f".{name}") for module in reached):
            raise ConfigError(
                f"{name!r} names no layer that an adapter could be put on", where="lora", remedy="check lora.targets"
            )
    return adapted


def _recompute(model: Any) -> None:
    """Gradient checkpointing under whichever of its two names this transformers has."""
    how = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # since 5.23, where the older name warns
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
    model.enable_input_require_grads()


@torch.no_grad()
def _check_head(model: Any) -> None:
    """Losses take the head as one matrix: a model that scales or caps its logits would be trained wrongly."""
    model.eval()
    ids = torch.arange(4, device=model.device).unsqueeze(0)
    states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    whole = model(input_ids=ids, use_cache=False).logits.float()
    if not torch.allclose(whole, model.get_output_embeddings()(states).float(), atol=1e-2, rtol=1e-2):
        raise ModelError(
            "scales or caps its logits after the head, which these recipes do not train",
            where=type(model).__name__,
            remedy="use a model whose logits are one matrix times its last state (Llama, Qwen, Mistral, SmolLM, ...)",
        )


def _keep_backward(model: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights for inference, as it does for good at a CPU's first eval forward.

    What is packed so has no backward pass: later steps would train the last layers alone, without an error.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def _require_bitsandbytes() -> None:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "quantization needs bitsandbytes", where="training", remedy="pip install 'penchant[quant]'"
        ) from error
