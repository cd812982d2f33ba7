"""``penchant demo``: MovieLens-100K and SmolLM2-135M, end to end, on a machine without a GPU."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from penchant.cli.console import progress
from penchant.errors import StorageError

if TYPE_CHECKING:
    from penchant.cli.console import Stages
    from penchant.data.split import Split
    from penchant.engine.transformers import TransformersEngine
    from penchant.recommend import Recommender
    from penchant.run_folder import FitConfig

RECOMMENDATIONS, REPORT = "recommendations.parquet", "report.json"  # beside the run's own files
_SHOWN = ("42", "7", "600")
_LLM_USERS = 100
# The time box of the demo's fine-tune, and how little it validates: what it does is measured after it.
_FINETUNE_MINUTES = 1.0


def demo_command(
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/demo"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Fit again though the run is there.")] = False,
) -> None:
    """Fetch, prepare, embed, train, retrieve, rank; three users' top ten and an honest table; then a minute of LoRA."""
    from penchant.engine.noise import quiet_libraries

    quiet_libraries()
    from penchant.data.dataset import Dataset
    from penchant.data.split import leave_last_out
    from penchant.engine.loading import load_engine
    from penchant.evaluation.evaluate import evaluate
    from penchant.fetch import fetch
    from penchant.files import write_json
    from penchant.interest.config import EncoderConfig
    from penchant.run_folder import FitConfig

    seconds: dict[str, float] = {}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        seconds[name] = time.perf_counter() - begun

    with timed("fetch"):
        data, _ = fetch("movielens-100k"), fetch("smollm2-135m")
    with timed("prepare"):
        dataset = Dataset.read(data / "interactions.csv", data / "items.csv")
        split = leave_last_out(dataset)
    typer.echo(f"{dataset}\n{split.summary()}")
    with timed("load the model"):
        engine = load_engine("smollm2-135m")
    # Twenty epochs are where validation stops rising within the demo's two minutes.
    config = FitConfig(encoder=EncoderConfig(epochs=20), validation_users=100)
    with progress() as stages:
        begun = time.perf_counter()
        model, loaded = _fit_or_load(split, engine, config, out, fresh=fresh, stages=stages)
        if loaded:
            seconds["open the run"] = time.perf_counter() - begun
        else:
            seconds.update(model.seconds)
        with timed("evaluate"):
            report = evaluate(model, llm_users=_LLM_USERS, n_examples=0, stages=stages)
        with timed("recommend"):
            _recommend(model, out)
        with timed("fine-tune"):
            adapter = _finetune(split, out, fresh=fresh)
        with timed("evaluate the fine-tuned"):
            tuned = evaluate(
                model.with_ranker(load_engine("smollm2-135m", adapter), stages=stages),
                llm_users=_LLM_USERS,
                slices=False,
                n_examples=0,
                stages=stages,
            )
    found = {**report.to_dict(), "demo_seconds": seconds, "fitted_now": not loaded}
    write_json(out / REPORT, {**found, "fine_tuned": tuned.to_dict()})
    typer.echo("")
    typer.echo(report.to_text())
    typer.echo(f"\nthe same after {_FINETUNE_MINUTES:g} minute of next-item LoRA ({adapter})")
    asked = [row for row in tuned.rows if "llm" in row.system]
    typer.echo(replace(tuned, rows=asked, notes=[]).to_text())
    _say_seconds(seconds, out, loaded)
    typer.echo(f"next: penchant recommend {out} --user 42")
    typer.echo(str(out))


def _say_seconds(seconds: dict[str, float], out: Path, loaded: bool) -> None:
    typer.echo("")
    typer.echo("where the seconds went" + (f" ({out} was there already: opened, not fitted)" if loaded else ""))
    for name, value in seconds.items():
        typer.echo(f"  {name:<24} {value:7.1f}")
    typer.echo(f"  {'in all':<24} {sum(seconds.values()):7.1f}")
    typer.echo("")


