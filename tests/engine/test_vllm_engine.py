"""The vLLM engine around its runner: what it asks, in which order, for which adapter. A stub answers for vLLM, which is
run for real in tests/contract."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests import tiny
from tests.engine.blocks import Blocks

from penchant.catalog_trie import CatalogTrie
from penchant.engine import vllm as module
from penchant.engine.asking import Answer, Ask
from penchant.engine.folders import fingerprint_of
from penchant.engine.loading import load_engine
from penchant.engine.vllm_runner import Lora
from penchant.errors import ConfigError, NotFiniteError


class StubRunner:
    """Answers from blocks, one set an adapter's name; like vLLM it reads an adapter once for its number."""

    def __init__(self, *given: Any) -> None:
        self.given = given
        self.max_model_len = 512
        self.closed = False
        self.calls: list[list[Ask]] = []
        self.weights: dict[int, bytes] = {}
        self.blocks: dict[str, Blocks] = {}
        self.off = 0.0  # nats by which what it says of prompt tokens is wrong

    @property
    def asked(self) -> list[Ask]:
        return [ask for call in self.calls for ask in call]

    def ask(self, asks: Sequence[Ask], lora: Lora | None = None) -> list[Answer]:
        self.calls.append(list(asks))
        if lora is None:
            name, shift = "", 0.0
        else:
            name = lora.name
            read = self.weights.setdefault(lora.number, (lora.folder / "adapter_model.safetensors").read_bytes())
            shift = sum(read) % 97 / 97 + 0.1
        answers = [self.blocks.setdefault(name, Blocks(8)).answer(ask) for ask in asks]
        return [Answer([v - shift for v in a.tokens], [v - shift - self.off for v in a.path]) for a in answers]


Stubbed = Callable[..., Any]


@pytest.fixture
def stubbed(byte_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Stubbed:
    """Loads the tiny model with the options given."""
    monkeypatch.setattr(module, "Runner", StubRunner)
    return lambda **options: load_engine(byte_folder, dtype="float32", backend="vllm", options=options)


def test_an_adapter_trained_again_in_its_folder_is_another_one(
    stubbed: Stubbed, byte_folder: Path, tmp_path: Path
) -> None:
    """And a view of the old one goes on serving the old, which it says it is."""
    engine = stubbed(max_lora_rank=8)
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


@pytest.mark.parametrize("deep", [True, False])
def test_an_answer_that_is_no_number_is_an_error_not_asked_for_ever(
    stubbed: Stubbed, deep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = stubbed(max_lora_rank=0 if deep else 8)
    runner = engine._runners.generating()

    def nothing(asks: Sequence[Ask], lora: Lora | None = None) -> list[Answer]:
        runner.calls.append(list(asks))
        assert len(runner.calls) < 100
        return [Answer([float("nan")] * len(ask.tokens), []) for ask in asks]

    monkeypatch.setattr(runner, "ask", nothing)
    items = engine.codec.encode_items(tiny.TITLES, "\n")
    with pytest.raises(NotFiniteError, match="is not a number"):
        engine.generate(["Heat"], CatalogTrie.build(items), 3)
    with pytest.raises(NotFiniteError, match="is not a number"):
        engine.score(["Heat"], [items])


def test_a_view_is_loaded_again_with_its_adapter_merged_and_no_room_for_others(
    stubbed: Stubbed, byte_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.save_adapter(byte_folder, tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    view = stubbed(max_lora_rank=8, max_num_seqs=4).with_adapter("a")
    monkeypatch.chdir("/")  # a run is opened from other places than it was fitted at
    again: Any = load_engine(**view.source)
    assert again.fingerprint == view.fingerprint
    _, _, _, options, *_ = again._runners.generating().given
    assert (options.max_lora_rank, options.max_num_seqs) == (0, 4)
    assert again.source == view.source | {"options": {"max_num_seqs": 4}}
    assert any(ask.path for ask in again._runners.generating().asked)  # as fast as without
    with pytest.raises(ConfigError, match="there is an adapter already"):
        again.with_adapter(tmp_path / "a")


def families(asked: Sequence[Ask], texts: Sequence[list[int]]) -> list[int]:
    """Which of the texts each request begins with, runs of the same taken together."""
    begun = [next(i for i, ids in enumerate(texts) if ask.ids[: len(ids)] == ids) for ask in asked]
    return [family for place, family in enumerate(begun) if place == 0 or begun[place - 1] != family]


@pytest.mark.parametrize("verb", ["score", "generate"])
def test_what_shares_a_beginning_is_asked_one_after_the_other(stubbed: Stubbed, verb: str) -> None:
    """A user's candidates, and users whose prompts begin alike: what they share may be thrown out of the cache soon."""
    engine = stubbed()
    runner = engine._runners.generating()
    runner.calls.clear()
    beginnings = ["Heat " * 4, "Up " * 4, "M " * 4]
    prompts = [f"{beginnings[i % 3]}{title}" for i, title in enumerate(tiny.TITLES[:12])]
    items = engine.codec.encode_items(tiny.TITLES, "\n")
    if verb == "score":
        engine.score(prompts, [items] * len(prompts))
    else:
        engine.generate(prompts, CatalogTrie.build(items), 3)
    assert len({tuple(ask.ids) for ask in runner.calls[0]}) >= len(prompts)
    for call in runner.calls:
        for texts in (prompts, [beginning.strip() for beginning in beginnings]):
            found = families(call, [engine.codec.encode(text) for text in texts])
            assert len(found) == len(set(found))


def test_where_prompt_log_probabilities_are_wrong_it_falls_back_saying_so(
    stubbed: Stubbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Off(StubRunner):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            self.off = 0.5

    right = stubbed()
    monkeypatch.setattr(module, "Runner", Off)
    with pytest.warns(UserWarning, match=r"vLLM's prompt log-probabilities are off by [\d.]+ nats here"):
        engine = stubbed()
    runner = engine._runners.generating()
    runner.calls.clear()
    items = engine.codec.encode_items(tiny.TITLES, "\n")
    np.testing.assert_allclose(engine.score(["Heat"], [items])[0], right.score(["Heat"], [items])[0], atol=1e-9)
    trie = CatalogTrie.build(items)
    assert [g.item for g in engine.generate(["Heat"], trie, 5)[0]] == [
        g.item for g in right.generate(["Heat"], trie, 5)[0]
    ]
    assert not any(ask.path for ask in runner.asked)
