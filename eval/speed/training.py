"""How fast training is: dense against one target a prompt, packed against full batches, NF4's memory.

    python eval/speed/training.py --data data/ml-100k --out eval/results/speed-training.json

All sides run the same model and loss in one process, each warmed, in turns, and the median of the ratios is kept:
1. supervised targets a second of dense rows (20 titles) against the same histories with one prompt a target;
2. padding of packs, and tokens a second of the packed step against the same step on full-length unpadded batches;
3. bytes of NF4 weights (bf16 compute) against bf16's.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

import penchant as pt
from penchant.cli.script import script
from penchant.environment import made_by
from penchant.files import write_json
from penchant.training.batch import Batch, collate
from penchant.training.config import NextItemConfig
from penchant.training.corpus import Corpus
from penchant.training.losses import next_item_loss
from penchant.training.next_item import next_item_rows
from penchant.training.packing import Plan, pack
from penchant.training.recipe import Recipe
from penchant.training.recipes import cut
from penchant.training.rows import Row, RowBuilder
from penchant.training.student import Student, load_student


def main(
    data: Annotated[Path, typer.Option(help="A folder made by `penchant prepare`.")],
    out: Annotated[Path, typer.Option(help="The JSON file to write.")],
    model: Annotated[str, typer.Option(help="A known name, or a model's folder.")] = "smollm2-135m",
    rounds: Annotated[int, typer.Option(help="Times each side runs, in turns.")] = 5,
    quantised: Annotated[bool, typer.Option(help="Also load the model in NF4.")] = True,
) -> None:
    """Measure all three and write them."""
    dataset = pt.Dataset.load(data)
    found: dict[str, Any] = {"dense": _dense(dataset, model, rounds), "packed": _packed(dataset, model, rounds)}
    if quantised:
        found["nf4"] = _memory(model)
    for name, values in found.items():
        print(name, values)
    write_json(out, {**found, "model": model, "data": dataset.content_hash, **made_by(__file__)})
    print(out)


def _dense(dataset: pt.Dataset, model: str, rounds: int) -> dict[str, Any]:
    """Histories of 20 titles: one dense row each, against one prompt for each of their targets."""
    config = NextItemConfig(model=model, window=20, max_history=20, pack_tokens=1024)
    recipe = Recipe("next_item", config, cut(dataset, config))
    dense = [r for r in next_item_rows(recipe.corpus, config) if r.n_targets == 20][:12]
    single = [row for dense_row in dense[:3] for row in _one_by_one(recipe.corpus, config, dense_row)]
    student = recipe.student
    sides = {"dense": _packs(student, dense, config), "single": _packs(student, single, config)}
    step = {name: _stepper(student, batches) for name, batches in sides.items()}
    targets = {name: sum(b.n_targets for b in batches) for name, batches in sides.items()}
    seconds = _in_turns(step, rounds)
    ratios = [
        (targets["dense"] / d) / (targets["single"] / s)
        for d, s in zip(seconds["dense"], seconds["single"], strict=True)
    ]
    return {
        "targets_a_second_ratio": round(statistics.median(ratios), 2),
        "ratios": [round(r, 2) for r in ratios],
        **{f"{n}_targets_a_second": round(targets[n] / statistics.median(seconds[n]), 2) for n in sides},
        **{f"{n}_tokens": sum(b.n_tokens for b in batches) for n, batches in sides.items()},
        **{f"{n}_targets": targets[n] for n in sides},
    }


def _one_by_one(corpus: Corpus, config: NextItemConfig, row: Row) -> list[Row]:
    """The same targets of a dense row, each behind a prompt of the items before it."""
    out = []
    for i, position in enumerate(row.targets):
        before = row.targets[:i]
        prompt, _ = corpus.render("next_item", before, max_history=config.max_history, budget=config.prompt_tokens)
        sequence = corpus.item_tokens[int(corpus.split.log.item[position])]
        builder = RowBuilder([*prompt, *sequence])
        builder.supervise(len(prompt), len(sequence))
        out.append(builder.build())
    return out


def _packed(dataset: pt.Dataset, model: str, rounds: int) -> dict[str, Any]:
    """The packed step against the same forward on batches without a pad or a mask of ours."""
    config = NextItemConfig(model=model)
    recipe = Recipe("next_item", config, cut(dataset, config))
    rows = recipe.rows()
    plan = Plan(rows.lengths, pack_tokens=config.pack_tokens, packs_per_step=2, seed=0)
    batches = [_batch(recipe.student, [rows[r] for r in p]) for p in plan.step(0)]
    full = [_full(recipe.student, config.pack_tokens) for _ in batches]
    seconds = _in_turns({"packed": _stepper(recipe.student, batches), "full": _stepper(recipe.student, full)}, rounds)
    tokens = {"packed": sum(b.n_tokens for b in batches), "full": sum(b.n_tokens for b in full)}
    ratios = [
        (tokens["packed"] / p) / (tokens["full"] / f) for p, f in zip(seconds["packed"], seconds["full"], strict=True)
    ]
    return {
        "padding_share": round(plan.padding(), 4),
        "tokens_a_second_ratio": round(statistics.median(ratios), 3),
        "ratios": [round(r, 3) for r in ratios],
        **{f"{n}_tokens_a_second": round(tokens[n] / statistics.median(seconds[n]), 1) for n in tokens},
    }


def _full(student: Student, length: int) -> Batch:
    """One sequence as long as a pack, every token a target; without a mask attention is plainly causal."""
    rng = np.random.default_rng(0)
    size = int(student.causal_lm.get_input_embeddings().weight.shape[0])
    builder = RowBuilder(rng.integers(100, size, size=length).tolist())
    builder.supervise(1, length - 1)
    return dataclasses.replace(_batch(student, [builder.build()]), layout=None)


def _packs(student: Student, rows: list[Row], config: NextItemConfig) -> list[Batch]:
    packs = pack([len(r) for r in rows], config.pack_tokens, np.random.default_rng(0))
    return [_batch(student, [rows[i] for i in p]) for p in packs]


def _batch(student: Student, rows: list[Row]) -> Batch:
    return collate([rows], student.dtype, student.causal_lm.device)


def _stepper(student: Student, batches: list[Batch]) -> Callable[[], None]:
    optimiser = torch.optim.AdamW(student.trainable().values(), lr=1e-5)

    def step() -> None:
        student.train()
        for batch in batches:
            torch.autograd.backward(next_item_loss(student(batch), batch) / float(batch.weight.sum()))
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


def _in_turns(sides: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    for run in sides.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            _wait()
            begun = time.perf_counter()
            run()
            _wait()
            seconds[name].append(time.perf_counter() - begun)
    return seconds


def _wait() -> None:
    """A GPU has done what it was given: else one side's work is timed as the other's."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _memory(model: str) -> dict[str, Any]:
    """Bytes of all weights but the adapter's, as they lie in memory."""

    def size(quantization: str) -> int:
        student = load_student(NextItemConfig(model=model, dtype="bfloat16", quantization=quantization))
        kept = {id(p): p.numel() * p.element_size() for n, p in student.model.named_parameters() if "lora_" not in n}
        return sum(kept.values())

    plain, nf4 = size("none"), size("nf4")
    return {"bf16_mib": round(plain / 2**20, 1), "nf4_mib": round(nf4 / 2**20, 1), "ratio": round(nf4 / plain, 3)}


if __name__ == "__main__":
    script(main)
