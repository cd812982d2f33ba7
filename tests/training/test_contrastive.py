"""contrastive: what is embedded in training is what is served, the loss is InfoNCE, and caching leaves its gradient."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.conftest import toy_frames
from tests.training.helpers import corpus_of, distinct, losses_of, settings, steps_of, stirred
from tests.training.test_choose import Fixed
from tests.training.test_resume import stop_after

from penchant import metrics
from penchant.data.dataset import Dataset
from penchant.data.split import leave_last_out
from penchant.engine import Engine
from penchant.engine.loading import load_engine
from penchant.errors import ConfigError, DataError
from penchant.interest.histories import history_prompt, history_vectors, unit
from penchant.interest.index import ExactIndex
from penchant.interest.vectors import item_vectors
from penchant.prompt import Templates
from penchant.recommend import Recommender
from penchant.run_folder import FitConfig
from penchant.training.batch import Batch, collate
from penchant.training.config import ContrastiveConfig
from penchant.training.contrastive import InfoNCE, Texts, contrastive_row, contrastive_rows, n_pairs, valid_rows
from penchant.training.corpus import Corpus
from penchant.training.objectives import alone
from penchant.training.preview import preview
from penchant.training.recipe import Recipe
from penchant.training.recipes import finetune
from penchant.training.rows import Row
from penchant.training.student import Student, load_student
from penchant.training.validation import NearestScore, engine_of

QUICK: dict[str, Any] = {"hard": 2, "targets_per_user": 3, "packs_per_step": 4, "max_history": 4}


def config(folder: Path, **changes: Any) -> ContrastiveConfig:
    return settings(folder, ContrastiveConfig, **{**QUICK, **changes})


def rows_of(corpus: Corpus, made: ContrastiveConfig) -> list[Row]:
    retriever: Any = Fixed(corpus)
    return list(contrastive_rows(corpus, made, retriever if made.hard else None))


def items_of(row: Row) -> list[int]:
    """The item of each text of a row."""
    return [int(row.label[row.sequence == s][0]) for s in range(len(row.group))]


@contextmanager
def quiet() -> Iterator[None]:
    """A few steps on a random model need not help."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "no validation|nothing learnt")
        yield


# -- rows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_a_row_is_the_texts_that_serving_embeds(corpus: Corpus, byte_folder: Path, pooling: str) -> None:
    made = config(byte_folder, pooling=pooling)
    rows = rows_of(corpus, made)
    log = corpus.split.log
    wanted = [p for positions in corpus.train_positions for p in positions[1:][-3:].tolist()]
    assert [int(row.targets[0]) for row in rows] == wanted, "the newest training events that have a history"
    for row, p in zip(rows, wanted, strict=True):
        past = np.arange(log.before(p).start, p)
        assert row.inputs.tolist() == past[-4:].tolist()
        prompt = history_prompt(
            corpus.templates, corpus.codec, corpus.texts, log.item[past], max_history=4, prompt_tokens=768
        ).prompt
        history, taken, *hard = items_of(row)
        assert (history, taken) == (-1, log.item[p])
        assert len(hard) == 2
        assert not set(hard) & {taken, *log.item[past].tolist()}
        texts = [prompt, *(corpus.texts[i] for i in (taken, *hard))]
        for b, text in enumerate(texts):
            mine = row.branch == b
            assert row.tokens[mine].tolist() == corpus.codec.encode(text)
            assert row.position[mine].tolist() == list(range(mine.sum()))
            assert row.weight[row.sequence == b].sum() == pytest.approx(1)
            assert len(row.at[row.sequence == b]) == (mine.sum() if pooling == "mean" else 1)
            assert row.at[row.sequence == b][-1] == np.flatnonzero(mine)[-1]


class Everything:
    """A retriever that gives every item, those of the history and the target among them."""

    def __init__(self, n_items: int) -> None:
        self.n_items = n_items

    def for_training(self, positions: Any, k: int, folds: int) -> Any:
        from penchant.training.candidates import Candidates

        items = np.tile(np.arange(self.n_items, dtype=np.int32), (len(positions), 1))
        return Candidates(items, np.zeros(items.shape, dtype=np.float32))


