"""How much memory and time it takes to read and save a large log of interactions.

    python eval/speed/read_memory.py [--rows 5000000] [--items 100000] [--out eval/results/read_memory.json]

Makes an interactions CSV (user, item, time, rating) and an items CSV with seeded random content in a temporary
folder, reads and saves them in a fresh process, and writes what that process used as JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl

from penchant.environment import made_by, process_mib

_USERS_A_ROW = 0.1
_PIECE = 1_000_000


def make_files(folder: Path, rows: int, items: int) -> None:
    """Write interactions.csv and items.csv with seeded content, the log piece by piece."""
    rng = np.random.default_rng(0)
    users = max(1, int(rows * _USERS_A_ROW))
    with open(folder / "interactions.csv", "wb") as out:
        for start in range(0, rows, _PIECE):
            size = min(_PIECE, rows - start)
            # Squaring a uniform number gives the popular items that real logs have.
            piece = pl.DataFrame(
                {
                    "user_id": rng.integers(0, users, size),
                    "item_id": (rng.random(size) ** 2 * items).astype(np.int64),
                    "timestamp": rng.integers(1_500_000_000, 1_700_000_000, size),
                    "rating": rng.integers(1, 6, size),
                }
            )
            piece.write_csv(out, include_header=start == 0)
    ids = np.arange(items)
    pl.DataFrame({"item_id": ids, "title": [f"Item {i}, a thing of kind {i % 97}" for i in ids]}).write_csv(
        folder / "items.csv"
    )


def read_and_save(folder: Path) -> None:
    """What the fresh process does; prints one JSON line of what it used."""
    from penchant.data.dataset import Dataset

    start = time.perf_counter()
    dataset = Dataset.read(folder / "interactions.csv", folder / "items.csv")
    after_read = time.perf_counter()
    peak_read = process_mib(peak=True)
    dataset.save(folder / "saved")
    used = {
        "read_seconds": round(after_read - start, 2),
        "save_seconds": round(time.perf_counter() - after_read, 2),
        "peak_rss_after_read_mib": round(peak_read),
        "peak_rss_mib": round(process_mib(peak=True)),
        "users": dataset.n_users,
        "content_hash": dataset.content_hash,
    }
    sys.stdout.write(json.dumps(used) + "\n")


def main() -> None:
    """Make the files, measure in a fresh process, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "read_memory.json")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read is not None:
        read_and_save(args.read)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_files(folder, args.rows, args.items)
        command = [sys.executable, __file__, "--read", str(folder)]
        used = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        result = {
            "rows": args.rows,
            "items": args.items,
            **used,
            "csv_mib": round((folder / "interactions.csv").stat().st_size / 2**20, 1),
            "saved_mib": round(sum(path.stat().st_size for path in (folder / "saved").iterdir()) / 2**20, 1),
            **made_by(__file__),
        }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
