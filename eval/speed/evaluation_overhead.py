"""What the harness adds to the scoring it measures: masking, ranks and top lists beside a real encoder's scores.

python eval/speed/evaluation_overhead.py --out eval/results/evaluation_overhead.json

The encoder is the interest encoder with ids, of the default size, whose scores are a dot product with every item: the
cheapest system that is worth evaluating. Short histories make it cheaper still, so both kinds are measured. The share
is (all the time of rank_targets minus that in system.scores) / that in system.scores.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from penchant.cli.script import script
from penchant.data.history import EventLog, Targets
from penchant.environment import made_by
from penchant.evaluation.baselines.sasrec import SASRec
from penchant.evaluation.ranking import rank_targets
from penchant.files import write_json
from penchant.interest.config import EncoderConfig
from penchant.interest.encoder import InterestEncoder


@dataclass(frozen=True)
class Log:
    """Random users over random items; lengths are geometric, five at least."""

    users: int
    items: int
    mean_length: int

    def targets(self) -> Targets:
        rng = np.random.default_rng(0)
        lengths = np.minimum(rng.geometric(1 / max(1, self.mean_length - 4), self.users) + 5, 500)
        start = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        item = rng.integers(0, self.items, start[-1]).astype(np.int32)
        names = [str(i) for i in range(max(self.users, self.items))]
        log = EventLog(names[: self.users], names[: self.items], start, item, np.arange(start[-1]))
        return Targets(log, start[1:] - 1)


def measured(log: Log, k: int, repeats: int) -> dict[str, Any]:
    """The run with the smallest time in all, of ``repeats``."""
    targets = log.targets()
    encoder = InterestEncoder(EncoderConfig(use_text=False, neighbours=0), log.items, None).eval()
    counts: NDArray[np.float32] = np.ones(log.items, dtype=np.float32)
    system = SASRec(encoder, encoder.item_matrix(), counts, "encoder")
    rank_targets(system, targets.take(np.arange(min(2_000, log.users))), k=k)  # threads and caches are warm then
    best: tuple[float, float] | None = None
    for _ in range(repeats):
        begun = time.perf_counter()
        ranked = rank_targets(system, targets, k=k)
        spent = time.perf_counter() - begun
        if best is None or spent < best[0]:
            best = spent, ranked.seconds
    if best is None:
        raise typer.BadParameter("give --repeats 1 or more")
    harness = best[0] - best[1]
    return {
        "users": log.users,
        "items": log.items,
        "mean_history": log.mean_length,
        "k": k,
        "scoring_seconds": round(best[1], 3),
        "harness_seconds": round(harness, 3),
        "harness_microseconds_a_user": round(1e6 * harness / log.users, 1),
        "share": round(harness / best[1], 4),
    }


def main(
    out: Annotated[Path, typer.Option(help="The JSON file to write.")],
    users: Annotated[int, typer.Option(help="Users, one target each.")] = 20_000,
    items: Annotated[int, typer.Option(help="Items.")] = 12_000,
    repeats: Annotated[int, typer.Option(help="Runs, of which the fastest counts.")] = 3,
) -> None:
    """Histories of 9 events (Beauty's) and of 100 (MovieLens'), lists of 10 and of 100."""
    rows = [measured(Log(users, items, length), k, repeats) for length in (9, 100) for k in (10, 100)]
    for row in rows:
        print(row)
    write_json(out, {**made_by(__file__), "rows": rows})


if __name__ == "__main__":
    script(main)
