"""The vLLM engine around its runner: what it asks in which order, and for which adapter; a stub answers for vLLM, which is
run for real in tests/contract."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests import tiny
from tests.engine.blocks import Blocks

from penchant.engine import vllm as module
from penchant.engine.asking import Answer, Ask
from penchant.engine.folders import fingerprint_of
from penchant.engine.loading import load_engine
from penchant.engine.vllm_runner import Lora


class StubRunner:
    """Answers from blocks, one set an adapter's name; like vLLM it reads an adapter once for its number."""

    def __init__(self, *given: Any) -> None:
        self.given = given
        self.max_model_len = 512
        self.closed = False
        self.asked: list[Ask] = []
        self.weights: dict[int, bytes] = {}
        self.blocks: dict[str, Blocks] = {}

    def ask(self, asks: Sequence[Ask], lora: Lora | None = None) -> list[Answer]:
        self.asked += asks
        if lora is None:
            name, shift = "", 0.0
        else:
            name = lora.name
            read = self.weights.setdefault(lora.number, (lora.folder / "adapter_model.safetensors").read_bytes())
            shift = sum(read) % 97 / 97 + 0.1
        answers = [self.blocks.setdefault(name, Blocks(8)).answer(ask) for ask in asks]
        return [Answer([v - shift for v in a.tokens], [v - shift for v in a.path]) for a in answers]


@pytest.fixture
def _stub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "Runner", StubRunner)


def stubbed(folder: Path, **options: Any) -> Any:
    return load_engine(folder, dtype="float32", backend="vllm", options=options)


def test_an_adapter_trained_again_in_its_folder_is_another_one(_stub: None, byte_folder: Path, tmp_path: Path) -> None:
    """And a view of the old one goes on serving the old, which it says it is."""
    engine = stubbed(byte_folder, max_lora_rank=8)
    adapter = tiny.save_adapter(byte_folder, tmp_path / "a", seed=1)
    old = engine.with_adapter(adapter)
    said = old.score(["Heat"], [["Up", "M"]])[0]
    again = engine.with_adapter(adapter)
    np.testing.assert_array_equal(again.score(["Heat"], [["Up", "M"]])[0], said)
    shutil.rmtree(adapter)
    tiny.save_adapter(byte_folder, adapter, seed=2)
    new = engine.with_adapter(adapter)
    assert new.fingerprint == f"{fingerprint_of(byte_folder)}+{fingerprint_of(adapter)}:float32"
    assert old.fingerprint == again.fingerprint != new.fingerprint
    assert np.abs(new.score(["Heat"], [["Up", "M"]])[0] - said).max() > 0.01
    engine._runners.generating().weights.clear()  # as where the old adapter was dropped for others
    np.testing.assert_array_equal(old.score(["Heat"], [["Up", "M"]])[0], said)
    loras = [view._lora for view in (old, again, new)]
    assert loras[0] == loras[1]
    assert all(getattr(loras[0], part) != getattr(loras[2], part) for part in ("name", "number", "folder"))