def test_what_was_taken_and_its_twin_are_no_hard_negatives(byte_folder: Path) -> None:
    data = distinct(n_users=3)
    twin = data.items["title"][0]
    data.items = data.items.with_columns(title=data.items["title"].replace({data.items["title"][5]: twin}))
    corpus, log = corpus_of(data, byte_folder), leave_last_out(data).log
    retriever: Any = Everything(log.n_items)
    for row in contrastive_rows(corpus, config(byte_folder, hard=99), retriever):
        p = int(row.targets[0])
        taken = {corpus.texts[i] for i in log.item[log.before(p).start : p + 1]}
        hard = items_of(row)[2:]
        assert sorted(hard) == [i for i in range(log.n_items) if corpus.texts[i] not in taken]


def test_a_held_out_event_is_refused_and_held_out_rows_have_it(corpus: Corpus, byte_folder: Path) -> None:
    made, retriever = config(byte_folder), Fixed(corpus)
    for position in (corpus.split.valid.position[0], corpus.split.test.position[0]):
        with pytest.raises(DataError, match="validation or test event"):
            contrastive_row(corpus, made, int(position), [])
    found: Any = retriever
    rows = valid_rows(corpus, made, found, 7)
    assert len(rows) == 7
    assert all(int(row.targets[0]) in corpus.split.valid.position for row in rows)
    assert all((row.inputs < row.targets[0]).all() for row in rows)


def test_without_an_event_there_is_no_history(corpus: Corpus) -> None:
    given = (corpus.templates, corpus.codec, corpus.texts)
    with pytest.raises(DataError, match="without an event"):
        history_prompt(*given, [], max_history=4, prompt_tokens=768)
    empty = len(corpus.codec.encode(corpus.templates.render("user", {"history": []}).prompt))
    with pytest.raises(DataError, match="not one event"):
        history_prompt(*given, [1, 2], max_history=4, prompt_tokens=empty + 1)


# -- what is trained is what is served ----------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("layer", [None, -1])
def test_vectors_in_training_are_those_of_the_saved_adapter(
    corpus: Corpus, byte_folder: Path, tmp_path: Path, pooling: Any, layer: int | None
) -> None:
    made = config(byte_folder, pooling=pooling, layer=layer)
    student = stirred(made)
    assert student.layer == (1 if layer is None else 2)
    rows = rows_of(corpus, made)[:7]
    with torch.no_grad():
        got = student(collate([rows[:3], rows[3:4], rows[4:]], student.dtype)).numpy()
    student.save(tmp_path / "adapter")
    engine = load_engine(byte_folder, tmp_path / "adapter", dtype="float32", device="cpu")
    base = load_engine(byte_folder, dtype="float32", device="cpu")
    items = np.array([i for row in rows for i in items_of(row)])
    log = corpus.split.log
    histories = [log.item[log.before(int(row.targets[0]))] for row in rows]
    how: dict[str, Any] = {"pooling": pooling, "layer": student.layer}
    served = engine.embed([corpus.texts[i] for i in items[items >= 0]], **how)
    assert got[items >= 0] == pytest.approx(served, abs=1e-4)
    assert np.abs(got[items >= 0] - base.embed([corpus.texts[i] for i in items[items >= 0]], **how)).max() > 1e-2
    vectors = history_vectors(engine, corpus.templates, corpus.texts, histories, max_history=4, **how)
    assert unit(got[items < 0]) == pytest.approx(vectors, abs=1e-4)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(7), abs=1e-5)


def test_nothing_above_the_layer_is_trained(corpus: Corpus, byte_folder: Path) -> None:
    assert {name.split(".layers.")[1][0] for name in load_student(config(byte_folder)).trainable()} == {"0"}
    assert {name.split(".layers.")[1][0] for name in load_student(config(byte_folder, layer=2)).trainable()} == {
        "0",
        "1",
    }
    student = load_student(config(byte_folder, method="full"))
    torch.autograd.backward(student(collate([rows_of(corpus, config(byte_folder))[:1]], student.dtype)).sum())
    assert all(p.grad is not None for p in student.trainable().values()), "many processes would wait for it"


