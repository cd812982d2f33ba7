"""The demo's minute of LoRA, with a tiny model: an adapter that is served, and made anew when it must be."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import toy_frames
from tests.fake_engine import FakeEngine

from penchant.cli import demo
from penchant.data.dataset import Dataset
from penchant.data.split import Split, leave_last_out
from penchant.errors import StorageError
from penchant.interest.config import EncoderConfig
from penchant.recommend import silent
from penchant.run_folder import FitConfig


@pytest.fixture(autouse=True)
def _accelerate() -> Iterator[None]:
    from tests.training.helpers import fresh_accelerate

    with fresh_accelerate():
        yield


@pytest.mark.filterwarnings("ignore:no validation", "ignore:nothing learnt")
def test_the_demos_fine_tune(monkeypatch: pytest.MonkeyPatch, byte_folder: Path, tmp_path: Path) -> None:
    from tests.training.helpers import losses_of, patched_clock

    from penchant.engine.loading import load_engine

    monkeypatch.setattr("penchant.engine.folders.fetch", lambda name: byte_folder)
    patched_clock(monkeypatch, "penchant.training.loop", 10)
    split = leave_last_out(Dataset.read(*toy_frames()))
    adapter = demo._finetune(split, tmp_path / "demo", fresh=False)
    assert adapter == tmp_path / "demo-adapter"
    outcome = json.loads((adapter / "penchant.json").read_text())["outcome"]
    losses = losses_of(adapter)
    assert outcome["steps"] == len(losses) <= 6, "the box holds six steps of ten seconds"
    load_engine("smollm2-135m", adapter, device="cpu")

    def made() -> int:
        return (adapter / "penchant.json").stat().st_mtime_ns

    first = made()
    demo._finetune(split, tmp_path / "demo", fresh=False)
    assert made() == first, "the same again is there already"
    demo._finetune(split, tmp_path / "demo", fresh=True)
    second = made()
    assert second != first
    other = leave_last_out(Dataset.read(*toy_frames(seed=4)))
    with pytest.raises(StorageError, match="other data than the demo's"):
        demo._finetune(other, tmp_path / "demo", fresh=False)
    assert made() == second
    demo._finetune(other, tmp_path / "demo", fresh=True)
    assert made() != second


def test_the_demos_run_is_opened_where_the_same_was_fitted(tmp_path: Path) -> None:
    engine: Any = FakeEngine()
    encoder = EncoderConfig(dim=8, blocks=1, max_length=8, epochs=1, batch_rows=8)  # neighbours as they come
    config = FitConfig(encoder=encoder, candidates=4, validation_users=3)
    split = leave_last_out(Dataset.read(*toy_frames()))

    def opened(config: FitConfig = config, *, split: Split = split, fresh: bool = False) -> bool:
        return demo._fit_or_load(split, engine, config, tmp_path / "run", fresh=fresh, stages=silent)[1]

    assert not opened()
    assert opened()
    assert not opened(fresh=True)
    assert opened()
    assert not opened(config.model_copy(update={"encoder": encoder.model_copy(update={"neighbours": 4})}))
    assert not opened()
    (tmp_path / "run" / demo.REPORT).write_text("{}")
    assert not opened(fresh=True), "what a demo wrote beside its run goes with it"
    other = leave_last_out(Dataset.read(*toy_frames(seed=4)))
    with pytest.raises(StorageError, match="other data than the demo's"):
        opened(split=other)
    assert not opened(split=other, fresh=True)
