"""What the LLM has scored, kept on disk: a stage that was cut off goes on where it was, and seeds share what they ask.

What was scored again would cost an hour a seed and be the same but for its last digits, as for any other batch.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from penchant import __version__
from penchant.errors import StorageError

if TYPE_CHECKING:
    from penchant.engine import Engine
    from penchant.engine.base import Continuation, Progress
    from penchant.tokens import Prompt

_CHUNK = 128  # prompts that are scored, and kept, at once
_TABLE = "create table if not exists scores (key blob primary key, logprob real, seconds real, tokens real)"


@dataclass(frozen=True, slots=True)
class _Known:
    """A continuation's score, and its share of what it took to score it."""

    logprob: float
    seconds: float
    tokens: float


class KeptScores:
    """An engine that scores nothing twice: what it knows stands in the SQLite file ``path``, for this and other runs.

    A score is known by the engine's fingerprint and the tokens of prompt and continuation. ``seconds_kept`` and
    ``tokens_run`` count what was taken from the file at what it took when it was made, so that costs stay those of
    scoring; a prompt that is asked of some continuations now and others then counts twice in them. Everything else is
    the engine's.
    """

    def __init__(self, engine: Engine, path: Path) -> None:
        self._engine, self._path = engine, path
        self.seconds_kept = 0.0
        self._tokens_kept = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    @property
    def tokens_run(self) -> int | None:
        """Tokens that went through the model, now or when a score was made; None where the engine does not count."""
        run = getattr(self._engine, "tokens_run", None)
        return run + round(self._tokens_kept) if isinstance(run, int) else None

    def score(
        self,
        prompts: Sequence[Prompt | str],
        continuations: Sequence[Sequence[Continuation]],
        *,
        progress: Progress | None = None,
    ) -> list[NDArray[np.float64]]:
        """See Engine.score."""
        out: list[NDArray[np.float64]] = []
        for start in range(0, len(prompts), _CHUNK):
            part = slice(start, start + _CHUNK)
            out += self._scored(prompts[part], continuations[part], progress)
        return out

    def _scored(
        self,
        prompts: Sequence[Prompt | str],
        continuations: Sequence[Sequence[Continuation]],
        progress: Progress | None,
    ) -> list[NDArray[np.float64]]:
        keys = [self._keys(prompt, row) for prompt, row in zip(prompts, continuations, strict=True)]
        known = self._read([key for row in keys for key in row])
        self.seconds_kept += sum(one.seconds for one in known.values())
        self._tokens_kept += sum(one.tokens for one in known.values())
        missing = [[at for at, key in enumerate(row) if key not in known] for row in keys]
        asked = [i for i, places in enumerate(missing) if places]
        if progress is not None and len(asked) < len(keys):
            progress(len(keys) - len(asked))
        if not asked:
            return _arrays(keys, known)
        begun, before = time.perf_counter(), self.tokens_run
        found = self._engine.score(
            [prompts[i] for i in asked], [[continuations[i][at] for at in missing[i]] for i in asked], progress=progress
        )
        number = sum(len(missing[i]) for i in asked)
        seconds = (time.perf_counter() - begun) / number
        tokens = ((self.tokens_run or 0) - (before or 0)) / number
        new = {
            keys[i][at]: _Known(float(value), seconds, tokens)
            for i, values in zip(asked, found, strict=True)
            for at, value in zip(missing[i], values, strict=True)
        }
        self._write(new)
        return _arrays(keys, known | new)

    def _keys(self, prompt: Prompt | str, continuations: Sequence[Continuation]) -> list[bytes]:
        said = hashlib.sha256(json.dumps([__version__, self.fingerprint, self.codec.encode(prompt)]).encode())
        keys = []
        for one in continuations:
            whole = said.copy()
            whole.update(json.dumps(one if isinstance(one, str) else [int(token) for token in one]).encode())
            keys.append(whole.digest())
        return keys

    def _read(self, keys: Sequence[bytes]) -> dict[bytes, _Known]:
        with self._base() as base:
            found = {
                key: base.execute("select logprob, seconds, tokens from scores where key = ?", (key,)).fetchone()
                for key in keys
            }
        return {key: _Known(*row) for key, row in found.items() if row is not None}

    def _write(self, new: dict[bytes, _Known]) -> None:
        # What is not finite is refused by whoever asked, and is asked again.
        rows = [(key, one.logprob, one.seconds, one.tokens) for key, one in new.items() if np.isfinite(one.logprob)]
        with self._base() as base, base:
            base.executemany("insert or ignore into scores values (?, ?, ?, ?)", rows)

    @contextmanager
    def _base(self) -> Iterator[sqlite3.Connection]:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self._path, timeout=60)) as base:
                base.execute(_TABLE)
                yield base
        except (sqlite3.Error, OSError) as error:
            raise StorageError(
                f"kept scores cannot be read or written ({error})",
                where=str(self._path),
                remedy="free disk space, or delete the file: what it holds is scored again",
            ) from error


def _arrays(keys: Sequence[Sequence[bytes]], known: Mapping[bytes, _Known]) -> list[NDArray[np.float64]]:
    return [np.array([known[key].logprob for key in row], dtype=np.float64) for row in keys]