def test_nothing_above_the_layer_is_run(corpus: Corpus, byte_folder: Path) -> None:
    student, ran = load_student(config(byte_folder)), []
    for i, block in enumerate(student.causal_lm.base_model.layers):
        block.register_forward_hook(lambda *given, i=i: ran.append(i))  # type: ignore[misc]
    batch = collate([rows_of(corpus, config(byte_folder))[:1]], student.dtype)
    student(batch)  # at first it has looked which they are
    ran.clear()
    student(batch)
    assert ran == [0]


def test_going_on_from_an_adapter_leaves_its_upper_blocks_alone(
    toy: Dataset, byte_folder: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    stirred(settings(byte_folder)).save(tmp_path / "first")
    made = config(byte_folder, start_from=str(tmp_path / "first"), max_steps=2)
    with quiet():
        finetune("contrastive", made, toy, tmp_path / "run")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("first", "run"))
    assert set(before) == set(after)
    assert {name for name in after if not torch.equal(before[name], after[name])} == {
        name for name in after if ".layers.0." in name
    }


@pytest.mark.parametrize("layer", [0, 3, -3])
def test_a_layer_that_is_not_there_is_refused(byte_folder: Path, layer: int) -> None:
    with pytest.raises(ConfigError, match=f"layer {layer} of a model with 2"):
        load_student(config(byte_folder, layer=layer))


# -- the loss --------------------------------------------------------------------------------------


def brute_force(
    vectors: NDArray[np.float64], items: Sequence[int], targets: Sequence[int], corpus: Corpus, temperature: float
) -> list[float]:
    """Every pair by a loop over all items, those of a text that the user has taken left out."""
    log = corpus.split.log
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    out = []
    starts = [s for s, item in enumerate(items) if item < 0]
    for start, p in zip(starts, targets, strict=True):
        taken = {corpus.texts[i] for i in log.item[log.before(p).start : p + 1]}
        own = float(vectors[start] @ vectors[start + 1]) / temperature
        summed = np.exp(own)
        for s, item in enumerate(items):
            if item >= 0 and s != start + 1 and corpus.texts[item] not in taken:
                summed += np.exp(float(vectors[start] @ vectors[s]) / temperature)
        out.append(float(np.log(summed) - own))
    return out


def test_each_pairs_loss_is_the_papers_with_false_negatives_left_out(
    corpus: Corpus, byte_folder: Path, rng: np.random.Generator
) -> None:
    made = config(byte_folder, temperature=0.3)
    rows = rows_of(corpus, made)[:12]
    items = [i for row in rows for i in items_of(row)]
    targets = [int(row.targets[0]) for row in rows]
    vectors = rng.standard_normal((len(items), 5))
    texts = Texts(torch.from_numpy(vectors), np.array(items), np.array(targets))
    got = InfoNCE(corpus, made).pairs(texts)
    assert got.numpy() == pytest.approx(brute_force(vectors, items, targets, corpus, 0.3), rel=1e-9)


def test_false_negatives_are_masked_one_by_one(corpus: Corpus, byte_folder: Path) -> None:
    """Another row's positive that is this row's own, or in its history, and nothing else."""
    log = corpus.split.log
    first, second = corpus.train_positions[0], corpus.train_positions[1]
    p, q = int(first[3]), int(second[2])
    past = log.item[log.before(p)]
    stranger = next(i for i in range(log.n_items) if i not in {*log.item[: p + 1].tolist()})
    items = np.array([log.item[p], log.item[p], past[0], past[-1], stranger, log.item[q]])
    false = InfoNCE(corpus, config(byte_folder)).false_negatives(items, np.array([p, q]), np.array([0, 5]))
    assert false[0, :5].tolist() == [False, True, True, True, False]
    assert not false[1, 5], "its own place is no negative"


