"""Each recipe from data to adapter, and the adapter read back by others: the same scores."""

from __future__ import annotations

import dataclasses
import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from tests import tiny
from tests.training.helpers import letter_prompts, losses_of, plain_logprobs, settings, steps_of
from tests.training.test_yes_no import entry
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from penchant.data.dataset import Dataset
from penchant.data.split import global_time, leave_last_out
from penchant.engine.loading import load_engine
from penchant.errors import ConfigError, DataError, ModelError
from penchant.prompt import Templates
from penchant.resources import shipped
from penchant.training import next_item, recipes
from penchant.training.config import (
    CONFIGS,
    ChooseConfig,
    ContrastiveConfig,
    NextItemConfig,
    PreferenceConfig,
    TrainConfig,
    YesNoConfig,
)
from penchant.training.journal import read_log
from penchant.training.recipe import TEMPLATES, Recipe
from penchant.training.recipes import cut, finetune
from penchant.training.rows import Row
from penchant.training.start import started
from penchant.training.student import Student, load_student

# A few steps on a random model need not help: that is test_guards.py's matter.
pytestmark = pytest.mark.filterwarnings("ignore:no validation", "ignore:nothing learnt")

PROMPTS = ["One user's history, in the order of time, one title a line:\nHeat (1995)\n", "a b c"]
TEXTS = ["Alien (1979)\n", "Up (2009)\n", "Toy Story (1995)\n", "M"]

KINDS: dict[str, tuple[type[TrainConfig], dict[str, Any]]] = {
    "next_item": (NextItemConfig, {}),
    "yes_no": (YesNoConfig, {"pack_tokens": 400, "negatives": ["unexposed", "hard"], "targets_per_user": 2}),
    "choose": (ChooseConfig, {"pack_tokens": 600, "letters": 5, "targets_per_user": 2, "insert_missed": True}),
    "preference": (PreferenceConfig, {"pack_tokens": 400, "negatives": 2, "learning_rate": 2e-3}),
    "contrastive": (ContrastiveConfig, {"pack_tokens": 400, "hard": 2, "targets_per_user": 3}),
}


def made(name: str, folder: Path, prompts: Path, **changes: Any) -> TrainConfig:
    kind, own = KINDS[name]
    return settings(folder, kind, **{"prompts": str(prompts), "max_steps": 6, "epochs": 3, **own, **changes})


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """The recipes whose students were published, in order."""
    seen: list[Recipe] = []
    plain = recipes.publish

    def publish(recipe: Recipe, *rest: Any) -> None:
        seen.append(recipe)
        plain(recipe, *rest)

    monkeypatch.setattr(recipes, "publish", publish)
    return seen


def scores_of(student: Student) -> np.ndarray[Any, np.dtype[np.float64]]:
    """log p of every text behind every prompt by plain forwards of the trained model itself."""
    tokenizer = AutoTokenizer.from_pretrained(student.causal_lm.config._name_or_path)
    out = []
    with torch.no_grad():
        for prompt in PROMPTS:
            for text in TEXTS:
                ids = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in (prompt, text)]
                out.append(float(plain_logprobs(student.eval(), *ids).sum()))
    return np.array(out)


def reload_scores(base: Path, adapter: Path) -> tuple[Any, Any, Any]:
    """By the engine, by stock peft, and the base alone."""
    engine = load_engine(base, adapter, dtype="float32", device="cpu")
    served = np.concatenate(engine.score(PROMPTS, [TEXTS] * 2))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    alone = scores_of(Student(model))
    stock = scores_of(Student(PeftModel.from_pretrained(model, str(adapter))))
    return served, stock, alone


