"""From a name, hub id or folder (and an adapter) to an engine. Anything wrong ends here, before any work."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, overload

import torch
from safetensors import safe_open
from transformers import AutoConfig

from penchant.engine.adapters import merged_folder, require_own_base, with_adapter
from penchant.engine.device import DType, resolve_device, resolve_dtype, warn_of_emulation
from penchant.engine.folders import fingerprint_of, lasting, require_weights, resolve_adapter, resolve_model
from penchant.engine.weights import load_tokenizer, load_weights, not_loaded
from penchant.errors import ConfigError

if TYPE_CHECKING:
    from penchant.engine.transformers import TransformersEngine
    from penchant.engine.vllm import VllmEngine
    from penchant.engine.vllm_options import VllmOptions


@overload
def load_engine(
    model: str | Path,
    adapter: str | Path | None = None,
    *,
    dtype: DType = "auto",
    device: str = "auto",
    backend: Literal["transformers"] = "transformers",
    max_batch_tokens: int = 4096,
) -> TransformersEngine: ...
@overload
def load_engine(
    model: str | Path,
    adapter: str | Path | None = None,
    *,
    dtype: DType = "auto",
    device: str = "auto",
    backend: Literal["vllm"],
    options: VllmOptions | Mapping[str, Any] | None = None,
) -> VllmEngine: ...
def load_engine(
    model: str | Path,
    adapter: str | Path | None = None,
    *,
    dtype: DType = "auto",
    device: str = "auto",
    backend: Literal["transformers", "vllm"] = "transformers",
    max_batch_tokens: int = 4096,
    options: VllmOptions | Mapping[str, Any] | None = None,
) -> TransformersEngine | VllmEngine:
    """Load a causal language model as an engine.

    ``model`` is a name `penchant fetch` knows (``smollm2-135m``), a folder, or a hub id; ``adapter`` a
    folder or hub id in peft's format. ``device`` "auto" takes CUDA where there is one, and ``dtype`` "auto" bfloat16
    where that device computes it, else float32 (processors without it emulate it, many times slower); which of them it
    was stands in the fingerprint and in ``source``. Weights come from safetensors only, and no code of the model's
    repository is run. ModelError where any of it is missing or where the adapter changes nothing.

    ``backend`` "transformers" runs anywhere and bounds a forward by ``max_batch_tokens``; "vllm" serves fast and takes
    the ``options`` of VllmOptions. Both have the same fingerprint: in float32 one stands in for the other.
    """
    if backend not in ("transformers", "vllm"):
        raise ConfigError(f"unknown backend {backend!r}", remedy="use backend='transformers' or 'vllm'")
    if dtype not in get_args(DType):
        raise ConfigError(f"unknown dtype {dtype!r}", remedy="use auto, bfloat16, float16 or float32")
    if options is not None and backend != "vllm":
        raise ConfigError(f"options are vLLM's, and the backend is {backend!r}", remedy="give backend='vllm' too")
    folder = resolve_model(model)
    require_weights(folder)
    source = {
        "model": lasting(model, folder),
        "adapter": None,
        "device": device,
        "backend": backend,
    }
    adapter_folder: Path | None = None
    if adapter is not None:
        adapter_folder = resolve_adapter(adapter)
        source["adapter"] = lasting(adapter, adapter_folder)
    fingerprint = "+".join(fingerprint_of(part) for part in (folder, adapter_folder) if part is not None)
    if backend == "vllm":
        return _load_vllm(folder, adapter_folder, fingerprint, dtype, device, options, source)
    from penchant.engine.transformers import TransformersEngine

    where = resolve_device(device)
    numbers = resolve_dtype(dtype, where)
    warn_of_emulation(numbers, where)
    tokenizer = load_tokenizer(folder)
    loaded = move(load_weights(folder, getattr(torch, numbers)), where)
    if adapter_folder is not None:
        require_own_base(adapter_folder, folder)
        loaded = with_adapter(loaded, adapter_folder).get_base_model()
    return TransformersEngine(
        loaded,
        tokenizer,
        fingerprint=f"{fingerprint}:{numbers}",
        max_batch_tokens=max_batch_tokens,
        source=source | {"dtype": numbers},
    )


def _load_vllm(
    folder: Path,
    adapter: Path | None,
    fingerprint: str,
    dtype: DType,
    device: str,
    options: VllmOptions | Mapping[str, Any] | None,
    source: dict[str, Any],
) -> VllmEngine:
    from penchant.engine.vllm import VllmEngine
    from penchant.engine.vllm_options import VllmOptions

    chosen = VllmOptions.of(options)
    if adapter is not None:  # merged, it takes no other, and room for others would only make scoring slow
        chosen = chosen.model_copy(update={"max_lora_rank": 0})
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"unknown device {device!r}", remedy="use auto, cpu or cuda; CUDA_VISIBLE_DEVICES says which")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()
    except Exception as error:  # malformed JSON ends in errors of any type
        raise not_loaded(folder, error) from error
    tokenizer = load_tokenizer(folder)
    numbers = _vllm_dtype(dtype, chosen)
    quantised = "" if chosen.quantization is None else f"/{chosen.quantization}"
    return VllmEngine(
        folder if adapter is None else merged_folder(folder, adapter, numbers),
        tokenizer,
        dtype=numbers,
        device=device,
        options=chosen,
        fingerprint=f"{fingerprint}:{numbers}{quantised}",
        n_layers=int(config.num_hidden_layers),
        hidden_size=int(config.hidden_size),
        vocabulary=int(config.vocab_size),
        source=source | {"dtype": numbers} | ({"options": chosen.changed()} if chosen.changed() else {}),
    )


def _vllm_dtype(dtype: DType, options: VllmOptions) -> str:
    """What "auto" is for vLLM: on a GPU, and with quantised weights, which take 16 bits only, bfloat16.

    What a GPU computes isn't asked: that would open CUDA in this process, and vLLM could fork none of its own then. It
    refuses bfloat16 itself where a GPU has none.
    """
    if dtype == "auto" and (torch.cuda.is_available() or options.quantization is not None):
        return "bfloat16"
    return resolve_dtype(dtype, torch.device("cpu"))


def move(model: Any, where: torch.device) -> Any:
    """The model on that device; ConfigError where it can't be there."""
    try:
        return model.to(where)
    except (RuntimeError, NotImplementedError, AssertionError) as error:  # torch asserts that it has CUDA
        raise ConfigError(
            f"cannot move the model to device {str(where)!r}: {error}", remedy="use auto, cpu or cuda"
        ) from error


def describe_model(folder: Path) -> dict[str, int]:
    """Sizes without loading, for estimates: n_layers, hidden, vocabulary, context (tokens), weights (numbers)."""
    require_weights(folder)
    config = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()
    weights = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="numpy") as tensors:
            weights += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return {
        "n_layers": int(config.num_hidden_layers),
        "hidden": int(config.hidden_size),
        "vocabulary": int(config.vocab_size),
        "context": int(getattr(config, "max_position_embeddings", 0) or 0),
        "weights": weights,
    }
