"""The likelihood of every item without history, which a job needs before its first shard.

It is scored for the whole catalogue, in pieces of fixed items: asked for as shards come to need it, it would depend on
their order in its last digits. A piece is on disk before the next is begun, so a kill costs one piece:

recs/setup/<key>-00000.json     one piece; the folder is gone once a run holds them all
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penchant.batch.identity import Identity
from penchant.batch.options import BatchOptions
from penchant.batch.shards import Record, sealed, unsealed
from penchant.files import sha256_text, write_json
from penchant.recommend import Recommender

SETUP = "setup"
_PIECE = 4096  # items scored at once


def needs_prior(model: Recommender, options: BatchOptions) -> bool:
    """Whether scores depend on the items' likelihood without history."""
    if options.method == "generate":
        return options.job == "recommend" and options.calibration > 0
    fused = options.asks_llm and model.config.question == "likelihood" and model.fusion.calibration > 0
    return fused and (options.job == "score" or model.fusion.weight > 0)


def prior_of(model: Recommender, options: BatchOptions) -> NDArray[np.float64]:
    """What is known of the likelihood without history that this job needs, NaN where it was not asked, (n_items,)."""
    return model.ranker.title_prior if options.method == "generate" else model.ranker.prior


def take_prior(model: Recommender, options: BatchOptions, prior: NDArray[np.float64]) -> None:
    """Let the model know what ``prior_of`` gave where the run was made."""
    if options.method == "generate":
        model.ranker.title_prior = prior
    else:
        model.ranker.prior = prior


def score_pieces(
    folder: Path,
    model: Recommender,
    options: BatchOptions,
    identity: Identity,
    *,
    stopped: Callable[[], bool],
    tell: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Fill what ``prior_of`` gives, from the pieces of the same job in ``folder`` where they are there; what it
    took, pieces of earlier processes included.

    Once ``stopped`` says so, no other piece is begun. ``tell`` is given the numbers after each piece: items and
    items_done, tokens_asked and tokens_run (see ``Answered``), seconds, and seconds_left at this pace.
    """
    key = sha256_text(json.dumps(identity, sort_keys=True))[:16]
    for path in folder.glob("*.json"):
        if not path.name.startswith(key):  # another job's, which was given up
            path.unlink()
    n = len(model.texts)
    numbers: dict[str, Any] = {
        "state": "setting up",
        "items": n,
        "items_done": 0,
        "tokens_asked": 0,
        "tokens_run": 0,
        "seconds": 0.0,
    }
    for start in range(0, n, _PIECE):
        if stopped():
            break
        items = np.arange(start, min(start + _PIECE, n))
        path = folder / f"{key}-{start // _PIECE:05d}.json"
        piece = unsealed(path)
        if piece is None:
            piece = _scored(model, options, items)
            write_json(path, sealed(piece))
        else:
            prior_of(model, options)[items] = piece["prior"]
        numbers["items_done"] += len(items)
        for name in ("tokens_asked", "tokens_run", "seconds"):
            numbers[name] += piece[name]
        left = numbers["seconds"] * (n / numbers["items_done"] - 1)
        tell(numbers | {"seconds_left": round(left, 1)})
    return numbers


def pieces_done(folder: Path) -> tuple[int, int] | None:
    """Items scored and items in all of a set-up that is under way, or was stopped; None where none is."""
    found = [piece for path in folder.glob("*-*.json") if (piece := unsealed(path)) is not None]
    return (sum(len(piece["prior"]) for piece in found), found[-1]["items"]) if found else None


def _scored(model: Recommender, options: BatchOptions, items: NDArray[np.int64]) -> Record:
    engine = model.engine
    before, begun = getattr(engine, "tokens_run", 0), time.perf_counter()
    missing = items[np.isnan(prior_of(model, options)[items])]
    prior = model.ranker.title_priors(items) if options.method == "generate" else model.ranker.priors(items)
    prompt = model.ranker.prompt(np.zeros(0, dtype=np.int32)).n_tokens or 0
    return {
        "prior": prior.tolist(),
        "items": len(model.texts),
        "tokens_asked": prompt * len(missing) + sum(map(len, model.ranker.tokens(missing))),
        "tokens_run": getattr(engine, "tokens_run", 0) - before,
        "seconds": time.perf_counter() - begun,
    }
