"""What fine-tuning does to ranking: the same 20 retrieved candidates before, during and after training.

    python eval/finetuning.py next_item --data data/ml-100k --work runs/curves --minutes 10 --minutes 30 \
        --out eval/results/finetuning-next_item.json
    python eval/finetuning.py preference --start-from runs/curves/next_item --minutes 10 \
        --untuned runs/curves/next_item-step-0000000.npz ... --out ...

Trains one recipe for the last of --minutes, keeps it at each of them, and measures every one (and the model before
training) on test users: held-out loss; NDCG@10 and HR@10 of the encoder's candidates in the order of the LLM alone,
the LLM calibrated, and fused, with weights chosen on validation users; and paired differences of the fused order
against the encoder alone and against the untuned fusion (--untuned: of another recipe's untuned point, where this one
starts from an adapter). What encoder and LLM say of the candidates is kept in --work, so that a run that stopped goes
on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray

import penchant as pt
from penchant import metrics
from penchant.cli.script import script
from penchant.environment import made_by
from penchant.evaluation.statistics import bootstrap_mean
from penchant.files import sha256_text, staged_file, write_json
from penchant.fusion import Fusion, choose_fusion
from penchant.rank import Question, Ranker
from penchant.training.checkpoints import checkpoints, load_checkpoint
from penchant.training.config import CONFIGS
from penchant.training.held_out import held_out_loss
from penchant.training.journal import read_log
from penchant.training.recipe import Recipe
from penchant.training.recipes import cut, finetune
from penchant.training.settings import read_settings
from penchant.training.validation import engine_of

QUESTION: dict[str, Question] = {
    "next_item": "likelihood",
    "preference": "likelihood",
    "choose": "choose",
    "yes_no": "yes_no",
}
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def main(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="RECIPE", help="next_item, preference, choose or yes_no.")],
    data: Annotated[Path, typer.Option(help="A folder made by `penchant prepare`.")],
    work: Annotated[Path, typer.Option(help="Folder of the training run and of what was measured.")],
    out: Annotated[Path, typer.Option(help="The JSON file to write.")],
    minutes: Annotated[list[float], typer.Option(help="Minutes of training at which to measure.")],
    untuned: Annotated[Path | None, typer.Option(help="A point kept in --work to be compared with.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of the recipe's settings.")] = None,
    candidates: Annotated[int, typer.Option(help="Retrieved items that are ranked.")] = 20,
    test_users: Annotated[int, typer.Option(help="Seeded test users; 0: all of them.")] = 0,
    validation_users: Annotated[int, typer.Option(help="Seeded users that weights are chosen on; 0: all.")] = 0,
) -> None:
    """Train and measure. Every setting of the recipe is an option too."""
    if name not in QUESTION:
        raise typer.BadParameter(f"{name} has no order of candidates: use one of {', '.join(QUESTION)}")
    if untuned is not None and not untuned.is_file():
        raise typer.BadParameter(f"{untuned} is not there: measure the untuned point first")
    kind = CONFIGS[name]
    settings = read_settings(kind, config, context.args).model_copy(
        update={"max_minutes": max(minutes), "eval_minutes": sorted(minutes)[:-1], "patience": 10**6}
    )
    dataset = pt.Dataset.load(data)
    split = cut(dataset, settings)
    folder = work / name

    def bench_of(recipe: Recipe) -> Bench:
        return Bench(recipe, QUESTION[name], candidates, test_users, validation_users)

    base = None
    if untuned is not None:
        start = _load(untuned)
        if start.get("asked") != bench_of(Recipe(name, settings, split)).asked:  # now, and not after the training
            raise typer.BadParameter(f"{untuned} is of other candidates or users: measure it with these settings")
        base = ranks_of(start)[1]["fused"]
    if not (folder / "penchant.json").is_file():
        finetune(name, settings, split, folder, resume=(folder / "run.json").is_file(), on_record=_show)
    recipe = Recipe(name, settings, split)
    task, bench = recipe.task(), bench_of(recipe)
    log = read_log(folder / "log.jsonl")
    stops = _stops(folder, log, sorted(minutes))
    points: list[dict[str, Any]] = []
    for label, trained, path in stops:
        kept = work / f"{name}-{path.name}.npz"
        point = _load(kept) if kept.is_file() else {}
        if point.get("asked") != bench.asked:
            load_checkpoint(path, recipe.student, None)
            loss = held_out_loss(task, recipe.student, recipe.config)
            said = bench.scores()
            with staged_file(kept) as stage, stage.open("wb") as handle:
                np.savez(handle, asked=bench.asked, held_out_loss=np.nan if loss is None else loss, **said)
            point = _load(kept)
        fusion, ranks = ranks_of(point)
        base = ranks["fused"] if base is None else base
        points.append(
            {
                "minutes": label,
                "minutes_trained": trained,
                "held_out_loss": float(point["held_out_loss"]),
                "fusion": fusion.to_dict(),
                **table(ranks, base),
            }
        )
        typer.echo(f"{label:g} minutes: {points[-1]}")
    steps = [r for r in log if r["kind"] == "step"]
    write_json(
        out,
        {
            "recipe": name,
            "points": points,
            "candidates": candidates,
            # Where an adapter lay on this machine says nothing; its folder's name says what it was.
            "settings": settings.model_dump(mode="json")
            | {"start_from": settings.start_from and Path(settings.start_from).name},
            "steps": len(steps),
            "targets": sum(r["targets"] for r in steps),
            "tokens": sum(r["tokens"] for r in steps),
            "data": dataset.content_hash,
            "split": split.spec,
            **made_by(__file__),
        },
    )
    typer.echo(str(out))


def _stops(folder: Path, log: list[dict[str, Any]], minutes: list[float]) -> list[tuple[float, float, Path]]:
    """Minutes wanted, minutes trained, checkpoint: of the start, the first at or after each of the minutes, the last.

    The last takes the newest: how many steps fit was fixed beforehand, and they may have gone faster.
    """
    at = {r["step"]: r["minutes"] for r in log if r["kind"] == "validation"}
    found = [(at[int(p.name[5:])], p) for p in checkpoints(folder / "checkpoints") if int(p.name[5:]) in at]
    stops = [(0.0, 0.0, p) for m, p in found if m == 0][:1]
    for wanted in minutes[:-1]:
        stops += [(wanted, m, p) for m, p in found if m >= wanted * 0.95][:1]
    return [*stops, (minutes[-1], *found[-1])]


class Bench:
    """The encoder's candidates of validation and test users, and the LLM's order of them."""

    def __init__(self, recipe: Recipe, question: Question, k: int, test_users: int, validation_users: int) -> None:
        self._recipe, self._question = recipe, question
        split = recipe.corpus.split
        test = split.test if test_users == 0 else split.test.sample(test_users, 0)
        valid = split.valid if validation_users == 0 else split.valid.sample(validation_users, 0)
        self._parts = {"valid": valid, "test": test}
        self._found = {name: recipe.retriever.for_targets(t, k) for name, t in self._parts.items()}
        # Of everybody's candidates: a point that was kept of others is none of this curve.
        self.asked = sha256_text(
            repr([(t.position.tolist(), self._found[n].items.tolist()) for n, t in self._parts.items()])
        )

    def scores(self) -> dict[str, NDArray[Any]]:
        """What encoder and LLM say of every part's candidates, rows one after another: see ``_part``.

        The LLM is asked about retrieved targets alone, NaN stands for the others.
        """
        out: dict[str, NDArray[Any]] = {}
        for name, targets in self._parts.items():
            found, settings = self._found[name], self._recipe.config
            rows = [row[row >= 0] for row in found.items]
            places = [int(np.flatnonzero(r == t)[0]) if t in r else -1 for r, t in zip(rows, targets.item, strict=True)]
            asked = [i for i, place in enumerate(places) if place >= 0]  # no order finds what was not retrieved
            ranker = Ranker(
                engine_of(self._recipe.student, self._recipe.tokenizer),
                self._recipe.templates,
                self._recipe.corpus.texts,
                max_history=settings.max_history,
                prompt_tokens=settings.prompt_tokens,
                question=self._question,
            )
            said = [np.full(len(row), np.nan) for row in rows]
            prior = [np.full(len(row), np.nan) for row in rows]
            with torch.inference_mode():
                scores = ranker.scores([targets.history(i) for i in asked], [rows[i] for i in asked])
                ranker.priors(np.unique(np.concatenate([rows[i] for i in asked] or [np.zeros(0, dtype=np.int32)])))
            for i, values in zip(asked, scores, strict=True):
                said[i], prior[i] = values, ranker.prior[rows[i]]
            out |= {
                f"{name} n": np.array([len(row) for row in rows]),
                f"{name} place": np.array(places),
                f"{name} interest": np.concatenate([s[: len(r)] for s, r in zip(found.scores, rows, strict=True)]),
                f"{name} said": np.concatenate(said),
                f"{name} prior": np.concatenate(prior),
            }
        return out


def _load(path: Path) -> dict[str, NDArray[Any]]:
    with np.load(path, allow_pickle=False) as kept:
        return dict(kept)


def _part(point: dict[str, NDArray[Any]], name: str) -> tuple[list[Any], list[Any], list[Any], list[int]]:
    """Interest, what the LLM says, prior (each a row a user), and the targets' places."""
    ends = np.cumsum(point[f"{name} n"])[:-1]
    interest, said, prior = (np.split(point[f"{name} {what}"], ends) for what in ("interest", "said", "prior"))
    return interest, said, prior, point[f"{name} place"].tolist()


