"""A made-up report of the size and shape of a real one, for the tests of the page. Its numbers mean nothing."""

from __future__ import annotations

from typing import Any

import numpy as np

SYSTEMS = [
    "popularity",
    "recent popularity",
    "BM25 on the last title",
    "last item (LLM vectors)",
    "ItemKNN",
    "EASE",
    "BPR",
    "ALS",
    "Mult-VAE",
    "SASRec-CE",
    "zero-shot LLM",
    "encoder",
    "llm likelihood",
    "llm likelihood - no-history likelihood",
    "llm+interest (weight 0.4, calibration 0.5)",
]
_ADJECTIVES = ["Quiet", "Long", "Blue", "Last", "Hidden", "Second", "Broken", "Golden"]
_NOUNS = ["River", "Summer", "Letter", "Heart", "Garden", "Witness", "Journey", "House"]
TITLES = [f"{a} {n}, The ({1950 + 7 * i % 49})" for i, (a, n) in enumerate((a, n) for a in _ADJECTIVES for n in _NOUNS)]


def estimate(mean: float, spread: float, n: int) -> dict[str, Any]:
    return {"mean": mean, "low": mean - spread, "high": mean + spread, "n": n}


def sample_report(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    quality = np.round(np.sort(rng.uniform(0.02, 0.095, len(SYSTEMS))), 4)

    def metrics(q: float, n: int) -> dict[str, Any]:
        spread = 0.5 / np.sqrt(n)
        return {
            name: estimate(factor * q, spread * factor, n)
            for name, factor in (
                ("Recall@10", 1.9),
                ("NDCG@10", 1.0),
                ("Recall@20", 2.8),
                ("NDCG@20", 1.2),
                ("MRR", 0.8),
            )
        }

    rows = [
        {"group": group, "system": system, "metrics": metrics(q, n), "difference": False, "p": None}
        for group, n in (
            ("all 943 test targets, whole catalogue of 1,682", 943),
            ("the same 500 of them (seed 0), sampled candidates (100)", 500),
        )
        for system, q in zip(SYSTEMS, quality, strict=True)
    ]
    rows += [
        {
            "group": "what the LLM adds, paired difference",
            "system": f"llm+interest minus {other}",
            "metrics": {name: estimate(mean, 0.008, 500) for name in ("Recall@10", "NDCG@10")},
            "difference": True,
            "p": p,
        }
        for other, mean, p in (("encoder", 0.0023, 0.41), ("EASE", -0.0061, 0.0471), ("popularity", 0.041, 0.00002))
    ]
    slices = [
        {"slice": name, "value": value, "n": n, "system": system, "metrics": metrics(max(q * f, 0.001), n)}
        for name, values in (
            ("history length", [("1-3", 41, 0.6), ("4-10", 160, 0.9), ("11-50", 420, 1.1), ("51+", 322, 1.0)]),
            ("popularity of the target", [("head", 300, 1.7), ("middle", 320, 0.8), ("tail", 323, 0.2)]),
        )
        for value, n, f in values
        for system, q in zip(SYSTEMS, quality, strict=True)
    ]
    seconds = [0.02, 0.021, 0.4, 0.35, 0.09, 0.11, 0.05, 0.05, 0.3, 0.9, 2900, 1.0, 2100, 2300, 2250]
    costs = [
        {
            "system": system,
            "seconds_per_1000_users": s,
            "tokens_per_1000_users": 1.2e6 if "llm" in system.lower() and s > 100 else None,
            "fit_seconds": float(rng.uniform(0.1, 400)),
        }
        for system, s in zip(SYSTEMS, seconds, strict=True)
    ]
    beyond = [
        {
            "system": system,
            "coverage": float(rng.uniform(0.01, 0.8)),
            "intra_list_distance": float(rng.uniform(0.3, 0.9)),
            "novelty": float(rng.uniform(5, 13)),
            "popularity_lift": float(rng.uniform(-0.5, 3)),
            "gini": float(rng.uniform(0.5, 0.99)),
            "genre_calibration": None if i % 4 == 0 else float(rng.uniform(0, 0.5)),
            "duplicates": 0.0,
            "invalid": 0.0,
        }
        for i, system in enumerate(SYSTEMS)
    ]
    trials = [
        {"system": "EASE", "config": {"l2": l2}, "valid_ndcg@10": v, "seconds": 1.2}
        for l2, v in ((10.0, 0.081), (100.0, 0.0933), (1000.0, 0.088))
    ] + [
        {
            "system": "SASRec-CE",
            "config": {"dim": dim, "blocks": 2, "dropout": 0.3, "learning_rate": 0.001},
            "valid_ndcg@10": v,
            "seconds": 310.0,
        }
        for dim, v in ((32, 0.0901), (64, 0.0972))
    ]
    published = [
        {
            "system": "SASRec (RecBole)",
            "source": "A. Author et al., A Study of Things, RecSys 2023, table 3",
            "protocol": "5-core, leave-last-out, full ranking, seen masked",
            "metrics": {"Recall@10": 0.1523, "NDCG@10": 0.0801},
        }
    ]
    examples = []
    for user in range(10):
        drawn = rng.permutation(len(TITLES))
        history = [TITLES[i] for i in drawn[: 3 + 4 * user]]
        target = TITLES[drawn[50]]
        recommended, ranks = {}, {}
        for j, system in enumerate(("encoder", SYSTEMS[-1], "EASE", "popularity", "SASRec-CE", "BPR")):
            titles = [TITLES[i] for i in drawn[40 + j : 50 + j]]
            recommended[system] = titles
            ranks[system] = titles.index(target) + 1 if target in titles else 23 + j
        examples.append(
            {
                "user": f"u{user}",
                "history": history,
                "target": target,
                "target_rank": ranks,
                "recommended": recommended,
                "why": "The true item is from a genre new to this user; both rank head items first.",
            }
        )
    return {
        "title": "MovieLens-100K: leave-last-out, full ranking",
        "rows": rows,
        "notes": [
            "full ranking over the catalogue, seen items masked, ties counted against us",
            "leave-last-out: whatever is trained on all users has seen other users' events later than a target",
            "12 targets are items without any training event",
        ],
        "settings": {
            "k": 10,
            "seed": 0,
            "split": {"kind": "leave-last-out", "min_events": 3},
            "data": "0f" * 32,
            "fusion": {"weight": 0.4, "calibration": 0.5},
        },
        "seconds": {"encoder and baselines": 1.23, "LLM stage": 455.0},
        "environment": {"machine": "x86_64", "cores": 2, "versions": {"numpy": "2.3.4", "torch": "2.13.0"}},
        "slices": slices,
        "costs": costs,
        "beyond": beyond,
        "trials": trials,
        "published": published,
        "examples": examples,
    }
