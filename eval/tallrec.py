"""TALLRec's few-shot protocol: AUC on its test examples after training on 16, 64, 256 or all of its training examples.

    python eval/tallrec.py --data-dir data --size 16 --size 64 --size 256 --size 0 --seeds 3 --epochs 20 \
        --max-minutes 10 --work runs/tallrec --out eval/results/tallrec-movie.json

Examples are drawn by seed from the task's training rows (eval/tasks/tallrec-movie.yaml). Of four points of a run (every
quarter of its steps) the one with the best AUC on 200 of its validation rows (or --eval-users, if more) is kept. Its
test rows are scored once a run: log p(Yes) - log p(No) in one forward a row. The untuned model is also asked how likely
the title is behind what was liked, and behind what was disliked: the difference is the other way of asking it. Beside
them stands what needs no LLM (the user's share of likes; with all training rows' histories and answers also the
item's), and each with the other. What is published stands in the task. What is measured is kept in --work, and made
again where settings, data or model are others.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from penchant import __version__
from penchant.cli.script import script
from penchant.engine.folders import fingerprint_of, resolve_model
from penchant.environment import commit_of, made_by
from penchant.errors import ConfigError
from penchant.evaluation.readers import YesNo, YesNoRow, folder_of, read_yes_no
from penchant.evaluation.statistics import Spread
from penchant.evaluation.store import key_of
from penchant.evaluation.tasks import load_task
from penchant.evaluation.yes_no import LLM, TASTE, answer_margins, taste_margins, weighed_on, yes_no_report
from penchant.files import read_json, sha256_file, write_json
from penchant.training.checkpoints import load_checkpoint
from penchant.training.config import YesNoConfig
from penchant.training.loop import Loop
from penchant.training.processes import make_accelerator
from penchant.training.recipe import Recipe
from penchant.training.settings import read_settings
from penchant.training.validation import engine_of

_CONFIG = Path("finetune/configs/yes_no-tallrec.yaml")
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def main(
    context: typer.Context,
    data_dir: Annotated[Path, typer.Option(help="Folder that holds tallrec/, or that folder itself.")],
    work: Annotated[Path, typer.Option(help="Folder of the runs and of what was measured.")],
    out: Annotated[Path, typer.Option(help="The JSON file to write.")],
    size: Annotated[list[int], typer.Option(help="Training examples; 0: all.")],
    seeds: Annotated[int, typer.Option(help="Seeds 0, 1, ... of examples, weights and order.")] = 3,
    config: Annotated[Path, typer.Option(help="YAML file of settings.")] = _CONFIG,
) -> None:
    """Train and score each size and seed. Every setting of yes_no is an option too."""
    base = read_settings(YesNoConfig, config, context.args)
    task = load_task("tallrec-movie")
    data, folder = task.data, folder_of(task.data, data_dir)
    if not isinstance(data, YesNo) or folder is None:
        raise ConfigError("the task is not one of yes and no", where="tallrec-movie")
    base = base.model_copy(update={"examples": str(folder / data.train), "valid_examples": str(folder / data.valid)})
    test, train, valid = (read_yes_no(data, part, data_dir) for part in ("test", "train", "valid"))
    parts = test, train, weighed_on(valid, 0)
    files = {name: sha256_file(folder / name) for name in (data.train, data.valid, data.test)}
    told = {"examples", "valid_examples"}  # paths: their content is in files
    runs = []
    for n in [None, *size]:
        for seed in range(seeds if n is not None else 1):
            settings = base.model_copy(update={"max_rows": n or None, "seed": seed})
            label = "untuned" if n is None else "all" if n == 0 else str(n)
            ways = [LLM] if n is not None else [LLM, TASTE]  # yes_no trains the answer alone
            told_by = {"files": files, "base": fingerprint_of(resolve_model(settings.model)), "version": __version__}
            key = key_of(settings=settings.model_dump(mode="json", exclude=told), ways=ways, **told_by)
            name = f"{label}-{seed}-{key[:12]}"
            kept = work / f"{name}.json"
            if not kept.is_file():
                made = _run(settings, *parts, work / name, ways, tune=n is not None)
                write_json(kept, made | commit_of(Path(__file__).resolve().parent))
            runs.append({"examples": label, "seed": seed, **read_json(kept)})
            typer.echo(runs[-1])
    summary = {
        label: {
            system: _spread([r["systems"][system]["AUC"]["mean"] for r in runs if r["examples"] == label])
            for system in next(r["systems"] for r in runs if r["examples"] == label)
        }
        for label in dict.fromkeys(r["examples"] for r in runs)
    }
    write_json(
        out,
        {
            **made_by(__file__),
            "auc": summary,
            "published": [one.model_dump(mode="json") for one in task.published],
            "runs": runs,
            "settings": base.model_dump(mode="json", exclude=told),
            "files": files,
        },
    )
    typer.echo(str(out))


def _run(
    settings: YesNoConfig,
    test: list[YesNoRow],
    train: list[YesNoRow],
    valid: list[YesNoRow],
    folder: Path,
    ways: list[str],
    *,
    tune: bool,
) -> dict[str, Any]:
    recipe = Recipe("yes_no", settings, None)
    trained: dict[str, Any] = {}
    if tune:
        folder.mkdir(parents=True, exist_ok=True)
        loop = Loop(recipe.task(), recipe.student, settings, folder, accelerator=make_accelerator(settings, folder))
        outcome = loop.run(resume=True)
        load_checkpoint(loop.best_checkpoint(), recipe.student, None)
        trained = {"steps": outcome.steps, "best_step": outcome.best_step, "train_seconds": outcome.seconds}
        trained["valid_auc"] = (outcome.best or {}).get("AUC")
    recipe.student.eval()
    engine = engine_of(recipe.student, recipe.tokenizer)
    margins, held, seconds = {}, {}, {}
    for name in ways:
        ask = {LLM: answer_margins, TASTE: taste_margins}[name]
        begun = time.perf_counter()
        margins[name] = ask(engine, recipe.templates, test, prompt_tokens=settings.prompt_tokens)
        seconds[name] = round(time.perf_counter() - begun, 1)
        held[name] = ask(engine, recipe.templates, valid, prompt_tokens=settings.prompt_tokens)
    report = yes_no_report(margins, test, train, valid=(valid, held))
    return {
        "systems": {row.system: {name: asdict(one) for name, one in row.metrics.items()} for row in report.rows},
        "n_test": len(test),
        "test_seconds": seconds,
        **trained,
    }


def _spread(values: list[float]) -> dict[str, float | int | None]:
    found = asdict(Spread.of(values))
    return found if len(values) > 1 else found | {"sd": None}


if __name__ == "__main__":
    script(app)
