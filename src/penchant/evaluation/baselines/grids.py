"""The configurations each baseline is tuned over, the likeliest first: a budget may end before the last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from penchant.evaluation.baselines.bm25 import BM25Config
from penchant.evaluation.baselines.ease import EASEConfig
from penchant.evaluation.baselines.factors import ALSConfig, BPRConfig
from penchant.evaluation.baselines.item_knn import ItemKNNConfig
from penchant.evaluation.baselines.llm import ZeroShotConfig
from penchant.evaluation.baselines.mult_vae import MultVAESystemConfig
from penchant.evaluation.baselines.nearest import NearestConfig
from penchant.evaluation.baselines.neighbours import NeighboursConfig
from penchant.evaluation.baselines.recent import RecentConfig
from penchant.evaluation.baselines.tune import grid
from penchant.interest.config import EncoderConfig

_SASREC = EncoderConfig(use_text=False, neighbours=0, dropout=0.5, max_length=50, learning_rate=5e-3, epochs=60)


@dataclass(frozen=True)
class Grids:
    """One sequence of configurations a baseline; popularity has nothing to choose.

    ItemKNN, EASE, ALS and Mult-VAE are known for whole histories, which is a weak way to serve the next item: shown
    only the newest few (``last``) they do far better, on MovieLens-100K nearly twice as well; so do the first two
    where older items weigh less (``decay``). So that is tuned too.
    """

    recent: Sequence[RecentConfig] = tuple(
        grid(RecentConfig(), half_life_days=(1.0, 3.0, 7.0, 14.0, 30.0, 90.0, 365.0, None))
    )
    bm25: Sequence[BM25Config] = tuple(grid(BM25Config(), b=(0.75, 0.3), last=(1, 3, 10, None)))
    nearest: Sequence[NearestConfig] = tuple(grid(NearestConfig(), last=(1, 2, 3, 5, 10, 20, 50, None)))
    item_knn: Sequence[ItemKNNConfig] = tuple(
        grid(ItemKNNConfig(last=3), shrinkage=(10.0, 0.0), last=(3, 1, 10, None), decay=(1.0, 0.8, 0.6))
    )
    neighbours: Sequence[NeighboursConfig] = tuple(grid(NeighboursConfig(), size=(100, 50, 200, 400)))
    ease: Sequence[EASEConfig] = tuple(
        grid(EASEConfig(last=3), ridge=(500.0, 100.0, 2000.0), last=(3, 10, None), decay=(1.0, 0.8, 0.6))
    )
    als: Sequence[ALSConfig] = tuple(grid(ALSConfig(last=5), alpha=(10.0, 40.0), factors=(128, 64), last=(5, None)))
    bpr: Sequence[BPRConfig] = tuple(
        grid(BPRConfig(), learning_rate=(0.05, 0.02), regularization=(0.03, 0.01), factors=(64, 16))
    )
    mult_vae: Sequence[MultVAESystemConfig] = tuple(
        grid(MultVAESystemConfig(last=10), last=(10, None), beta=(0.2, 0.1), dropout=(0.5, 0.7))
    )
    sasrec: Sequence[EncoderConfig] = tuple(
        grid(_SASREC, dropout=(0.5, 0.3), max_length=(50, 100), learning_rate=(5e-3, 2e-3))
    )
    llm: Sequence[ZeroShotConfig] = tuple(grid(ZeroShotConfig(), calibration=(1.0, 0.5, 0.0)))


GRIDS = Grids()
