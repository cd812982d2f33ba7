"""How targets are ranked and averaged, and which of them the LLM is asked about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penchant.data.history import Targets
from penchant.errors import ConfigError
from penchant.evaluation.ranking import Ranked, Seen, rank_targets
from penchant.evaluation.rows import Average
from penchant.evaluation.systems import System
from penchant.recommend import Stages, silent


@dataclass(frozen=True, eq=False)
class Protocol:
    """What decides how targets are ranked and averaged. ``candidates`` (n_targets, c), padded with -1, or None."""

    k: int = 10
    llm_users: int = 500
    llm_found_only: bool = False
    seed: int = 0
    average: Average = "event"
    seen: Seen = "mask"
    seen_last: int | None = None
    candidates: NDArray[np.integer] | None = None

    def __post_init__(self) -> None:
        for name, value, least in (("k", self.k, 1), ("llm_users", self.llm_users, 0), ("seed", self.seed, 0)):
            if isinstance(value, bool) or not isinstance(value, int | np.integer):
                raise ConfigError(f"{name} is {value!r}", where="evaluate", remedy="give a whole number")
            if value < least:
                raise ConfigError(f"{name} is {value}", where="evaluate", remedy=f"give {least} or more")
        if self.average not in ("event", "user"):
            raise ConfigError(f"unknown average {self.average!r}", where="evaluate", remedy="use event or user")
        given = self.candidates
        if given is None:
            return
        if not isinstance(given, np.ndarray) or given.ndim != 2 or not np.issubdtype(given.dtype, np.integer):
            raise ConfigError(
                "the candidates are no array of whole numbers (n_targets, c)",
                where="evaluate",
                remedy="give np.array(rows) of the log's item indices, padded with -1",
            )

    def rank(self, system: System, targets: Targets, stages: Stages = silent) -> Ranked:
        """One system's ranking of all targets."""
        return rank_targets(
            system,
            targets,
            k=self.k,
            seen=self.seen,
            seen_last=self.seen_last,
            candidates=self.candidates,
            done=stages(f"rank {system.name}", len(targets)),
        )

    def sampled(self, targets: Targets) -> NDArray[np.int64]:
        """Rows of the ``llm_users`` targets that go through the LLM stage: a seeded draw of those with a history."""
        warm = np.flatnonzero(targets.position > targets.log.start[targets.user])
        if self.llm_users >= len(warm):
            return warm
        return np.sort(np.random.default_rng(self.seed).choice(warm, size=self.llm_users, replace=False))

    def whole(self, n_items: int) -> str:
        """What the targets were ranked among, for the name of a group."""
        if self.candidates is None:
            return f"whole catalogue of {n_items:,}"
        return f"sampled candidates ({self.candidates.shape[1]})"

    def to_dict(self) -> dict[str, Any]:
        """For the settings of a report."""
        sampled = None if self.candidates is None else self.candidates.shape[1]
        names = ("k", "llm_users", "seed", "average", "seen", "seen_last")
        asked = {"llm_found_only": True} if self.llm_found_only else {}  # else as in reports that were made before it
        return {name: getattr(self, name) for name in names} | {"candidates": sampled} | asked
