"""Finished systems on disk, so that a comparison that was cut off goes on where it was."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from penchant import __version__
from penchant.environment import short_environment
from penchant.errors import StorageError
from penchant.evaluation.ranking import Ranked
from penchant.files import read_json, sha256_file, sha256_text, staged_file, write_json
from penchant.interest.encoder import InterestEncoder


@dataclass(frozen=True, eq=False)
class Finished:
    """One system with one seed: its ranking of the test targets, and how it was fitted (plain JSON)."""

    ranked: Ranked
    record: dict[str, Any]


def origin(stamp: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """Where a record comes from: the commit (as ``stamp`` says it), version and machine, and what it took."""
    return {
        "commit": stamp.get("commit"),
        "changed": stamp.get("changed"),
        "version": __version__,
        "seconds": round(seconds, 1),
        "environment": short_environment(),
    }


def seconds_of(where: Mapping[str, Any]) -> float:
    """Of a system, its training by another task included."""
    return (where.get("seconds") or 0.0) + (where.get("trained") or {}).get("seconds", 0.0)


def made_of(where: Mapping[str, Any]) -> dict[str, Any]:
    """Commit and seconds of a system, and of the training if that was another run's."""
    found = {part: where.get(part) for part in ("commit", "changed", "seconds")}
    return found | ({"trained": made_of(where["trained"])} if "trained" in where else {})


@dataclass(frozen=True)
class Store:
    """A folder of one task's finished systems: `NAME-seedN.json` with the key, and `.npz` with the ranks.

    What was stored under another key (another task, data, configuration or version) is as good as absent.
    """

    folder: Path

    def load(self, name: str, seed: int, key: str) -> Finished | None:
        """What is stored of that system, seed and key; None where it is absent, torn or of another key."""
        record = self.record(name, seed, key)
        path = self._path(name, seed).with_suffix(".npz")
        if record is None or not path.is_file():
            return None
        try:
            with path.open("rb") as handle, np.load(handle, allow_pickle=False) as arrays:
                if str(arrays["key"]) != key:
                    return None
                ranked = Ranked(record["system"], arrays["rank"], arrays["top"], float(record["rank_seconds"]))
        except (OSError, EOFError, ValueError, KeyError, BadZipFile):
            return None
        return Finished(ranked, record)

    def record(self, name: str, seed: int, key: str) -> dict[str, Any] | None:
        """The JSON alone."""
        path = self._path(name, seed)
        if not path.is_file():
            return None
        try:
            found = read_json(path)
        except StorageError:
            return None
        return found if isinstance(found, dict) and found.get("key") == key else None

    def save(self, name: str, seed: int, key: str, finished: Finished) -> None:
        """Write both files, the JSON last: it says that the system is finished."""
        path = self._path(name, seed)
        ranked = finished.ranked
        with staged_file(path.with_suffix(".npz")) as stage, stage.open("wb") as handle:
            np.savez_compressed(handle, key=np.array(key), rank=ranked.rank, top=ranked.top)
        self.save_record(name, seed, key, {"system": ranked.system, "rank_seconds": ranked.seconds, **finished.record})

    def save_record(self, name: str, seed: int, key: str, record: dict[str, Any]) -> None:
        """A result that is JSON alone."""
        write_json(self._path(name, seed), {"key": key, **record})

    def _path(self, name: str, seed: int) -> Path:
        return self.folder / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}-seed{seed}.json"


@dataclass(frozen=True)
class TrainedStore:
    """A folder of trained encoders that tasks share: `KEY.safetensors`, and `KEY.json` with how each was trained.

    What is absent or torn, or whose weights are not those that were saved, is as good as absent.
    """

    folder: Path

    def load(self, key: str) -> dict[str, Any] | None:
        """How the encoder of that key was trained; its weights are whole."""
        try:
            found = read_json(self._record(key)) if self._record(key).is_file() else None
        except StorageError:
            return None
        weights = self.weights(key)
        whole = isinstance(found, dict) and weights.is_file() and sha256_file(weights) == found.get("weights")
        return found if whole else None

    def save(self, key: str, encoder: InterestEncoder, record: Mapping[str, Any]) -> str:
        """Write both files, the JSON last; the weights' SHA-256."""
        with staged_file(self.weights(key)) as stage:
            encoder.save(stage)
            made = sha256_file(stage)
        write_json(self._record(key), {**record, "weights": made})
        return made

    def weights(self, key: str) -> Path:
        """Where the encoder's weights are."""
        return self.folder / f"{key}.safetensors"

    def _record(self, key: str) -> Path:
        return self.folder / f"{key}.json"


def key_of(**parts: Any) -> str:
    """Hex SHA-256 of what decides a result."""
    return sha256_text(json.dumps(parts, sort_keys=True, default=str))
