"""TALLRec's few-shot protocol: AUC on its test examples after training on 16, 64, 256 or all of its training examples.

    python eval/tallrec.py --data-dir data/tallrec/movie --size 16 --size 64 --size 256 --seeds 3 \
        --work runs/tallrec --out eval/results/tallrec-movie.json

Examples are drawn by seed from train.json.gz. Of four points of a run (every quarter of its steps) the one with the
best AUC on the first 200 rows of valid.json.gz (or --eval-users, if more) is kept. test.json.gz is scored once a run:
log p(Yes) - log p(No) in one forward an example. Published: TALLRec (LLaMA-7B) .6724, .6748 and .7198 with 16, 64 and
256 examples; SASRec .5043, .5048 and .5225 (TALLRec's README; Bao et al. 2023).
What is measured is kept in --work.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from scipy import stats

from penchant.environment import environment
from penchant.files import read_json, sha256_file, write_json
from penchant.metrics import auc
from penchant.training.checkpoints import load_checkpoint
from penchant.training.config import YesNoConfig
from penchant.training.loop import Loop
from penchant.training.processes import make_accelerator
from penchant.training.recipe import Recipe
from penchant.training.rows import Row
from penchant.training.settings import read_settings
from penchant.training.student import Student
from penchant.training.validation import label_scores
from penchant.training.yes_no import answer_tokens, example_row, read_examples

PUBLISHED = {
    "TALLRec (LLaMA-7B)": {"16": 0.6724, "64": 0.6748, "256": 0.7198},
    "SASRec": {"16": 0.5043, "64": 0.5048, "256": 0.5225},
    "GRU-BERT": {"16": 0.5085, "64": 0.5165, "256": 0.5344},
}
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def main(
    context: typer.Context,
    data_dir: Annotated[Path, typer.Option(help="Folder of train, valid and test.json.gz.")],
    work: Annotated[Path, typer.Option(help="Folder of the runs and of what was measured.")],
    out: Annotated[Path, typer.Option(help="The JSON file to write.")],
    size: Annotated[list[int], typer.Option(help="Training examples; 0: all.")],
    seeds: Annotated[int, typer.Option(help="Seeds 0, 1, ... of examples, weights and order.")] = 3,
    config: Annotated[Path, typer.Option(help="YAML file of settings.")] = Path("finetune/configs/yes_no-tallrec.yaml"),
) -> None:
    """Train and score each size and seed. Every setting of yes_no is an option too."""
    base = read_settings(YesNoConfig, config, context.args)
    base = base.model_copy(
        update={"examples": str(data_dir / "train.json.gz"), "valid_examples": str(data_dir / "valid.json.gz")}
    )
    runs = []
    for n in [None, *size]:
        for seed in range(seeds if n is not None else 1):
            settings = base.model_copy(update={"max_rows": n or None, "seed": seed})
            label = "untuned" if n is None else "all" if n == 0 else str(n)
            kept = work / f"{label}-{seed}.json"
            if not kept.is_file():
                write_json(kept, _run(settings, data_dir, work / f"{label}-{seed}", tune=n is not None))
            runs.append({"examples": label, "seed": seed, **read_json(kept)})
            typer.echo(runs[-1])
    summary = {
        label: _spread([r["auc"] for r in runs if r["examples"] == label])
        for label in dict.fromkeys(r["examples"] for r in runs)
    }
    write_json(
        out,
        {
            "auc": summary,
            "published": PUBLISHED,
            "runs": runs,
            "settings": base.model_dump(mode="json", exclude={"examples", "valid_examples"}),
            "files": {p.name: sha256_file(p) for p in sorted(data_dir.glob("*.json.gz"))},
            "environment": environment(),
        },
    )
    typer.echo(str(out))


def _run(settings: YesNoConfig, data_dir: Path, folder: Path, *, tune: bool) -> dict[str, Any]:
    recipe = Recipe("yes_no", settings, None)
    trained: dict[str, Any] = {}
    if tune:
        folder.mkdir(parents=True, exist_ok=True)
        loop = Loop(recipe.task(), recipe.student, settings, folder, accelerator=make_accelerator(settings, folder))
        outcome = loop.run(resume=True)
        load_checkpoint(loop.best_checkpoint(), recipe.student, None)
        trained = {"steps": outcome.steps, "best_step": outcome.best_step, "train_seconds": outcome.seconds}
        trained["valid_auc"] = (outcome.best or {}).get("AUC")
    labels = answer_tokens(recipe.templates, recipe.codec)
    rows = [
        example_row(example, recipe.templates, recipe.codec, settings, labels)
        for example in read_examples(data_dir / "test.json.gz")
    ]
    begun = time.perf_counter()
    value, low, high = _auc(recipe.student, rows, settings.pack_tokens)
    return {
        "auc": value,
        "low": low,
        "high": high,
        "n_test": len(rows),
        "test_seconds": round(time.perf_counter() - begun, 1),
        **trained,
    }


def _auc(student: Student, rows: list[Row], pack_tokens: int) -> tuple[float, float, float]:
    """AUC and its 95% bootstrap interval over test examples."""
    logp = label_scores(student, rows, pack_tokens)
    scores = logp[:, 0] - logp[:, 1]
    truth = np.array([row.label[0] == row.choices[0] for row in rows])
    interval = stats.bootstrap(
        (scores, truth),
        lambda s, t: auc(np.asarray(s), np.asarray(t)),
        paired=True,
        vectorized=False,
        n_resamples=1000,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return auc(scores, truth), float(interval.low), float(interval.high)


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "mean": round(float(np.mean(values)), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
        "seeds": len(values),
    }


if __name__ == "__main__":
    app()
