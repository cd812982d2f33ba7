"""The dataset everything downstream reads: interactions and items, checked, ordered, saved whole."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import polars as pl
from polars.exceptions import PolarsError

from penchant.data import filters
from penchant.data.columns import unused_mapping
from penchant.data.content import content_hash
from penchant.data.findings import Findings
from penchant.data.options import ReadOptions
from penchant.data.order import is_integer_ids, item_order, sort_interactions, sort_items
from penchant.data.reading import Rows, Source, read_interactions, read_items
from penchant.data.tables import ROW, TableOptions
from penchant.errors import DataError, StorageError
from penchant.files import read_json, sha256_file, staged_folder, write_json
from penchant.schema import TIME, USER

MANIFEST = "manifest.json"
_KIND = "penchant dataset"
_VERSION = 1
_FILES = ("interactions.parquet", "items.parquet")


class Dataset:
    """What users did, and what there is to do it with.

    ``interactions``: USER and ITEM (String), TIME (Int64, microseconds since 1970 UTC), and where the source has
    them EVENT (String), RATING (Float64), REVIEW, QUERY (String), and the context columns asked for (String).
    Ordered by user, time, item. ``items``: ITEM, TITLE and every further column as String, in item order.
    ``report``: rows read, what was dropped and why, the mapping and the options.
    """

    def __init__(self, interactions: pl.DataFrame, items: pl.DataFrame, report: dict[str, Any] | None = None) -> None:
        self.interactions = interactions
        self.items = items
        self.report: dict[str, Any] = report or {}

    @classmethod
    def read(cls, interactions: Source, items: Source, *, options: ReadOptions | None = None, **kw: Any) -> Dataset:
        """Read, check and order two files (or frames); ``kw`` are fields of ReadOptions.

        Raises DataError at the first rule the data break, with the file, the row, the column and the remedy, and
        ConfigError for an option that doesn't exist.
        """
        options = ReadOptions.of(options, **kw)
        findings = Findings()
        events, catalogue, dropped = read_both(interactions, items, options, findings)
        if events is None or catalogue is None:
            raise TypeError("a strict reading returns both tables or raises")
        return cls._filtered(events, catalogue, dropped, options)

    @classmethod
    def _filtered(cls, events: Rows, catalogue: Rows, dropped: dict[str, int], options: ReadOptions) -> Dataset:
        frame, kept, dropped = events_left(events, catalogue, dropped, options)
        events.frame = frame = frame.drop(ROW)
        kept = sort_items(kept.drop(ROW))
        report = {
            "rows": {"interactions": events.read, "items": catalogue.read},
            "dropped": dropped,
            "mapping": {"interactions": events.mapping, "items": catalogue.mapping},
            "options": options.model_dump(mode="json"),
        }
        return cls(sort_interactions(frame, kept), kept, report)

    @property
    def n_users(self) -> int:
        """How many users have an event."""
        return int(self.interactions[USER].n_unique())

    @property
    def n_items(self) -> int:
        """How many items the catalogue has, those without an event counted."""
        return len(self.items)

    @cached_property
    def content_hash(self) -> str:
        """Hex SHA-256 of all rows in their order: equal for equal content, whatever file it was read from."""
        return content_hash(interactions=self.interactions, items=self.items)

    @property
    def time_range(self) -> tuple[str, str]:
        """The first and the last event's time, ISO 8601 UTC."""
        first, last = self.interactions.select(pl.col(TIME).min().alias("a"), pl.col(TIME).max().alias("b")).row(0)
        return _iso(first), _iso(last)

    def __repr__(self) -> str:
        return (
            f"Dataset({self.n_users:,} users, {self.n_items:,} items, {len(self.interactions):,} interactions, "
            f"{self.time_range[0][:10]} to {self.time_range[1][:10]})"
        )

    def save(self, folder: str | Path) -> Path:
        """Write the two tables and a manifest into ``folder``, whole or not at all; returns the folder.

        Replaces a dataset saved there before. Raises DataError where the folder holds anything else, and
        StorageError where the disk is full or the folder isn't writable.
        """
        folder = Path(folder)
        _check_target(folder)
        with staged_folder(folder) as stage:
            for name, frame in zip(_FILES, (self.interactions, self.items), strict=True):
                frame.write_parquet(stage / name, compression="zstd")
            manifest = {
                "kind": _KIND,
                "version": _VERSION,
                "penchant": _penchant_version(),
                "counts": self._counts(),
                "time_range": list(self.time_range),
                "content_hash": self.content_hash,
                "files": {name: sha256_file(stage / name) for name in _FILES},
                "report": self.report,
            }
            write_json(stage / MANIFEST, manifest)
        return folder

    def _counts(self) -> dict[str, int]:
        return {"users": self.n_users, "items": self.n_items, "interactions": len(self.interactions)}

    @classmethod
    def load(cls, folder: str | Path) -> Dataset:
        """Load what `save` wrote, after checking its files against the manifest.

        Raises DataError for a folder that is missing or isn't a dataset, StorageError for a corrupt one.
        """
        folder = Path(folder)
        manifest = _read_manifest(folder)
        remedy = "the folder is corrupt: run penchant prepare again"
        for name in _FILES:
            path = folder / name
            if not path.is_file():
                raise StorageError("the file is missing", where=str(path), remedy=remedy)
            if sha256_file(path) != manifest["files"].get(name):
                raise StorageError(
                    "the file's bytes aren't those the manifest says (SHA-256)", where=str(path), remedy=remedy
                )
        try:
            interactions, items = (pl.read_parquet(folder / name) for name in _FILES)
        except PolarsError as error:
            raise StorageError(f"cannot be read ({error})", where=str(folder), remedy=remedy) from error
        dataset = cls(interactions, items, manifest["report"])
        if dataset._counts() != manifest["counts"]:
            raise StorageError(
                f"holds {dataset._counts()} and its manifest says {manifest['counts']}",
                where=str(folder),
                remedy=remedy,
            )
        # The bytes are those that were hashed when saved, so the content is too.
        dataset.__dict__["content_hash"] = manifest["content_hash"]
        return dataset


