"""Nothing succeeds silently: each guard fires."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import tiny
from tests.training.helpers import lora, losses_of, settings, steps_of
from tests.training.test_yes_no import entry

from penchant.adapter_card import check_templates, read_card
from penchant.data.dataset import Dataset
from penchant.data.split import leave_last_out
from penchant.engine.loading import load_engine
from penchant.errors import ConfigError, DataError, ModelError, NotFiniteLossError
from penchant.prompt import Templates
from penchant.recommend import Recommender
from penchant.resources import shipped
from penchant.run_folder import FitConfig
from penchant.training import recipe as recipe_module
from penchant.training import recipes
from penchant.training.checkpoints import checkpoints, load_checkpoint
from penchant.training.config import ChooseConfig, ContrastiveConfig, NextItemConfig, PreferenceConfig, YesNoConfig
from penchant.training.merge import merge
from penchant.training.recipe import Recipe
from penchant.training.recipes import cut, finetune
from penchant.training.student import Student, load_student

# -- adapters that say nothing, or something else --------------------------------------------------


def test_an_adapter_that_changes_no_logit_is_refused_where_it_is_loaded(byte_folder: Path, tmp_path: Path) -> None:
    load_student(settings(byte_folder)).save(tmp_path / "new")  # as it begins: B is zero
    with pytest.raises(ModelError, match="changes no logit"):
        load_engine(byte_folder, tmp_path / "new", dtype="float32", device="cpu")


def test_a_run_that_made_the_model_worse_says_so_and_keeps_what_it_trained(
    toy: Dataset, byte_folder: Path, tmp_path: Path
) -> None:
    config = settings(byte_folder, learning_rate=30.0, max_steps=1)
    with pytest.warns(UserWarning, match="untuned model may serve|nothing learnt") as caught:
        outcome = finetune("next_item", config, toy, tmp_path / "run")
    assert outcome.best_step == 1
    assert any("untuned model may serve better" in str(w.message) for w in caught)
    card = json.loads((tmp_path / "run" / "penchant.json").read_text())
    assert any("untuned model may serve better" in w for w in card["outcome"]["warnings"])
    load_engine(byte_folder, tmp_path / "run", dtype="float32", device="cpu")


def test_training_that_leaves_every_logit_as_it_was_is_an_error(
    toy: Dataset, byte_folder: Path, tmp_path: Path
) -> None:
    config = settings(byte_folder, learning_rate=1e-30, max_steps=1)
    with (
        pytest.warns(UserWarning, match="untuned model may serve|nothing learnt"),
        pytest.raises(ModelError, match="changes no logit"),
    ):
        finetune("next_item", config, toy, tmp_path / "run")


def tampered(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Let ``change`` at the student just before it is published."""
    plain = recipes.publish

    def publish(recipe: Recipe, *rest: Any) -> None:
        change(recipe.student)
        plain(recipe, *rest)

    monkeypatch.setattr(recipes, "publish", publish)


def test_a_trained_adapter_that_changes_nothing_is_an_error(
    monkeypatch: pytest.MonkeyPatch, toy: Dataset, byte_folder: Path, tmp_path: Path
) -> None:
    def empty(student: Student) -> None:
        with torch.no_grad():
            for name, p in student.trainable().items():
                if "lora_B" in name:
                    p.zero_()

    tampered(monkeypatch, empty)
    with pytest.raises(ModelError, match="changes no logit: nothing was learnt"):
        finetune("next_item", settings(byte_folder, max_steps=3), toy, tmp_path / "run")
    assert checkpoints(tmp_path / "run" / "checkpoints")
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_an_adapter_that_does_not_reload_to_itself_is_an_error(
    monkeypatch: pytest.MonkeyPatch, toy: Dataset, byte_folder: Path, tmp_path: Path
) -> None:
    plain = Student.save

    def other(student: Student, folder: Path) -> None:
        before = {n: p.detach().clone() for n, p in student.trainable().items()}
        with torch.no_grad():
            for p in student.trainable().values():
                p.mul_(3)
        plain(student, folder)
        with torch.no_grad():
            for n, p in student.trainable().items():
                p.copy_(before[n])

    monkeypatch.setattr(Student, "save", other)
    with pytest.raises(ModelError, match="does not reload to the trained one"):
        finetune("next_item", settings(byte_folder, max_steps=3), toy, tmp_path / "run")