@pytest.mark.parametrize("name", KINDS)
def test_each_recipe_leaves_an_adapter_that_reloads_to_the_same_scores(
    picture: None, trained: list[Recipe], toy: Dataset, byte_folder: Path, prompts: Path, tmp_path: Path, name: str
) -> None:
    config = made(name, byte_folder, prompts, eval_users=4)
    outcome = finetune(name, config, toy, tmp_path / "run")
    assert outcome.steps == 6
    assert len(losses_of(tmp_path / "run")) == 6
    assert all(np.isfinite(losses_of(tmp_path / "run")))
    score = {"yes_no": "AUC"}.get(name, "NDCG@10")
    assert all(0 <= r[score] <= 1 for r in steps_of(tmp_path / "run", "validation"))
    # Whatever validation thought of it, the last checkpoint is looked at: it has learnt something.
    from penchant.training.checkpoints import checkpoints, load_checkpoint

    recipe = trained[0]
    load_checkpoint(checkpoints(tmp_path / "run" / "checkpoints")[-1], recipe.student, None)
    outcome.best_step = 6
    recipes.publish(recipe, 0, outcome, tmp_path / "run")
    expected = scores_of(recipe.student)
    served, stock, alone = reload_scores(byte_folder, tmp_path / "run")
    assert served == pytest.approx(expected, abs=1e-4)
    assert stock == pytest.approx(expected, abs=1e-5)
    assert np.abs(expected - alone).max() > 1e-3
    left = {p.name for p in (tmp_path / "run").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "penchant.json", "config.yaml"} <= left
    assert {"log.jsonl", "loss.png", "run.json", "prompts"} <= left
    assert not {"new", "README.md"} & left


def test_what_is_saved_beside_the_adapter(toy: Dataset, byte_folder: Path, prompts: Path, tmp_path: Path) -> None:
    config = made("yes_no", byte_folder, prompts, negatives=["unexposed"])
    outcome = finetune("yes_no", config, toy, tmp_path / "run")
    card = json.loads((tmp_path / "run" / "penchant.json").read_text())
    templates = Templates(prompts)
    assert card["recipe"] == "yes_no"
    assert card["templates"] == {name: templates.hash(name) for name in ("item", "user", "yes_no")}
    assert card["data"] == toy.content_hash
    assert card["seed"] == 0
    assert card["outcome"]["steps"] == outcome.steps
    assert {"python", "torch", "transformers", "peft", "penchant"} <= set(card["versions"])
    again = YesNoConfig.model_validate(yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()))
    assert again == config
    saved = {p.stem: p.read_text(encoding="utf-8") for p in (tmp_path / "run" / "prompts").iterdir()}
    assert saved == templates.sources


def test_every_recipe_has_its_settings_and_templates() -> None:
    assert set(CONFIGS) == set(TEMPLATES) == set(KINDS)
    assert all(set(names) <= set(Templates().sources) for names in TEMPLATES.values())


# -- ways to train ---------------------------------------------------------------------------------


def run(toy: Dataset, folder: Path, out: Path, **changes: Any) -> Path:
    finetune("next_item", settings(folder, **{"max_steps": 8, "epochs": 4, "eval_every": 8, **changes}), toy, out)
    losses = losses_of(out)
    assert np.mean(losses[-2:]) < np.mean(losses[:2])
    return out


def test_full_training_leaves_a_plain_model(
    trained: list[Recipe], toy: Dataset, byte_folder: Path, tmp_path: Path
) -> None:
    out = run(toy, byte_folder, tmp_path / "run", method="full", learning_rate=1e-3)
    assert not (out / "adapter_config.json").exists()
    engine = load_engine(out, dtype="float32", device="cpu")
    served = np.concatenate(engine.score(PROMPTS, [TEXTS] * 2))
    student = trained[0].student
    assert served == pytest.approx(scores_of(student), abs=1e-4)
    assert np.abs(served - scores_of(load_student(settings(byte_folder)))).max() > 1e-3
    assert all(p.requires_grad for p in student.parameters())


def test_full_training_in_bfloat16_keeps_what_a_step_moves(toy: Dataset, byte_folder: Path, tmp_path: Path) -> None:
    """Weights in bfloat16 would stay where they are under steps smaller than 1/256 of them."""
    small = {"method": "full", "learning_rate": 1e-4, "max_steps": 20, "epochs": 9}
    lowest = {}
    for dtype in ("float32", "bfloat16"):
        finetune("next_item", settings(byte_folder, dtype=dtype, **small), toy, tmp_path / dtype)
        found = steps_of(tmp_path / dtype, "validation")
        lowest[dtype] = found[0]["valid_loss"] - found[-1]["valid_loss"]
    assert lowest["float32"] > 0.01
    assert lowest["bfloat16"] == pytest.approx(lowest["float32"], rel=0.1)
    before, after = (load_file(folder / "model.safetensors") for folder in (byte_folder, tmp_path / "bfloat16"))
    moved = [float((after[name].float() != before[name].float()).float().mean()) for name in before if "proj" in name]
    assert min(moved) > 0.95


