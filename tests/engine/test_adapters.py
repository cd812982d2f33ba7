"""What is looked at before vLLM gets an adapter as a request, and its options: no vLLM is needed to refuse them."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tests import tiny
from transformers import AutoModelForCausalLM

from penchant.engine.adapters import check_request, merged_folder
from penchant.engine.folders import fingerprint_of
from penchant.engine.loading import load_engine
from penchant.engine.vllm_options import VllmOptions
from penchant.engine.vllm_runner import lora_room
from penchant.errors import ConfigError, ModelError


def test_a_plain_adapter_passes(byte_folder: Path, tmp_path: Path) -> None:
    every = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    check_request(tiny.save_adapter(byte_folder, tmp_path / "a", r=8, target_modules=every), byte_folder, 8)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"r": 9}, "has rank 9, and the engine was started for 8 at most"),
        ({"use_dora": True}, "uses use_dora"),
        ({"modules_to_save": ["lm_head"]}, "uses modules_to_save"),
        ({"target_modules": ["q_proj", "lm_head"]}, "has weights for .*lm_head"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens.*no linear layer"),
        ({"trainable_token_indices": [1, 2]}, "uses trainable_token_indices"),
        ({"bias": "all"}, "trains biases"),
        ({"rank_pattern": {"v_proj": 16}}, "has rank 16"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # peft's own about tied weights
def test_what_vllm_cannot_serve_is_refused(byte_folder: Path, tmp_path: Path, config: Any, said: str) -> None:
    adapter = tiny.save_adapter(byte_folder, tmp_path / "a", **config)
    with pytest.raises(ModelError, match=said):
        check_request(adapter, byte_folder, 8)


def test_weights_of_another_shape_or_place_are_refused(byte_folder: Path, tmp_path: Path) -> None:
    other = tiny.save_model(tmp_path / "other", "byte", head=16)
    with pytest.raises(ModelError, match=r"does not fit this model: .* the layer\s+\[32, 32\]"):
        check_request(tiny.save_adapter(other, tmp_path / "a"), byte_folder, 8)
    adapter = tiny.save_adapter(byte_folder, tmp_path / "b")
    weights = load_file(adapter / "adapter_model.safetensors")
    moved = {name.replace("layers.1.", "layers.7."): w for name, w in weights.items()}
    save_file(moved, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="no linear layer"):
        check_request(adapter, byte_folder, 8)


def test_an_adapter_with_our_card_of_another_base_is_refused(byte_folder: Path, tmp_path: Path) -> None:
    adapter = tiny.save_adapter(byte_folder, tmp_path / "a")
    (adapter / "penchant.json").write_text(json.dumps({"base": "0" * 16}))
    with pytest.raises(ModelError, match="was trained on another model"):
        check_request(adapter, byte_folder, 8)
    (adapter / "penchant.json").write_text(json.dumps({"base": fingerprint_of(byte_folder)}))
    check_request(adapter, byte_folder, 8)


def broken(name: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    first = next(n for n in weights if "lora_B" in n)
    if name == "empty":
        return {}
    if name == "half":
        return {n: w for n, w in weights.items() if n != first}
    if name == "narrow B":
        return {n: w[:, :1].contiguous() if n == first else w for n, w in weights.items()}
    if name == "narrow pairs":
        return {n: (w[:, :1] if "lora_B" in n else w[:1]).contiguous() for n, w in weights.items()}
    if name == "zero":
        return {n: w * (0 if "lora_B" in n else 1) for n, w in weights.items()}
    return {n: torch.full_like(w, torch.nan) if n == first else w for n, w in weights.items()}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("empty", "changes nothing"),
        ("half", "has A alone of model.layers.0"),
        ("narrow B", r"does not fit this model: A of .* is \[2, 32\] and B \[\d+, 1\]"),
        ("narrow pairs", "does not fit this model: .* the configuration has rank 2"),
        ("zero", "changes nothing"),
        ("nan", "not finite"),
    ],
)
def test_weights_that_kill_vllm_or_that_it_serves_as_something_else_are_refused(
    byte_folder: Path, tmp_path: Path, name: str, said: str
) -> None:
    adapter = tiny.save_adapter(byte_folder, tmp_path / "a")
    path = adapter / "adapter_model.safetensors"
    save_file(broken(name, load_file(path)), path)
    with pytest.raises(ModelError, match=said):
        check_request(adapter, byte_folder, 8)


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_no_adapter(byte_folder: Path, tmp_path: Path, missing: str) -> None:
    adapter = tiny.save_adapter(byte_folder, tmp_path / "a")
    (adapter / missing).unlink()
    with pytest.raises(ModelError, match=f"has no {missing}"):
        check_request(adapter, byte_folder, 8)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"peft_type": "IA3"}, "is no LoRA adapter but 'IA3'"),
        ({"init_lora_weights": "pissa"}, "began as pissa, which changed its base too"),
        ({"r": None}, "has rank None"),
        ({"r": 0}, "has rank 0"),
        ({"lora_alpha": None}, "has lora_alpha None"),
        ({"lora_alpha": 0}, "has lora_alpha 0"),
        ({"rank_pattern": [4]}, "has rank"),
        (None, "that is no object"),
    ],
)
def test_what_its_configuration_says_is_read(byte_folder: Path, tmp_path: Path, change: Any, said: str) -> None:
    path = tiny.save_adapter(byte_folder, tmp_path / "a") / "adapter_config.json"
    path.write_text(json.dumps([] if change is None else json.loads(path.read_text()) | change))
    with pytest.raises(ModelError, match=said):
        check_request(path.parent, byte_folder, 8)


def test_an_adapter_of_the_head_is_refused_also_where_it_has_nothing_else(tmp_path: Path) -> None:
    """peft itself saves the head's own weights with such an adapter; others need not."""
    base = tiny.save_model(tmp_path / "base", "sentencepiece")
    adapter = tiny.save_adapter(base, tmp_path / "a")
    shapes = {"A": (2, 32), "B": (460, 2)}
    head = {f"base_model.model.lm_head.lora_{side}.weight": torch.ones(shape) for side, shape in shapes.items()}
    save_file(head, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="changes lm_head, which vLLM may drop"):
        check_request(adapter, base, 8)