def test_vectors_that_agree_cost_little_and_all_alike_cost_log_n(corpus: Corpus, byte_folder: Path) -> None:
    made = config(byte_folder, temperature=1.0, hard=0)
    p = int(corpus.train_positions[0][2])
    other = next(i for i in range(16) if i not in corpus.split.log.item[: p + 1])
    items, target = np.array([-1, corpus.split.log.item[p], other]), np.array([p])
    loss = InfoNCE(corpus, made)
    alike = loss.pairs(Texts(torch.ones(3, 4), items, target))
    assert float(alike) == pytest.approx(np.log(2), rel=1e-6)
    apart = torch.tensor([[1.0, 0.0], [5.0, 0.0], [-3.0, 0.0]])  # length says nothing
    assert float(loss.pairs(Texts(apart, items, target))) == pytest.approx(np.log(1 + np.exp(-2)), rel=1e-6)


# -- gradient caching --------------------------------------------------------------------------------


def gradient(student: Student) -> torch.Tensor:
    found = torch.cat([p.grad.flatten() for p in student.trainable().values() if p.grad is not None])
    for parameter in student.trainable().values():
        parameter.grad = None
    return found


def cached_gradient(loss: InfoNCE, student: Student, batches: Sequence[Batch]) -> tuple[float, torch.Tensor]:
    torch.manual_seed(5)
    loss_of = loss.over(student, batches, alone)
    parts = []
    for batch in batches:
        part = loss_of(student, student, batch)
        torch.autograd.backward(part)
        parts.append(float(part.detach()))
    return sum(parts), gradient(student)


def plain_gradient(loss: InfoNCE, student: Student, batches: Sequence[Batch]) -> tuple[float, torch.Tensor]:
    """One graph of everything."""
    torch.manual_seed(5)
    vectors = torch.cat([student(batch) for batch in batches])
    items = []
    for batch in batches:
        of = np.empty(len(batch.group), dtype=np.int64)
        of[batch.sequence.numpy()] = batch.label.numpy()
        items.append(of)
    targets = np.concatenate([batch.targets for batch in batches])
    summed = loss.pairs(Texts(vectors, np.concatenate(items), targets)).sum()
    torch.autograd.backward(summed)
    return float(summed.detach()), gradient(student)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_cached_gradient_is_the_whole_ones(
    corpus: Corpus, byte_folder: Path, dropout: float, checkpointing: bool
) -> None:
    made = config(byte_folder, lora={"r": 4, "alpha": 8, "dropout": dropout}, gradient_checkpointing=checkpointing)
    student, loss = stirred(made), InfoNCE(corpus, made)
    student.train()
    rows = rows_of(corpus, made)[:9]
    chunks = [collate([part], student.dtype) for part in (rows[:2], rows[2:3], rows[3:7], rows[7:])]
    assert sum(n_pairs(chunk) for chunk in chunks) == 9
    value, cached = cached_gradient(loss, student, chunks)
    wanted, whole = plain_gradient(loss, student, chunks)
    assert value == pytest.approx(wanted, rel=1e-5)
    assert torch.allclose(cached, whole, rtol=1e-5, atol=1e-5 * float(whole.abs().max()))
    assert float(whole.abs().max()) > 1e-3
    if not dropout:  # with it, another layout draws other noise
        _, at_once = plain_gradient(loss, student, [collate([rows], student.dtype)])
        assert torch.allclose(cached, at_once, rtol=1e-4, atol=1e-5 * float(whole.abs().max()))


def test_dropout_drawn_anew_would_be_another_gradient(
    monkeypatch: pytest.MonkeyPatch, corpus: Corpus, byte_folder: Path
) -> None:
    """The test above sees whether noise is set back."""
    made = config(byte_folder, lora={"r": 4, "alpha": 8, "dropout": 0.3})
    student, loss = stirred(made), InfoNCE(corpus, made)
    student.train()
    chunks = [collate([part], student.dtype) for part in (rows_of(corpus, made)[:2], rows_of(corpus, made)[2:4])]
    _, whole = plain_gradient(loss, student, chunks)
    monkeypatch.setattr("penchant.training.contrastive._redraw", lambda *args: None)
    _, other = cached_gradient(loss, student, chunks)
    assert not torch.allclose(other, whole, rtol=1e-2, atol=1e-2 * float(whole.abs().max()))


