"""What a run leaves in its folder: whether it may go there, what must stay the same, the adapter and its card."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from penchant import __version__
from penchant.adapter_card import CARD, ancestors_of
from penchant.engine.folders import fingerprint_of, resolve_adapter
from penchant.environment import versions
from penchant.errors import ConfigError, ModelError, NotFiniteLossError, StorageError
from penchant.files import read_json, sha256_file, staged_folder, write_json
from penchant.training.recipe import Recipe
from penchant.training.task import Outcome


def publish(recipe: Recipe, dropped: int, outcome: Outcome, out: Path) -> None:
    """Put the student's weights and card in ``out``; ModelError where read back they say something else."""
    start = recipe.config.start_from
    card = {
        "recipe": recipe.name,
        "templates": {name: recipe.templates.hash(name) for name in recipe.template_names},
        **identity_of(recipe),
        "ancestors": ancestors_of(None if start is None else resolve_adapter(start), recipe.base),
        **recipe.served_as,
        "outcome": vars(outcome),
        "item_texts_cut": recipe.texts_cut,
        "events_dropped": dropped,
        "versions": {"python": platform.python_version(), **versions()},
    }
    with staged_folder(out / "new") as stage:
        recipe.student.save(stage)
        if recipe.config.method == "full":
            recipe.tokenizer.save_pretrained(stage)
        write_json(stage / CARD, card)
        (stage / "prompts").mkdir()
        for name, text in recipe.templates.sources.items():
            (stage / "prompts" / f"{name}.jinja").write_text(text, encoding="utf-8")
    _check_reload(recipe, out / "new")
    for path in sorted((out / "new").iterdir()):
        target = out / path.name
        if path.is_dir() and target.is_dir():
            for inner in path.iterdir():
                os.replace(inner, target / inner.name)
            path.rmdir()
        else:
            os.replace(path, target)
    (out / "new").rmdir()


@torch.no_grad()
def _check_reload(recipe: Recipe, folder: Path) -> None:
    """What was trained must say numbers, and a saved adapter, read by stock peft, what the trained one says.

    And not what the base says.
    """
    student = recipe.student
    student.eval()
    size = int(student.causal_lm.get_input_embeddings().weight.shape[0])
    ids = torch.arange(1, 33, device=student.causal_lm.device).remainder(size).unsqueeze(0)

    def logits() -> torch.Tensor:
        return student.causal_lm(input_ids=ids, use_cache=False).logits.float()

    trained = logits()
    if not bool(torch.isfinite(trained).all()):
        raise NotFiniteLossError(
            "the trained model's logits are not finite",
            where=str(folder),
            remedy="lower learning_rate or use float32, in a new folder; the checkpoints are kept",
        )
    if recipe.config.method != "lora":
        return
    with student.adapter_off():
        plain = logits()
    if torch.equal(trained, plain):
        raise ModelError(
            "the trained adapter changes no logit: nothing was learnt",
            where=str(folder),
            remedy="train longer or raise learning_rate; the checkpoints are kept",
        )
    with student.as_saved(folder):
        moved = float((logits() - trained).abs().max())
    if not moved <= 1e-2 * float(trained.abs().max()):
        raise ModelError(
            f"the saved adapter does not reload to the trained one (logits differ by {moved:.3g})",
            where=str(folder),
            remedy="the checkpoints are kept: report this",
        )


def check_out(out: Path, identity: dict[str, Any], resume: bool) -> None:
    """StorageError or ConfigError where ``out`` cannot take this run."""
    started = out / "run.json"
    if out.is_file():
        raise StorageError("is a file", where=str(out), remedy="give a folder to write into")
    if not started.is_file():
        if out.is_dir() and any(out.iterdir()):
            raise StorageError(
                "the folder holds something that is no run of this kind", where=str(out), remedy="give a new folder"
            )
        return
    if not resume:
        raise StorageError(
            "a run was begun there", where=str(out), remedy="go on with --resume, or give a new folder (--out)"
        )
    before = read_json(started)
    changed = [key for key in identity if before.get(key) != identity[key]]
    if "config" in changed:
        was, now = before.get("config", {}), identity["config"]
        changed = [f"config.{key}" for key in now if was.get(key) != now[key]] + [c for c in changed if c != "config"]
    if changed:
        raise ConfigError(
            f"differs from the run begun there in: {', '.join(sorted(changed))}",
            where=str(out),
            remedy="resume with the same settings and data, or give a new folder",
        )


def identity_of(recipe: Recipe) -> dict[str, Any]:
    """What must stay the same for a run to go on."""
    split = recipe.split
    return {
        "recipe": recipe.name,
        "penchant": __version__,
        "config": recipe.config.model_dump(mode="json"),
        "base": fingerprint_of(recipe.base),
        "data": None if split is None else split.dataset.content_hash,
        "examples": {name: sha256_file(path) for name, path in recipe.example_files.items()},
        "split": None if split is None else split.spec,
        "template_texts": recipe.templates.hash(),
        "seed": recipe.config.seed,
    }
