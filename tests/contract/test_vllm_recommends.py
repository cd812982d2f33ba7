"""End to end: a Recommender served, and fitted, by vLLM recommends what it does with transformers."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from tests import tiny
from tests.conftest import toy_frames

from penchant.batch import run
from penchant.data.dataset import Dataset
from penchant.data.split import leave_last_out
from penchant.engine.loading import load_engine
from penchant.errors import ConfigError
from penchant.fusion import Fusion
from penchant.interest.config import EncoderConfig
from penchant.recommend import Recommender
from penchant.run_folder import FitConfig

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM has an environment of its own: make test-vllm")

OPTIONS = {"kv_cache_gib": 0.25, "prefix_caching": True}
USERS = [f"u{i}" for i in range(12)]


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PENCHANT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("model"), "byte", head=32, spread=0.2)


@pytest.fixture(scope="module")
def vllm(folder: Path) -> Iterator[Any]:
    engine = load_engine(folder, dtype="float32", backend="vllm", options=OPTIONS)
    yield engine
    engine.close()


def fitted(engine: Any, **config: Any) -> Recommender:
    encoder = EncoderConfig(dim=16, blocks=1, heads=2, max_length=12, epochs=3, batch_rows=8)
    settings = FitConfig(encoder=encoder, candidates=6, validation_users=8, **config)
    return Recommender.fit(leave_last_out(Dataset.read(*toy_frames())), engine, settings)


def same(mine: pl.DataFrame, theirs: pl.DataFrame) -> None:
    assert mine.drop("score").equals(theirs.drop("score"))
    np.testing.assert_allclose(mine["score"], theirs["score"], atol=1e-3)


@pytest.mark.parametrize("question", ["likelihood", "choose"])
def test_a_run_fitted_with_transformers_is_served_by_vllm(
    folder: Path, vllm: Any, tmp_path: Path, question: Any
) -> None:
    model = fitted(load_engine(folder, dtype="float32", device="cpu"), question=question)
    model.fusion = Fusion(0.7, 0.5 if question == "likelihood" else 0.0)  # else so small a model may weigh nothing
    model.save(tmp_path / "run")
    served = Recommender.load(tmp_path / "run", engine=vllm)
    served.fusion = model.fusion
    same(served.recommend(USERS, k=5), model.recommend(USERS, k=5))
    if question == "likelihood":
        for calibration in (0.0, 0.5):
            same(
                served.recommend(USERS, k=5, method="generate", calibration=calibration),
                model.recommend(USERS, k=5, method="generate", calibration=calibration),
            )


def test_a_run_fitted_at_another_layer_is_served_with_an_engine_beside_that_embeds(
    folder: Path, vllm: Any, tmp_path: Path
) -> None:
    plain = load_engine(folder, dtype="float32", device="cpu")
    model = fitted(plain)
    assert model.config.layer == 1
    model.save(tmp_path / "run")
    model.save(tmp_path / "its own, for its updates")
    with pytest.raises(ConfigError, match=r"(?s)vLLM gives the last one only.*embedder="):
        Recommender.load(tmp_path / "run", engine=vllm).recommend(text="a comedy")
    served = Recommender.load(tmp_path / "run", engine=vllm, embedder=plain)
    for one in (model, served):
        one.add_items([{"item_id": "new", "title": "Up Again (2030)", "genres": "Comedy", "year": "2030"}])
    same(served.recommend(text="a comedy", k=5), model.recommend(text="a comedy", k=5))
    same(served.recommend(USERS, k=5), model.recommend(USERS, k=5))


def test_fitted_with_vllm_it_recommends_the_same_and_is_loaded_with_its_options(
    folder: Path, vllm: Any, tmp_path: Path
) -> None:
    """Each with a cache of its own: vectors that one engine has made serve the other too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PENCHANT_CACHE", str(tmp_path / "one"))
        for config in ({}, {"layer": 1}):
            with pytest.raises(ConfigError, match=r"(?s)layer 1 asked .* the last one only.*layer: -1"):
                fitted(vllm, **config)
        mine = fitted(vllm, layer=2)
    assert vllm.source == {
        "model": str(folder), "adapter": None, "dtype": "float32", "device": "auto", "backend": "vllm",
        "options": {"kv_cache_gib": 0.25},
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PENCHANT_CACHE", str(tmp_path / "other"))
        theirs = fitted(load_engine(folder, dtype="float32", device="cpu"), layer=2)
    np.testing.assert_allclose(mine.vectors, theirs.vectors, atol=1e-3)
    assert mine.fusion.weight == theirs.fusion.weight
    same(mine.recommend(USERS, k=5), theirs.recommend(USERS, k=5))
    mine.save(tmp_path / "run")
    again = Recommender.load(tmp_path / "run")
    assert again.engine_source == vllm.source
    same(again.recommend(USERS, k=5), mine.recommend(USERS, k=5))  # by an engine of its own, as its source says
    assert again.engine.fingerprint == vllm.fingerprint
    again.engine.close()  # type: ignore[attr-defined]


def test_a_batch_of_a_run_fitted_with_transformers_is_made_by_vllm(folder: Path, vllm: Any, tmp_path: Path) -> None:
    """A job loads it by the run's own source, with vLLM's default options; another backend is another job."""
    model = fitted(load_engine(folder, dtype="float32", device="cpu"))
    model.fusion = Fusion(0.7, 0.5)
    model.save(tmp_path / "run")
    pl.DataFrame({"user_id": USERS}).write_parquet(tmp_path / "users.parquet")
    users = tmp_path / "users.parquet"
    found = []
    for backend in ("transformers", "vllm"):
        summary = run(tmp_path / "run", tmp_path / backend, users, backend=backend, k=5)
        assert summary["tokens_run"] > 0
        found.append(pl.read_parquet(tmp_path / backend / "latest" / "parts" / "*.parquet"))
    numbers = ["score", "interest", "llm", "fused"]
    assert found[0].drop(numbers).equals(found[1].drop(numbers))
    np.testing.assert_allclose(found[0]["llm"], found[1]["llm"], atol=1e-3)
    again = run(tmp_path / "run", tmp_path / "transformers", users, backend="vllm", k=5)
    assert again["run"].endswith("run-0002")
