"""How far a job is: a small file that the job rewrites, and what another terminal reads of it.

Plain numbers: users (rows) and items (result rows) and tokens a second of this process, the share of tokens that
shared prompts and beginnings of titles spared, and the seconds that are left at this pace.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from penchant.batch.folder import SUMMARY, JobFolder, held, read_manifest
from penchant.batch.setup import SETUP, pieces_done
from penchant.batch.shards import Record, Shards
from penchant.errors import StorageError
from penchant.files import disk_full, read_json

_EVERY = 1.0  # seconds between two writings

_SUMS = ("rows", "good", "bad", "results", "histories_cut", "unknown_items", "tokens_asked", "tokens_run")


def totals(records: Sequence[Record]) -> dict[str, Any]:
    """Sums over shards, and how many rows were quarantined for each reason."""
    found: dict[str, Any] = {name: sum(record[name] for record in records) for name in _SUMS}
    kinds: dict[str, int] = {}
    for record in records:
        for reason, number in record["reasons"].items():
            kinds[reason] = kinds.get(reason, 0) + number
    return found | {"reasons": dict(sorted(kinds.items()))}


def cached_share(asked: int, run: int) -> float | None:
    """The share of ``asked`` tokens (a full sequence an item) that were not run; None where they weren't counted."""
    return round(1 - run / asked, 4) if asked and run else None


class Progress:
    """What this process did, told to a file."""

    def __init__(self, run: Path, part: tuple[int, int], shards: int, rows: int, done: Sequence[Record]) -> None:
        """``shards`` and ``rows`` are this process's share, ``done`` the records of what was there already."""
        index, parts = part
        self._path = run / ("progress.json" if parts == 1 else f"progress.{index}-of-{parts}.json")
        self._begun = time.perf_counter()
        self._written = float("-inf")
        self._shards, self._rows = shards, rows
        self._before = totals(done)["rows"]
        self._done = len(done)
        self._new: list[Record] = []
        self._hand = 0  # rows of the shards in hand
        self.state = "running"

    def batch(self, rows: int) -> None:
        """Some rows of a shard in hand were answered."""
        self._hand += rows
        self.write()

    def shard(self, record: Record) -> None:
        """A shard is on disk."""
        self._new.append(record)
        self._hand = max(0, self._hand - record["rows"])
        self.write(now=True)

    @property
    def new(self) -> list[Record]:
        return self._new

    def numbers(self) -> dict[str, Any]:
        seconds = time.perf_counter() - self._begun
        sums = totals(self._new)
        rows = sums["rows"] + self._hand
        tokens = sums["tokens_run"] or sums["tokens_asked"]
        left = self._rows - self._before - rows
        return {
            "state": self.state,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "updated": datetime.now(UTC).isoformat(timespec="seconds"),
            "shards": self._shards,
            "shards_done": self._done + len(self._new),
            "users": self._rows,
            "users_done": self._before + rows,
            "seconds": round(seconds, 2),
            "users_per_s": round(rows / seconds, 3),
            "items_per_s": round(sums["results"] / seconds, 3),
            "tokens_per_s": round(tokens / seconds, 3),
            "cached_share": cached_share(sums["tokens_asked"], sums["tokens_run"]),
            "seconds_left": round(left * seconds / rows, 1) if rows else None,
        }

    def write(self, *, now: bool = False) -> None:
        """Rewrite the file if it is time. Not synced: what a crash takes with it is told by the shards themselves."""
        clock = time.perf_counter()
        if not now and clock - self._written < _EVERY:
            return
        self._written = clock
        stage = self._path.with_name(f".{self._path.name}.tmp")
        try:
            stage.write_text(json.dumps(self.numbers()) + "\n", encoding="utf-8")
            stage.rename(self._path)
        except OSError as error:
            if not disk_full(error):
                raise
            raise StorageError(
                f"no room to write it ({error}); the shards done are whole",
                where=str(self._path),
                remedy="free disk space and run the same command again",
            ) from error


def status(out: Path | str) -> dict[str, Any]:
    """How far the newest job of a folder is, from its files alone: safe beside a job at work.

    Keys: run, state (running, stopped, complete), published (the run that ``latest`` points to, or None), shards,
    shards_done, rows, rows_done, totals (see ``totals``), processes (the numbers each wrote last).
    """
    out = Path(out)
    folder = JobFolder(out)
    runs = folder.runs()
    if not runs:
        pieces = pieces_done(out / SETUP)
        scored = "" if pieces is None else f": {pieces[0]:,} of {pieces[1]:,} items are scored without history"
        if held(out):
            raise StorageError(f"is being set up{scored}", where=str(out), remedy="ask again when that is done")
        if pieces is not None:
            raise StorageError(
                f"was stopped in its set-up{scored}", where=str(out), remedy="run the same command again"
            )
        raise StorageError("holds no job", where=str(out), remedy="give the folder of `penchant batch ... --out`")
    run = runs[-1]
    manifest = read_manifest(run)
    shards = Shards(run, manifest["rows"], manifest["shard_rows"])
    records = [found for shard in range(len(shards)) if (found := shards.record(shard)) is not None]
    latest = out / "latest"
    complete = (run / SUMMARY).is_file()
    return {
        "run": str(run),
        "state": "complete" if complete else "running" if held(out) else "stopped",
        "published": os.readlink(latest) if latest.is_symlink() else None,
        "shards": len(shards),
        "shards_done": len(records),
        "rows": manifest["rows"],
        "rows_done": sum(record["rows"] for record in records),
        "totals": totals(records),
        "processes": [read_json(path) for path in sorted(run.glob("progress*.json"))],
    }