# -- losses that are no numbers --------------------------------------------------------------------


def poisoned(
    monkeypatch: pytest.MonkeyPatch, step: int = 5, value: float = float("nan")
) -> Callable[[dict[str, Any]], None]:
    """For ``on_record``: after that step the student's weights have this value."""
    students: list[Student] = []
    plain = recipe_module.load_student
    monkeypatch.setattr(recipe_module, "load_student", lambda c: students.append(plain(c)) or students[-1])

    def poison(record: dict[str, Any]) -> None:
        if record["kind"] == "step" and record["step"] == step:
            with torch.no_grad():
                for parameter in students[0].trainable().values():
                    parameter.fill_(value)

    return poison


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_checkpoint(
    monkeypatch: pytest.MonkeyPatch, toy: Dataset, byte_folder: Path, tmp_path: Path
) -> None:
    config = settings(byte_folder, epochs=3, checkpoint_every=2, eval_every=99)
    plain = recipe_module.load_student
    poison = poisoned(monkeypatch)
    with pytest.raises(ModelError, match="in step 6; it was not taken") as raised:
        finetune("next_item", config, toy, tmp_path / "run", on_record=poison)
    last = checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert last.name == "step-0000004"
    assert str(last) in str(raised.value.remedy)
    assert len(losses_of(tmp_path / "run")) == 5
    fresh = plain(config)
    load_checkpoint(last, fresh, None)
    assert all(bool(torch.isfinite(p).all()) for p in fresh.trainable().values())
    monkeypatch.setattr(recipe_module, "load_student", plain)
    finetune("next_item", config, toy, tmp_path / "run", resume=True)
    finetune("next_item", config, toy, tmp_path / "whole")
    assert losses_of(tmp_path / "run") == losses_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("value", "what"), [(float("nan"), "no numbers after step 4"), (1e30, "in step 5; it was not taken")]
)
def test_a_checkpoint_whose_next_loss_is_no_number_is_not_the_last_good_one(
    monkeypatch: pytest.MonkeyPatch, toy: Dataset, byte_folder: Path, tmp_path: Path, value: float, what: str
) -> None:
    """Weights that go bad in a step that is kept: no numbers at once, or so large that the next step says so."""
    config = settings(byte_folder, epochs=3, checkpoint_every=2, eval_every=99)
    plain = recipe_module.load_student
    poison = poisoned(monkeypatch, 4, value)
    with pytest.raises(NotFiniteLossError, match=what) as raised:
        finetune("next_item", config, toy, tmp_path / "run", on_record=poison)
    last = checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert last.name == "step-0000002"
    assert str(last) in str(raised.value.remedy)
    monkeypatch.setattr(recipe_module, "load_student", plain)
    finetune("next_item", config, toy, tmp_path / "run", resume=True)
    finetune("next_item", config, toy, tmp_path / "whole")
    assert losses_of(tmp_path / "run") == losses_of(tmp_path / "whole")


