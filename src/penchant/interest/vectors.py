"""Item vectors from the LLM: each item's text embedded once, and cached by all that decides the result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from penchant.cached import cached_array

if TYPE_CHECKING:
    from penchant.engine import Engine, Pooling, Progress


def default_layer(n_layers: int) -> int:
    """Two thirds of the way up: the last layers turn towards the next token, away from what the text means.

    (Layer 20 of SmolLM2's 30; see also Skean et al. 2025, "Layer by Layer".)
    """
    return round(n_layers * 2 / 3)


def item_vectors(
    engine: Engine,
    texts: Sequence[str],
    *,
    layer: int,
    pooling: Pooling = "mean",
    template_hash: str = "",
    progress: Progress | None = None,
) -> NDArray[np.float32]:
    """One vector an item text, (n_items, d) float32, computed once for this model, adapter and these texts."""
    key = (engine.fingerprint, template_hash, pooling, str(layer), *texts)
    return cached_array(
        "vectors", key, lambda: engine.embed(list(texts), pooling=pooling, layer=layer, progress=progress)
    )


def standardise(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Each dimension to mean 0 and deviation 1 over the catalogue.

    A few dimensions of a causal LM's states are larger by orders of magnitude than all others and would
    decide every dot product.
    """
    centred = vectors - vectors.mean(axis=0)
    return np.asarray(centred / np.maximum(vectors.std(axis=0), 1e-6), dtype=np.float32)
