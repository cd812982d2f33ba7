"""An adapter into the weights themselves: merged in float32 from the unquantised base, and measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from transformers import AutoTokenizer

from penchant.adapter_card import CARD, read_card
from penchant.engine.adapters import merged_model, require_own_base
from penchant.engine.folders import resolve_model
from penchant.engine.loading import load_engine
from penchant.errors import ConfigError, ModelError, StorageError
from penchant.files import read_json, staged_folder, write_json

Saved = Literal["bfloat16", "float16", "float32"]
# What the scores are compared on: prompts and continuations of many kinds, one token and more.
_PROMPTS = ("One user's history, in the order of time, one title a line:\n", "a b c d e f g", "1, 2, 3, 4", "The")
_TEXTS = ("Heat (1995)\n", "Toy Story (1995)\n", "The Good, the Bad and the Ugly\n", "5, 6", " quick brown fox", "A")


@dataclass(frozen=True, slots=True)
class Merged:
    """Where the model lies, and how far its scores (nats, summed over a text) moved from the unmerged adapter's."""

    folder: Path
    mean_moved: float
    max_moved: float
    dtype: str


def merge(adapter: Path, out: Path, *, base: str | None = None, dtype: Saved = "bfloat16") -> Merged:
    """Write a plain model of base and adapter to ``out``, saved as ``dtype``.

    ``base`` defaults to the adapter's own. The merge itself is done in float32 from the unquantised base:
    into quantised weights it would be rounded away. Both sides are then scored in float32.
    """
    if out.exists():
        raise StorageError("stands there already", where=str(out), remedy="give a new folder (--out)")
    if dtype not in get_args(Saved):
        raise ConfigError(f"unknown dtype {dtype!r}", where="merge", remedy="use bfloat16, float16 or float32")
    name = base or _base(adapter)
    folder = resolve_model(name)
    require_own_base(adapter, folder)
    whole = merged_model(folder, adapter, getattr(torch, dtype))
    with staged_folder(out) as stage:
        whole.save_pretrained(stage)
        AutoTokenizer.from_pretrained(folder, local_files_only=True).save_pretrained(stage)
        moved = _moved(name, adapter, stage)
        card = read_card(adapter) or {}
        write_json(stage / CARD, {**card, "merged": {"dtype": dtype, **moved}})
        for path in sorted((adapter / "prompts").glob("*.jinja")):
            (stage / "prompts").mkdir(exist_ok=True)
            (stage / "prompts" / path.name).write_bytes(path.read_bytes())
    return Merged(out, moved["mean_moved_nats"], moved["max_moved_nats"], dtype)


def _base(adapter: Path) -> str:
    """The base an adapter names: our card's, else peft's."""
    card = read_card(adapter)
    if card is not None and isinstance(card.get("config"), dict) and card["config"].get("model"):
        return str(card["config"]["model"])
    if not (adapter / "adapter_config.json").is_file():
        raise ModelError("has no adapter_config.json", where=str(adapter), remedy="give a peft adapter's folder")
    found = read_json(adapter / "adapter_config.json").get("base_model_name_or_path")
    if not found:
        raise ModelError("names no base model", where=str(adapter), remedy="give --base")
    return str(found)


def _moved(base: str, adapter: Path, merged: Path) -> dict[str, float]:
    asked = [list(_TEXTS)] * len(_PROMPTS)
    before = load_engine(base, adapter, dtype="float32", device="cpu").score(_PROMPTS, asked)
    after = load_engine(merged, dtype="float32", device="cpu").score(_PROMPTS, asked)
    moved = np.abs(np.concatenate(before) - np.concatenate(after))
    return {"mean_moved_nats": float(moved.mean()), "max_moved_nats": float(moved.max())}