@pytest.mark.filterwarnings("ignore:no held-out row")
@pytest.mark.parametrize("value", [float("nan"), 1e30])
def test_where_nothing_is_held_out_the_weights_before_the_bad_ones_are_published(
    monkeypatch: pytest.MonkeyPatch, byte_folder: Path, prompts: Path, tmp_path: Path, value: float
) -> None:
    """The newest is the best there, and would be the bad ones."""
    rows = [entry('"Heat (1995)"', '"Up (2009)"', title, "Yes.") for title in ("Alien (1979)", "M (1931)") * 30]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    files = {"prompts": str(prompts), "examples": str(tmp_path / "train.json")}
    few = {"max_steps": 8, "epochs": 99, "packs_per_step": 1, "checkpoint_every": 2, "eval_every": 4}
    poison = poisoned(monkeypatch, 4, value)
    out = tmp_path / "run"
    with pytest.raises(NotFiniteLossError) as raised:
        finetune("yes_no", settings(byte_folder, YesNoConfig, **files, **few), None, out, on_record=poison)
    assert [path.name for path in checkpoints(out / "checkpoints")][-1] == "step-0000002"
    assert str(out / "checkpoints" / "step-0000002") in str(raised.value.remedy)
    if value == 1e30:  # a validation that measures nothing had called step 4 the best
        assert json.loads((out / "penchant.json").read_text())["outcome"]["best_step"] == 2
        load_engine(byte_folder, out, dtype="float32", device="cpu")


def test_a_rate_far_too_high_stops(toy: Dataset, byte_folder: Path, tmp_path: Path) -> None:
    config = settings(byte_folder, learning_rate=1e30, epochs=2)
    with pytest.raises(ModelError, match="lower learning_rate"):
        finetune("next_item", config, toy, tmp_path / "run")
    good = load_student(config)
    load_checkpoint(tmp_path / "run" / "checkpoints" / "step-0000000", good, None)


def test_weights_that_became_no_numbers_are_not_published(toy: Dataset, byte_folder: Path, tmp_path: Path) -> None:
    """One step, and nothing after it that would meet the loss."""
    config = settings(byte_folder, learning_rate=1e30, max_steps=1)
    with pytest.raises(NotFiniteLossError, match="the held-out loss is nan after step 1"):
        finetune("next_item", config, toy, tmp_path / "run")
    assert not (tmp_path / "run" / "penchant.json").exists()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_model_whose_logits_are_no_numbers_is_not_published(
    monkeypatch: pytest.MonkeyPatch, toy: Dataset, byte_folder: Path, tmp_path: Path, method: str
) -> None:
    """Also where no held-out row could say so."""

    def poison(student: Student) -> None:
        with torch.no_grad():
            next(iter(student.trainable().values())).fill_(float("nan"))

    tampered(monkeypatch, poison)
    config = settings(byte_folder, max_steps=3, method=method, learning_rate=1e-3)
    with pytest.raises(NotFiniteLossError, match="logits are not finite"):
        finetune("next_item", config, toy, tmp_path / "run")
    assert not (tmp_path / "run" / "penchant.json").exists()


def test_what_was_best_before_a_loss_that_is_no_number_is_published(
    picture: None, monkeypatch: pytest.MonkeyPatch, toy: Dataset, byte_folder: Path, tmp_path: Path
) -> None:
    poison = poisoned(monkeypatch)
    out = tmp_path / "run"
    with pytest.raises(NotFiniteLossError, match="in step 6; it was not taken") as raised:
        finetune("next_item", settings(byte_folder, epochs=3, eval_every=2), toy, out, on_record=poison)
    assert f"{out} holds the best validation's (step 4)" in str(raised.value.remedy)
    outcome = json.loads((out / "penchant.json").read_text())["outcome"]
    assert (outcome["stopped"], outcome["steps"], outcome["best_step"]) == ("non-finite loss", 5, 4)
    load_engine(byte_folder, out, dtype="float32", device="cpu")
    assert (out / "loss.png").read_bytes()[:4] == b"\x89PNG", "the curves of a run that failed too"


# -- runs that learn nothing -----------------------------------------------------------------------


def test_nothing_learnt_in_fifty_steps_is_said_aloud(toy: Dataset, byte_folder: Path, tmp_path: Path) -> None:
    config = settings(
        byte_folder, learning_rate=1e-7, epochs=99, max_steps=51, packs_per_step=1, pack_tokens=96, eval_every=99
    )
    with pytest.warns(UserWarning, match="untuned model may serve|nothing learnt") as caught:
        outcome = finetune("next_item", config, toy, tmp_path / "run")
    said = [str(w.message) for w in caught if "nothing learnt in 50 steps" in str(w.message)]
    assert len(said) == 1
    assert said[0] in outcome.warnings
    assert json.loads((tmp_path / "run" / "penchant.json").read_text())["outcome"]["warnings"] == outcome.warnings


