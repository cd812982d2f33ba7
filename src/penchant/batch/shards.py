"""A run's shards on disk: which are whole, and how one is written so that it is there whole or not at all.

parts/part-00007.parquet        results, in the order of the input
quarantine/part-00007.parquet   rows that could not be answered; none where there is none
records/part-00007.json         written last: what the shard holds, and the checksums of all three
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from penchant.batch.answers import ROW, Answered
from penchant.batch.quarantine import as_frame, faults, reasons
from penchant.errors import StorageError
from penchant.files import read_json, sha256_file, sha256_text, staged_file, write_json
from penchant.schema import RANK

PARTS, QUARANTINE, RECORDS = "parts", "quarantine", "records"

# What a shard holds: its number, rows, good and bad rows, result rows, tokens, seconds, checksums.
Record = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Shards:
    """The shards of one run: ``rows`` input rows, ``size`` of them a shard, the last one shorter."""

    folder: Path
    rows: int
    size: int

    def __len__(self) -> int:
        return (self.rows + self.size - 1) // self.size

    def range(self, shard: int) -> range:
        """The input rows of a shard."""
        return range(shard * self.size, min((shard + 1) * self.size, self.rows))

    def of_part(self, index: int, parts: int) -> list[int]:
        """The shards of one part of an array job, from 1: every ``parts``-th."""
        return list(range(index - 1, len(self), parts))

    # -- writing -------------------------------------------------------------------------------

    def make(self) -> None:
        """The folders; what a kill left half written is not touched here."""
        for name in (PARTS, QUARANTINE, RECORDS):
            (self.folder / name).mkdir(parents=True, exist_ok=True)

    def sweep(self, shards: Sequence[int]) -> None:
        """Remove temporary files that a kill left of these shards, which no other process may be writing."""
        for shard in shards:
            for debris in self.folder.glob(f"*/.part-{shard:05d}.*.tmp"):
                debris.unlink(missing_ok=True)

    def write(self, done: Answered, seconds: float) -> Record:
        """Write a shard's files, each synced before it takes its name; the record comes last."""
        part, quarantine, record = self._paths(done.shard)
        sums: dict[str, str | None] = {PARTS: _write(done.frame, part), QUARANTINE: None}
        if done.bad:
            sums[QUARANTINE] = _write(as_frame(done.bad), quarantine)
        else:
            quarantine.unlink(missing_ok=True)
        counts = reasons(done.bad)
        found: Record = {
            "shard": done.shard,
            "rows": done.n_rows,
            "good": done.n_rows - len(done.bad),
            "bad": faults(counts),
            "reasons": counts,
            "results": len(done.frame),
            "histories_cut": done.cut,
            "unknown_items": done.unknown,
            "tokens_asked": done.asked,
            "tokens_run": done.run,
            "seconds": round(seconds, 3),
            "sha256": sums,
        }
        write_json(record, sealed(found))
        return found

    # -- reading -------------------------------------------------------------------------------

    def record(self, shard: int) -> Record | None:
        """What was written last of a shard; None where that is missing, torn or altered. Looks at the record alone."""
        return unsealed(self._paths(shard)[2])

    def whole(self, shard: int) -> Record | None:
        """The record of a shard whose files are what was written; None where it has to be made (again)."""
        found = self.record(shard)
        if found is None or found["shard"] != shard or found["rows"] != len(self.range(shard)):
            return None
        part, quarantine, _ = self._paths(shard)
        for name, path in ((PARTS, part), (QUARANTINE, quarantine)):
            expected = found["sha256"][name]
            if (expected is None) == path.is_file() or (expected is not None and sha256_file(path) != expected):
                return None
        return found

    def check(self, shard: int) -> None:
        """StorageError unless every input row of the shard is there exactly once: with results, or in quarantine."""
        part, quarantine, _ = self._paths(shard)
        frame = pl.read_parquet(part)
        bad = pl.read_parquet(quarantine)["row"] if quarantine.is_file() else pl.Series("row", [], dtype=pl.Int64)
        runs = frame[ROW].rle().struct.unnest()
        rows = np.sort(np.concatenate([runs["value"].to_numpy(), bad.to_numpy()]))
        wanted = self.range(shard)
        if not np.array_equal(rows, np.arange(wanted.start, wanted.stop)):
            raise StorageError(
                f"rows {wanted.start:,} to {wanted.stop - 1:,} of the input are not there exactly once",
                where=str(part),
                remedy="delete this file and run the job again: only this shard is made anew",
            )
        if RANK in frame.columns:
            expected = np.concatenate([np.arange(1, n + 1) for n in runs["len"].to_list()] or [np.zeros(0)])
            if not np.array_equal(frame[RANK].to_numpy(), expected):
                raise StorageError(
                    "ranks do not run from 1", where=str(part), remedy="delete this file and run the job again"
                )

    def _paths(self, shard: int) -> tuple[Path, Path, Path]:
        name = f"part-{shard:05d}"
        return (
            self.folder / PARTS / f"{name}.parquet",
            self.folder / QUARANTINE / f"{name}.parquet",
            self.folder / RECORDS / f"{name}.json",
        )


def _write(frame: pl.DataFrame, path: Path) -> str:
    """Write a frame as Parquet; its SHA-256."""
    with staged_file(path) as stage:
        with stage.open("wb") as handle:
            frame.write_parquet(handle, compression="zstd")
        return sha256_file(stage)


def sealed(record: Record) -> Record:
    """The record with a checksum of itself."""
    return record | {"check": sha256_text(json.dumps(record, sort_keys=True))[:16]}


def unsealed(path: Path) -> Record | None:
    """A record as it was sealed; None where its file is missing, torn or altered."""
    try:
        found = read_json(path)
    except StorageError:
        return None
    if not isinstance(found, dict):
        return None
    record = {name: value for name, value in found.items() if name != "check"}
    return record if sealed(record) == found else None
