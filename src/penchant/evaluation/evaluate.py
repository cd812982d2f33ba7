"""How good a fitted recommender is, with plain baselines beside it.

Full ranking over the whole catalogue, seen items masked, ties counted against us. The encoder and the
baselines are ranked on every target; the LLM reranks the encoder's candidates on a seeded sample, and
every system is shown on that same sample too. Nothing is scored before the leak check has passed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from penchant.data.history import Targets
from penchant.data.split import Split
from penchant.errors import ConfigError, DataError
from penchant.evaluation import beyond
from penchant.evaluation.examples import examples
from penchant.evaluation.latency import check_price, request_milliseconds, with_latency
from penchant.evaluation.leaks import check_run
from penchant.evaluation.llm_stage import CALIBRATED, LIKELIHOOD, LLMStage, fused_name, run_llm_stage
from penchant.evaluation.notes import counted, protocol_notes
from penchant.evaluation.ours import ENCODER, POPULARITY, own_systems
from penchant.evaluation.pointwise import value_rows
from penchant.evaluation.protocol import Protocol
from penchant.evaluation.ranking import Ranked, Seen
from penchant.evaluation.report import Cost, Report, Row
from penchant.evaluation.rows import Average, Table, corrected
from penchant.evaluation.slices import Slice
from penchant.evaluation.slices import slices as slices_of
from penchant.evaluation.systems import System
from penchant.interest.vectors import standardise
from penchant.recommend import Recommender, Stages, silent
from penchant.schema import USER

_GENRES = "genres"


def evaluate(
    model: Recommender,
    targets: Targets | None = None,
    *,
    k: int = 10,
    llm_users: int = 500,
    llm_found_only: bool = False,
    seed: int = 0,
    average: Average = "event",
    seen: Seen = "mask",
    seen_last: int | None = None,
    candidates: NDArray[np.integer] | None = None,
    baselines: Sequence[System] = (),
    slices: bool = True,
    item_columns: Sequence[str] = (),
    users: pl.DataFrame | None = None,
    n_examples: int = 10,
    price_per_hour: float | None = None,
    stages: Stages = silent,
) -> Report:
    """Recall@k, NDCG@k and MRR with 95% intervals, on ``targets`` (the split's test targets by default).

    ``llm_users`` targets, drawn with ``seed``, go through the LLM stage (0: none do); with ``llm_found_only`` the LLM
    is asked of those that were retrieved, which costs less and changes no accuracy. ``average``: events count
    alike, or users do. ``seen``, ``seen_last`` and ``candidates`` are those of ``rank_targets``. ``baselines`` stand
    beside the built-in ones (popularity in place of it), and ours is tested against the best. ``slices`` also by
    ``item_columns`` and by every column of ``users`` (a table with user_id). ``n_examples`` real users are shown with
    their titles. An encoder that learns values (loss mse, or bce with a value) is judged by these too, in a group of
    their own. With ``price_per_hour`` of the machine, in any currency, the costs say what a thousand users cost.

    Raises DataError where there are no targets, they are another log's, one is a training event, or the leak check
    finds something; ConfigError where two systems have one name, or an adapter was trained on another split.
    """
    protocol = Protocol(k, llm_users, llm_found_only, seed, average, seen, seen_last, candidates)
    check_price(price_per_hour)
    targets = model.split.test if targets is None else targets
    check_targets(model.split, targets)
    given = {system.name for system in baselines}  # popularity may be one of them
    own = [system for system in own_systems(model) if not (system.name == POPULARITY and POPULARITY in given)]
    systems = [*own, *baselines]
    _check_names([*(system.name for system in systems), LIKELIHOOD, CALIBRATED, fused_name(model.fusion)])
    checked = check_run(model, targets, targets.take(protocol.sampled(targets)))
    begun = time.perf_counter()
    ranked = [protocol.rank(system, targets, stages) for system in systems]
    seconds = {"encoder and baselines": time.perf_counter() - begun}
    report = tabulate(
        model.split,
        targets,
        protocol,
        ranked,
        [system.name for system in baselines],
        model=model,
        vectors=standardise(model.vectors[: model.log.n_items]),
        seconds=seconds,
        slices=slices,
        item_columns=item_columns,
        users=users,
        n_examples=n_examples,
        stages=stages,
    )
    report.rows.extend(value_rows(model, targets, seed))
    took = {ENCODER: request_milliseconds(model, targets, llm=False)}
    if llm_users:
        took[fused_name(model.fusion)] = request_milliseconds(model, targets, llm=True)
    report.costs[:] = with_latency(report.costs, took, price_per_hour)
    report.notes.extend(checked.notes())
    return report


def _check_names(names: Sequence[str]) -> None:
    twice = [name for number, name in enumerate(names) if name in names[:number]]
    if twice:
        raise ConfigError(
            f"two systems are called {twice[0]!r}, and a table could not tell them apart",
            where="evaluate",
            remedy="give each baseline a name of its own",
        )


def check_targets(split: Split, targets: Targets) -> None:
    """Refuse targets of another log, such as would flatter what was trained on ``split``, or none at all."""
    if len(targets) == 0:
        raise DataError(
            "there are no targets to evaluate on",
            where="evaluate",
            remedy="fit on a split with a test part (leave_last_out or global_time), not on a bare dataset",
        )
    ours, theirs = split.log, targets.log
    same = ours is theirs or (
        (ours.user_ids == theirs.user_ids and ours.item_ids == theirs.item_ids)
        and all(np.array_equal(getattr(ours, name), getattr(theirs, name)) for name in ("start", "item", "time"))
    )
    if not same or targets.position.min() < 0 or targets.position.max() >= len(ours.item):
        raise DataError(
            "the targets are not events of the data that was fitted on",
            where="evaluate",
            remedy="give targets of the split's own log: split.test, split.valid, or Targets(split.log, positions)",
        )
    learnt = int(split.train[targets.position].sum())
    if learnt:
        raise DataError(
            f"{learnt:,} of {len(targets):,} targets are events the model was trained on",
            where="evaluate",
            remedy="evaluate on the split's test (or valid) targets",
        )


def tabulate(
    split: Split,
    targets: Targets,
    protocol: Protocol,
    ranked: Sequence[Ranked],
    baselines: Sequence[str],
    *,
    model: Recommender | None = None,
    vectors: NDArray[np.float32] | None = None,
    seconds: dict[str, float] | None = None,
    slices: bool = True,
    item_columns: Sequence[str] = (),
    users: pl.DataFrame | None = None,
    fit_seconds: dict[str, float] | None = None,
    pairs: Sequence[tuple[str, str]] = (),
    n_examples: int = 10,
    stages: Stages = silent,
) -> Report:
    """The report from rankings that were made already, ours first; with a ``model`` the LLM stage is run here.

    ``baselines`` names those rankings that ours is tested against. ``vectors`` (n_items, d) are what lists are
    compared by. ``pairs`` names systems whose difference is shown too, on all targets and on those of cold items.
    """
    log, seconds = split.log, dict(seconds or {})
    encoder = ranked[0]
    chosen = protocol.sampled(targets) if model else np.zeros(0, dtype=np.int64)

    def parts_of(some: Targets) -> list[Slice]:
        if not slices:
            return []
        columns = [] if users is None else [name for name in users.columns if name != USER]
        return slices_of(split, some, item_columns=item_columns, user_columns=columns, users=users)

    # Now, for what is wrong with a column must not be found when the LLM was paid.
    parts, chosen_parts = parts_of(targets), parts_of(targets.take(chosen)) if len(chosen) else []
    table = Table(protocol.k, log.n_items, targets.user, protocol.average, protocol.seed)
    every = f"all {counted(targets)}, {protocol.whole(log.n_items)}"
    rows = table.rows(every, ranked)
    best = best_of([one for one in ranked if one.system in baselines], table)
    if best is not None:
        group = f"ours against the best baseline on all {counted(targets)}, paired difference"
        rows.append(table.difference(group, f"{encoder.system} minus {best.system}", encoder.rank, best.rank))
    rows += _pair_rows(table, split, targets, {one.system: one for one in ranked}, pairs)
    notes = protocol_notes(split, targets, protocol.seen, protocol.seen_last, protocol.candidates, protocol.average)
    if model and protocol.llm_users > 0 and not len(chosen):
        notes.append("no target has a history, so the LLM stage ran on none")
    stage, shown, shown_targets = None, list(ranked), targets
    listed: LLMStage | None = None  # the stage, where its lists are the LLM's own for everybody
    if model and len(chosen):
        begun = time.perf_counter()
        shown, shown_targets = [one.take(chosen) for one in ranked], targets.take(chosen)
        stage = run_llm_stage(
            model,
            shown_targets,
            shown[0],
            seen=protocol.seen,
            seen_last=protocol.seen_last,
            candidates=None if protocol.candidates is None else protocol.candidates[chosen],
            found_only=protocol.llm_found_only,
            stages=stages,
        )
        seconds["LLM stage"] = time.perf_counter() - begun
        rows += _llm_rows(table.take(chosen), protocol, model, shown, stage, best)
        notes.append(
            f"the LLM stage ran on {len(chosen):,} seeded targets of {len(targets):,}; --llm-users changes that"
        )
        if stage.n_asked < len(chosen):
            notes.append(
                f"the LLM was asked of the {stage.n_asked:,} targets among them that were retrieved: no order of other "
                "candidates changes the accuracy. Costs are of these; other numbers and examples leave it out"
            )
        else:
            shown, listed = [*shown, *stage.ranked], stage
    rows, tests = corrected(rows)
    notes += tests
    sliced = table.slice_rows(parts, ranked)
    if slices and stage is not None:
        sliced += table.take(chosen).slice_rows(chosen_parts, [stage.fused])
        notes.append("slices: the LLM's systems on their sample, all others on all targets")
    if stage is not None and stage.prior_seconds > 0.05:
        notes.append(
            f"the likelihoods without history took {stage.prior_seconds:.1f} s, once for a catalogue; no cost above "
            "counts them"
        )
    final = listed.fused if listed else shown[0]
    retrieved = 0 if model is None else model.config.candidates
    return Report(
        rows,
        notes,
        _settings(split, protocol, model),
        {name: round(value, 2) for name, value in seconds.items()},
        slices=sliced,
        costs=_costs(ranked, stage, shown[0], fit_seconds or {}),
        beyond=_beyond(split, shown_targets, shown, vectors),
        examples=examples(
            split,
            shown_targets,
            shown[0],
            final,
            [one for one in shown if best is not None and one.system == best.system],
            n=n_examples,
            seed=protocol.seed,
            masked=protocol.seen == "mask" and protocol.candidates is None,
            seen_last=protocol.seen_last,
            choices=None if listed is None else listed.choices,
            candidates=retrieved if protocol.candidates is None else protocol.candidates.shape[1],
        ),
    )


def _pair_rows(
    table: Table, split: Split, targets: Targets, ranked: dict[str, Ranked], pairs: Sequence[tuple[str, str]]
) -> list[Row]:
    """Differences of named systems; a pair of which one was not made is left out."""
    made = [(one, other) for one, other in pairs if one in ranked and other in ranked]
    cold = np.flatnonzero(split.train_counts[targets.item] == 0)
    groups = [(f"paired differences on all {counted(targets)}", np.arange(len(targets)))]
    if len(cold):
        groups.append((f"paired differences on the {counted(targets.take(cold))} that are cold items", cold))
    return [
        table.take(at).difference(group, f"{one} minus {other}", ranked[one].rank[at], ranked[other].rank[at])
        for group, at in groups
        for one, other in made
    ]


def best_of(ranked: Sequence[Ranked], table: Table) -> Ranked | None:
    """The one with the best NDCG, chosen on the test itself: the hardest to beat. None of none."""
    quality = [table.mean(table.headline(one.rank)[f"NDCG@{table.k}"]).mean for one in ranked]
    return ranked[int(np.argmax(quality))] if ranked else None


def _llm_rows(
    table: Table, protocol: Protocol, model: Recommender, shown: Sequence[Ranked], stage: LLMStage, best: Ranked | None
) -> list[Row]:
    """Every system on the LLM's sample, the floor under the LLM, and what the LLM adds."""
    ranks = (
        f"the encoder's top {model.config.candidates}"
        if protocol.candidates is None
        else f"the {protocol.whole(model.log.n_items)}"
    )
    group = f"the same {len(table.user):,} of them (seed {protocol.seed}) for every system; the LLM ranks {ranks}"
    rows = table.rows(group, [*shown, *stage.ranked])
    rows.append(table.random_order(group, stage.choices, stage.fused.rank))
    fused, encoder = stage.fused, shown[0]
    adds = "what the LLM adds on them, paired difference"
    rows.append(table.difference(adds, f"llm+interest minus {encoder.system}", fused.rank, encoder.rank))
    if best is not None:
        other = next(one for one in shown if one.system == best.system)
        rows.append(table.difference(adds, f"llm+interest minus {best.system}", fused.rank, other.rank))
    return rows


def _costs(
    ranked: Sequence[Ranked], stage: LLMStage | None, encoder: Ranked, fit_seconds: dict[str, float]
) -> list[Cost]:
    out = [
        Cost(one.system, 1000 * one.seconds / max(1, len(one.rank)), 0.0, fit_seconds.get(one.system)) for one in ranked
    ]
    if stage is not None and stage.n_asked:
        # The encoder's seconds are of all, the LLM's of those it was asked of.
        seconds = 1000 * (stage.seconds / stage.n_asked + encoder.seconds / len(encoder.rank))
        tokens = None if stage.tokens is None else 1000 * stage.tokens / stage.n_asked
        out += [Cost(one.system, seconds, tokens, fit_seconds.get(one.system)) for one in stage.ranked]
    return out


def _beyond(
    split: Split, targets: Targets, ranked: Sequence[Ranked], vectors: NDArray[np.float32] | None
) -> list[dict[str, Any]]:
    """The numbers beyond accuracy, of every system's top k on the same targets."""
    items, counts = split.dataset.items, split.train_counts
    genres = beyond.genre_matrix(items, _GENRES)[0] if _GENRES in items.columns else None
    histories = [targets.history(i) for i in range(len(targets))]
    out = []
    for one in ranked:
        found = beyond.describe(one.top, train_counts=counts, histories=histories, vectors=vectors, genres=genres)
        out.append({"system": one.system, **found.to_dict()})
    return out


def _settings(split: Split, protocol: Protocol, model: Recommender | None) -> dict[str, Any]:
    settings = {**protocol.to_dict(), "split": split.spec, "data": split.dataset.content_hash}
    if model is None:
        return settings
    return settings | {
        "templates": model.templates.hash(),
        "model": model.fingerprint,
        "engine": model.engine_source,
        "config": model.config.model_dump(mode="json"),
        "fusion": model.fusion.to_dict(),
    }