def read_both(
    interactions: Source, items: Source, options: ReadOptions, findings: Findings
) -> tuple[Rows | None, Rows | None, dict[str, int]]:
    """Read both tables and hold them against every rule; with findings that keep going, bad rows are left out.

    Returns the events, the items (None where unreadable) and the counts dropped so far.
    """
    events = findings.attempt("interactions can be read", lambda: read_interactions(interactions, options, findings))
    catalogue = findings.attempt("items can be read", lambda: read_items(items, options, findings))
    if events is not None and catalogue is not None:
        unused = unused_mapping(
            options.map, events.found, catalogue.found, options.context, f"{events.where} and {catalogue.where}"
        )
        findings.judge("mapped columns are there", unused)
    dropped = filters.with_titles(catalogue, events, options, findings) if catalogue is not None else {}
    if events is not None and catalogue is not None:
        dropped = dropped | filters.with_known_items(events, catalogue, options, findings)
    return events, catalogue, dropped


def events_left(
    events: Rows, catalogue: Rows, dropped: dict[str, int], options: ReadOptions
) -> tuple[pl.DataFrame, pl.DataFrame, dict[str, int]]:
    """Events and items that the options' filters leave, and the counts dropped; DataError where no event is left."""
    frame, below = filters.positive(events.frame, options.positive_threshold)
    frame, repeated = filters.without_repeats(frame, options.repeats)
    frame, outside = filters.k_core(frame, options.min_user_events, options.min_item_events)
    kept, unsold = filters.kept_items(catalogue.frame, frame, options.min_item_events)
    dropped = dropped | below | repeated | outside | unsold
    if frame.is_empty():
        reasons = ", ".join(f"{name} {number:,}" for name, number in dropped.items() if number) or "none were read"
        raise DataError(
            f"no events are left of {events.read:,} rows ({reasons})",
            where=events.where,
            remedy="loosen --positive-threshold, --min-user-events or --min-item-events, or check the ids",
        )
    return frame, kept, dropped


def _iso(microseconds: int) -> str:
    return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=microseconds)).isoformat()


def _penchant_version() -> str:
    try:
        return version("penchant")
    except PackageNotFoundError:
        return "not installed"


def _check_target(folder: Path) -> None:
    """Saving replaces the folder: it must not be one that holds anything but a dataset."""
    if os.path.isfile(folder):
        raise DataError("is a file", where=str(folder), remedy="give a folder to write into")
    others = {path.name for path in folder.iterdir()} - {MANIFEST, *_FILES} if os.path.isdir(folder) else set()
    if others:
        raise DataError(
            f"the folder holds other files ({min(others)}), and saving would replace it",
            where=str(folder),
            remedy="give a new folder (--out)",
        )


def _read_manifest(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise DataError(
            "no such dataset folder", where=str(folder), remedy="make it: penchant prepare INTERACTIONS ITEMS --out DIR"
        )
    foreign = DataError(
        f"not a dataset folder (no {MANIFEST} of one)",
        where=str(folder),
        remedy="make one: penchant prepare INTERACTIONS ITEMS --out DIR",
    )
    if not (folder / MANIFEST).is_file():
        raise foreign
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("kind") != _KIND:
        raise foreign
    if manifest.get("version") != _VERSION:
        raise DataError(
            f"dataset format {manifest.get('version')}, and this penchant reads {_VERSION}",
            where=str(folder),
            remedy="run penchant prepare again with this version",
        )
    kinds = {"counts": dict, "content_hash": str, "files": dict, "report": dict}
    lacking = [key for key, kind in kinds.items() if not isinstance(manifest.get(key), kind)]
    if lacking:
        raise StorageError(
            f"the manifest lacks {', '.join(lacking)}",
            where=str(folder / MANIFEST),
            remedy="the folder is corrupt: run penchant prepare again",
        )
    return manifest


__all__ = [
    "Dataset",
    "ReadOptions",
    "TableOptions",
    "is_integer_ids",
    "item_order",
    "read_both",
]
