"""What the tests of training share: settings for tiny models, corpora, and forwards written the slow, plain way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import polars as pl
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from transformers import AutoTokenizer

from penchant.data.dataset import Dataset
from penchant.data.split import leave_last_out
from penchant.prompt import Templates
from penchant.resources import shipped
from penchant.tokens import TextCodec
from penchant.training.config import LoraSettings, NextItemConfig, TrainConfig
from penchant.training.corpus import Corpus
from penchant.training.rows import Row
from penchant.training.student import Student, load_student

Config = TypeVar("Config", bound=TrainConfig)

# The tiny vocabulary has no token for Yes and none for No.
QUICK: dict[str, Any] = {
    "dtype": "float32",
    "device": "cpu",
    "lora": {"r": 4, "alpha": 8},
    "learning_rate": 1e-2,
    "pack_tokens": 256,
    "packs_per_step": 2,
    "max_history": 8,
    "candidates": 6,
    "retriever": {"epochs": 2},
    "eval_users": 0,
    "eval_every": 50,
}


def settings(model: Path, kind: type[Config] = NextItemConfig, **changes: Any) -> Config:  # type: ignore[assignment]
    """Settings with which a tiny model trains in a moment."""
    return kind.model_validate({**QUICK, "model": str(model), **changes})


def lora(**changes: Any) -> LoraSettings:
    return LoraSettings(**{"r": 4, "alpha": 8, **changes})


def letter_prompts(folder: Path) -> Path:
    """The shipped templates, but yes_no answers with A or B."""
    folder.mkdir(parents=True, exist_ok=True)
    text = (shipped("prompts") / "yes_no.jinja").read_text(encoding="utf-8")
    changed = text.replace('labels: ["Yes", "No"]', 'labels: ["A", "B"]')
    assert changed != text
    (folder / "yes_no.jinja").write_text(changed, encoding="utf-8")
    return folder


def corpus_of(dataset: Dataset, model: Path, prompts: Path | None = None) -> Corpus:
    codec = TextCodec(AutoTokenizer.from_pretrained(model, local_files_only=True))
    return Corpus.of(leave_last_out(dataset), Templates(prompts), codec)


def distinct(n_users: int = 8, n_events: int = 6, *, rated: bool = False) -> Dataset:
    """Each user takes items that nobody else does: u3 takes i30 to i35. So an item names its user."""
    rows = [(f"u{u}", f"i{u * 10 + e}", 1_000 + 60 * e + u) for u in range(n_users) for e in range(n_events)]
    interactions = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    if rated:
        interactions = interactions.with_columns(rating=pl.Series([(i % 5) + 1.0 for i in range(len(rows))]))
    ids = [row[1] for row in rows]
    return Dataset.read(interactions, pl.DataFrame({"item_id": ids, "title": [f"Film {i}" for i in ids]}))


def stirred(config: TrainConfig, seed: int = 0, scale: float = 0.1) -> Student:
    """A student whose adapter is no longer zero, for tests that don't train it."""
    student = load_student(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in student.trainable().values():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return student.eval()


def plain_logprobs(student: Student, context: Sequence[int], labels: Sequence[int]) -> torch.Tensor:
    """log p of each label behind ``context`` and the labels before it, by one ordinary forward."""
    ids = torch.tensor([[*context, *labels]])
    logits = student.causal_lm(input_ids=ids, use_cache=False).logits[0].float()
    return torch.log_softmax(logits, -1)[torch.arange(len(context) - 1, ids.shape[1] - 1), torch.tensor(labels)]


def row_logprobs(student: Student, row: Row) -> torch.Tensor:
    """log p of a row's labels, every candidate sequence by a forward of its own."""
    out = torch.empty(len(row.label))
    trunk = row.tokens[row.branch == 0].tolist()
    parts = []
    for s in range(len(row.group)):
        own = np.flatnonzero(row.sequence == s)
        parts.append((own, plain_logprobs(student, trunk[: int(row.at[own[0]]) + 1], row.label[own].tolist())))
    order = np.concatenate([own for own, _ in parts])
    return torch.cat([logp for _, logp in parts])[torch.from_numpy(np.argsort(order))].to(out.dtype)


def supervised_targets(rows: Sequence[Row]) -> list[list[tuple[int, ...]]]:
    """The label tokens of each row's candidate sequences."""
    return [[tuple(row.label[row.sequence == s].tolist()) for s in range(len(row.group))] for row in rows]


def steps_of(out: Path, kind: str = "step") -> list[dict[str, Any]]:
    """The records of one kind in a run's log."""
    import json

    records = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [r for r in records if r["kind"] == kind]


def losses_of(out: Path) -> list[float]:
    return [r["loss"] for r in steps_of(out)]


@contextmanager
def fresh_accelerate() -> Iterator[None]:
    """accelerate's processes are one shared state: leave none behind for the next test."""
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def patched_clock(patch: pytest.MonkeyPatch, module: str, seconds: float) -> None:
    """Every look at ``module``'s perf_counter is ``seconds`` later than the one before."""

    class Clock:
        now = 0.0

        @classmethod
        def perf_counter(cls) -> float:
            cls.now += seconds
            return cls.now

    patch.setattr(f"{module}.time", Clock)