def test_two_processes_that_gather_have_the_gradient_of_one(corpus: Corpus, byte_folder: Path) -> None:
    made = config(byte_folder)
    student, loss = stirred(made), InfoNCE(corpus, made)
    rows = rows_of(corpus, made)[:9]
    shares = [[collate([rows[:4]], student.dtype)], [collate([p], student.dtype) for p in (rows[4:5], rows[5:])]]
    given: list[Any] = []

    def note(mine: Any) -> tuple[list[Any], int]:
        given.append(mine)
        return [mine], 0

    for share in shares:
        loss.over(student, share, note)
    value = 0.0
    for i, share in enumerate(shares):
        loss_of = loss.over(student, share, lambda mine, i=i: (given, i))
        for batch in share:
            part = loss_of(student, student, batch)
            torch.autograd.backward(part)
            value += float(part.detach())
    both = gradient(student)
    wanted, whole = plain_gradient(loss, student, [batch for share in shares for batch in share])
    assert value == pytest.approx(wanted, rel=1e-5)
    assert torch.allclose(both, whole, rtol=1e-5, atol=1e-5 * float(whole.abs().max()))


# -- runs ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(byte_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on users who walk the circle of titles: what comes next is planted."""
    out = tmp_path_factory.mktemp("contrastive") / "run"
    made = config(
        byte_folder, epochs=8, targets_per_user=6, eval_users=30, eval_every=20, max_history=4, learning_rate=5e-3
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PENCHANT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        finetune("contrastive", made, Dataset.read(*toy_frames()), out)
    return out


def nearest(engine: Engine, corpus: Corpus) -> float:
    """NDCG@10 of test targets among the items nearest to their histories' vectors."""
    targets = corpus.split.test
    histories = [targets.history(i) for i in range(len(targets))]
    index = ExactIndex(unit(item_vectors(engine, corpus.texts, layer=1)))
    vectors = history_vectors(engine, corpus.templates, corpus.texts, histories, layer=1, max_history=4)
    found, _ = index.search(vectors, 10, exclude=histories)
    return float(metrics.ndcg(metrics.list_rank(found, targets.item), 10).mean())


def test_it_learns_and_retrieves_what_comes_next(trained: Path, corpus: Corpus, byte_folder: Path) -> None:
    losses = losses_of(trained)
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    card = json.loads((trained / "penchant.json").read_text())
    assert card["outcome"]["best"]["valid_loss"] < 0.9 * steps_of(trained, "validation")[0]["valid_loss"]
    before = nearest(load_engine(byte_folder, dtype="float32", device="cpu"), corpus)
    after = nearest(load_engine(byte_folder, trained, dtype="float32", device="cpu"), corpus)
    assert after > before + 0.2


def test_fit_takes_the_adapter_and_its_vectors(trained: Path, toy: Dataset, corpus: Corpus, byte_folder: Path) -> None:
    card = json.loads((trained / "penchant.json").read_text())
    assert card["recipe"] == "contrastive"
    assert card["vectors"] == {"layer": 1, "pooling": "mean"}
    assert set(card["templates"]) == {"item", "user"}
    engine = load_engine(byte_folder, trained, dtype="float32", device="cpu")
    quick = FitConfig(candidates=4, validation_users=4, encoder={"epochs": 1})
    model = Recommender.fit(leave_last_out(toy), engine, config=quick)
    assert np.array_equal(model.vectors, engine.embed(corpus.texts, layer=1))
    assert len(model.recommend(users=["u0"], k=3)) == 3


@pytest.mark.parametrize("changes", [{"layer": 2}, {"pooling": "last"}])
def test_vectors_taken_elsewhere_than_they_were_trained_are_refused(
    trained: Path, toy: Dataset, corpus: Corpus, byte_folder: Path, changes: dict[str, Any]
) -> None:
    engine = load_engine(byte_folder, trained, dtype="float32", device="cpu")
    with pytest.raises(ConfigError, match="was trained to embed at layer 1 with pooling mean"):
        Recommender.fit(leave_last_out(toy), engine, config=FitConfig(**changes))
    with pytest.raises(ConfigError, match="was trained to embed"):
        history_vectors(engine, Templates(), corpus.texts, [np.array([1])], **{"layer": 1, **changes})
    # Counted from the end it is the same layer.
    same = item_vectors(engine, corpus.texts, layer=-2)
    assert np.array_equal(same, item_vectors(engine, corpus.texts, layer=1))


@pytest.mark.parametrize("records", [1, 4, 9])
def test_broken_off_and_resumed_the_losses_are_the_unbroken_runs(
    toy: Dataset, byte_folder: Path, tmp_path: Path, records: int
) -> None:
    """Dropout and all; before the first checkpoint, at one, and between two."""
    made = config(
        byte_folder,
        lora={"r": 4, "alpha": 8, "dropout": 0.2},
        max_steps=8,
        epochs=9,
        checkpoint_every=2,
        eval_every=4,
        eval_users=4,
        patience=9,
    )
    with quiet():
        with pytest.raises(KeyboardInterrupt):
            finetune("contrastive", made, toy, tmp_path / "broken", on_record=stop_after(records))
        finetune("contrastive", made, toy, tmp_path / "broken", resume=True)
        finetune("contrastive", made, toy, tmp_path / "whole")
    assert len(losses_of(tmp_path / "whole")) == 8
    assert losses_of(tmp_path / "broken") == losses_of(tmp_path / "whole")


def test_the_chunk_does_not_change_a_run(toy: Dataset, byte_folder: Path, tmp_path: Path) -> None:
    with quiet():
        for n in (1, 4):
            finetune("contrastive", config(byte_folder, packs_per_forward=n, max_steps=4), toy, tmp_path / str(n))
    assert losses_of(tmp_path / "1") == pytest.approx(losses_of(tmp_path / "4"), rel=1e-4)


def test_validation_searches_a_sample_that_holds_its_targets(corpus: Corpus, byte_folder: Path) -> None:
    targets = corpus.split.valid.sample(3, 0)
    student, tokenizer = load_student(config(byte_folder)), corpus.codec.tokenizer
    few, all_ = (
        NearestScore(corpus, config(byte_folder, catalogue=n), targets, tokenizer)(student)["NDCG@10"] for n in (10, 99)
    )
    engine = engine_of(student, tokenizer)
    histories = [targets.history(i) for i in range(3)]
    vectors = history_vectors(engine, corpus.templates, corpus.texts, histories, layer=1, max_history=4)
    cosine = vectors @ unit(engine.embed(corpus.texts, layer=1)).T
    for row, history in zip(cosine, histories, strict=True):
        row[history] = -np.inf
    rank = (cosine >= cosine[np.arange(3), targets.item][:, None]).sum(1)
    assert all_ == pytest.approx(metrics.ndcg(rank, 10).mean())
    assert few >= all_, "among fewer items a target stands no lower"


def test_the_preview_shows_pairs(toy: Dataset, byte_folder: Path) -> None:
    text = preview("contrastive", config(byte_folder), toy)
    assert "The user's history, oldest first:\n- " in text
    assert text.count("\n  rather ") == 6
    assert len([line for line in text.splitlines() if line.endswith("]]")]) == 3


def test_without_hard_negatives_no_retriever_is_made(toy: Dataset, byte_folder: Path) -> None:
    recipe = Recipe("contrastive", config(byte_folder, hard=0), leave_last_out(toy))
    rows = recipe.rows()
    assert all(len(row.group) == 2 for row in rows)
    assert len(recipe.valid()) == 30
    assert "retriever" not in recipe.__dict__
