"""Do users get the same recommendations from vLLM as from transformers, in float32, on MovieLens-100K with SmolLM2?

    .venv-vllm/bin/python eval/vllm_parity.py --out eval/results/vllm-parity.json
    .venv-vllm/bin/python eval/vllm_parity.py --users 10 --candidates 5 --max-history 5 --out /tmp/parity.json

A run is fitted with transformers, saved, and opened twice: with either engine. The LLM alone orders the candidates (by
its likelihood, half of the no-history one taken out), whatever weight validation gave it. All candidates' scores are
compared; lists are the same where each of the ten first places holds the same item. Two items may change places where
their scores are nearer than the engines' (``nearest_scores``). What is further apart than ``FAR`` nats is listed.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import polars as pl
import typer

from penchant import schema
from penchant.cli.script import script
from penchant.data.dataset import Dataset
from penchant.data.split import leave_last_out
from penchant.engine.loading import load_engine
from penchant.engine.noise import quiet_libraries
from penchant.environment import made_by
from penchant.fetch import fetch
from penchant.files import write_json
from penchant.fusion import Fusion
from penchant.interest.config import EncoderConfig
from penchant.recommend import Recommender
from penchant.run_folder import FitConfig

FUSION = Fusion(weight=1.0, calibration=0.5)
FAR = 1e-3


def compared(mine: pl.DataFrame, theirs: pl.DataFrame) -> dict[str, Any]:
    """Whose lists are the same, and how far apart the scores of the same user and item are."""
    every = mine.join(theirs, on=["user_id", "item_id"], suffix="_theirs", how="full", coalesce=True)
    gap = (pl.col("score") - pl.col("score_theirs")).abs()
    far = every.filter(gap.is_null() | (gap > FAR)).select("user_id", "item_id", "score", "score_theirs")
    both, k = every.drop_nulls(), min(10, int(theirs["rank"].max()))  # type: ignore[arg-type]
    first = (pl.col("rank") == pl.col("rank_theirs")) & (pl.col("rank") <= k)
    same = both.group_by("user_id").agg(first.sum().alias("n"))
    # Not what fills the place of a title that was there twice: its score is the encoder's.
    ranked = theirs.filter(pl.col("stage") == schema.STAGE_LLM)
    gaps = ranked.sort("user_id", "rank").select(-pl.col("score").diff().over("user_id")).to_series().drop_nulls()
    return {
        "users": theirs["user_id"].n_unique(),
        "users_with_the_same_list": int((same["n"] == k).sum()),
        "items_in_both": len(both),
        "items": len(theirs),
        "further_apart": far.to_dicts(),
        "largest_score_difference": float(np.abs(both["score"] - both["score_theirs"]).max()),
        "nearest_scores": float(gaps.min()),  # type: ignore[arg-type]
    }


def main(
    out: Annotated[Path, typer.Option(help="The JSON file to write.")],
    users: Annotated[int, typer.Option(help="Users, chosen with seed 0.")] = 100,
    candidates: Annotated[int, typer.Option(help="Candidates that the LLM ranks.")] = 20,
    max_history: Annotated[int, typer.Option(help="Events in a prompt.")] = 20,
    epochs: Annotated[int, typer.Option(help="Of the encoder; it makes the same candidates for both.")] = 5,
    dtype: Annotated[str, typer.Option(help="Equality is a promise of float32.")] = "float32",
) -> None:
    """Fit, save, and recommend with both engines."""
    quiet_libraries()
    folder = fetch("movielens-100k")
    split = leave_last_out(Dataset.read(folder / "interactions.csv", folder / "items.csv"))
    plain = load_engine("smollm2-135m", dtype=dtype)  # type: ignore[call-overload]
    config = FitConfig(
        encoder=EncoderConfig(epochs=epochs), candidates=candidates, max_history=max_history, validation_users=10
    )
    model = Recommender.fit(split, plain, config)
    chosen = np.random.default_rng(0).choice(len(model.log.user_ids), users, replace=False)
    names = [model.log.user_ids[i] for i in sorted(chosen)]
    kept: dict[str, Any] = {
        **made_by(__file__),
        "dtype": dtype,
        "config": config.model_dump(mode="json"),
        "fusion": FUSION.to_dict(),
    }
    with tempfile.TemporaryDirectory() as name:
        model.save(Path(name) / "run")
        fast = load_engine("smollm2-135m", dtype=dtype, backend="vllm")  # type: ignore[call-overload]
        found, seconds = [], {}
        for label, engine in (("vllm", fast), ("transformers", plain)):
            opened = Recommender.load(Path(name) / "run", engine=engine)
            opened.fusion = FUSION
            begun = time.perf_counter()
            found.append(opened.recommend(names, k=candidates))
            seconds[label] = round(time.perf_counter() - begun, 1)
        fast.close()
    kept |= {"recommendations": compared(*found), "seconds": seconds}
    print(kept["recommendations"], seconds)
    write_json(out, kept)


if __name__ == "__main__":
    script(main)