def test_a_merged_folder_says_what_the_adapter_says_and_is_made_once(byte_folder: Path, tmp_path: Path) -> None:
    adapter = tiny.save_adapter(byte_folder, tmp_path / "a")
    folder = merged_folder(byte_folder, adapter, "float32")
    engine = load_engine(folder, dtype="float32", device="cpu")
    with_adapter = load_engine(byte_folder, adapter, dtype="float32", device="cpu")
    items = engine.codec.encode_items(tiny.TITLES, "\n")
    np.testing.assert_allclose(engine.score(["x"], [items])[0], with_adapter.score(["x"], [items])[0], atol=1e-4)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert merged_folder(byte_folder, adapter, "float32") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    other = tiny.save_adapter(byte_folder, tmp_path / "b", seed=5)
    assert merged_folder(byte_folder, other, "float32") != folder


def test_an_adapter_that_changes_nothing_is_not_merged(byte_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="changes no logit"):
        merged_folder(byte_folder, tiny.save_adapter(byte_folder, tmp_path / "a", spread=0.0), "float32")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kv_cache_dtype": "fp8"}, "is refused: a cache in fewer bits"),
        ({"generation_config": "auto"}, "is refused: a model's own top_k"),
        ({"logprobs_mode": "raw_logits"}, "is refused: scores are raw log-probabilities"),
        ({"speculative_config": {}}, "is refused: a draft model"),
        ({"trust_remote_code": True}, "is refused: no code of a model's repository"),
        ({"data_parallel_size": 2}, "is refused: .*one process a GPU"),
        ({"tensor_parallel": 2}, "(?s)vLLM option tensor_parallel: extra inputs.*tensor_parallel_size"),
        ({"gpu_memory_utilization": 1.5}, "less than or equal to 1"),
        ({"quantization": "int1"}, "vLLM option quantization"),
        (["max_model_len"], "(?s)vLLM options: is .*give a dict"),
        ("max_model_len", "(?s)vLLM options: is .*give a dict"),
        ({1: 2}, "(?s)vLLM options: is .*give a dict"),
    ],
)
def test_options_that_break_scores_or_mean_nothing_are_refused(options: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        VllmOptions.of(options)


def test_options_of_another_backend_are_refused(byte_folder: Path) -> None:
    with pytest.raises(ConfigError, match="options are vLLM's"):
        load_engine(byte_folder, options={"max_model_len": 100})  # type: ignore[call-overload]


def test_every_option_says_what_it_does() -> None:
    assert all(field.description for field in VllmOptions.model_fields.values())
    assert VllmOptions.of({"max_model_len": 100}).changed() == {"max_model_len": 100}
    assert VllmOptions.of(None).changed() == {}


def test_room_for_adapters() -> None:
    assert [lora_room(rank) for rank in (1, 8, 9, 300, 512)] == [8, 8, 16, 320, 512]
    with pytest.raises(ConfigError, match="512 at most"):
        lora_room(513)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # peft's own
@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_an_adapter_outside_the_layers_is_refused_and_not_lost(byte_folder: Path, tmp_path: Path, kind: Any) -> None:
    plain = AutoModelForCausalLM.from_pretrained(byte_folder, dtype=torch.float32)
    made = get_peft_model(plain, kind(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "prompt" in name:
                weight.normal_(std=2)
    made.save_pretrained(tmp_path / "soft")
    for load in (
        lambda: load_engine(byte_folder, tmp_path / "soft", dtype="float32", device="cpu"),
        lambda: merged_folder(byte_folder, tmp_path / "soft", "float32"),
    ):
        with pytest.raises(ModelError, match="outside the model's own layers"):
            load()


def test_an_adapter_of_a_shared_matrix_is_served_and_not_merged(byte_folder: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own about tied weights
        adapter = tiny.save_adapter(byte_folder, tmp_path / "a", target_modules=["q_proj", "lm_head"])
    served = load_engine(byte_folder, adapter, dtype="float32", device="cpu").score(["x"], [["ab", "cd"]])[0]
    plain = load_engine(byte_folder, dtype="float32", device="cpu").score(["x"], [["ab", "cd"]])[0]
    assert not np.allclose(served, plain)
    with pytest.raises(ModelError, match=r"(?s)does not fit this model.*tie"):
        merged_folder(byte_folder, adapter, "float32")


def test_an_adapter_of_a_newer_peft_says_so(byte_folder: Path, tmp_path: Path) -> None:
    path = tiny.save_adapter(byte_folder, tmp_path / "a") / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"of_the_future": None}))
    with pytest.raises(ModelError, match="upgrade peft"):
        load_engine(byte_folder, tmp_path / "a", dtype="float32", device="cpu")


def test_a_base_that_lacks_weights_is_not_merged(byte_folder: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(byte_folder, base)
    weights = load_file(base / "model.safetensors")
    save_file(
        {n: w for n, w in weights.items() if "0.mlp.down_proj" not in n}, base / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ModelError, match="they would be random"):
        merged_folder(base, tiny.save_adapter(byte_folder, tmp_path / "a"), "float32")