def test_full_training_of_an_untied_head(toy: Dataset, tiny_folder: Path, tmp_path: Path) -> None:
    run(toy, tiny_folder, tmp_path / "run", method="full", learning_rate=1e-3)


def test_rslora_scales_by_the_root_of_the_rank(toy: Dataset, byte_folder: Path, tmp_path: Path) -> None:
    out = run(toy, byte_folder, tmp_path / "run", lora={"r": 4, "alpha": 8, "rslora": True})
    saved = json.loads((out / "adapter_config.json").read_text())
    assert saved["use_rslora"] is True
    layers = [m for m in load_student(settings(byte_folder, start_from=str(out))).modules() if hasattr(m, "lora_A")]
    assert {m.scaling["default"] for m in layers} == {8 / 4**0.5}
    served, stock, _ = reload_scores(byte_folder, out)
    assert served == pytest.approx(stock, abs=1e-4)


def test_last_layers_alone_are_adapted(toy: Dataset, byte_folder: Path, tmp_path: Path) -> None:
    out = run(toy, byte_folder, tmp_path / "run", lora={"r": 4, "alpha": 8, "last_layers": 1})
    from safetensors.torch import load_file

    names = list(load_file(out / "adapter_model.safetensors"))
    assert names
    assert all(".layers.1." in name for name in names)
    served, stock, _ = reload_scores(byte_folder, out)
    assert served == pytest.approx(stock, abs=1e-4)


def test_targets_name_the_adapted_layers_and_never_the_head(byte_folder: Path) -> None:
    def adapted(**changes: Any) -> set[str]:
        student = load_student(settings(byte_folder, lora={"r": 2, "alpha": 2, **changes}))
        return {name.split(".lora_")[0].rpartition(".")[2] for name in student.trainable()}

    every = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert adapted() == every
    assert adapted(last_layers=2) == every
    assert adapted(targets=["q_proj", "v_proj"]) == {"q_proj", "v_proj"}
    with pytest.raises(ConfigError, match="changes the head"):
        adapted(targets=["lm_head", "q_proj"])
    with pytest.raises(ConfigError, match="'v_projj' names no layer"):
        adapted(targets=["q_proj", "v_projj"])
    with pytest.raises(ConfigError, match="changes the token embeddings, which this model shares"):
        adapted(targets=["embed_tokens", "q_proj"])


