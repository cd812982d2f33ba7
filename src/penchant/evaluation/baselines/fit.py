"""One call that fits all baselines, each tuned on validation within a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args, overload

import numpy as np
from numpy.typing import NDArray

from penchant.data.split import Split
from penchant.errors import ConfigError
from penchant.evaluation.baselines.bm25 import fit_bm25
from penchant.evaluation.baselines.ease import check_size, fit_ease
from penchant.evaluation.baselines.events import TrainingEvents
from penchant.evaluation.baselines.extras import needed
from penchant.evaluation.baselines.factors import fit_als, fit_bpr
from penchant.evaluation.baselines.grids import GRIDS, Grids
from penchant.evaluation.baselines.item_knn import fit_item_knn
from penchant.evaluation.baselines.llm import ZeroShotLLM, zero_shot_likelihoods
from penchant.evaluation.baselines.mult_vae import fit_mult_vae
from penchant.evaluation.baselines.nearest import fit_nearest
from penchant.evaluation.baselines.neighbours import fit_neighbours
from penchant.evaluation.baselines.popularity import PopularityConfig, fit_popularity
from penchant.evaluation.baselines.recent import fit_recent
from penchant.evaluation.baselines.sasrec import fit_sasrec
from penchant.evaluation.baselines.tune import ASKED, Budget, Config, FittedSystem, Validation, tune
from penchant.evaluation.ranking import Seen
from penchant.evaluation.systems import System
from penchant.prompt import Templates
from penchant.recommend import Stages, silent

if TYPE_CHECKING:
    from penchant.engine import Engine

Name = Literal[
    "popularity", "recent", "bm25", "nearest", "item_knn", "neighbours", "ease", "als", "bpr", "mult_vae",
    "sasrec", "llm",
]  # fmt: skip
NAMES: tuple[Name, ...] = get_args(Name)
# What is validated epoch by epoch or asks an LLM. All others are fitted in one go, and try their whole grid.
DEAR: frozenset[Name] = frozenset({"mult_vae", "sasrec", "llm"})


@dataclass(frozen=True, eq=False)
class Baselines(Sequence[FittedSystem]):
    """The fitted systems in the order of ``NAMES``, and ``notes`` that say which were left out and why."""

    fitted: tuple[FittedSystem, ...]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.fitted)

    @overload
    def __getitem__(self, index: int) -> FittedSystem: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[FittedSystem]: ...
    def __getitem__(self, index: int | slice) -> FittedSystem | Sequence[FittedSystem]:
        return self.fitted[index]

    def __iter__(self) -> Iterator[FittedSystem]:
        return iter(self.fitted)


def fit_baselines(
    split: Split,
    *,
    which: Sequence[Name] | None = None,
    texts: Sequence[str] | None = None,
    vectors: NDArray[np.float32] | None = None,
    engine: Engine | None = None,
    templates: Templates | None = None,
    retriever: System | None = None,
    seed: int = 0,
    budget: Budget | None = None,
    seen: Seen = "mask",
    seen_last: int | None = None,
    llm_targets: int = 200,
    grids: Grids = GRIDS,
    stages: Stages = silent,
) -> Baselines:
    """Fit baselines on ``split.train``, each tuned on validation within ``budget``; the test is never looked at.

    Of the cheap ones (all but Mult-VAE, SASRec and the LLM) the seconds alone are the limit, not the number of
    configurations, unless there is to be no tuning (a budget of one).
    ``which`` names them; None makes all that can be made with what is given and installed, and notes the others.
    ``texts`` (n_items) are item texts (bm25, llm), ``vectors`` (n_items, d) standardised item vectors (nearest),
    ``engine`` an untuned LLM (llm), which ranks the candidates of ``retriever``, by default of the baseline that
    validation likes best, and is itself judged on ``llm_targets`` validation targets only. ``grids`` holds the
    configurations to try. ``seen`` and ``seen_last`` are those of ``rank_targets``. Nothing is refitted with the
    validation events; the histories of test queries hold them.

    The same seed gives the same systems on the same machine, as long as the seconds do not cut tuning short.
    Raises ConfigError for a baseline asked for by name that lacks its input or the extra it needs.
    """
    budget = budget or Budget()
    given = {"texts": texts is not None, "vectors": vectors is not None, "engine": engine is not None}
    wanted, notes = _wanted(which, given, split.log.n_items)
    if "llm" in wanted and retriever is None and len(wanted) == 1:
        raise ConfigError(
            "the LLM ranks what another system retrieves, and there is none",
            where="baseline llm",
            remedy="give a retriever, or fit another baseline with it",
        )
    events = TrainingEvents.of(split)
    valid = Validation.of(split, seed=seed, seen=seen, seen_last=seen_last)
    counts = events.counts
    fitted: list[FittedSystem] = []

    def tuned(
        name: Name,
        configs: Sequence[Config],
        fit: Callable[[Config, float], System],
        serve: Callable[[Any, Config], System] | None = None,
    ) -> None:
        if name in wanted:
            some = valid.sample(llm_targets, seed) if name == "llm" else valid
            paid = budget if name in DEAR else budget.whole(len(configs))
            done = stages(f"tune {name}", min(paid.trials, len(configs)))
            fitted.append(tune(name, configs, fit, some, paid, serve=serve, seed=seed, done=done))

    tuned("popularity", [PopularityConfig()], lambda config, left: fit_popularity(events))
    tuned("recent", grids.recent, lambda config, left: fit_recent(events, config))
    if texts is not None:
        tuned("bm25", grids.bm25, lambda config, left: fit_bm25(texts, counts, config), _asked_otherwise)
    if vectors is not None:
        tuned("nearest", grids.nearest, lambda config, left: fit_nearest(vectors, counts, config), _asked_otherwise)
    tuned("item_knn", grids.item_knn, lambda config, left: fit_item_knn(events, config), _asked_otherwise)
    tuned("neighbours", grids.neighbours, lambda config, left: fit_neighbours(events, config))
    tuned("ease", grids.ease, lambda config, left: fit_ease(events, config), _asked_otherwise)
    tuned("als", grids.als, lambda config, left: fit_als(events, config, seed), _asked_otherwise)
    tuned("bpr", grids.bpr, lambda config, left: fit_bpr(events, config, seed))
    vaes = [config.model_copy(update={"seed": seed}) for config in grids.mult_vae]
    tuned("mult_vae", vaes, lambda config, left: fit_mult_vae(events, config, valid.ndcg, left))
    encoders = [config.model_copy(update={"seed": seed}) for config in grids.sasrec]
    tuned("sasrec", encoders, lambda config, left: fit_sasrec(events, config, valid.ndcg, left))
    if texts is not None and engine is not None and "llm" in wanted:
        first = retriever or max(fitted, key=lambda f: f.chosen.valid_ndcg).system
        likelihoods = zero_shot_likelihoods(engine, templates or Templates(None), texts)
        tuned(
            "llm",
            grids.llm,
            lambda config, left: ZeroShotLLM(likelihoods(config), first, config, counts, seen, seen_last),
        )
    return Baselines(tuple(fitted), tuple(notes))


def _asked_otherwise(system: Any, config: Any) -> Any:
    """The system as fitted, but asked with another number of newest items, or another decay of them."""
    return replace(system, **{name: getattr(config, name) for name in ASKED if name in type(config).model_fields})


# What must be given, and which modules of the extra `eval` must be installed, for the baselines that need any.
_INPUTS: dict[Name, tuple[str, ...]] = {"bm25": ("texts",), "nearest": ("vectors",), "llm": ("texts", "engine")}
_MODULES: dict[Name, tuple[str, ...]] = {
    "bm25": ("bm25s",),
    "als": ("implicit", "threadpoolctl"),
    "bpr": ("implicit", "threadpoolctl"),
}


def _wanted(which: Sequence[Name] | None, given: Mapping[str, bool], n_items: int) -> tuple[list[Name], list[str]]:
    """The baselines to fit in the order of ``NAMES``, and a note for each that had to be left out."""
    if which is None:
        wanted: list[Name] = []
        notes = []
        for name in NAMES:
            try:
                _check_can(name, given, n_items)
            except ConfigError as error:
                notes.append(f"the baseline {name} was left out: {error.what}")
            else:
                wanted.append(name)
        return wanted, notes
    unknown = sorted(set(which) - set(NAMES))
    if unknown or not which:
        raise ConfigError(
            f"unknown baseline {unknown[0]!r}" if unknown else "no baseline is named",
            where="fit_baselines",
            remedy=f"use some of {', '.join(NAMES)}",
        )
    for name in which:
        _check_can(name, given, n_items)
    return [name for name in NAMES if name in which], []


def _check_can(name: Name, given: Mapping[str, bool], n_items: int) -> None:
    """ConfigError that says why this baseline cannot be fitted here."""
    lacking = [what for what in _INPUTS.get(name, ()) if not given[what]]
    if lacking:
        raise ConfigError(
            f"it needs {' and '.join(lacking)}, which are not given",
            where=f"baseline {name}",
            remedy="pass them to fit_baselines",
        )
    for module in _MODULES.get(name, ()):
        needed(module, name)
    if name == "ease":
        check_size(n_items)
