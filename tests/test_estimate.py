"""What a fit would cost: sizes counted again one by one, and nothing left behind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from penchant.data.dataset import Dataset
from penchant.data.split import Split, leave_last_out
from penchant.estimate import Cost, FitEstimate, estimate_fit
from penchant.interest.config import EncoderConfig
from penchant.prompt import Templates
from penchant.run_folder import FitConfig
from tests import tiny
from tests.conftest import toy_frames
from tests.fake_engine import FakeEngine

SIZES = {"n_layers": 3, "hidden": 12, "vocabulary": 420, "context": 512, "weights": 2**19}
CONFIG = FitConfig(
    encoder=EncoderConfig(dim=16, blocks=1, max_length=4, epochs=7, batch_rows=8),
    candidates=100,  # more than there are items: every user is judged on the whole catalogue
    validation_users=11,
    max_history=5,
)


@pytest.fixture(scope="module")
def split() -> Split:
    return leave_last_out(Dataset.read(*toy_frames()))


def estimated(split: Split, config: FitConfig = CONFIG, engine: FakeEngine | None = None) -> FitEstimate:
    return estimate_fit(split, engine or FakeEngine(), config, Templates(), sizes=SIZES)


def costs(estimate: FitEstimate) -> dict[str, Cost]:
    return {cost.stage: cost for cost in estimate.costs}


def test_the_sizes_are_those_counted_one_by_one(split: Split) -> None:
    found = costs(estimated(split))
    codec = FakeEngine().codec
    titles = split.dataset.items["title"].to_list()
    assert found["embed items"].size == sum(len(codec.encode(title)) for title in titles)

    # A user's every training event but the first is a target, once an epoch.
    n_targets = sum(max(0, int(split.train[split.log.all_of(u)].sum()) - 1) for u in range(split.log.n_users))
    assert n_targets == 30 * 6
    assert found["train encoder, at most 7 epochs"].size == n_targets * 7

    sequences = [(*codec.encode_data(title), *codec.encode_template("\n")) for title in titles]
    prompts = 0
    sample = split.valid.sample(11, 0)
    for i in range(11):
        history = [{"text": titles[j]} for j in sample.history(i)[-5:]]
        prompts += len(codec.encode(Templates().render("next_item", {"history": history}).prompt))
    # Titles that begin alike share those tokens; the prompt's last token is the tree's root.
    distinct = len({s[:n] for s in sequences for n in range(1, len(s) + 1)})
    assert found["LLM on validation users"].size == prompts + 11 * (distinct + 1)
    assert found["LLM without history, at most"].size == sum(map(len, sequences))
    assert [c.unit for c in found.values()] == ["tokens", "targets", "tokens", "tokens"]


def test_sizes_grow_with_what_is_asked_for(split: Split) -> None:
    found = costs(estimated(split))
    more = CONFIG.model_copy(
        update={"encoder": CONFIG.encoder.model_copy(update={"epochs": 14}), "validation_users": 22}
    )
    twice = costs(estimated(split, more))
    assert twice["train encoder, at most 14 epochs"].size == 2 * found["train encoder, at most 7 epochs"].size
    assert twice["LLM on validation users"].size > 1.5 * found["LLM on validation users"].size
    few = costs(estimated(split, CONFIG.model_copy(update={"candidates": 1, "validation_users": 1})))
    assert few["LLM without history, at most"].size < found["LLM without history, at most"].size / 8


def test_times_are_measured_and_add_up(split: Split) -> None:
    estimate = estimated(split)
    assert all(cost.seconds > 0 for cost in estimate.costs)
    assert estimate.seconds == pytest.approx(sum(cost.seconds for cost in estimate.costs))


def test_memory_counts_weights_and_vectors(split: Split) -> None:
    wide = SIZES | {"hidden": 2**16}
    memory = estimate_fit(split, FakeEngine(), CONFIG, Templates(), sizes=wide).memory_mib
    assert memory["model weights"] == 1.0
    # 16 items of 65,536 float32 are 4 MiB: as they came, and standardised.
    assert memory["item vectors"] == 8.0
    assert all(mib >= 0 for mib in memory.values())


def test_the_engine_is_asked_about_a_small_sample_only(split: Split) -> None:
    engine = FakeEngine()
    estimated(split, CONFIG.model_copy(update={"candidates": 6}), engine)
    assert engine.scored == 4 * 6


def test_an_encoder_without_text_and_a_short_context_can_be_estimated(split: Split) -> None:
    config = CONFIG.model_copy(update={"encoder": CONFIG.encoder.model_copy(update={"use_text": False})})
    engine = FakeEngine(context_length=72)
    longest = max(len(engine.codec.encode_data(t)) for t in tiny.TITLES) + 1
    found = costs(estimated(split, config, engine))
    distinct = 11 * (1 + sum(len(engine.codec.encode_data(t)) + 1 for t in tiny.TITLES))
    assert found["LLM on validation users"].size <= 11 * (72 - longest) + distinct


def test_what_else_the_encoder_reads_is_part_of_it() -> None:
    interactions, items = toy_frames()
    events = interactions.with_columns(
        pl.Series("rating", [1.0 + i % 5 for i in range(len(interactions))]),
        pl.Series("review", [f"it was number {i % 7}" if i % 3 else None for i in range(len(interactions))]),
    )
    made = leave_last_out(Dataset.read(events, items.with_columns(pl.lit("the same").alias("blurb"))))
    encoder = CONFIG.encoder.model_copy(update={"inputs": ("rating", "gap", "review"), "loss": "mse"})
    config = CONFIG.model_copy(update={"encoder": encoder, "fields": ("title", "blurb")})
    found, codec = costs(estimated(made, config)), FakeEngine().codec
    texts = [*items["title"].to_list(), "the same"]  # a text that many items share is embedded once
    assert found["embed items"].size == sum(len(codec.encode(text)) for text in texts)
    assert found["embed the users' words"].size == sum(len(codec.encode(f"it was number {i}")) for i in range(7))


def test_nothing_is_written_and_no_random_state_is_touched(
    split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PENCHANT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    estimated(split)
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")) == ["here"]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