@pytest.mark.parametrize(
    ("changes", "words"), [({"targets": ["nonsense"]}, "no such adapter"), ({"last_layers": 3}, "a model with 2")]
)
def test_layers_that_are_not_there_are_refused(byte_folder: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_student(settings(byte_folder, lora={"r": 2, "alpha": 2, **changes}))


def test_an_adapters_first_weights_are_a_function_of_the_seed(byte_folder: Path) -> None:
    first, again, other = (load_student(settings(byte_folder, seed=s)).trainable() for s in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_one_recipe_goes_on_from_anothers_adapter(
    trained: list[Recipe], toy: Dataset, byte_folder: Path, prompts: Path, tmp_path: Path
) -> None:
    first = run(toy, byte_folder, tmp_path / "first")
    config = made("preference", byte_folder, prompts, start_from=str(first), max_steps=4, learning_rate=1e-3)
    started = scores_of(load_student(config))
    assert started == pytest.approx(reload_scores(byte_folder, first)[1], abs=1e-5)
    finetune("preference", config, toy, tmp_path / "second")
    # The reference is the base, and not the first adapter: at the start the loss is not log 2.
    assert abs(losses_of(tmp_path / "second")[0] - np.log(3)) > 0.01
    served, stock, _ = reload_scores(byte_folder, tmp_path / "second")
    assert served == pytest.approx(stock, abs=1e-4)
    assert np.abs(served - started).max() > 1e-4


def test_a_folder_without_an_adapter_is_no_start(byte_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such adapter folder"):
        load_student(settings(byte_folder, start_from=str(tmp_path / "absent")))
    with pytest.raises(ModelError, match=r"no adapter_config\.json"):
        load_student(settings(byte_folder, start_from=str(tmp_path)))
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(ModelError, match="is no LoRA adapter but 'IA3'"):
        started(settings(byte_folder, start_from=str(tmp_path)))


def test_an_adapter_of_another_model_is_no_start(toy: Dataset, byte_folder: Path, tmp_path: Path) -> None:
    """Of the same shapes: nothing but the card says so."""
    other = tiny.save_model(tmp_path / "other", "byte", seed=5)
    first = run(toy, other, tmp_path / "first")
    with pytest.raises(ModelError, match="was trained on another model"):
        finetune("next_item", settings(byte_folder, start_from=str(first)), toy, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ModelError, match="was trained on another model"):
        load_engine(byte_folder, first, dtype="float32", device="cpu")
    (first / "penchant.json").unlink()
    load_student(settings(byte_folder, start_from=str(first)))  # peft's own are not judged


def test_an_empty_adapter_is_no_start(byte_folder: Path, tmp_path: Path) -> None:
    empty = tiny.save_adapter(byte_folder, tmp_path / "a", spread=0.0)
    with pytest.raises(ModelError, match="changes no logit"):
        load_student(settings(byte_folder, start_from=str(empty)))


def test_an_adapter_whose_weights_fit_nothing_is_no_start(byte_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    adapter = tiny.save_adapter(byte_folder, tmp_path / "a")
    path = adapter / "adapter_model.safetensors"
    save_file({k.replace("layers.1.", "layers.7."): v for k, v in load_file(path).items()}, path)
    with pytest.raises(ModelError, match="does not fit this model"):
        load_student(settings(byte_folder, start_from=str(adapter)))


def test_an_adapter_trained_with_another_template_is_no_start(
    toy: Dataset, byte_folder: Path, prompts: Path, tmp_path: Path
) -> None:
    from tests.training.test_guards import changed_templates

    first = run(toy, byte_folder, tmp_path / "first")
    changed = str(changed_templates(tmp_path / "p", "next_item"))
    with pytest.raises(ConfigError, match="another text of the template 'next_item'"):
        Recipe("preference", settings(byte_folder, PreferenceConfig, start_from=str(first), prompts=changed), None)
    # yes_no's differs from the shipped one, and the first recipe had no use for it
    Recipe("preference", settings(byte_folder, PreferenceConfig, start_from=str(first), prompts=str(prompts)), None)


def test_the_settings_of_an_adapter_gone_on_from_are_its_own(toy: Dataset, byte_folder: Path, tmp_path: Path) -> None:
    first = run(toy, byte_folder, tmp_path / "first", lora={"r": 3, "alpha": 6, "rslora": True})
    for asked, words in (({"r": 8}, r"r 8 \(it has 3\)"), ({"r": 3, "rslora": False}, r"rslora False \(it has True\)")):
        config = settings(byte_folder, start_from=str(first), lora=asked)
        with pytest.raises(ConfigError, match=words):
            finetune("next_item", config, toy, tmp_path / "other")
    for name, asked in (("same", {"lora": {"r": 3}}), ("unsaid", {})):
        values = {k: v for k, v in settings(byte_folder).model_dump(exclude_unset=True).items() if k != "lora"}
        config = NextItemConfig(**{**values, "start_from": str(first), "max_steps": 1, **asked})
        finetune("next_item", config, toy, tmp_path / name)
        saved = yaml.safe_load((tmp_path / name / "config.yaml").read_text())["lora"]
        assert (saved["r"], saved["alpha"], saved["rslora"]) == (3, 6, True)
        assert json.loads((tmp_path / name / "adapter_config.json").read_text())["r"] == 3


def test_bfloat16_trains_and_keeps_the_adapter_in_float32(toy: Dataset, byte_folder: Path, tmp_path: Path) -> None:
    out = run(toy, byte_folder, tmp_path / "run", dtype="bfloat16")
    student = load_student(settings(byte_folder, dtype="bfloat16"))
    assert student.dtype == torch.bfloat16
    assert {p.dtype for p in student.trainable().values()} == {torch.float32}
    assert all(np.isfinite(losses_of(out)))


@pytest.mark.parametrize(("computes", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_a_run_leaves_the_numbers_that_auto_was(
    toy: Dataset, byte_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, computes: bool, dtype: str
) -> None:
    monkeypatch.setattr("penchant.engine.device.computes_bfloat16", lambda device: computes)
    finetune("next_item", settings(byte_folder, dtype="auto", max_steps=1), toy, tmp_path / "run")
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["dtype"] == dtype
    # Elsewhere it goes on with the same numbers.
    monkeypatch.setattr("penchant.engine.device.computes_bfloat16", lambda device: not computes)
    finetune("next_item", settings(byte_folder, dtype="auto", max_steps=1), toy, tmp_path / "run", resume=True)
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["dtype"] == dtype
    other = "float32" if computes else "bfloat16"
    with pytest.raises(ConfigError, match=r"config\.dtype"):
        finetune("next_item", settings(byte_folder, dtype=other, max_steps=1), toy, tmp_path / "run", resume=True)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NF4 quantises 64 weights of a row together: a model with rows of at least as many."""
    folder = tmp_path_factory.mktemp("wide")
    tokenizer = tiny.tokenizer("byte")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                max_position_embeddings=512,
                initializer_range=0.2,
                tie_word_embeddings=True,
            )
        ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("quantization", "bits"), [("nf4", "Linear4bit"), ("int8", "Linear8bitLt")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_quantised_base_is_quantised_frozen_and_trains(
    toy: Dataset, wide: Path, tmp_path: Path, quantization: str, bits: str, dtype: str
) -> None:
    pytest.importorskip("bitsandbytes")
    student = load_student(settings(wide, quantization=quantization, dtype=dtype))
    plain = load_student(settings(wide))
    layers = [m.get_base_layer() for m in student.modules() if hasattr(m, "get_base_layer")]
    assert layers
    assert {type(layer).__name__ for layer in layers} == {bits}
    wanted = {"nf4": torch.uint8, "int8": torch.int8}[quantization]
    assert {layer.weight.dtype for layer in layers} == {wanted}
    whole = sum(m.get_base_layer().weight.numel() * 4 for m in plain.modules() if hasattr(m, "get_base_layer"))
    small = sum(layer.weight.numel() * layer.weight.element_size() for layer in layers)
    assert small * (8 if quantization == "nf4" else 4) == whole
    assert all(not p.requires_grad for n, p in student.named_parameters() if "lora_" not in n)
    # Rounded, and still nearly the same model.
    difference = np.abs(scores_of(student) - scores_of(plain)) / np.abs(scores_of(plain))
    assert 0 < difference.mean() < 0.25
    run(toy, wide, tmp_path / "run", quantization=quantization, dtype=dtype)


@pytest.mark.parametrize("looked_at_first", [False, True])
def test_gradients_pass_through_a_quantised_base(wide: Path, looked_at_first: bool) -> None:
    """They are those of the rounded weights in float32; also after validation has run the model (bitsandbytes packs
    weights for inference at such a moment, and packed ones have no backward pass)."""
    bnb = pytest.importorskip("bitsandbytes")
    from tests.training.helpers import stirred

    student, plain = (stirred(settings(wide, quantization=q), scale=0.05) for q in ("nf4", "none"))
    bases = [[m.get_base_layer() for m in s.modules() if hasattr(m, "get_base_layer")] for s in (student, plain)]
    for small, whole in zip(*bases, strict=True):
        with torch.no_grad():
            whole.weight.copy_(bnb.functional.dequantize_4bit(small.weight.data, small.weight.quant_state))
    if looked_at_first:
        with torch.no_grad():
            student.eval().causal_lm(input_ids=torch.arange(1, 9).unsqueeze(0))
    grads = []
    for s in (student, plain):
        torch.autograd.backward(plain_logprobs(s.train(), [5, 6, 7], [8, 9, 10, 11]).sum())
        grads.append({name: p.grad for name, p in s.trainable().items()})
    assert grads[0].keys() == grads[1].keys()
    for name, wanted in grads[1].items():
        got = grads[0][name]
        assert got is not None, name
        assert wanted is not None
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-3)
        assert float(wanted.abs().max()) > 0


def test_quantisation_without_bitsandbytes_is_refused(monkeypatch: pytest.MonkeyPatch, byte_folder: Path) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match="needs bitsandbytes") as raised:
        load_student(settings(byte_folder, quantization="nf4"))
    assert "penchant[quant]" in str(raised.value.remedy)


@pytest.mark.parametrize("changes", [{"quantization": "nf4"}, {"start_from": "x"}])
def test_full_training_of_a_quantised_or_adapted_model_is_refused(byte_folder: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="method full"):
        settings(byte_folder, method="full", **changes)


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("preferences", PreferenceConfig, "no recipe is called 'preferences'"),
        ("choose", NextItemConfig, "wants settings of type ChooseConfig, and got NextItemConfig"),
        ("next_item", PreferenceConfig, "wants settings of type NextItemConfig"),
    ],
)
def test_a_recipe_wants_its_own_settings(
    toy: Dataset, byte_folder: Path, tmp_path: Path, name: str, kind: type[TrainConfig], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        finetune(name, settings(byte_folder, kind), toy, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_device_without_numbers_is_refused(toy: Dataset, byte_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="device meta"):
        finetune("next_item", settings(byte_folder, device="meta"), toy, tmp_path / "run")


def test_preference_without_an_adapter_to_switch_off_is_refused(byte_folder: Path) -> None:
    with pytest.raises(ValueError, match="use method lora"):
        settings(byte_folder, PreferenceConfig, method="full")


@pytest.mark.parametrize("retriever", [{"inputs": ["gap"]}, {"loss": "mse"}])
def test_a_retriever_that_reads_more_than_items_is_refused(byte_folder: Path, retriever: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="the retriever reads items alone"):
        settings(byte_folder, PreferenceConfig, retriever=retriever)


def test_beside_the_retriever_the_held_out_loss_decides(toy: Dataset, byte_folder: Path, tmp_path: Path) -> None:
    more = {"beside": 1.0, "reference": False, "eval_users": 8, "eval_every": 1, "max_steps": 4, "patience": 9}
    made = settings(byte_folder, PreferenceConfig, pack_tokens=600, candidates=15, negatives=4, every=1, **more)
    outcome = finetune("preference", made, toy, tmp_path / "run")
    seen = [r for r in read_log(tmp_path / "run" / "log.jsonl") if r["kind"] == "validation"]
    assert len(seen) == 5
    assert all("score" not in r and "fused NDCG@10" in r for r in seen)
    assert outcome.best_step == min(seen[1:], key=lambda r: r["valid_loss"])["step"]


# -- data ------------------------------------------------------------------------------------------


def test_tallrecs_examples_need_no_dataset(byte_folder: Path, prompts: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    titles = ["Heat (1995)", "Alien (1979)", "Up (2009)", "M (1931)", "Aliens (1986)"]

    def examples(path: Path, n: int) -> str:
        rows = []
        for _ in range(n):
            liked, disliked, target = rng.permutation(titles)[:3]
            rows.append(entry(f'"{liked}"', f'"{disliked}"', target, "Yes." if "19" in target else "No."))
        path.write_bytes(gzip.compress(json.dumps(rows).encode()))
        return str(path)

    config = settings(
        byte_folder,
        YesNoConfig,
        prompts=str(prompts),
        examples=examples(tmp_path / "train.json.gz", 60),
        valid_examples=examples(tmp_path / "valid.json.gz", 40),
        pack_tokens=512,
        epochs=6,
        max_rows=36,
        eval_users=40,
        learning_rate=2e-2,
        patience=9,
    )
    finetune("yes_no", config, None, tmp_path / "run")
    found = steps_of(tmp_path / "run", "validation")
    assert max(r["AUC"] for r in found) > 0.9, "a year tells the answer"
    assert found[-1]["valid_loss"] < found[0]["valid_loss"]
    assert sum(r["examples"] for r in steps_of(tmp_path / "run")) == 36 * 6, "max_rows of them in every epoch"


def test_a_recipe_without_data_is_refused(byte_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs a dataset"):
        finetune("next_item", settings(byte_folder), None, tmp_path / "run")


def test_rows_are_sampled_by_seed_and_made_again_for_other_settings(toy: Dataset, byte_folder: Path) -> None:
    split = leave_last_out(toy)

    def users(**changes: Any) -> list[int]:
        rows = Recipe("next_item", settings(byte_folder, max_rows=10, **changes), split).rows()
        return [row.user for row in rows]

    first = users()
    assert len(first) == 10
    assert first == sorted(first) == users()
    assert users(seed=1) != first
    assert users(learning_rate=3e-4) == first
    windowed = Recipe("next_item", settings(byte_folder, window=3), split).rows()
    assert len(windowed) == 90


def test_stored_rows_are_the_rows_that_were_made(toy: Dataset, byte_folder: Path) -> None:
    from penchant.training.next_item import next_item_rows
    from penchant.training.rows import ARRAYS

    config = settings(byte_folder, popularity_power=0.5)
    recipe = Recipe("next_item", config, leave_last_out(toy))
    stored = recipe.rows()
    made_now = list(next_item_rows(recipe.corpus, config))
    assert len(stored) == len(made_now)
    for a, b in zip(stored, made_now, strict=True):
        assert a.user == b.user
        for name in (*ARRAYS, "inputs", "targets"):
            mine, other = getattr(a, name), getattr(b, name)
            assert mine.dtype == other.dtype
            assert np.array_equal(mine, other)
    assert stored.lengths.tolist() == [len(row) for row in made_now]
    assert stored.n_targets.tolist() == [row.n_targets for row in made_now]


def test_a_torn_row_store_is_found(toy: Dataset, byte_folder: Path, monkeypatch: Any, tmp_path: Path) -> None:
    from penchant.errors import StorageError

    monkeypatch.setenv("PENCHANT_CACHE", str(tmp_path / "own"))
    recipe = Recipe("next_item", settings(byte_folder), leave_last_out(toy))
    recipe.rows()
    (arrow,) = (tmp_path / "own" / "rows").glob("*/rows.arrow")
    data = bytearray(arrow.read_bytes())
    data[len(data) // 2] ^= 0xFF
    arrow.write_bytes(bytes(data))
    with pytest.raises(StorageError, match="corrupt"):
        recipe.rows()


def test_splits_are_cut_as_asked_for(toy: Dataset, byte_folder: Path) -> None:
    from datetime import UTC, datetime

    assert len(cut(toy, settings(byte_folder)).test) == 30
    assert len(cut(toy, settings(byte_folder, split="none")).test) == 0
    at = datetime.fromtimestamp(1_000_000 + 300, UTC)
    later = datetime.fromtimestamp(1_000_000 + 420, UTC)
    found = cut(toy, settings(byte_folder, split="global-time", valid_from=at, test_from=later))
    assert found.spec["kind"] == "global time"
    # As `penchant fit --targets` cuts it: a run fitted so may be evaluated with this adapter.
    last = cut(toy, settings(byte_folder, split="global-time", valid_from=at, test_from=later, targets="last"))
    assert last.spec == global_time(toy, valid_from=at, test_from=later, targets="last").spec
    assert last.spec != found.spec
    for other in ({"valid_from": at}, {"targets": "last"}):
        with pytest.raises(ConfigError, match="need split: global-time"):
            cut(toy, settings(byte_folder, **other))


@pytest.mark.filterwarnings("ignore:no held-out row")
@pytest.mark.parametrize("name", KINDS)
def test_validation_users_without_a_history_leave_the_loss_to_decide(
    byte_folder: Path, prompts: Path, tmp_path: Path, name: str
) -> None:
    """A split by time in which everybody is new once the validation begins."""
    from datetime import UTC, datetime

    from tests.conftest import toy_frames

    interactions, items = toy_frames(n_users=20)
    new = interactions.group_by("user_id", maintain_order=True).first()
    new = new.with_columns(user_id="n" + new["user_id"], timestamp=2_000_000 + pl.int_range(len(new)) * 60)
    data = Dataset.read(pl.concat([interactions, new.select(interactions.columns)]), items)
    at = {k: datetime.fromtimestamp(s, UTC) for k, s in (("valid_from", 1_900_000), ("test_from", 2_000_600))}
    config = made(name, byte_folder, prompts, split="global-time", **at, eval_users=4, max_steps=2)
    outcome = finetune(name, config, data, tmp_path / "run")
    assert outcome.steps == 2
    assert all(r.get("score") is None for r in steps_of(tmp_path / "run", "validation"))


def test_choose_learns_on_the_toy_data(toy: Dataset, byte_folder: Path, tmp_path: Path) -> None:
    prompts = letter_prompts(tmp_path / "prompts")
    few = {"letters": 3, "targets_per_user": 1, "max_history": 2, "max_rows": 16}
    config = made("choose", byte_folder, prompts, **few, max_steps=20, epochs=99, learning_rate=2e-2)
    finetune("choose", config, toy, tmp_path / "run")
    losses = losses_of(tmp_path / "run")
    assert np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3])


def test_preference_learns_on_the_toy_data(toy: Dataset, byte_folder: Path, prompts: Path, tmp_path: Path) -> None:
    few = {"max_rows": 8, "max_steps": 20, "epochs": 99, "learning_rate": 1e-2, "patience": 99}
    finetune("preference", made("preference", byte_folder, prompts, **few), toy, tmp_path / "run")
    losses = losses_of(tmp_path / "run")
    assert losses[0] == pytest.approx(np.log(3), abs=1e-3), "the reference itself, among one and two rivals"
    assert np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3])


def test_other_templates_data_or_words_of_a_tokenizer_are_other_rows(
    toy: Dataset, byte_folder: Path, tiny_folder: Path, prompts: Path, tmp_path: Path
) -> None:
    """What is kept of rows is found by all that decides them."""

    def key(model: Path = byte_folder, data: Dataset = toy, **changes: Any) -> tuple[str, ...]:
        return Recipe("next_item", settings(model, **changes), leave_last_out(data))._key()

    renamed = Dataset(toy.interactions, toy.items.with_columns(title=pl.col("title") + "!"))
    words = shutil.copytree(byte_folder, tmp_path / "words")
    shutil.copy(tiny_folder / "tokenizer.json", words / "tokenizer.json")
    text = (shipped("prompts") / "next_item.jinja").read_text(encoding="utf-8")
    (tmp_path / "next_item.jinja").write_text(text.replace("version: ", "version: 9"), encoding="utf-8")
    plain = key()
    assert plain == key() == key(learning_rate=3e-3)
    others = [key(data=renamed), key(model=words), key(prompts=str(tmp_path)), key(window=5)]
    others.append(key(method="full"))  # whose retriever stands on other vectors
    assert len({plain, *others}) == 6


# -- the leak check --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_rows_of_every_recipe_say_which_events_they_are_of(
    toy: Dataset, byte_folder: Path, prompts: Path, name: str
) -> None:
    recipe = Recipe(name, made(name, byte_folder, prompts), leave_last_out(toy))
    rows = recipe.rows()
    store = rows.provenance(slice(2, 7))
    for i in range(5):
        row = rows[2 + i]
        assert store.user[i] == row.user
        assert store.inputs[store.input_start[i] : store.input_start[i + 1]].tolist() == row.inputs.tolist()
        assert store.targets[store.target_start[i] : store.target_start[i + 1]].tolist() == row.targets.tolist()
    assert recipe.valid()


def test_rows_from_the_cache_that_hold_what_is_held_out_now_are_refused(
    toy: Dataset, byte_folder: Path, prompts: Path
) -> None:
    """A split made by hand, under the same name: another user's last events were trained on before."""
    split = leave_last_out(toy)
    one = split.test.take(np.arange(1, len(split.test)))
    train = split.train.copy()
    train[split.test.position[0]] = train[split.valid.position[0]] = True
    more = dataclasses.replace(split, train=train, test=one, valid=split.valid.take(np.arange(1, len(split.valid))))
    config = made("next_item", byte_folder, prompts, seed=77)
    Recipe("next_item", config, more).rows()
    with pytest.raises(DataError, match=r"leak check, user .*: a training row has a held-out event"):
        Recipe("next_item", config, split).rows()


def test_a_held_out_row_that_knows_its_target_is_refused(
    toy: Dataset, byte_folder: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = next_item.valid_rows

    def leaky(*args: Any) -> list[Row]:
        first, *rest = honest(*args)
        return [*rest, dataclasses.replace(first, inputs=np.append(first.inputs, first.targets))]

    monkeypatch.setattr(next_item, "valid_rows", leaky)
    with pytest.raises(DataError, match="a valid prompt has its own target among its inputs"):
        Recipe("next_item", made("next_item", byte_folder, prompts), leave_last_out(toy)).valid()


def test_what_is_made_before_the_first_step_is_said_once(toy: Dataset, byte_folder: Path, prompts: Path) -> None:
    told: list[str] = []

    def begin(stage: str, size: int | None) -> Any:
        told.append(stage)
        return lambda n: None

    config = made("preference", byte_folder, prompts, eval_users=4)
    asked = Dataset(toy.interactions, toy.items.with_columns(title=pl.col("title") + "?"))  # nothing of it in the cache
    Recipe("preference", config, leave_last_out(asked), begin).task()
    encoder = "train the encoder that retrieves, {}: epochs"
    wanted = ["embed items", encoder.format("1 of 1"), "make the training rows"]
    assert told == [*wanted, encoder.format("1 of 2"), encoder.format("2 of 2")]
    told.clear()
    Recipe("preference", config, leave_last_out(asked), begin).task()
    assert told == [], "all of it is in the cache"
