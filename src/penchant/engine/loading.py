"""From a name, hub id or folder (and an adapter) to an engine. Anything wrong ends here, before any work."""

from __future__ import annotations

import hashlib
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import huggingface_hub
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from penchant.errors import ConfigError, ModelError
from penchant.fetch import KNOWN, fetch
from penchant.files import sha256_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from penchant.engine.transformers import TransformersEngine

DType = Literal["auto", "bfloat16", "float16", "float32"]

_MODELS = sorted(name for name, known in KNOWN.items() if known.kind == "model")

# Files that decide what a model says. No pickled weights: safetensors only.
_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
# Past this size a file is identified by its length and 1 MiB windows spread over it, not by all of it.
_HASH_WHOLE = 64 * 2**20
_WINDOWS = 16


def load_engine(
    model: str | Path,
    adapter: str | Path | None = None,
    *,
    dtype: DType = "bfloat16",
    device: str = "auto",
    backend: Literal["transformers"] = "transformers",
    max_batch_tokens: int = 4096,
) -> TransformersEngine:
    """Load a causal language model as an engine.

    ``model`` is a name `penchant fetch` knows (``smollm2-135m``), a folder, or a hub id; ``adapter`` a
    folder or hub id in peft's format. ``device`` "auto" takes CUDA where there is one. Weights come from
    safetensors only, and no code of the model's repository is run. ModelError where any of it is missing
    or where the adapter changes nothing.
    """
    from penchant.engine.transformers import TransformersEngine

    if backend != "transformers":
        raise ConfigError(f"unknown backend {backend!r}", remedy="use backend='transformers'")
    if dtype not in ("auto", "bfloat16", "float16", "float32"):
        raise ConfigError(f"unknown dtype {dtype!r}", remedy="use auto, bfloat16, float16 or float32")
    folder = resolve_model(model)
    where = resolve_device(device)
    _require_weights(folder)
    try:
        loaded: PreTrainedModel
        loaded, found = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto" if dtype == "auto" else getattr(torch, dtype),
            attn_implementation="sdpa",
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises no less, and malformed JSON ends in errors of any type
        raise ModelError(
            f"cannot be loaded as a causal language model: {error}",
            where=str(folder),
            remedy="the folder needs config.json, safetensors weights and a tokenizer, all of one model",
        ) from error
    if found["missing_keys"]:
        names = sorted(found["missing_keys"])
        raise ModelError(
            f"lacks {len(names)} of the model's weights, such as {names[0]}; they would be random",
            where=str(folder),
            remedy="config.json and the weights must be of one causal language model: fetch or save it again",
        )
    try:
        loaded = loaded.to(where)
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        raise ConfigError(f"cannot move the model to device {device!r}: {error}", remedy="use auto or cpu") from error
    fingerprint = fingerprint_of(folder)
    if adapter is not None:
        adapter_folder = _resolve(adapter, "adapter")
        loaded = _with_adapter(loaded, adapter_folder)
        fingerprint += "+" + fingerprint_of(adapter_folder)
    name = str(loaded.dtype).removeprefix("torch.")
    return TransformersEngine(
        loaded,
        tokenizer,
        fingerprint=f"{fingerprint}:{name}",
        max_batch_tokens=max_batch_tokens,
        source={
            "model": str(model),
            "adapter": None if adapter is None else str(adapter),
            "dtype": dtype,
            "device": device,
            "backend": backend,
        },
    )


def resolve_model(model: str | Path) -> Path:
    """The local folder of a model: fetched by name, a folder as it is, or a snapshot of a hub id."""
    return fetch(model) if isinstance(model, str) and model in _MODELS else _resolve(model, "model")


