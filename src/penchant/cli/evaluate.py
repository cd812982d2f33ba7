"""``penchant evaluate``: an honest table for a run, on the test targets of its own split."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from penchant.cli.console import progress


def evaluate_command(
    run: Annotated[Path, typer.Argument(help="A folder made by `penchant fit`.")],
    k: Annotated[int, typer.Option("-k", "--k", help="Cut-off of the metrics.")] = 10,
    llm_users: Annotated[int, typer.Option(help="Seeded test users that go through the LLM stage; 0: none.")] = 500,
    seed: Annotated[int, typer.Option(help="Seed of the sample and of the intervals.")] = 0,
    json: Annotated[Path | None, typer.Option(help="Also write the report, with machine and versions, here.")] = None,
) -> None:
    """Print Recall and NDCG with 95% intervals for the model, its parts and plain baselines."""
    from penchant.engine.noise import quiet_libraries

    quiet_libraries()
    from penchant.evaluation.evaluate import evaluate
    from penchant.recommend import Recommender

    model = Recommender.load(run)
    with progress() as stages:
        report = evaluate(model, k=k, llm_users=llm_users, seed=seed, stages=stages)
    typer.echo(report.to_text())
    if json is not None:
        from penchant.files import write_json

        write_json(json, report.to_dict())
        typer.echo(str(json))
