"""What a fit would cost, before it is spent: tokens counted, rates measured on a small sample here and now."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from penchant.catalog_trie import CatalogTrie
from penchant.data.split import Split
from penchant.interest.fit import inputs_of, training_behaviours
from penchant.interest.softmax import logits_held
from penchant.interest.train import batch_size, train_encoder, windows
from penchant.interest.vectors import default_layer, field_texts
from penchant.interest.words import read_events
from penchant.prompt import Templates
from penchant.rank import Ranker
from penchant.run_folder import FitConfig

if TYPE_CHECKING:
    from penchant.engine import Engine

_SAMPLE_ITEMS = 64
_SAMPLE_USERS = 4
_SAMPLE_STEPS = 8


@dataclass(frozen=True, slots=True)
class Cost:
    """One stage's size (tokens, or training targets) and its estimated seconds."""

    stage: str
    size: int
    unit: str
    seconds: float


@dataclass(frozen=True, slots=True)
class FitEstimate:
    """Stages in order, and peak memory in MiB: the model as loaded, one forward's work, vectors and training."""

    costs: list[Cost]
    memory_mib: dict[str, float]

    @property
    def seconds(self) -> float:
        return sum(cost.seconds for cost in self.costs)


def estimate_fit(
    split: Split, engine: Engine, config: FitConfig, templates: Templates, *, sizes: dict[str, int]
) -> FitEstimate:
    """Estimate ``Recommender.fit``; ``sizes`` are those of ``describe_model``. Runs the model for a few seconds."""
    rng = np.random.default_rng(config.seed)
    items, log = split.dataset.items, split.log
    texts = templates.item_texts(items.to_dict(as_series=False), log.item_ids).texts
    budget = min(config.prompt_tokens, engine.context_length)
    ranker = Ranker(
        engine,
        templates,
        texts,
        max_history=config.max_history,
        prompt_tokens=budget,
        question=config.question,
    )
    lengths = np.array([len(t) for t in ranker.tokens(range(len(texts)))])
    # An item is scored with the terminator behind it, and embedded without.
    end = len(engine.codec.encode_template(templates.headers["next_item"].terminator))
    bos = len(engine.codec.bos_ids)
    embedded = int((lengths - end + bos).sum())
    if config.fields:
        embedded = sum(_tokens(engine, set(column)) for column in field_texts(items, config.fields))

    some = rng.choice(len(texts), size=min(_SAMPLE_ITEMS, len(texts)), replace=False)
    layer = default_layer(engine.n_layers) if config.layer is None else config.layer
    engine.embed([texts[i] for i in some], layer=layer)  # the first forwards of a process are slower
    begun = time.perf_counter()
    engine.embed([texts[i] for i in some], layer=layer)
    embed_rate = (lengths - end + bos)[some].sum() / (time.perf_counter() - begun)

    valid = split.valid.sample(config.validation_users, config.seed)
    histories = [valid.history(i) for i in range(len(valid))]
    prompt_tokens = [ranker.prompt(h).n_tokens or 0 for h in histories]
    users = histories[:_SAMPLE_USERS]
    candidates = [rng.choice(len(texts), size=min(config.candidates, len(texts)), replace=False) for _ in users]
    begun = time.perf_counter()
    ranker.scores(users, candidates)
    behind = sum(CatalogTrie.build(ranker.tokens(c)).n_nodes for c in candidates)
    score_rate = (sum(prompt_tokens[: len(users)]) + behind) / (time.perf_counter() - begun)
    per_user = behind / max(1, len(users))

    width = sizes["hidden"] * max(1, len(config.fields))
    text = rng.standard_normal((len(texts), width)).astype(np.float32) if config.encoder.use_text else None
    training = _training(split, text, config, sizes["hidden"], rng)

    judged = round(sum(prompt_tokens) + per_user * len(histories))
    pool = min(len(texts), config.candidates * len(histories))
    prior = round(float(lengths.mean()) * pool)
    epochs, spoken = config.encoder.epochs, _tokens(engine, training.words)
    targets = training.targets * epochs
    costs = [
        Cost("embed items", embedded, "tokens", embedded / embed_rate),
        *([Cost("embed the users' words", spoken, "tokens", spoken / embed_rate)] if training.words else []),
        Cost(f"train encoder, at most {epochs} epochs", targets, "targets", targets / training.rate),
        Cost("LLM on validation users", judged, "tokens", judged / score_rate),
        Cost("LLM without history, at most", prior, "tokens", prior / score_rate),
    ]
    mib = 2**20
    memory = {
        "model weights": sizes["weights"] * (4 if engine.fingerprint.endswith(":float32") else 2) / mib,
        "one forward: logits and states": (256 * sizes["vocabulary"] * 8 + 4096 * sizes["hidden"] * 40) / mib,
        "item vectors": 2 * len(texts) * width * 4 / mib,
        "encoder training: logits and gradients": (2 * logits_held(len(texts)) + 6 * len(texts) * width) * 4 / mib,
        "neighbours": 16 * len(texts) * config.encoder.near / mib,  # as trained, and as a sparse matrix to search with
        "interactions": float(split.dataset.interactions.estimated_size("mb")) * 2,
    }
    return FitEstimate(costs, {name: round(value, 1) for name, value in memory.items()})


@dataclass(frozen=True, slots=True)
class _Training:
    """Targets of an epoch, how many a second were trained just now, and the users' words that would be embedded."""

    targets: int
    rate: float
    words: list[str]


def _training(
    split: Split, text: NDArray[np.float32] | None, config: FitConfig, hidden: int, rng: np.random.Generator
) -> _Training:
    """Train the encoder for a few steps; vectors of words are drawn."""
    said: list[str] = []

    def vectors_of(words: Sequence[str]) -> NDArray[np.float32]:
        said.extend(words)
        return rng.standard_normal((len(words), hidden)).astype(np.float32)

    columns, reading, words = read_events(split, config.encoder, vectors_of)
    inputs, n_items = inputs_of(columns, words), split.log.n_items
    rows = [w for s in training_behaviours(split, reading) for w in windows(s, config.encoder.max_length)]
    size = batch_size(rows, config.encoder)
    sample = min(_SAMPLE_STEPS * size, len(rows))
    few = [rows[i] for i in rng.choice(len(rows), size=sample, replace=False)]
    short = config.encoder.model_copy(update={"epochs": 1, "batch_rows": size})
    train_encoder(few[:size], n_items, text, short, lambda encoder: 0.0, inputs=inputs)
    begun = time.perf_counter()
    train_encoder(few, n_items, text, short, lambda encoder: 0.0, inputs=inputs)
    rate = sum(len(w) - 1 for w in few) / (time.perf_counter() - begun)
    return _Training(sum(len(w) - 1 for w in rows), rate, said)


def _tokens(engine: Engine, texts: Iterable[str]) -> int:
    """Tokens of these texts as they are embedded; an empty one is not."""
    return sum(len(engine.codec.encode(text)) + len(engine.codec.bos_ids) for text in texts if text)
