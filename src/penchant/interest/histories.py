"""A history as text, and its vector by the LLM alone: retrieval without an encoder, for a model trained to it.

The `contrastive` recipe trains a model so that the vector of a rendered history is near the next item's. What it
is near to are the items' vectors scaled to length 1 (``unit``), not the standardised ones that the encoder takes:

    index = ExactIndex(unit(item_vectors(engine, texts, layer=layer, pooling=pooling)))
    vectors = history_vectors(engine, templates, texts, histories, layer=layer, pooling=pooling)
    items, cosines = index.search(vectors, k, exclude=histories)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from penchant.errors import DataError
from penchant.prompt import Rendered, Templates
from penchant.tokens import TextCodec

if TYPE_CHECKING:
    from penchant.engine import Engine, Pooling, Progress


def history_prompt(
    templates: Templates,
    codec: TextCodec,
    texts: Sequence[str],
    items: Sequence[int] | NDArray[np.integer],
    *,
    max_history: int,
    prompt_tokens: int,
) -> Rendered:
    """The `user` template over the newest of ``items`` (oldest first) that fit, at most ``max_history`` of them.

    ``texts`` has one entry an item of the catalogue. DataError where not one event is left: that is nobody's history.
    """
    history = [{"text": texts[int(i)]} for i in items[-max_history:]]
    rendered = templates.render(
        "user", {"history": history}, count=lambda prompt: len(codec.encode(prompt)), budget=prompt_tokens
    )
    if rendered.dropped == len(history):
        raise DataError(
            "a history without an event has no vector" if not history else "not one event of a history fits its prompt",
            where="history",
            remedy="give histories of at least one event, and raise prompt_tokens where a title is long",
        )
    return rendered


def history_vectors(
    engine: Engine,
    templates: Templates,
    texts: Sequence[str],
    histories: Sequence[NDArray[np.integer]],
    *,
    layer: int,
    pooling: Pooling = "mean",
    max_history: int = 20,
    prompt_tokens: int = 768,
    progress: Progress | None = None,
) -> NDArray[np.float32]:
    """The LLM's vector of each history (item indices, oldest first), of length 1: (n, d) float32."""
    budget = min(prompt_tokens, engine.context_length)
    prompts = [
        history_prompt(templates, engine.codec, texts, items, max_history=max_history, prompt_tokens=budget).prompt
        for items in histories
    ]
    return unit(engine.embed(prompts, pooling=pooling, layer=layer, progress=progress))


def unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Each row of (n, d) scaled to length 1, so that dot products are cosines."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(length, 1e-12), dtype=np.float32)
