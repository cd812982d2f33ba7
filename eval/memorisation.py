"""What a model knows of a catalogue's titles by heart, and what is left of each system when titles mean nothing.

    python eval/memorisation.py movielens-100k --out eval/results/memorisation-ml-100k.json
    python eval/memorisation.py data/mine --fit --out eval/results/memorisation-mine.json

The data is a folder made by `penchant prepare`, or a name that `penchant fetch` knows. Always: how many of n sampled
titles the model can finish, and whether it knows their years. With --fit: fit twice, leave-last-out, with the real
titles and with neutral names, and compare each system with itself on the same users.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

import penchant as pt
from penchant.cli.script import script
from penchant.engine.noise import quiet_libraries
from penchant.environment import made_by
from penchant.evaluation.probe import memorisation, neutral_dataset, probe
from penchant.fetch import KNOWN, fetch
from penchant.files import write_json
from penchant.interest.config import EncoderConfig


def read(data: str) -> pt.Dataset:
    """A prepared folder, or a dataset by its known name."""
    if data not in KNOWN:
        return pt.Dataset.load(data)
    folder = fetch(data)
    return pt.Dataset.read(folder / "interactions.csv", folder / "items.csv")


def main(
    data: Annotated[str, typer.Argument(help="A prepared folder, or a name `penchant fetch` knows.")],
    out: Annotated[Path, typer.Option(help="The JSON file to write.")],
    model: Annotated[str, typer.Option(help="A known name, a model's folder, or a hub id.")] = "smollm2-135m",
    adapter: Annotated[str | None, typer.Option(help="A peft adapter.")] = None,
    n: Annotated[int, typer.Option(min=1, help="Titles to ask for.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sample and of the names.")] = 0,
    fit: Annotated[
        bool, typer.Option("--fit", help="Also fit and evaluate with real and with neutral titles.")
    ] = False,
    llm_users: Annotated[int, typer.Option(min=0, help="Targets that go through the LLM stage.")] = 500,
) -> None:
    """Write what was found as JSON, with the machine and the versions."""
    quiet_libraries()
    dataset = read(data)
    engine = pt.load_engine(model, adapter)
    begun = time.perf_counter()
    found: dict[str, Any] = {"data": data, "recall": memorisation(engine, dataset, n, seed)}
    found["recall_seconds"] = round(time.perf_counter() - begun, 1)
    print_recall(found["recall"])
    if fit:
        neutral = neutral_dataset(dataset, seed, codec=engine.codec)
        # Neighbours know items by their IDs, whatever their names: beside them little of a title could be missed.
        config = pt.FitConfig(encoder=EncoderConfig(neighbours=0))
        models = [pt.Recommender.fit(pt.leave_last_out(one), engine, config) for one in (dataset, neutral)]
        report = probe(models[0], models[1], llm_users=llm_users, seed=seed)
        found |= {"probe": report.to_dict(), "neutral": neutral.report["neutral"]}
        print(report.to_text())
    write_json(out, {**found, **made_by(__file__)})
    print(out)


def print_recall(recall: dict[str, Any]) -> None:
    """The shares with their intervals."""
    for part in ("titles", "years"):
        for name, value in (recall[part] or {}).items():
            if isinstance(value, dict) and "mean" in value:
                interval = f"[{value['low']:.3f}, {value['high']:.3f}]"
                print(f"{part:<7} {name:<12} {value['mean']:.3f} {interval}  n {value['n']}")


if __name__ == "__main__":
    script(main)
