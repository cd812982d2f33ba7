"""Our own parts as systems to be ranked, and the two plainest baselines that stand beside them in every table."""

from __future__ import annotations

import dataclasses

import numpy as np

from penchant.evaluation.baselines.nearest import NearestConfig, fit_nearest
from penchant.evaluation.baselines.popularity import Popularity
from penchant.evaluation.baselines.sasrec import SASRec
from penchant.evaluation.systems import System
from penchant.interest.vectors import standardise
from penchant.recommend import Recommender

ENCODER, POPULARITY = "encoder", "popularity"
LAST = "last item (LLM vectors)"


def own_systems(model: Recommender) -> list[System]:
    """The model's encoder, popularity from training, and the newest item's nearest by LLM vectors.

    Where a history is empty all three give popularity.
    """
    counts = model.split.train_counts.astype(np.float32)
    nearest = fit_nearest(standardise(model.vectors[: len(counts)]), counts, NearestConfig(last=1))
    return [
        SASRec(model.encoder, model.index.vectors[: len(counts)], counts, ENCODER, model.reading),
        Popularity(counts, POPULARITY),
        dataclasses.replace(nearest, name=LAST),
    ]
