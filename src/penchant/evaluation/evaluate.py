"""How good a fitted recommender is, with plain baselines beside it.

Full ranking over the whole catalogue, seen items masked, ties counted against us. The encoder and the
baselines are ranked on every target; the LLM reranks the encoder's candidates on a seeded sample, and
every system is shown on that same sample too.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from penchant import metrics
from penchant.data.history import Targets
from penchant.errors import ConfigError, DataError
from penchant.evaluation.report import Report, Row
from penchant.evaluation.statistics import bootstrap_mean
from penchant.interest.vectors import standardise
from penchant.rank import Fusion
from penchant.recommend import Items, Recommender, Stages, silent

if TYPE_CHECKING:
    from collections.abc import Mapping

Ranks = NDArray[np.int64]

# Scores held at once: 16M float32 are 64 MB.
_BLOCK = 16_000_000


def evaluate(
    model: Recommender,
    targets: Targets | None = None,
    *,
    k: int = 10,
    llm_users: int = 500,
    seed: int = 0,
    stages: Stages = silent,
) -> Report:
    """Recall@k and NDCG@k with 95% intervals, on ``targets`` (the split's test targets by default).

    ``llm_users`` targets, drawn with ``seed``, go through the LLM stage (0: none do).
    """
    for name, value, least in (("k", k, 1), ("llm_users", llm_users, 0), ("seed", seed, 0)):
        if value < least:
            raise ConfigError(f"{name} is {value}", where="evaluate", remedy=f"give {least} or more")
    targets = model.split.test if targets is None else targets
    if len(targets) == 0:
        raise DataError(
            "there are no targets to evaluate on",
            where="evaluate",
            remedy="fit on a split with a test part (leave_last_out or global_time), not on a bare dataset",
        )
    seconds: dict[str, float] = {}
    begun = time.perf_counter()
    plain = _plain_ranks(model, targets, stages)
    seconds["encoder and baselines"] = time.perf_counter() - begun
    rows = _rows(f"all {len(targets):,} test targets, whole catalogue of {model.log.n_items:,}", plain, k, seed)
    notes = _notes(model, targets)
    chosen = _sample(targets, llm_users, seed)
    if llm_users > 0 and not len(chosen):
        notes.append("no target has a history, so the LLM stage ran on none")
    if len(chosen):
        begun = time.perf_counter()
        reranked, choices = _llm_ranks(model, targets.take(chosen), plain["encoder"][chosen], stages)
        seconds["LLM stage"] = time.perf_counter() - begun
        group = (
            f"the same {len(chosen):,} of them (seed {seed}) for every system; "
            f"the LLM ranks the encoder's top {model.config.candidates}"
        )
        some = {name: rank[chosen] for name, rank in plain.items()}
        rows += _rows(group, {**some, **reranked}, k, seed)
        rows += _random_order(group, choices, k, seed)
        fused, encoder = reranked[_fused_name(model.fusion)], some["encoder"]
        rows.append(
            Row(
                "what the LLM adds on them, paired difference",
                "llm+interest minus encoder",
                {
                    f"Recall@{k}": bootstrap_mean(metrics.recall(fused, k) - metrics.recall(encoder, k), seed),
                    f"NDCG@{k}": bootstrap_mean(metrics.ndcg(fused, k) - metrics.ndcg(encoder, k), seed),
                },
                difference=True,
            )
        )
        notes.append(f"the LLM stage ran on {len(chosen):,} seeded users of {len(targets):,}; --llm-users changes that")
    settings = {
        "k": k,
        "llm_users": llm_users,
        "seed": seed,
        "split": model.split.spec,
        "data": model.split.dataset.content_hash,
        "templates": model.templates.hash(),
        "model": model.fingerprint,
        "engine": model.engine_source,
        "config": model.config.model_dump(mode="json"),
        "fusion": model.fusion.to_dict(),
    }
    return Report(rows, notes, settings, {name: round(value, 2) for name, value in seconds.items()})


def _sample(targets: Targets, n: int, seed: int) -> NDArray[np.int64]:
    """Rows of up to n targets that have a history, drawn without replacement, in order."""
    warm = np.flatnonzero(targets.position > targets.log.start[targets.user])
    if n >= len(warm):
        return warm
    return np.sort(np.random.default_rng(seed).choice(warm, size=n, replace=False))


def _plain_ranks(model: Recommender, targets: Targets, stages: Stages) -> dict[str, Ranks]:
    """Ranks over the whole catalogue of the systems that need no LLM at serving time."""
    text = standardise(model.vectors)
    text /= np.maximum(np.linalg.norm(text, axis=1, keepdims=True), 1e-6)
    counts = model.split.train_counts.astype(np.float32)
    names = ("encoder", "popularity", "last item (LLM vectors)")
    ranks: dict[str, list[Ranks]] = {name: [] for name in names}
    done = stages("rank the whole catalogue", len(targets))
    block = max(1, _BLOCK // model.log.n_items)
    for start in range(0, len(targets), block):
        part = targets.take(np.arange(start, min(start + block, len(targets))))
        histories = [part.history(i) for i in range(len(part))]
        warm = np.array([i for i, h in enumerate(histories) if len(h)], dtype=np.int64)
        popular = np.repeat(counts[None], len(part), axis=0)
        encoder, last = popular.copy(), popular.copy()
        if warm.size:
            interest = model.encoder.encode([histories[i] for i in warm])
            encoder[warm] = interest @ model.index.vectors.T
            last[warm] = text[[histories[i][-1] for i in warm]] @ text.T
        for name, scores in zip(names, (encoder, popular, last), strict=True):
            for i, seen in enumerate(histories):
                scores[i, seen] = -np.inf
            ranks[name].append(metrics.target_rank(scores, part.item))
        done(len(part))
    return {name: np.concatenate(parts) for name, parts in ranks.items()}


def _fused_name(fusion: Fusion) -> str:
    return f"llm+interest (weight {fusion.weight:g}, calibration {fusion.calibration:g})"


def _llm_ranks(
    model: Recommender, targets: Targets, encoder: Ranks, stages: Stages
) -> tuple[dict[str, Ranks], NDArray[np.int64]]:
    """Ranks after the LLM reorders the retrieved candidates; behind them the encoder's order goes on.

    Also how many candidates each target stands among, 0 where it is outside them.
    """
    histories = [targets.history(i) for i in range(len(targets))]
    items, interest = model.retrieve(histories, model.config.candidates)
    candidates: list[Items] = [row[row >= 0] for row in items]
    likelihood = model.ranker.likelihoods(histories, candidates, stages("LLM on test users", len(histories)))
    model.ranker.priors(np.unique(np.concatenate(candidates)), stages("LLM without history", 1))
    variants = {
        "llm likelihood": Fusion(1.0, 0.0),
        "llm likelihood - no-history likelihood": Fusion(1.0, 1.0),
        _fused_name(model.fusion): model.fusion,
    }
    ranks: dict[str, Ranks] = {}
    for name, fusion in variants.items():
        found = np.maximum(encoder, model.config.candidates + 1)
        for i, (row, lik) in enumerate(zip(candidates, likelihood, strict=True)):
            at = np.flatnonzero(row == targets.item[i])
            if at.size:
                scores = fusion.scores(interest[i][: len(row)], lik, model.ranker.prior[row])
                found[i] = (scores >= scores[at[0]]).sum()
        ranks[name] = found
    choices = [len(row) if t in row else 0 for t, row in zip(targets.item, candidates, strict=True)]
    return ranks, np.array(choices, dtype=np.int64)


def _rows(group: str, ranks: Mapping[str, Ranks], k: int, seed: int) -> list[Row]:
    return [
        Row(
            group,
            name,
            {
                f"Recall@{k}": bootstrap_mean(metrics.recall(rank, k), seed),
                f"NDCG@{k}": bootstrap_mean(metrics.ndcg(rank, k), seed),
            },
        )
        for name, rank in ranks.items()
    ]


def _random_order(group: str, choices: NDArray[np.int64], k: int, seed: int) -> list[Row]:
    """What the candidates give in random order, in expectation: the floor under any ranking of them.

    ``choices`` (n,) is how many candidates each target stands among, each place as likely; 0 where it is none.
    """
    recall, ndcg = np.zeros(len(choices)), np.zeros(len(choices))
    for n in np.unique(choices[choices > 0]):
        places = np.arange(1, n + 1)
        recall[choices == n] = metrics.recall(places, k).mean()
        ndcg[choices == n] = metrics.ndcg(places, k).mean()
    return [
        Row(
            group,
            "the candidates in random order (expected)",
            {f"Recall@{k}": bootstrap_mean(recall, seed), f"NDCG@{k}": bootstrap_mean(ndcg, seed)},
        )
    ]


def _notes(model: Recommender, targets: Targets) -> list[str]:
    log = model.log
    repeated = sum(int(targets.item[i]) in targets.history(i) for i in range(len(targets)))
    cold = int((model.split.train_counts[targets.item] == 0).sum())
    nothing = int((targets.position == log.start[targets.user]).sum())
    notes = [
        "full ranking over the catalogue, seen items masked, ties counted against us; mean [95% bootstrap interval "
        "over targets]",
        model.split.summary(),
    ]
    if model.split.spec["kind"].startswith("leave-last-out"):
        notes.append(
            "leave-last-out: whatever is trained on all users has seen other users' events later than a target"
        )
    if repeated:
        notes.append(
            f"{repeated:,} targets are repeats of an item the user has already; masked, they cannot be found and count "
            "as misses (prepare with --repeats first to take repeats out)"
        )
    if cold:
        notes.append(f"{cold:,} targets are items without any training event")
    if nothing:
        notes.append(f"{nothing:,} targets have no history: popularity stands in for every system there")
    return notes
