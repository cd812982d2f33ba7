"""A folder's tokenizer and weights: from safetensors alone, whole, or one clear error."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from penchant.engine.folders import require_weights
from penchant.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The folder's tokenizer; ModelError where it can't be read."""
    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises no less, and malformed JSON ends in errors of any type
        raise not_loaded(folder, error) from error
    return found


def load_weights(folder: Path, dtype: torch.dtype, **more: Any) -> PreTrainedModel:
    """The folder's causal language model, from safetensors alone; ModelError where it can't be read or lacks weights.

    ``more`` goes to ``from_pretrained``: a quantisation, say.
    """
    require_weights(folder)
    try:
        loaded: PreTrainedModel
        loaded, found = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation="sdpa",
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **more,
        )
    except Exception as error:  # as above
        raise not_loaded(folder, error) from error
    if found["missing_keys"]:
        names = sorted(found["missing_keys"])
        raise ModelError(
            f"lacks {len(names)} of the model's weights, such as {names[0]}; they would be random",
            where=str(folder),
            remedy="config.json and the weights must be of one causal language model: fetch or save it again",
        )
    return loaded


def not_loaded(folder: Path, error: Exception) -> ModelError:
    return ModelError(
        f"cannot be loaded as a causal language model: {error}",
        where=str(folder),
        remedy="the folder needs config.json, safetensors weights and a tokenizer, all of one model",
    )
