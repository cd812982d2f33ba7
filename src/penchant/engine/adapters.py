"""peft adapters: put on a model, merged into its weights, or checked before vLLM takes them as requests."""

from __future__ import annotations

import re
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from penchant.adapter_card import read_card
from penchant.engine.folders import fingerprint_of
from penchant.engine.weights import load_tokenizer, load_weights
from penchant.errors import ModelError
from penchant.fetch import cache_folder
from penchant.files import read_json, sha256_text, staged_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What peft can do and vLLM's LoRA cannot, by the key of adapter_config.json; None, False and empty values are fine.
_NOT_AS_REQUEST = (
    "modules_to_save", "trainable_token_indices", "use_dora", "lora_bias", "alora_invocation_tokens",
    "layer_replication", "target_parameters", "use_qalora", "use_bdlora",
)  # fmt: skip
# Ways to begin training that leave the base as it was; others (PiSSA, LoftQ) change the base too.
_PLAIN_BEGINNINGS = ("gaussian", "orthogonal", "eva")
_WEIGHT = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


def with_adapter(model: PreTrainedModel, folder: Path, *, trainable: bool = False, merging: bool = False) -> Any:
    """The model with a peft adapter on it, a PeftModel.

    Refused are one that changes no logit (saved empty), one that works outside the model's own layers (soft prompts),
    which no engine runs, and for ``merging`` one on a matrix that two layers share: merged, it would change both.
    """
    _require_files(folder)
    try:
        with warnings.catch_warnings():
            # peft only warns of keys that fit nothing
            warnings.simplefilter("error", UserWarning)
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            if not merging:
                warnings.filterwarnings("ignore", "(?s).*tie_word_embeddings", UserWarning)
            wrapped = PeftModel.from_pretrained(model, folder, is_trainable=trainable)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, UserWarning, SafetensorError) as error:
        newer = "Unexpected keyword arguments" in str(error)
        remedy = "upgrade peft: a newer one saved it" if newer else "use the adapter's own base model"
        raise ModelError(f"does not fit this model: {error}", where=str(folder), remedy=remedy) from error
    wrapped.eval()
    size = int(model.get_input_embeddings().weight.shape[0])
    ids = torch.arange(1, 33, device=model.device).remainder(size).unsqueeze(0)
    with torch.no_grad():
        adapted = wrapped(input_ids=ids, use_cache=False).logits
        with wrapped.disable_adapter():
            plain = wrapped(input_ids=ids, use_cache=False).logits
        served = wrapped.get_base_model()(input_ids=ids, use_cache=False).logits
    if torch.equal(adapted, plain):
        raise ModelError(
            "loading this adapter changes no logit: it is empty or was trained on another model",
            where=str(folder),
            remedy="look at how it was saved; an adapter that learnt something is not all zeros",
        )
    if served.shape != adapted.shape or not torch.allclose(served, adapted, rtol=1e-2, atol=1e-2):
        raise ModelError(
            f"works outside the model's own layers ({wrapped.active_peft_config.peft_type.value}), and would be lost",
            where=str(folder),
            remedy="give an adapter of the layers themselves: LoRA, DoRA, IA3 and the like",
        )
    return wrapped