def ranks_of(point: dict[str, NDArray[Any]]) -> tuple[Fusion, dict[str, NDArray[np.int64]]]:
    """The fusion that validation chose, and the test targets' ranks in each way of ordering."""
    interest, said, prior, places = _part(point, "valid")
    fusion = choose_fusion(interest, said, prior, places)
    # With an interest that says nothing, what is chosen is the calibration of the LLM alone.
    alone = choose_fusion([np.zeros(len(e)) for e in interest], said, prior, places)
    ways = {
        "encoder": Fusion(0, 0),
        "llm": Fusion(1, 0),
        "llm calibrated": Fusion(1, 1),
        "llm, calibration from validation": Fusion(1, alone.calibration),
        "fused": fusion,
    }
    test = _part(point, "test")
    return fusion, {name: np.array(_ranks(way, *test)) for name, way in ways.items()}


def table(ranks: dict[str, NDArray[np.int64]], untuned: NDArray[np.int64]) -> dict[str, Any]:
    """Means with intervals, and the paired differences of the fused order."""
    ndcg = {name: metrics.ndcg(rank, 10) for name, rank in ranks.items()}
    rows = {
        name: {"NDCG@10": _interval(ndcg[name]), "HR@10": _interval(metrics.recall(rank, 10))}
        for name, rank in ranks.items()
    }
    return {
        "systems": rows,
        "fused minus encoder, NDCG@10": _interval(ndcg["fused"] - ndcg["encoder"]),
        "fused minus untuned fused, NDCG@10": _interval(ndcg["fused"] - metrics.ndcg(untuned, 10)),
    }


def _ranks(way: Fusion, interest: list[Any], said: list[Any], prior: list[Any], places: list[int]) -> list[int]:
    out = []
    for e, lik, p, t in zip(interest, said, prior, places, strict=True):
        scores = way.scores(e, lik, p) if t >= 0 else e
        out.append(int((scores >= scores[t]).sum()) if t >= 0 else 10**6)
    return out


def _interval(values: NDArray[np.float64]) -> dict[str, float]:
    found = bootstrap_mean(values)
    return {"mean": round(found.mean, 5), "low": round(found.low, 5), "high": round(found.high, 5), "n": found.n}


def _show(record: dict[str, Any]) -> None:
    if record["kind"] == "validation" or record["step"] % 10 == 0:
        typer.echo({k: v for k, v in record.items() if k not in ("examples", "padding", "learning_rate")})


if __name__ == "__main__":
    script(app)
