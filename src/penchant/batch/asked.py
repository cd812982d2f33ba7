"""A job before it has a folder: the model opened, the rows found."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from penchant.batch.columns import HISTORY
from penchant.batch.options import BatchOptions
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
    return Asked(
        opened,
        chosen,
        source_of(opened, chosen, rows),
        None if isinstance(model, Recommender) else Path(model),
        None if rows is None else str(rows),
    )


def source_of(model: Recommender, options: BatchOptions, rows: Path | str | None) -> Source:
    """The rows of a job. ConfigError for pairs that are not given, DataError for files that can't be used."""
    needed, optional, _ = COLUMNS[options.job]
    if rows is not None:
        source: Source = ParquetSource(str(rows), needed, optional)
    elif options.job == "score":
        raise ConfigError("no pairs", where="score", remedy="give a Parquet file with user_id and item_id")
    elif options.job == "embed-items":
        source = NamesSource(ITEM, model.items[ITEM].to_list())
    else:
        source = NamesSource(USER, model.log.user_ids)
    if not source.rows:
        raise DataError("has no rows", where=str(rows), remedy="give a file with rows")
    return source
