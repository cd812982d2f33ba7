"""What variety costs: NDCG against how varied and how wide the lists are, as ``diversity`` grows from 0 to 1.

python eval/diversity.py RUN --out eval/results/diversity.json

Every test target's list of ten is chosen by maximal marginal relevance from the encoder's best hundred, seen items
masked. OUT holds the numbers with 95% intervals, OUT's name with .png the two curves.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from matplotlib.figure import Figure

import penchant as pt
from penchant import metrics
from penchant.cli.script import script
from penchant.environment import made_by
from penchant.evaluation import beyond
from penchant.evaluation.statistics import bootstrap_mean
from penchant.files import write_json
from penchant.rerank import Rules

LEVELS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def main(
    run: Annotated[Path, typer.Argument(help="A folder made by `penchant fit` whose split has a test.")],
    out: Annotated[Path, typer.Option(help="The JSON file to write.")] = Path("eval/results/diversity.json"),
    k: Annotated[int, typer.Option(help="Places of a list.")] = 10,
) -> None:
    """One point a level of diversity."""
    model = pt.Recommender.load(run)
    targets = model.split.test
    histories = model.reading.before(targets.position)
    warm = np.flatnonzero([len(history) > 0 for history in histories])
    targets, histories = targets.take(warm), [histories[i] for i in warm]
    n_items = model.log.n_items
    vectors = model.scaling.apply(model.vectors[:n_items])
    found, _ = model.retrieve(histories, Rules.of(model.items, diversity=0.5, unique=False).pool(k))
    points: list[dict[str, Any]] = []
    for level in LEVELS:
        rules = Rules.of(model.items, diversity=level, unique=False)
        top = np.full((len(targets), k), -1, dtype=np.int32)
        for row, items in enumerate(found):
            pool = items[items >= 0]
            chosen = pool[rules.choose(pool.tolist(), vectors[pool], k)]
            top[row, : len(chosen)] = chosen
        rank = metrics.list_rank(top, targets.item)
        ndcg = bootstrap_mean(metrics.ndcg(rank, k), 0)
        points.append(
            {
                "diversity": level,
                f"NDCG@{k}": {"mean": ndcg.mean, "low": ndcg.low, "high": ndcg.high},
                "intra_list_distance": float(np.nanmean(beyond.intra_list_distance(top, vectors))),
                "coverage": beyond.coverage(top, n_items),
            }
        )
        print(points[-1])
    write_json(
        out,
        {
            **made_by(__file__),
            "data": model.split.dataset.content_hash,
            "split": model.split.spec,
            "targets": len(targets),
            "items": n_items,
            "points": points,
        },
    )
    draw(points, k, out.with_suffix(".png"))
    print(out)


def draw(points: list[dict[str, Any]], k: int, path: Path) -> None:
    """NDCG against the distance within a list, and against the share of the catalogue that is ever recommended."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    names = {"intra_list_distance": "distance within a list (1 - cosine)", "coverage": "share of the catalogue shown"}
    for axes, (name, label) in zip(figure.subplots(1, 2, sharey=True), names.items(), strict=True):
        x = [point[name] for point in points]
        y = [point[f"NDCG@{k}"] for point in points]
        mean = np.array([value["mean"] for value in y])
        spread = np.array([[m - v["low"], v["high"] - m] for m, v in zip(mean, y, strict=True)]).T
        axes.errorbar(x, mean, yerr=spread, marker="o", capsize=2, linewidth=1)
        for point, at, height in zip(points, x, mean, strict=True):
            axes.annotate(
                f"{point['diversity']:g}", (at, height), textcoords="offset points", xytext=(5, 5), fontsize=7
            )
        axes.set_xlabel(label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.set_ylabel(f"NDCG@{k} [95% interval]" if name == "intra_list_distance" else "")
    figure.suptitle("diversity from 0 to 1, written at its point", fontsize=9)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    script(main)