def _finetune(split: Split, out: Path, *, fresh: bool) -> Path:
    """A minute of dense next-item training; the adapter of an earlier demo where the same was trained."""
    import shutil

    from penchant.adapter_card import read_card
    from penchant.engine.device import resolve_device, resolve_dtype
    from penchant.training.config import NextItemConfig
    from penchant.training.recipes import finetune

    adapter = out.with_name(out.name + "-adapter")
    config = NextItemConfig.model_validate(
        {
            "dtype": resolve_dtype("auto", resolve_device("auto")),  # as the card says it
            "max_minutes": _FINETUNE_MINUTES,
            "packs_per_step": 1,
            "eval_users": 0,
            "eval_every": 10**6,
        }
    )
    card = None if fresh else read_card(adapter)
    wanted = (config.model_dump(mode="json"), split.dataset.content_hash)
    if card is None or (card.get("config"), card.get("data")) != wanted:
        if card is not None and card.get("data") != split.dataset.content_hash:
            raise _not_the_demos(adapter)
        if (adapter / "run.json").is_file():
            shutil.rmtree(adapter)
        finetune("next_item", config, split, adapter)
    return adapter


def _fit_or_load(
    split: Split, engine: TransformersEngine, config: FitConfig, out: Path, *, fresh: bool, stages: Stages
) -> tuple[Recommender, bool]:
    """The run in ``out`` if it was made from the same data, model, templates and settings; else a new one."""
    from penchant.prompt import Templates
    from penchant.recommend import Recommender
    from penchant.run_folder import read_manifest

    if (out / "manifest.json").is_file() and not fresh:
        found = read_manifest(out)
        wanted = config.model_copy(update={"encoder": config.encoder.resolved()}).model_dump(mode="json")
        made_with = {**found["config"], "layer": wanted["layer"]}
        if (found["data"], found["fingerprint"], found["templates"], made_with) == (
            split.dataset.content_hash,
            engine.fingerprint,
            Templates().hash(),
            wanted,
        ):
            return Recommender.load(out, engine), True
        if found["data"] != split.dataset.content_hash:
            raise _not_the_demos(out)
    model = Recommender.fit(split, engine, config, stages=stages)
    for name in (RECOMMENDATIONS, REPORT):  # an earlier demo's
        (out / name).unlink(missing_ok=True)
    model.save(out)
    return model, False


def _not_the_demos(folder: Path) -> StorageError:
    return StorageError(
        "was made from other data than the demo's, which would replace it",
        where=str(folder),
        remedy="give another --out, or --fresh to replace it",
    )


def _recommend(model: Recommender, out: Path) -> None:
    """Show three users, and write everybody's top ten: the LLM ranks the three, the encoder alone the others."""
    import polars as pl

    from penchant.files import staged_file

    shown = model.recommend(list(_SHOWN), 10)
    for user in _SHOWN:
        history = model.log.item[model.log.all_of(model.user(user))][-5:]
        typer.echo(f"\nuser {user}, lately:")
        for item in history:
            typer.echo(f"     {model.texts[item]}")
        typer.echo("  recommended:")
        for row in shown.filter(pl.col("user_id") == user).iter_rows(named=True):
            typer.echo(f"  {row['rank']:>2} {row['title']:<60.60} {row['score']:+.3f}  {row['stage']}")
    named = model.recommend([_SHOWN[0]], 5, method="generate")
    typer.echo(f"\nuser {_SHOWN[0]}, named by the LLM alone out of the whole catalogue, seen ones left out:")
    for row in named.iter_rows(named=True):
        typer.echo(f"  {row['rank']:>2} {row['title']:<60.60} {row['score']:+.3f}  {row['stage']}")
    others = [user for user in model.log.user_ids if user not in _SHOWN]
    everybody = pl.concat([shown, model.recommend(others, 10, method="retrieve")])
    with staged_file(out / RECOMMENDATIONS) as stage, stage.open("wb") as handle:
        everybody.write_parquet(handle)
