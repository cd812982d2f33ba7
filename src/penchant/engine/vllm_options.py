"""The options of the vLLM engine: what a GPU user expects, and why some of vLLM's are refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from penchant.errors import ConfigError

# vLLM's own options that would change what a score is, or run what the project never runs.
_REFUSED = {
    "trust_remote_code": "no code of a model's repository is run",
    "load_format": "weights come from safetensors only",
    "generation_config": "a model's own top_k and top_p would cut tokens off",
    "override_generation_config": "a model's own top_k and top_p would cut tokens off",
    "logprobs_mode": "scores are raw log-probabilities",
    "logits_processors": "they change the distribution that scores are read from",
    "speculative_config": "a draft model's tokens come without the log-probabilities asked for",
    "kv_cache_dtype": "a cache in fewer bits moves scores by more than the engines may differ",
    "calculate_kv_scales": "a cache in fewer bits moves scores by more than the engines may differ",
    "hf_overrides": "the weights would run under another configuration than they were trained with",
    "rope_scaling": "the weights would run under another configuration than they were trained with",
    "max_logprobs": "no more log-probabilities are asked for than needed",
    "skip_tokenizer_init": "prompts come as token ids of the model's own tokenizer anyway",
    "tokenizer": "the tokens must be the model's own",
    "runner": "the engine starts the runner that each verb needs",
    "convert": "the engine starts the runner that each verb needs",
    "pooler_config": "embed() says which pooling",
    "enable_lora": "give max_lora_rank",
    "data_parallel_size": "vLLM has none within one process: run one process a GPU (CUDA_VISIBLE_DEVICES=0, 1, ...), "
    "each with its own part of the users",
}


class VllmOptions(BaseModel):
    """How vLLM runs. None leaves the choice to vLLM."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tensor_parallel_size: int = Field(1, ge=1, description="GPUs over which each layer is split.")
    pipeline_parallel_size: int = Field(1, ge=1, description="GPUs over which the layers are shared out.")
    quantization: Literal["fp8", "bitsandbytes", "awq", "gptq", "compressed-tensors"] | None = Field(
        None,
        description="Weights in fewer bits. Scores move: the fingerprint says so, such an engine is another.",
    )
    gpu_memory_utilization: float = Field(
        0.45,
        gt=0,
        le=1,
        description="Share of the GPU's memory for each of the two runners: score and generate share one, embed has "
        "one of its own, started by the first call. 0.9 where only one of them is used.",
    )
    kv_cache_gib: float | None = Field(
        None, gt=0, description="GiB of keys and values for each runner, in place of the share. On a CPU: 2 by default."
    )
    max_model_len: int | None = Field(
        None, ge=64, description="Tokens of a prompt and its longest item. None: the model's own context."
    )
    max_num_seqs: int | None = Field(None, ge=1, description="Requests in one step.")
    max_num_batched_tokens: int | None = Field(None, ge=1, description="Tokens in one step.")
    block_size: int | None = Field(
        None, ge=1, description="Tokens of a cached block: what is shared is whole blocks. On a CPU: 32 by default."
    )
    prefix_caching: bool = Field(True, description="Whether what requests have in common is run once.")
    enforce_eager: bool | None = Field(
        None, description="No compilation and no CUDA graphs: a quick start and slower steps. None: on a CPU only."
    )
    max_lora_rank: int = Field(
        0,
        ge=0,
        description="Largest rank of adapters taken by with_adapter; 0 takes none, nor does an engine with one merged.",
    )
    max_loras: int = Field(4, ge=1, description="Adapters that may be in one step.")

    @classmethod
    def of(cls, given: VllmOptions | Mapping[str, Any] | None) -> VllmOptions:
        """Checked options; ConfigError that says why where one is refused, unknown or out of its range."""
        if isinstance(given, VllmOptions):
            return given
        if not isinstance(given or {}, Mapping) or not all(isinstance(name, str) for name in given or ()):
            raise ConfigError(
                f"is {given!r}", where="vLLM options", remedy="give a dict, such as {'max_model_len': 2048}, by name"
            )
        given = dict(given or {})
        for name in given:
            if name in _REFUSED:
                raise ConfigError(f"is refused: {_REFUSED[name]}", where=f"vLLM option {name}", remedy="leave it out")
        try:
            return cls(**given)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"])
            raise ConfigError(
                f"{first['msg'].lower()} (given: {first['input']!r})",
                where=f"vLLM option {name}",
                remedy=f"the options are {', '.join(cls.model_fields)}",
            ) from error

    def changed(self) -> dict[str, Any]:
        """What differs from the defaults, to be kept with a run."""
        return self.model_dump(exclude_defaults=True)
