"""Vectors from the LLM: each text embedded once, cached by all that decides the result, and made comparable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import polars as pl
from numpy.typing import NDArray

from penchant.cached import cached_array
from penchant.errors import ConfigError, DataError
from penchant.schema import ITEM

if TYPE_CHECKING:
    from penchant.engine import Engine, Pooling, Progress

Scale = Literal["standardise", "whiten"]
# Directions of less than this share of the mean variance are noise: whitening would blow them up.
_LEAST = 1e-3


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


def field_vectors(
    engine: Engine,
    items: pl.DataFrame,
    fields: Sequence[str],
    *,
    layer: int,
    pooling: Pooling = "mean",
    progress: Progress | None = None,
) -> NDArray[np.float32]:
    """The vectors of several text columns side by side, (n_items, len(fields) * d) float32, NaN where a text is empty.

    ConfigError for a column that is not there, DataError for an item that has none of the texts.
    """
    texts = field_texts(items, fields)
    empty = [row for row in range(len(items)) if not any(column[row] for column in texts)]
    if empty:
        raise DataError(
            f"item {items[ITEM][empty[0]]!r} ({len(empty):,} in all) has no text in {', '.join(fields)}",
            where="items",
            remedy="name a field that every item has, such as title",
        )
    parts = []
    for column in texts:
        known = [row for row, text in enumerate(column) if text]
        distinct = list(dict.fromkeys(column[row] for row in known))
        found = item_vectors(engine, distinct or [" "], layer=layer, pooling=pooling, progress=progress)
        part = np.full((len(items), found.shape[1]), np.nan, dtype=np.float32)
        place = {text: i for i, text in enumerate(distinct)}
        if known:
            part[known] = found[[place[column[row]] for row in known]]
        parts.append(part)
    return np.concatenate(parts, axis=1)


def field_texts(items: pl.DataFrame, fields: Sequence[str]) -> list[list[str]]:
    """The items' texts in each of these columns, "" where there is none; ConfigError for a column that is not there."""
    missing = [name for name in fields if name not in items.columns]
    if missing:
        raise ConfigError(
            f"the items have no column {missing[0]!r}", where="fields", remedy=f"use some of {', '.join(items.columns)}"
        )
    return [[(text or "").strip() for text in items[name].cast(pl.String).to_list()] for name in fields]


class Embedding(Protocol):
    """Which of the LLM's vectors an item has: a part of FitConfig."""

    @property
    def fields(self) -> tuple[str, ...]: ...
    @property
    def layer(self) -> int | None: ...
    @property
    def pooling(self) -> Pooling: ...


def embed_items(
    engine: Engine,
    items: pl.DataFrame,
    texts: Sequence[str],
    config: Embedding,
    template_hash: str,
    progress: Progress | None = None,
) -> NDArray[np.float32]:
    """The LLM's vectors of items as the configuration asks for them, unscaled: of their rendered ``texts``, or of each
    of its ``fields`` side by side. (n_items, d) float32, NaN where a field is empty.
    """
    layer = default_layer(engine.n_layers) if config.layer is None else config.layer
    if config.fields:
        return field_vectors(engine, items, config.fields, layer=layer, pooling=config.pooling, progress=progress)
    return item_vectors(
        engine, texts, layer=layer, pooling=config.pooling, template_hash=template_hash, progress=progress
    )


@dataclass(frozen=True, eq=False)
class Scaling:
    """How vectors are made comparable, learnt from a catalogue: (vector - mean) @ map, or * map where it is (d,)."""

    mean: NDArray[np.float32]
    map: NDArray[np.float32]

    @classmethod
    def fit(cls, vectors: NDArray[np.float32], kind: Scale = "standardise") -> Scaling:
        """From vectors (n, d), NaN left out. standardise: each dimension to deviation 1. whiten: uncorrelated too
        (Su et al. 2021, "Whitening Sentence Representations").

        A few dimensions of a causal LM's states are larger by orders of magnitude than all others and would decide
        every dot product. What these vectors do not vary in says nothing of them, and must not decide what is like a
        vector that comes later: it is left out.
        """
        empty = np.isnan(vectors).all(axis=0)
        if empty.any():  # a field that nobody has
            vectors = np.where(empty, np.float32(0), vectors)
        mean: NDArray[np.float64] = np.nanmean(vectors, axis=0, dtype=np.float64)
        if kind == "standardise":
            deviation = np.nanstd(vectors, axis=0, dtype=np.float64)
            scale = np.where(deviation > 1e-6, 1 / np.maximum(deviation, 1e-6), 0.0)
            return cls(mean.astype(np.float32), scale.astype(np.float32))
        centred = np.nan_to_num(vectors - mean)
        variance, axes = np.linalg.eigh(centred.T @ centred / max(1, len(vectors) - 1))
        told = variance > _LEAST * max(variance.mean(), 1e-12)
        scale = np.where(told, 1 / np.sqrt(np.where(told, variance, 1.0)), 0.0)
        # An axis has no sign: without one of ours another processor's would give another run.
        axes *= np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])
        return cls(mean.astype(np.float32), (axes * scale).astype(np.float32))

    def apply(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """(n, d) scaled; what is NaN (no text) becomes 0, the mean."""
        centred = np.nan_to_num(vectors - self.mean)
        return np.asarray(centred * self.map if self.map.ndim == 1 else centred @ self.map, dtype=np.float32)


def standardise(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Each dimension to mean 0 and deviation 1 over the catalogue."""
    return Scaling.fit(vectors).apply(vectors)
