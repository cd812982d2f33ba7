"""The demo's minute of LoRA, with a tiny model: an adapter that is served, and made anew when it must be."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.conftest import toy_frames

from penchant.cli import demo
from penchant.data.dataset import Dataset
from penchant.data.split import leave_last_out


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
    demo._finetune(leave_last_out(Dataset.read(*toy_frames(seed=4))), tmp_path / "demo", fresh=False)
    assert made() != second, "other data"