def _resolve(name: str | Path, kind: str) -> Path:
    if os.path.isdir(name):
        return Path(name)
    try:
        return Path(huggingface_hub.snapshot_download(str(name), allow_patterns=_PATTERNS))
    except HFValidationError as error:
        raise ModelError(
            f"no such {kind} folder", where=str(name), remedy="give an existing folder, or a hub id like owner/name"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise ModelError(
            f"no such {kind} folder, and the hub did not give it: {str(error).splitlines()[0]}",
            where=str(name),
            remedy=f"check the name and the network, or use one of: {', '.join(_MODELS)}",
        ) from error


def _require_weights(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ModelError("has no config.json", where=str(folder), remedy="give a model's folder, not its parent")
    if not any(folder.glob("*.safetensors")):
        others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".gguf"))
        raise ModelError(
            f"has no *.safetensors weights (found {', '.join(others) or 'none in other formats either'})",
            where=str(folder),
            remedy="save the model with save_pretrained; pickled weights are not loaded",
        )


def resolve_device(device: str) -> torch.device:
    """The torch device of that name; "auto" is CUDA where there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"unknown device {device!r}", remedy="use auto, cpu or cuda") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda asked for, and torch sees none", remedy="use device='cpu' or 'auto'")
    return found


def _with_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Put a peft adapter on the model, refusing one that changes no logit (an adapter saved empty)."""
    if not (folder / "adapter_config.json").is_file():
        raise ModelError("has no adapter_config.json", where=str(folder), remedy="give a peft adapter's folder")
    if not (folder / "adapter_model.safetensors").is_file():
        raise ModelError(
            "has no adapter_model.safetensors", where=str(folder), remedy="save it with peft's save_pretrained"
        )
    try:
        with warnings.catch_warnings():
            # peft only warns of keys that fit nothing
            warnings.simplefilter("error", UserWarning)
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            wrapped = PeftModel.from_pretrained(model, folder)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, UserWarning, SafetensorError) as error:
        raise ModelError(
            f"does not fit this model: {error}", where=str(folder), remedy="use the adapter's own base model"
        ) from error
    wrapped.eval()
    size = int(model.get_input_embeddings().weight.shape[0])
    ids = torch.arange(1, 33, device=model.device).remainder(size).unsqueeze(0)
    with torch.inference_mode():
        adapted = wrapped(input_ids=ids, use_cache=False).logits
        with wrapped.disable_adapter():
            plain = wrapped(input_ids=ids, use_cache=False).logits
    if torch.equal(adapted, plain):
        raise ModelError(
            "loading this adapter changes no logit: it is empty or was trained on another model",
            where=str(folder),
            remedy="look at how it was saved; an adapter that learnt something is not all zeros",
        )
    base: PreTrainedModel = wrapped.get_base_model()
    return base


def describe_device() -> str:
    """One line on what "auto" would run on, with free memory in GiB."""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return f"{torch.cuda.get_device_name()}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    return f"CPU, {torch.get_num_threads()} threads (torch sees no CUDA device)"


def describe_model(folder: Path) -> dict[str, int]:
    """Sizes from a model's config alone, for estimates: n_layers, hidden, vocabulary, context (tokens), bytes."""
    _require_weights(folder)
    config = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()
    return {
        "n_layers": int(config.num_hidden_layers),
        "hidden": int(config.hidden_size),
        "vocabulary": int(config.vocab_size),
        "context": int(getattr(config, "max_position_embeddings", 0) or 0),
        "bytes": sum(p.stat().st_size for p in folder.glob("*.safetensors")),
    }


def fingerprint_of(folder: Path) -> str:
    """16 hex digits over the names and contents of the files that decide what a model says."""
    digest = hashlib.sha256()
    files = {p for pattern in _PATTERNS for p in folder.glob(pattern) if p.is_file() and p.name != "manifest.json"}
    for path in sorted(files, key=lambda p: p.name):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        if size <= _HASH_WHOLE:
            digest.update(sha256_file(path).encode())
            continue
        with path.open("rb") as handle:
            for window in range(_WINDOWS):
                handle.seek((size - 2**20) * window // (_WINDOWS - 1))
                digest.update(handle.read(2**20))
    return digest.hexdigest()[:16]
