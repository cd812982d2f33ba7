"""What a fit would cost, before it is spent: tokens counted, rates measured on a small sample here and now."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from penchant.catalog_trie import CatalogTrie
from penchant.data.split import Split
from penchant.interest.fit import training_sequences
from penchant.interest.softmax import logits_held
from penchant.interest.train import batch_size, train_encoder, windows
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
    embedded = lengths - end + len(engine.codec.bos_ids)

    some = rng.choice(len(texts), size=min(_SAMPLE_ITEMS, len(texts)), replace=False)
    engine.embed([texts[i] for i in some])  # the first forwards of a process are slower
    begun = time.perf_counter()
    engine.embed([texts[i] for i in some])
    embed_rate = embedded[some].sum() / (time.perf_counter() - begun)

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

    sequences = training_sequences(split)
    rows = [w for s in sequences for w in windows(s, config.encoder.max_length)]
    targets = sum(len(w) - 1 for w in rows)
    size = batch_size(rows, config.encoder)
    sample = min(_SAMPLE_STEPS * size, len(rows))
    few = [rows[i] for i in rng.choice(len(rows), size=sample, replace=False)]
    width = sizes["hidden"]
    text = rng.standard_normal((len(texts), width)).astype(np.float32) if config.encoder.use_text else None
    short = config.encoder.model_copy(update={"epochs": 1, "batch_rows": size})
    train_encoder(few[:size], len(texts), text, short, lambda encoder: 0.0)
    begun = time.perf_counter()
    train_encoder(few, len(texts), text, short, lambda encoder: 0.0)
    train_rate = sum(len(w) - 1 for w in few) / (time.perf_counter() - begun)

    judged = round(sum(prompt_tokens) + per_user * len(histories))
    pool = min(len(texts), config.candidates * len(histories))
    prior = round(float(lengths.mean()) * pool)
    epochs = config.encoder.epochs
    costs = [
        Cost("embed items", int(embedded.sum()), "tokens", float(embedded.sum() / embed_rate)),
        Cost(f"train encoder, at most {epochs} epochs", targets * epochs, "targets", targets * epochs / train_rate),
        Cost("LLM on validation users", judged, "tokens", judged / score_rate),
        Cost("LLM without history, at most", prior, "tokens", prior / score_rate),
    ]
    mib = 2**20
    memory = {
        "model weights": sizes["bytes"] / mib,
        "one forward: logits and states": (256 * sizes["vocabulary"] * 8 + 4096 * sizes["hidden"] * 40) / mib,
        "item vectors": 2 * len(texts) * width * 4 / mib,
        "encoder training: logits and gradients": (3 * logits_held(len(texts)) + 6 * len(texts) * width) * 4 / mib,
        "interactions": float(split.dataset.interactions.estimated_size("mb")) * 2,
    }
    return FitEstimate(costs, {name: round(value, 1) for name, value in memory.items()})