def test_without_held_out_rows_the_first_steps_say_that_nothing_is_learnt(
    byte_folder: Path, prompts: Path, tmp_path: Path
) -> None:
    rows = [entry('"Heat (1995)"', '"Up (2009)"', title, "Yes.") for title in ("Alien (1979)", "M (1931)") * 30]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    few = {"prompts": str(prompts), "examples": str(tmp_path / "train.json")}
    few |= {"max_steps": 51, "epochs": 99, "packs_per_step": 1, "pack_tokens": 256}
    what = "nothing learnt in 50 steps: the loss of the first step's rows"
    with (
        pytest.warns(UserWarning, match="no held-out row|nothing learnt") as caught,
        pytest.raises(ModelError, match="changes no logit"),
    ):
        finetune("yes_no", settings(byte_folder, YesNoConfig, learning_rate=1e-12, **few), None, tmp_path / "none")
    assert [w for w in caught if what in str(w.message)]
    with pytest.warns(UserWarning, match="no held-out row"):
        outcome = finetune("yes_no", settings(byte_folder, YesNoConfig, **few), None, tmp_path / "learnt")
    assert not [text for text in outcome.warnings if "nothing learnt" in text]


def test_weights_that_get_no_gradient_are_an_error(
    monkeypatch: pytest.MonkeyPatch, toy: Dataset, byte_folder: Path, tmp_path: Path
) -> None:
    plain = recipe_module.task_loss

    def cut_off(name: str, config: Any) -> Any:
        loss, weight = plain(name, config)
        return (lambda f, s, b: loss(f, s, b) * 0.0), weight

    monkeypatch.setattr(recipe_module, "task_loss", cut_off)
    with pytest.raises(ModelError, match="no weight gets a gradient"):
        finetune("next_item", settings(byte_folder), toy, tmp_path / "run")


def test_no_row_at_all_is_an_error(
    monkeypatch: pytest.MonkeyPatch, toy: Dataset, byte_folder: Path, tmp_path: Path, prompts: Path
) -> None:
    from tests.training.helpers import corpus_of
    from tests.training.test_choose import Fixed

    config = settings(byte_folder, ChooseConfig, letters=3, prompts=str(prompts), pack_tokens=700, seed=77)
    recipe = Recipe("choose", config, leave_last_out(toy))
    recipe.__dict__["retriever"] = Fixed(corpus_of(toy, byte_folder), miss=True)
    with pytest.raises(DataError, match="not one training row"):
        recipe.rows()


# -- targets cut off -------------------------------------------------------------------------------


def long_titles(toy: Dataset) -> Dataset:
    items = toy.items.with_columns(title=toy.items["title"] + " and everything that came after it, in many words")
    return Dataset(toy.interactions, items)


@pytest.mark.parametrize(
    ("name", "kind", "more"),
    [
        ("next_item", NextItemConfig, {}),
        ("next_item", NextItemConfig, {"mode": "single", "max_history": 1}),
        ("preference", PreferenceConfig, {"negatives": 1}),
        ("contrastive", ContrastiveConfig, {"hard": 1}),
    ],
)
def test_a_title_longer_than_a_pack_is_refused(
    toy: Dataset, byte_folder: Path, tmp_path: Path, name: str, kind: Any, more: dict[str, Any]
) -> None:
    config = settings(byte_folder, kind, pack_tokens=40, **more)
    with pytest.raises((DataError, ConfigError), match="cut off") as raised:
        finetune(name, config, long_titles(toy), tmp_path / "run")
    assert "raise pack_tokens" in str(raised.value.remedy)


