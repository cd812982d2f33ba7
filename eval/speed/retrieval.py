"""Retrieval at a million items: exact search against numpy's scores alone, HNSW against exact, and one user's top 100.

python eval/speed/retrieval.py --out eval/results/retrieval.json

Items stand round random centres, each as near to its own as the noise lets it; queries stand there too. Searches and
numpy's product take turns, after one round each that is not counted; the smallest time of each counts. numpy writes
into memory that is already there, for all queries at once (4 GB of scores at the full size). Set OMP_NUM_THREADS and
OPENBLAS_NUM_THREADS for the cores to be used (1 for what is said of one core).
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from penchant.cli.script import script
from penchant.environment import made_by, process_mib
from penchant.files import write_json
from penchant.interest.config import EncoderConfig
from penchant.interest.encoder import InterestEncoder
from penchant.interest.hnsw import HNSWConfig, HNSWIndex
from penchant.interest.index import ExactIndex

Floats = NDArray[np.float32]


def near(centres: Floats, n: int, noise: float, rng: np.random.Generator) -> Floats:
    """n vectors of length 1, each round a random centre: noise 1 is as long as the centre itself."""
    d = centres.shape[1]
    out = rng.standard_normal((n, d), dtype=np.float32)
    out *= np.float32(noise)
    out += centres[rng.integers(len(centres), size=n)]
    out /= np.linalg.norm(out, axis=1, keepdims=True)
    return out


def in_turn(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Seconds of each, the smallest of ``repeats`` rounds after one that warms."""
    best = dict.fromkeys(calls, np.inf)
    for counted in range(repeats + 1):
        for name, call in calls.items():
            begun = time.perf_counter()
            call()
            if counted:
                best[name] = min(best[name], time.perf_counter() - begun)
    return best


def one_user(n_items: int, dim: int, n: int, k: int, seen: int) -> dict[str, Any]:
    """Milliseconds of one request after another: a history of ``seen`` items to its interest vector, then to the k
    best of the items that are not in it. The encoder has IDs of so many items and is untrained: that takes as long.
    """
    encoder = InterestEncoder(EncoderConfig(use_text=False, neighbours=0, dim=dim), n_items, None).eval()
    index = ExactIndex(encoder.item_matrix())
    rng = np.random.default_rng(1)
    times = []
    for _ in range(n + 10):
        history = rng.integers(n_items, size=seen)
        begun = time.perf_counter()
        interest = encoder.encode([history])
        middle = time.perf_counter()
        index.search(interest, k, exclude=[history])
        times.append((1000 * (middle - begun), 1000 * (time.perf_counter() - begun)))
    vector, whole = np.percentile(times[10:], 50, axis=0)
    return {
        "items": n_items,
        "history": seen,
        "p50_milliseconds": round(float(whole), 3),
        "of_which_the_vector": round(float(vector), 3),
        "p99_milliseconds": round(float(np.percentile([t for _, t in times[10:]], 99)), 3),
    }


def race(exact: ExactIndex, graph: HNSWIndex, asked: Floats, k: int, repeats: int) -> dict[str, float]:
    """Seconds of numpy's scores, of exact search and of the graph's."""
    room = np.empty((len(asked), exact.n_items), dtype=np.float32)
    return in_turn(
        {
            "numpy": lambda: np.matmul(asked, exact.vectors.T, out=room),
            "exact": lambda: exact.search(asked, k),
            "hnsw": lambda: graph.search(asked, k),
        },
        repeats,
    )


def main(
    out: Annotated[Path, typer.Option(help="The JSON file to write.")] = Path("eval/results/retrieval.json"),
    items: Annotated[int, typer.Option(help="Items of the catalogue.")] = 1_000_000,
    dim: Annotated[int, typer.Option(help="Dimensions.")] = 128,
    clusters: Annotated[int, typer.Option(help="Centres the items stand round.")] = 10_000,
    noise: Annotated[float, typer.Option(help="How far, as a share of a centre's length.")] = 0.5,
    queries: Annotated[int, typer.Option(help="Queries.")] = 1_000,
    k: Annotated[int, typer.Option(help="Items wanted of each.")] = 100,
    one_user_items: Annotated[int, typer.Option(help="Items where one user asks.")] = 100_000,
    repeats: Annotated[int, typer.Option(help="Rounds that count.")] = 3,
    m: Annotated[int, typer.Option(help="HNSW: neighbours.")] = HNSWConfig().m,
    ef_construction: Annotated[
        int, typer.Option(help="HNSW: candidates of a new item.")
    ] = HNSWConfig().ef_construction,
    ef_search: Annotated[int, typer.Option(help="HNSW: candidates of a query.")] = HNSWConfig().ef_search,
) -> None:
    """Seed 0."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((clusters, dim), dtype=np.float32)
    vectors, asked = near(centres, items, noise, rng), near(centres, queries, noise, rng)
    found: dict[str, Any] = {
        **made_by(__file__),
        "items": items,
        "dimensions": dim,
        "clusters": clusters,
        "noise": noise,
        "queries": queries,
        "k": k,
        "threads": {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")},
    }
    found["one_user"] = one_user(one_user_items, dim, queries, k, seen=50)
    print(found["one_user"])

    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak so far was that of making the vectors
    before = process_mib(peak=False)
    exact = ExactIndex(vectors, model="benchmark")
    exact.search(asked, k)
    exact_peak, without = process_mib(peak=True), process_mib(peak=False)
    config = HNSWConfig(m=m, ef_construction=ef_construction, ef_search=ef_search)
    begun = time.perf_counter()
    graph = HNSWIndex(vectors, config, model="benchmark")
    built = time.perf_counter() - begun
    graph_mib = process_mib(peak=False) - without

    seconds = race(exact, graph, asked, k, repeats)
    found["exact"] = {
        "numpy_scores_seconds": round(seconds["numpy"], 3),
        "search_seconds": round(seconds["exact"], 3),
        "times_numpy_scores": round(seconds["exact"] / seconds["numpy"], 2),
        "peak_mib_above_the_vectors": round(exact_peak - before),
    }
    print(found["exact"])
    with tempfile.TemporaryDirectory() as folder:
        recall = graph.recall(asked, k)
        graph.save(Path(folder) / "index")
        size = sum(p.stat().st_size for p in (Path(folder) / "index").iterdir()) / 2**20
        begun = time.perf_counter()
        HNSWIndex.load(Path(folder) / "index", model="benchmark")
        load = time.perf_counter() - begun
    found["hnsw"] = {
        **config.model_dump(),
        "search_seconds": round(seconds["hnsw"], 3),
        "times_as_fast_as_exact": round(seconds["exact"] / seconds["hnsw"], 1),
        f"recall@{k}": round(recall, 4),
        "build_seconds": round(built, 1),
        "mib_of_the_graph": round(graph_mib),
        "saved_mib": round(size),
        "load_seconds": round(load, 2),
    }
    print(found["hnsw"])
    write_json(out, found)


if __name__ == "__main__":
    script(main)
