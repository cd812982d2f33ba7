"""Merging: the plain model says what base and adapter say together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests import tiny
from tests.conftest import toy_frames
from tests.training.helpers import settings
from transformers import AutoModelForCausalLM

from penchant.data.dataset import Dataset
from penchant.engine.loading import load_engine
from penchant.errors import ConfigError, ModelError, StorageError
from penchant.training.merge import _PROMPTS, _TEXTS, merge
from penchant.training.recipes import finetune

HISTORY = ["One user's history, in the order of time, one title a line:\nUp (2009)\n", "x"]
ITEMS = ["Heat (1986)\n", "Aliens (1986)\n", "七人の侍 (1954)\n"]


@pytest.fixture(scope="module")
def adapter(byte_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("merge") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PENCHANT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        config = settings(byte_folder, epochs=3, learning_rate=2e-2)
        finetune("next_item", config, Dataset.read(*toy_frames()), out)
    return out


def scores(model: Path, adapter: Path | None, prompts: Any = HISTORY, texts: Any = ITEMS) -> Any:
    engine = load_engine(model, adapter, dtype="float32", device="cpu")
    return np.concatenate(engine.score(list(prompts), [list(texts)] * len(prompts)))


def test_a_float32_merge_says_what_the_adapter_says(byte_folder: Path, adapter: Path, tmp_path: Path) -> None:
    done = merge(adapter, tmp_path / "merged", dtype="float32")
    assert done.folder == tmp_path / "merged"
    together = scores(byte_folder, adapter)
    assert scores(tmp_path / "merged", None) == pytest.approx(together, abs=1e-4)
    assert np.abs(together - scores(byte_folder, None)).max() > 0.1
    assert done.max_moved < 1e-4
    assert not list((tmp_path / "merged").glob("adapter_*"))


def test_a_bfloat16_merge_moves_as_far_as_it_says(byte_folder: Path, adapter: Path, tmp_path: Path) -> None:
    done = merge(adapter, tmp_path / "merged")
    weights = load_file(next((tmp_path / "merged").glob("*.safetensors")))
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}
    moved = np.abs(scores(tmp_path / "merged", None, _PROMPTS, _TEXTS) - scores(byte_folder, adapter, _PROMPTS, _TEXTS))
    assert done.mean_moved == pytest.approx(moved.mean(), abs=1e-4)
    assert done.max_moved == pytest.approx(moved.max(), abs=1e-4)
    assert 1e-4 < done.mean_moved < done.max_moved
    assert done.dtype == "bfloat16"
    card = json.loads((tmp_path / "merged" / "penchant.json").read_text())
    assert card["merged"]["dtype"] == "bfloat16"
    assert card["merged"]["max_moved_nats"] == done.max_moved
    assert card["recipe"] == "next_item"


def test_the_merge_itself_is_in_float32(byte_folder: Path, adapter: Path, tmp_path: Path) -> None:
    """W + scale B A in float32, and only then rounded: to the last bit of bfloat16."""
    merge(adapter, tmp_path / "merged")
    saved = load_file(next((tmp_path / "merged").glob("*.safetensors")))
    base = AutoModelForCausalLM.from_pretrained(byte_folder, dtype=torch.float32).state_dict()
    parts = load_file(adapter / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    a, b = (parts[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
    wanted = (base[f"{name}.weight"] + 8 / 4 * (b @ a)).bfloat16()
    assert torch.equal(saved[f"{name}.weight"], wanted)


def test_a_model_merged_from_nf4_training_is_of_the_unquantised_base(toy: Dataset, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny.tokenizer("byte")
    base = tmp_path / "base"
    LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=1,
                    num_attention_heads=2, num_key_value_heads=2, initializer_range=0.2)
    ).save_pretrained(base)  # fmt: skip
    tokenizer.save_pretrained(base)
    config = settings(base, quantization="nf4", max_steps=3)
    finetune("next_item", config, toy, tmp_path / "run")
    merge(tmp_path / "run", tmp_path / "merged", dtype="float32")
    assert scores(tmp_path / "merged", None) == pytest.approx(scores(base, tmp_path / "run"), abs=1e-4)


def test_the_merged_folder_keeps_its_templates(adapter: Path, tmp_path: Path) -> None:
    merge(adapter, tmp_path / "merged")
    for path in (adapter / "prompts").iterdir():
        assert (tmp_path / "merged" / "prompts" / path.name).read_bytes() == path.read_bytes()


def test_an_existing_folder_is_refused(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(StorageError, match="stands there already"):
        merge(adapter, tmp_path / "mine")


@pytest.mark.parametrize("kind", ["other shapes", "same shapes"])
def test_a_wrong_base_is_refused(adapter: Path, tmp_path: Path, kind: str) -> None:
    other = tiny.save_model(tmp_path / "base", "sentencepiece" if kind == "other shapes" else "byte", seed=3)
    with pytest.raises(ModelError, match="trained on another model"):
        merge(adapter, tmp_path / "merged", base=str(other))
    assert not (tmp_path / "merged").exists()


def test_an_adapter_of_somebody_else_is_merged_by_peft_alone(byte_folder: Path, adapter: Path, tmp_path: Path) -> None:
    """Without our card: peft's own config names the base; shapes that don't fit are refused."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (bare / name).write_bytes((adapter / name).read_bytes())
    merge(bare, tmp_path / "merged", dtype="float32")
    assert scores(tmp_path / "merged", None) == pytest.approx(scores(byte_folder, adapter), abs=1e-4)
    from transformers import LlamaConfig, LlamaForCausalLM

    wider = tmp_path / "wider"
    LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=48, intermediate_size=48, num_hidden_layers=2,
                                 num_attention_heads=2, num_key_value_heads=2)).save_pretrained(wider)  # fmt: skip
    with pytest.raises(ModelError, match="does not fit this model"):
        merge(bare, tmp_path / "other", base=str(wider))


@pytest.mark.parametrize(("content", "words"), [(None, "no adapter_config.json"), ("{}", "names no base model")])
def test_what_is_no_adapter_is_refused(tmp_path: Path, content: str | None, words: str) -> None:
    (tmp_path / "x").mkdir()
    if content is not None:
        (tmp_path / "x" / "adapter_config.json").write_text(content)
    with pytest.raises(ModelError, match=words):
        merge(tmp_path / "x", tmp_path / "merged")


@pytest.mark.parametrize("dtype", ["int8", "nonsense", "auto"])
def test_an_unknown_dtype_is_refused(adapter: Path, tmp_path: Path, dtype: Any) -> None:
    with pytest.raises(ConfigError, match="unknown dtype"):
        merge(adapter, tmp_path / "merged", dtype=dtype)
