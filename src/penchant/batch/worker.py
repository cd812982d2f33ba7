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
from penchant.batch.setup import take_prior
from penchant.errors import ModelError, PenchantError, StorageError
from penchant.files import save_array, sha256_file
from penchant.recommend import Recommender

DUPLICATES, PRIOR = "duplicates.npy", "prior.npy"


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
            take_prior(model, options, np.load(run / PRIOR, allow_pickle=False))
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


def save_fixed(folder: Path, duplicates: NDArray[np.int64], prior: NDArray[np.float64] | None) -> dict[str, str]:
    """Write what is computed once for all shards; the hash of each file."""
    names = [DUPLICATES]
    save_array(folder / DUPLICATES, duplicates)
    if prior is not None:
        save_array(folder / PRIOR, prior)
        names.append(PRIOR)
    return {name: sha256_file(folder / name) for name in names}