def test_the_item_whose_title_is_too_long_is_named(toy: Dataset, byte_folder: Path, tmp_path: Path) -> None:
    titles = toy.items["title"].to_list()
    titles[3] += " (which goes on and on and on and on and on and on)"
    data = Dataset(toy.interactions, toy.items.with_columns(title=pl.Series(titles)))
    with pytest.raises(DataError, match=f"the title of item {toy.items['item_id'][3]} has"):
        finetune("next_item", settings(byte_folder, pack_tokens=60), data, tmp_path / "run")


def test_titles_cut_to_their_first_characters_are_said_aloud(toy: Dataset, byte_folder: Path, tmp_path: Path) -> None:
    titles = toy.items["title"].to_list()
    titles[3] = "a " * 150
    data = Dataset(toy.interactions, toy.items.with_columns(title=pl.Series(titles)))
    config = settings(byte_folder, max_steps=1, pack_tokens=512)
    with pytest.warns(UserWarning, match="1 item texts were cut to their first 200 characters"):
        outcome = finetune("next_item", config, data, tmp_path / "run")
    assert any("were cut" in w for w in outcome.warnings)


def test_events_that_fit_no_prompt_are_counted_in_the_card(toy: Dataset, byte_folder: Path, tmp_path: Path) -> None:
    from penchant.training.next_item import next_item_rows

    config = settings(byte_folder, mode="single", prompt_tokens=60, max_steps=1, packs_per_step=1)
    recipe = Recipe("next_item", config, leave_last_out(toy))
    log = recipe.corpus.split.log
    wanted = 0
    for row in next_item_rows(recipe.corpus, config):
        wanted += min(8, int(row.targets[0]) - log.before(int(row.targets[0])).start) - len(row.inputs)
    assert wanted > 0
    for name in ("made", "from the cache"):
        finetune("next_item", config, toy, tmp_path / name)
        assert json.loads((tmp_path / name / "penchant.json").read_text())["events_dropped"] == wanted


# -- templates -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(byte_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter trained with the shipped templates."""
    from tests.conftest import toy_frames

    out = tmp_path_factory.mktemp("adapter") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PENCHANT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        finetune("next_item", settings(byte_folder, max_steps=3), Dataset.read(*toy_frames()), out)
    return out


