"""A million titles as a trie: seconds to build, peak memory, size on disk, and one transition step for 512 beams.

python eval/speed/trie.py --out eval/results/trie.json
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from penchant.catalog_trie import CatalogTrie
from penchant.cli.script import script
from penchant.environment import made_by, process_mib
from penchant.files import write_json


def main(
    out: Annotated[Path, typer.Option(help="The JSON file to write.")],
    titles: Annotated[int, typer.Option(help="Titles.")] = 1_000_000,
    tokens: Annotated[int, typer.Option(help="Tokens of each.")] = 10,
    beams: Annotated[int, typer.Option(help="Nodes that take a step at once.")] = 512,
) -> None:
    """Zipf-distributed tokens, as words are; seed 0."""
    rng = np.random.default_rng(0)
    sequences = [tuple(row) for row in (rng.zipf(1.3, (titles, tokens)) % 49_152).tolist()]
    before = process_mib(peak=True)
    begun = time.perf_counter()
    trie = CatalogTrie.build(sequences)
    seconds = time.perf_counter() - begun
    peak = process_mib(peak=True)
    with tempfile.TemporaryDirectory() as folder:
        trie.save(Path(folder) / "trie")
        size = sum(p.stat().st_size for p in (Path(folder) / "trie").iterdir()) / 2**20
        begun = time.perf_counter()
        loaded = CatalogTrie.load(Path(folder) / "trie")
        load = time.perf_counter() - begun
        nodes = rng.integers(0, loaded.n_nodes, size=beams)
        wanted = rng.integers(0, 49_152, size=beams)
        loaded.step(nodes, wanted)  # builds the keys once
        times = []
        for _ in range(200):
            begun = time.perf_counter()
            loaded.step(nodes, wanted)
            times.append(time.perf_counter() - begun)
    found = {
        **made_by(__file__),
        "titles": titles,
        "tokens_each": tokens,
        "nodes": trie.n_nodes,
        "build_seconds": round(seconds, 2),
        "peak_mib_with_the_sequences": round(peak),
        "mib_before_the_build": round(before),
        "saved_mib": round(size),
        "load_milliseconds": round(1000 * load, 2),
        "beams": beams,
        "step_milliseconds_median": round(1000 * float(np.median(times)), 4),
    }
    write_json(out, found)
    print(found)


if __name__ == "__main__":
    script(main)
