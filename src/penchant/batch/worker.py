"""What makes a shard's results, on this machine or on any other: the model, the job, and what the manifest fixed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from penchant.batch.answers import Answered, Answerer
from penchant.batch.identity import Identity, model_hash
from penchant.batch.options import BatchOptions
from penchant.batch.rows import Prepared, Preparer
from penchant.errors import ModelError, PenchantError, StorageError
from penchant.files import save_array, sha256_file
from penchant.recommend import Recommender

DUPLICATES, PRIOR = "duplicates.npy", "prior.npy"
_PRIORS = 4096  # items whose no-history likelihood is asked for at once


class Worker:
    """Prepares and answers shards. Reading and preparing may run in another thread than answering."""

    def __init__(
        self, model: Recommender, options: BatchOptions, identity: Identity, duplicates: NDArray[np.int64]
    ) -> None:
        self._prepare = Preparer(model, options, duplicates)
        self._answer = Answerer(model, options, model_hash(identity))

    @classmethod
    def of_run(cls, run: Path, manifest: dict[str, Any], model: Recommender, options: BatchOptions) -> Worker:
        """With what was fixed when the run was made; StorageError where one of its files is torn."""
        for name, expected in manifest["files"].items():
            if not (run / name).is_file() or sha256_file(run / name) != expected:
                raise StorageError(
                    "is missing or altered", where=str(run / name), remedy="delete the run's folder and start again"
                )
        if PRIOR in manifest["files"]:
            model.ranker.prior = np.load(run / PRIOR, allow_pickle=False)
        return cls(model, options, manifest["identity"], np.load(run / DUPLICATES, allow_pickle=False))

    def prepare(self, shard: int, start: int, frame: pl.DataFrame) -> Prepared:
        """The rows from number ``start`` on, ready to be answered."""
        return self._prepare(shard, start, frame)

    def answer(self, prepared: Prepared, progress: Callable[[int], None]) -> Answered:
        """The shard's results; ModelError where the engine itself gives up, whatever it says."""
        try:
            return self._answer(prepared, progress)
        except PenchantError:
            raise
        except (RuntimeError, OSError, MemoryError) as error:
            raise ModelError(
                f"the engine stopped: {type(error).__name__}: {error}",
                where=f"shard {prepared.shard}",
                remedy="mend the cause and run the same command again: the shards done are kept",
            ) from error


def needs_prior(model: Recommender, options: BatchOptions) -> bool:
    """Whether scores depend on the items' likelihood without history."""
    if options.method == "generate":
        return options.job == "recommend" and options.calibration > 0
    fused = options.asks_llm and model.config.question == "likelihood" and model.fusion.calibration > 0
    return fused and (options.job == "score" or model.fusion.weight > 0)


def save_fixed(
    folder: Path, model: Recommender, options: BatchOptions, duplicates: NDArray[np.int64]
) -> dict[str, str]:
    """Write what is computed once for all shards; the hash of each file.

    The likelihood of items without history is scored for the whole catalogue, in pieces of fixed items: asked for as
    shards come to need it, it would depend on their order in its last digits.
    """
    save_array(folder / DUPLICATES, duplicates)
    names = [DUPLICATES]
    if needs_prior(model, options):
        for start in range(0, len(model.texts), _PRIORS):
            model.ranker.priors(np.arange(start, min(start + _PRIORS, len(model.texts))))
        save_array(folder / PRIOR, model.ranker.prior)
        names.append(PRIOR)
    return {name: sha256_file(folder / name) for name in names}
