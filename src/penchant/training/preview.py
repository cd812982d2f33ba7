"""`--dry-run`: what a run would train on and cost, and some of its examples with the trained tokens marked."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch

from penchant.data.dataset import Dataset
from penchant.recommend import Stages, silent
from penchant.tokens import TextCodec
from penchant.training.batch import collate
from penchant.training.config import ContrastiveConfig, TrainConfig
from penchant.training.held_out import VALID_PACKS, greedy, validation_every
from penchant.training.objectives import over
from penchant.training.packing import Plan
from penchant.training.processes import memory_mib
from penchant.training.recipe import Recipe
from penchant.training.recipes import cut
from penchant.training.rows import Row
from penchant.training.store import RowStore

# Validation users whose scoring is timed.
_TIMED_USERS = 8


def preview(name: str, config: TrainConfig, dataset: Dataset | None, stages: Stages = silent) -> str:
    """Examples, targets, tokens an epoch, steps, padding, memory, time (from a measured forward), three examples."""
    recipe = Recipe(name, config, None if dataset is None else cut(dataset, config), stages)
    config, rows = recipe.config, recipe.rows()
    recipe.require_context(rows)
    plan = Plan(rows.lengths, pack_tokens=config.pack_tokens, packs_per_step=config.packs_per_step, seed=config.seed)
    steps = max(1, int(np.ceil(config.epochs * plan.steps_per_epoch)))
    steps = min(steps, config.max_steps or steps)
    seconds, tokens = _measure(recipe, rows, plan)
    rate = tokens / seconds
    weights = sum(p.numel() * p.element_size() for p in recipe.student.model.parameters())
    trained = sum(p.numel() for p in recipe.student.trainable().values())
    whole = seconds / max(tokens, 1) * float(rows.lengths.sum()) * steps / plan.steps_per_epoch
    boxed = whole if config.max_minutes is None else min(whole, 60 * config.max_minutes)
    validations = 1 + math.ceil(steps / validation_every(config, steps))
    looked = validations * _validation_seconds(recipe, seconds / max(tokens, 1))
    lines = [
        *(f"note: {note}" for note in recipe.notes),
        f"{'examples':<28} {len(rows):>14,}",
        f"{'supervised targets':<28} {int(rows.n_targets.sum()):>14,}",
        f"{'tokens an epoch':<28} {int(rows.lengths.sum()):>14,}",
        f"{'events that fit no prompt':<28} {rows.dropped:>14,}",
        f"{'padding':<28} {plan.padding():>14.1%}",
        f"{'steps an epoch':<28} {plan.steps_per_epoch:>14,}",
        f"{'steps in all':<28} {steps:>14,}",
        f"{'trained weights':<28} {trained:>14,}",
        f"{'memory: weights':<28} {weights / 2**20:>10,.0f} MiB",
        f"{'memory: optimiser':<28} {trained * 12 / 2**20:>10,.0f} MiB",
        f"{'memory: peak of two forwards':<28} {memory_mib():>10,.0f} MiB",
        f"{'speed, measured':<28} {rate:>10,.0f} tokens/s",
        f"{'time of the steps, estimated':<28} {boxed / 60:>10,.1f} minutes"
        + ("" if boxed == whole else f" (the time box; {whole / 60:,.1f} without it)"),
        f"{f'time of {validations} validations':<28} {looked / 60:>10,.1f} minutes",
        f"{'time in all, estimated':<28} {(boxed + looked) / 60:>10,.1f} minutes",
        "",
        "Three examples; what is trained stands between [[ and ]]:",
    ]
    for i in np.linspace(0, len(rows) - 1, min(3, len(rows))).astype(int):
        show = paired if isinstance(config, ContrastiveConfig) else marked
        lines += ["", show(rows[int(i)], recipe.codec)]
    return "\n".join(lines)


def marked(row: Row, codec: TextCodec) -> str:
    """A row as text, its trained tokens between [[ and ]]; rivals on lines of their own."""
    out: list[str] = []
    trained = set()
    answers: dict[int, int] = {}
    for at, label in zip(row.at.tolist(), row.label.tolist(), strict=True):
        following = at + 1
        if following < len(row) and row.tokens[following] == label and row.branch[following] == row.branch[at]:
            trained.add(following)
        elif row.branch[at] == 0 and following == len(row):
            answers[at] = label
    trunk = np.flatnonzero(row.branch == 0)
    for i in trunk.tolist():
        text = codec.tokenizer.decode([int(row.tokens[i])])
        opens = i in trained and i - 1 not in trained
        closes = i in trained and i + 1 not in trained
        out.append(("[[" if opens else "") + text + ("]]" if closes else ""))
        if i in answers:
            out.append("[[" + codec.tokenizer.decode([answers[i]]) + "]]")
    text = "".join(out)
    first = {int(g): s for s, g in reversed(list(enumerate(row.group.tolist())))}
    for s, g in enumerate(row.group.tolist()):
        if s != first[g]:
            taken, rival = (
                codec.tokenizer.decode(row.label[row.sequence == x].tolist()).strip() for x in (first[g], s)
            )
            text += f"\n  rather {taken!r} than {rival!r}"
    return text


def paired(row: Row, codec: TextCodec) -> str:
    """A row of texts that are embedded: the history, the item it is to be near to, and the hard negatives."""
    history, taken, *hard = (
        codec.tokenizer.decode(row.tokens[row.branch == b].tolist()) for b in range(len(row.group))
    )
    return f"{history}[[{taken}]]" + "".join(f"\n  rather {taken!r} than {text!r}" for text in hard)


def _measure(recipe: Recipe, rows: RowStore, plan: Plan) -> tuple[float, int]:
    """Seconds and tokens of one forward, of as many packs as it will have, and its backward: the second of two."""
    loss, weight = recipe.objective()
    student = recipe.student
    student.train()
    packs = [[rows[r] for r in pack] for pack in plan.step(0)[: recipe.config.packs_per_forward]]
    batch = collate(packs, student.dtype, student.causal_lm.device)
    seconds = 0.0
    for _ in range(2):
        begun = time.perf_counter()
        torch.autograd.backward(over(loss, student, [batch])(student, student, batch) / weight(batch))
        if student.causal_lm.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begun
    for parameter in student.trainable().values():
        parameter.grad = None
    return seconds, batch.n_tokens


def _validation_seconds(recipe: Recipe, each_token: float) -> float:
    """Seconds of one validation: a forward is a third of a step, and the score is timed on a few of its users."""
    config = recipe.config
    valid = recipe.valid()
    recipe.require_context(valid)
    packs = greedy(valid, config.pack_tokens)[:VALID_PACKS]
    seconds = each_token / 3 * sum(len(row) for pack in packs for row in pack)
    if not config.eval_users:
        return seconds
    share = min(1.0, _TIMED_USERS / config.eval_users)
    few: dict[str, Any] = {"eval_users": max(1, round(share * config.eval_users))}
    if isinstance(config, ContrastiveConfig):
        few["catalogue"] = max(10, round(share * config.catalogue))
    score, _ = recipe.score(valid[: max(1, round(share * len(valid)))], config.model_copy(update=few))
    if score is not None:
        recipe.student.eval()
        begun = time.perf_counter()
        with torch.no_grad():
            score(recipe.student)
        seconds += (time.perf_counter() - begun) / share
    return seconds
