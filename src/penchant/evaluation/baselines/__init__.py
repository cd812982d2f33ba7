"""Plain recommenders to stand beside ours, tuned as honestly: one file a baseline, ``fit_baselines`` for all."""

from penchant.evaluation.baselines.fit import DEAR, NAMES, Baselines, Name, fit_baselines
from penchant.evaluation.baselines.grids import Grids
from penchant.evaluation.baselines.popularity import popularities_that_flatter
from penchant.evaluation.baselines.tune import Budget, FittedSystem, Trial, Validation, trial_rows

__all__ = [
    "DEAR",
    "NAMES",
    "Baselines",
    "Budget",
    "FittedSystem",
    "Grids",
    "Name",
    "Trial",
    "Validation",
    "fit_baselines",
    "popularities_that_flatter",
    "trial_rows",
]