def changed_templates(folder: Path, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = (shipped("prompts") / f"{name}.jinja").read_text(encoding="utf-8")
    (folder / f"{name}.jinja").write_text(text.replace("version: ", "version: 1"), encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", ["next_item", "item"])
def test_an_adapter_is_not_served_with_another_template(
    toy: Dataset, byte_folder: Path, adapter: Path, tmp_path: Path, name: str
) -> None:
    other = Templates(changed_templates(tmp_path / "prompts", name))
    with pytest.raises(ConfigError, match=f"another text of the template '{name}'") as raised:
        check_templates(adapter, other)
    assert str(adapter / "prompts") in str(raised.value.remedy)
    engine = load_engine(byte_folder, adapter, dtype="float32", device="cpu")
    split = leave_last_out(toy)
    config = FitConfig(candidates=4, validation_users=4, encoder={"epochs": 1})
    with pytest.raises(ConfigError, match="another text of the template"):
        Recommender.fit(split, engine, config=config, prompts=tmp_path / "prompts")


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_merged_or_wholly_trained_model_is_not_served_with_another_template(
    toy: Dataset, byte_folder: Path, adapter: Path, tmp_path: Path, method: str
) -> None:
    if method == "lora":
        model = merge(adapter, tmp_path / "merged", dtype="float32").folder
    else:
        model = tmp_path / "full"
        finetune("next_item", settings(byte_folder, max_steps=3, method="full", learning_rate=1e-3), toy, model)
    engine = load_engine(model, dtype="float32", device="cpu")
    config = FitConfig(candidates=4, validation_users=4, encoder={"epochs": 1})
    prompts = changed_templates(tmp_path / "prompts", "next_item")
    with pytest.raises(ConfigError, match="another text of the template"):
        Recommender.fit(leave_last_out(toy), engine, config=config, prompts=prompts)
    other = Recommender.fit(leave_last_out(toy), load_engine(byte_folder, dtype="float32", device="cpu"), config=config)
    other.templates, other.fingerprint = Templates(prompts), engine.fingerprint
    with pytest.raises(ConfigError, match="another text of the template"):
        other.use_engine(engine)
    Recommender.fit(leave_last_out(toy), engine, config=config, prompts=model / "prompts")


def test_its_own_templates_and_those_it_does_not_use_are_fine(adapter: Path, tmp_path: Path) -> None:
    check_templates(adapter, Templates())
    check_templates(adapter, Templates(adapter / "prompts"))
    check_templates(adapter, Templates(changed_templates(tmp_path, "choose")))


def test_adapters_without_a_card_are_not_judged(tmp_path: Path) -> None:
    assert read_card(None) is None
    assert read_card(tmp_path) is None
    check_templates(None, Templates())
    check_templates(tmp_path, Templates(changed_templates(tmp_path / "p", "next_item")))


def test_the_adapter_can_be_fitted_and_serves(toy: Dataset, byte_folder: Path, adapter: Path) -> None:
    engine = load_engine(byte_folder, adapter, dtype="float32", device="cpu")
    config = FitConfig(candidates=4, validation_users=4, encoder={"epochs": 1})
    model = Recommender.fit(leave_last_out(toy), engine, config=config)
    assert len(model.recommend(users=["u0"], k=3)) == 3


# -- models ----------------------------------------------------------------------------------------


def test_a_head_that_is_more_than_a_matrix_is_refused(monkeypatch: pytest.MonkeyPatch, byte_folder: Path) -> None:
    from transformers import LlamaForCausalLM

    plain = LlamaForCausalLM.forward

    def capped(self: Any, *args: Any, **more: Any) -> Any:
        out = plain(self, *args, **more)
        out.logits = 5 * torch.tanh(out.logits / 5)
        return out

    monkeypatch.setattr(LlamaForCausalLM, "forward", capped)
    with pytest.raises(ModelError, match="scales or caps its logits"):
        load_student(settings(byte_folder))


def test_a_row_longer_than_the_models_context_is_refused(toy: Dataset, tmp_path: Path) -> None:
    """A pack may be longer than the context, a row may not: positions begin anew with each."""
    folder = tiny.save_model(tmp_path / "short", "byte", max_positions=120)
    finetune("next_item", settings(folder, max_steps=1, pack_tokens=512), toy, tmp_path / "packs")
    small = tiny.save_model(tmp_path / "shorter", "byte", max_positions=64)
    with pytest.raises(ConfigError, match="the model's context only 64"):
        finetune("next_item", settings(small, max_steps=1), toy, tmp_path / "rows")


def copied(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def test_a_folder_that_holds_no_whole_model_is_refused(toy: Dataset, byte_folder: Path, tmp_path: Path) -> None:
    """Before anything is trained: weights that are not there would be random, and others in each process."""
    (tmp_path / "empty").mkdir()
    torn = copied(byte_folder, tmp_path / "torn") / "model.safetensors"
    torn.write_bytes(torn.read_bytes()[:-1000])
    lacking = copied(byte_folder, tmp_path / "lacking") / "model.safetensors"
    weights = load_file(lacking)
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, lacking, metadata={"format": "pt"})
    mute = copied(byte_folder, tmp_path / "mute")
    for path in mute.glob("*token*"):
        path.unlink()
    for name, words in {
        "empty": "cannot be loaded|no config",
        "torn": "cannot be loaded",
        "lacking": "lacks 1 of the model's weights, such as model.layers.0.mlp.up_proj.weight",
        "mute": "cannot be loaded",
    }.items():
        with pytest.raises(ModelError, match=words):
            finetune("next_item", settings(tmp_path / name), toy, tmp_path / "run")
        assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore:no validation", "ignore:nothing learnt")  # a few steps need not help
def test_answers_learnt_from_likes_and_dislikes_are_not_asked_for_without_them(
    toy: Dataset, byte_folder: Path, prompts: Path, tmp_path: Path
) -> None:
    few = {"prompts": str(prompts), "max_steps": 6, "pack_tokens": 400, "negatives": ["unexposed"]}
    rated = Dataset(toy.interactions.with_columns(rating=pl.lit(4.0)), toy.items)
    finetune("yes_no", settings(byte_folder, YesNoConfig, like_threshold=3.0, **few), rated, tmp_path / "marked")
    finetune("yes_no", settings(byte_folder, YesNoConfig, **few), rated, tmp_path / "plain")
    config = FitConfig(candidates=4, validation_users=4, question="yes_no", encoder={"epochs": 1})
    engine, marked, plain = (
        load_engine(byte_folder, adapter, dtype="float32", device="cpu")
        for adapter in (None, tmp_path / "marked", tmp_path / "plain")
    )
    with pytest.raises(ConfigError, match="say of each item whether it was liked"):
        Recommender.fit(leave_last_out(toy), engine, config=config, prompts=prompts, ranker=marked)
    model = Recommender.fit(leave_last_out(toy), engine, config=config, prompts=prompts, ranker=plain)
    assert len(model.recommend(users=["u0"], k=3)) == 3


def test_validation_does_not_disturb_training(toy: Dataset, byte_folder: Path, tmp_path: Path) -> None:
    """With validation at every step, and with none before the end: the same losses, dropout and all."""
    noise = {"lora": {"r": 4, "alpha": 8, "dropout": 0.2}, "patience": 99}
    finetune("next_item", settings(byte_folder, eval_every=1, **noise), toy, tmp_path / "often")
    finetune("next_item", settings(byte_folder, eval_every=99, **noise), toy, tmp_path / "once")
    assert losses_of(tmp_path / "often") == losses_of(tmp_path / "once")
    assert len(steps_of(tmp_path / "often", "validation")) == 6


def test_held_out_rows_beyond_the_context_are_refused_too(toy: Dataset, tmp_path: Path) -> None:
    """Windows of two events fit, whole histories do not: their loss would be measured where the model knows nothing."""
    folder = tiny.save_model(tmp_path / "short", "byte", max_positions=64)
    config = settings(folder, window=2, max_history=40, prompt_tokens=700)
    with pytest.raises(ConfigError, match="a row reaches 98 tokens, and the model's context only 64"):
        Recipe("next_item", config, cut(toy, config)).task()
    # Cut to prompt_tokens as a prompt would be; of 87 tokens, with rivals in branches, none stands past the 64th.
    rivals = settings(folder, PreferenceConfig, window=2, max_history=40, prompt_tokens=50)
    task = Recipe("preference", rivals, cut(toy, rivals)).task()
    assert max(len(row) for row in task.valid) > 64
    assert max(row.position.max() for row in task.valid) < 64


def test_a_row_that_reaches_past_a_sliding_window_is_refused(toy: Dataset, byte_folder: Path, tmp_path: Path) -> None:
    """Our mask lets a token see all before it, which such a model never does."""
    folder = tmp_path / "sliding"
    shutil.copytree(byte_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 24}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="the model's context only 24"):
        finetune("next_item", settings(folder, max_steps=1), toy, tmp_path / "out")


def test_the_reference_has_no_dropout_and_lets_nothing_learn_anew(byte_folder: Path) -> None:
    student = load_student(settings(byte_folder, lora=lora(dropout=0.5)))
    frozen, learning = list(student.trainable())[:2]
    student.trainable()[frozen].requires_grad_(False)
    student.train()
    with student.adapter_off():
        assert not any(module.training for module in student.modules())
    assert student.training
    assert frozen not in student.trainable()
    assert learning in student.trainable()