def merged_model(base: Path, adapter: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The base with the adapter in its weights, merged in float32 and then cast to ``dtype``.

    Into quantised or rounded weights much of the adapter would be lost.
    """
    wrapped = with_adapter(load_weights(base, torch.float32), adapter, merging=True)
    merged: PreTrainedModel = wrapped.merge_and_unload(safe_merge=True).to(dtype)
    return merged


def merged_folder(base: Path, adapter: Path, dtype: str) -> Path:
    """A folder in the cache with base and adapter as one plain model, made once for their contents."""
    require_own_base(adapter, base)
    out = cache_folder() / "merged" / sha256_text(fingerprint_of(base), fingerprint_of(adapter), dtype)[:32]
    if not out.is_dir():
        with staged_folder(out) as stage:
            merged_model(base, adapter, getattr(torch, dtype)).save_pretrained(stage)
            load_tokenizer(base).save_pretrained(stage)
    return out


def kept_adapter(adapter: Path) -> Path:
    """A copy of a peft adapter in the cache, in a folder that its fingerprint names.

    vLLM reads an adapter's folder when it first needs it and again after it has dropped it, and tells adapters apart by
    name, number and path: one trained again in its place would be served with its old weights, or its new ones to
    whoever holds the old.
    """
    _require_files(adapter)
    out = cache_folder() / "adapters" / fingerprint_of(adapter)
    if not out.is_dir():
        with staged_folder(out) as stage:
            for name in (_CONFIG, _WEIGHTS):
                shutil.copyfile(adapter / name, stage / name)
    return out


def require_own_base(adapter: Path, base: Path) -> None:
    """ModelError where our card says another base: an adapter fits any model of its shapes."""
    trained_on = (read_card(adapter) or {}).get("base")
    if trained_on is not None and trained_on != fingerprint_of(base):
        raise ModelError(
            f"was trained on another model than {base}: its files differ",
            where=str(adapter),
            remedy="give its own base model",
        )


def check_request(adapter: Path, base: Path, max_rank: int) -> None:
    """ModelError for an adapter that changes nothing, or that vLLM would refuse, drop parts of or die of, as a LoRA
    request on this base.
    """
    _require_files(adapter)
    ranks = _require_servable(adapter)
    require_own_base(adapter, base)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base, local_files_only=True))
    linear = {name: m.weight.shape for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    head = model.get_output_embeddings()
    where, changes = str(adapter), False
    for module, (down, up) in _pairs(adapter).items():
        if module not in linear:
            raise ModelError(
                f"has weights for {module}, which is no linear layer of {base}", where=where, remedy=_alone(adapter)
            )
        if model.get_submodule(module) is head:
            raise ModelError(f"changes {module}, which vLLM may drop in silence", where=where, remedy=_alone(adapter))
        rank = down.shape[0]
        if (up.shape[0], down.shape[1]) != linear[module] or up.shape[1] != rank or rank not in ranks:
            raise ModelError(
                f"does not fit this model: A of {module} is {list(down.shape)} and B {list(up.shape)}, the layer "
                f"{list(linear[module])}, and the configuration has rank {' or '.join(map(str, sorted(ranks)))}",
                where=where,
                remedy="use the adapter's own base model, and its configuration as it was saved",
            )
        if not (down.isfinite().all() and up.isfinite().all()):
            raise ModelError(
                f"has weights of {module} that are not finite", where=where, remedy="train it again, at a lower rate"
            )
        changes = changes or bool(down.any() and up.any())
    if not changes:
        raise ModelError(
            "changes nothing: it has no weights, or all are zero",
            where=where,
            remedy="look at how it was saved; an adapter that learnt something is not all zeros",
        )
    if max(ranks) > max_rank:
        raise ModelError(
            f"has rank {max(ranks)}, and the engine was started for {max_rank} at most",
            where=where,
            remedy=f"load the engine with max_lora_rank={max(ranks)} or more",
        )


def _alone(adapter: Path) -> str:
    return f"load it alone, merged: load_engine(model, {str(adapter)!r}, backend='vllm')"


def _require_servable(adapter: Path) -> set[int]:
    """The ranks that the adapter's configuration gives its layers; ModelError where it is more than vLLM's LoRA."""
    config, where, alone = read_json(adapter / _CONFIG), str(adapter), _alone(adapter)
    if not isinstance(config, dict):
        raise ModelError(f"has a {_CONFIG} that is no object", where=where, remedy="save the adapter again")
    if config.get("peft_type") != "LORA":
        raise ModelError(f"is no LoRA adapter but {config.get('peft_type')!r}", where=where, remedy=alone)
    for name in _NOT_AS_REQUEST:
        if config.get(name):
            raise ModelError(f"uses {name}, which vLLM cannot serve as a request", where=where, remedy=alone)
    if config.get("bias", "none") != "none":
        raise ModelError("trains biases, which vLLM cannot serve as a request", where=where, remedy=alone)
    beginning = config.get("init_lora_weights", True)
    if isinstance(beginning, str) and beginning not in _PLAIN_BEGINNINGS:
        raise ModelError(f"began as {beginning}, which changed its base too", where=where, remedy=alone)
    pattern = config.get("rank_pattern") or {}
    ranks = [config.get("r"), *(pattern.values() if isinstance(pattern, dict) else [pattern])]
    if not all(isinstance(rank, int) and rank > 0 for rank in ranks):
        raise ModelError(
            f"has rank {ranks[0]!r} and rank_pattern {pattern!r} in {_CONFIG}",
            where=where,
            remedy="save the adapter again",
        )
    alpha = config.get("lora_alpha")
    if not isinstance(alpha, int | float) or not alpha:
        raise ModelError(f"has lora_alpha {alpha!r} in {_CONFIG}", where=where, remedy="save the adapter again")
    return set(ranks)


def _pairs(adapter: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The weights A (rank, in) and B (out, rank) of each layer that the adapter changes."""
    try:
        with safe_open(adapter / _WEIGHTS, framework="pt") as weights:
            tensors = {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelError(f"cannot be read: {error}", where=str(adapter), remedy="save the adapter again") from error
    sides: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        found = _WEIGHT.fullmatch(name)
        if found is None or tensor.ndim != 2:
            raise ModelError(
                f"has weights for {name}, which are no linear layer's", where=str(adapter), remedy=_alone(adapter)
            )
        sides.setdefault(found["module"], {})[found["side"]] = tensor
    for module, pair in sides.items():
        if len(pair) < 2:
            raise ModelError(
                f"has {next(iter(pair))} alone of {module}'s weights A and B",
                where=str(adapter),
                remedy="save the adapter again",
            )
    return {module: (pair["A"], pair["B"]) for module, pair in sides.items()}


def _require_files(folder: Path) -> None:
    if not (folder / _CONFIG).is_file():
        raise ModelError(f"has no {_CONFIG}", where=str(folder), remedy="give a peft adapter's folder")
    if not (folder / _WEIGHTS).is_file():
        raise ModelError(f"has no {_WEIGHTS}", where=str(folder), remedy="save it with peft's save_pretrained")
