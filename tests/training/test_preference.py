"""preference: a history run once, and behind some of its items the rivals that weren't taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.training.helpers import distinct, plain_logprobs, settings, stirred
from tests.training.test_choose import Fixed
from tests.training.test_losses import brute_force

from penchant.data.split import leave_last_out
from penchant.errors import ConfigError, DataError
from penchant.training.batch import collate
from penchant.training.candidates import Candidates
from penchant.training.config import PreferenceConfig
from penchant.training.corpus import Corpus
from penchant.training.objectives import task_loss
from penchant.training.preference import preference_row, preference_rows, preference_targets, valid_rows
from penchant.training.student import load_student


def config(folder: Path, **changes: Any) -> PreferenceConfig:
    return settings(folder, PreferenceConfig, **{"negatives": 2, "every": 2, "beta": 0.3, **changes})


@pytest.mark.parametrize("every", [1, 2, 3, 99])
def test_every_nth_item_counted_from_the_newest_has_rivals(corpus: Corpus, byte_folder: Path, every: int) -> None:
    wanted = [p for positions in corpus.train_positions for p in positions[1:] if (positions[-1] - p) % every == 0]
    assert preference_targets(corpus, config(byte_folder, every=every)).tolist() == wanted


@pytest.mark.parametrize("window", [20, 3])
def test_rows_hold_each_target_once_with_its_rivals(corpus: Corpus, byte_folder: Path, window: int) -> None:
    retriever: Any = Fixed(corpus)
    made = config(byte_folder, window=window, every=1)
    rows = list(preference_rows(corpus, made, retriever))
    log, at = corpus.split.log, corpus.item_tokens
    targets = np.concatenate([row.targets for row in rows])
    assert sorted(targets.tolist()) == preference_targets(corpus, made).tolist()
    for row in rows:
        for g, p in enumerate(row.targets.tolist()):
            own, *rivals = [row.label[row.sequence == s].tolist() for s in np.flatnonzero(row.group == g)]
            assert own == list(at[log.item[p]])
            assert len(rivals) == 2
            starts = {int(row.at[row.sequence == s][0]) for s in np.flatnonzero(row.group == g)}
            assert len(starts) == 1, "all hang where the title itself begins"
            past = log.item[log.before(int(p))].tolist()
            for rival in rivals:
                item = next(i for i, tokens in enumerate(at) if list(tokens) == rival)
                assert item != log.item[p]
                assert item not in past
        assert len(row.inputs) < window + 1


def test_a_window_that_fits_no_pack_is_cut_in_two(corpus: Corpus, byte_folder: Path) -> None:
    retriever: Any = Fixed(corpus)
    whole = list(preference_rows(corpus, config(byte_folder, every=1, pack_tokens=4_000), retriever))
    longest = max(len(row) for row in whole)
    made = config(byte_folder, every=1, pack_tokens=longest - 1)
    rows = list(preference_rows(corpus, made, retriever))
    assert len(rows) > len(whole)
    assert max(len(row) for row in rows) < longest
    targets = np.concatenate([row.targets for row in rows])
    assert sorted(targets.tolist()) == preference_targets(corpus, made).tolist(), "each target once, as before"
    assert len([row for row in rows if len(row) == 0]) == 0


def test_an_item_of_the_same_title_is_no_rival(byte_folder: Path) -> None:
    from tests.training.helpers import corpus_of

    data = distinct(n_users=3)
    twin = data.items["title"][0]
    data.items = data.items.with_columns(title=data.items["title"].replace({data.items["title"][5]: twin}))
    corpus = corpus_of(data, byte_folder)
    assert leave_last_out(data).log.n_items == len(corpus.texts)

    class Twin:
        def for_training(self, positions: Any, k: int, folds: int) -> Any:
            from penchant.training.candidates import Candidates

            log = corpus.split.log
            pool = np.array([[log.item[p], 0, 5, 7, 9][:k] for p in positions], dtype=np.int32)
            return Candidates(pool, np.zeros(pool.shape, dtype=np.float32))

    retriever: Any = Twin()
    for row in preference_rows(corpus, config(byte_folder, negatives=4, every=1), retriever):
        for g in range(row.n_targets):
            own, *rivals = [tuple(row.label[row.sequence == s].tolist()) for s in np.flatnonzero(row.group == g)]
            assert own not in rivals
            assert rivals


def test_held_out_rows_have_the_validation_event_as_the_one_target(corpus: Corpus, byte_folder: Path) -> None:
    retriever: Any = Fixed(corpus)
    rows = valid_rows(corpus, config(byte_folder), retriever, 9)
    assert len(rows) == 9
    for row in rows:
        (target,) = row.targets.tolist()
        assert target in corpus.split.valid.position
        assert row.n_targets == 1


def test_a_row_ends_with_its_last_target(corpus: Corpus) -> None:
    """What would stand behind it is seen by no target: tokens for nothing, and inputs that are later than it."""
    positions = corpus.train_positions[0][:6]
    own = corpus.split.log.item[positions].tolist()
    rivals = {1: [1], 3: [2, 3], 5: []}
    groups = {int(positions[i]): [(own[i], 0.0), *((r, 0.0) for r in some)] for i, some in rivals.items()}
    row = preference_row(corpus, positions, groups)
    assert row.targets.tolist() == positions[[1, 3]].tolist()
    assert row.inputs.tolist() == positions[:3].tolist()
    titles = [t for i in corpus.split.log.item[positions[:4]] for t in corpus.item_tokens[int(i)]]
    assert row.tokens[row.branch == 0].tolist() == [*corpus.opening, *titles]


def test_a_held_out_event_in_a_trunk_is_refused(corpus: Corpus) -> None:
    held = int(corpus.split.test.position[1])
    positions = np.arange(corpus.split.log.before(held).start, held + 1)
    with pytest.raises(DataError, match="validation or test event"):
        preference_row(corpus, positions, {int(positions[2]): [(0, 0.0), (1, 0.0)]})


@pytest.mark.parametrize("likelihood_weight", [0.0, 0.7])
def test_the_recipes_loss_is_the_papers_with_the_adapter_off_as_reference(
    corpus: Corpus, byte_folder: Path, likelihood_weight: float
) -> None:
    """Every sequence by a forward of its own, under the adapter and without it."""
    made = config(byte_folder, likelihood_weight=likelihood_weight, every=3)
    student = stirred(made)
    retriever: Any = Fixed(corpus)
    rows = list(preference_rows(corpus, made, retriever))[:3]
    policy, reference, lengths = [], [], []
    for row in rows:
        trunk = row.tokens[row.branch == 0].tolist()
        for g in range(row.n_targets):
            mine, base, length = [], [], []
            for s in np.flatnonzero(row.group == g):
                own = row.sequence == s
                context, labels = trunk[: int(row.at[own][0]) + 1], row.label[own].tolist()
                with torch.no_grad():
                    mine.append(float(plain_logprobs(student, context, labels).sum()))
                    with student.adapter_off():
                        base.append(float(plain_logprobs(student, context, labels).sum()))
                length.append(len(labels))
            policy.append(mine)
            reference.append(base)
            lengths.append(length)
    wanted = sum(brute_force(policy, reference, 0.3))
    wanted -= likelihood_weight * sum(p[0] / n[0] for p, n in zip(policy, lengths, strict=True))
    loss, weight = task_loss("preference", made)
    batch = collate([rows[:1], rows[1:]], student.dtype)
    assert weight(batch) == len(policy)
    assert float(loss(student, student, batch).detach()) == pytest.approx(wanted, rel=1e-4)


def test_the_reference_gives_no_gradient_and_starts_at_log_two(corpus: Corpus, byte_folder: Path) -> None:
    """A new adapter says what the base says: one rival's loss is log 2."""
    made = config(byte_folder, negatives=1)
    student = load_student(made)
    retriever: Any = Fixed(corpus)
    batch = collate([list(preference_rows(corpus, made, retriever))[:2]], student.dtype)
    loss, weight = task_loss("preference", made)
    assert float(loss(student, student, batch).detach()) / weight(batch) == pytest.approx(np.log(2), rel=1e-5)


def test_beside_the_retriever_only_what_it_found_is_trained_on_with_its_scores(
    corpus: Corpus, byte_folder: Path
) -> None:
    """Each candidate's score is the row's, that of the item taken among them."""
    made = config(byte_folder, beside=0.5, every=1, negatives=3)
    log, at = corpus.split.log, corpus.item_tokens
    rng = np.random.default_rng(0)

    class Scored:
        """Every third target is missed; the others stand anywhere in the list."""

        def for_training(self, positions: Any, k: int, folds: int) -> Candidates:
            items = np.array([rng.permutation(log.n_items)[:k] for _ in positions], dtype=np.int32)
            for row, p in zip(items, positions, strict=True):
                row[row == log.item[p]] = -1
                if p % 3:
                    row[int(rng.integers(k))] = log.item[p]
            self.at = {int(p): row for p, row in zip(positions, items, strict=True)}
            # A score tells whose and for whom it is.
            return Candidates(items, (items + 1000 * np.array(positions)[:, None]).astype(np.float32))

    retriever: Any = Scored()
    rows = list(preference_rows(corpus, made, retriever))
    targets = np.concatenate([row.targets for row in rows])
    assert targets.tolist() == [p for p in preference_targets(corpus, made).tolist() if p % 3]
    for row in rows:
        for g, p in enumerate(row.targets.tolist()):
            members = np.flatnonzero(row.group == g)
            assert len(members) == 4
            for s in members:
                item = int(row.lead[s]) - 1000 * p
                assert row.label[row.sequence == s].tolist() == list(at[item])
                assert item in retriever.at[p]
    plain = list(preference_rows(corpus, config(byte_folder, every=1, negatives=3), retriever))
    assert all(not row.lead.any() for row in plain)
    assert sum(len(row.targets) for row in plain) == len(preference_targets(corpus, made))


@pytest.mark.parametrize("reference", [True, False])
def test_the_retrievers_scores_stand_inside_the_softmax(corpus: Corpus, byte_folder: Path, reference: bool) -> None:
    """-log softmax at the item taken of beta (log p - log p of the base, or 0) + beside times its score."""
    made = config(byte_folder, beside=0.7, reference=reference)
    student = stirred(made)
    log = corpus.split.log
    positions = corpus.train_positions[1][:4]
    group = [(int(log.item[positions[3]]), 1.5), (1, 2.5), (2, -3.0)]
    row = preference_row(corpus, positions, {int(positions[3]): group})
    context = row.tokens[row.branch == 0][: int(row.at[0]) + 1].tolist()

    def logp() -> list[float]:
        with torch.no_grad():
            return [float(plain_logprobs(student, context, list(corpus.item_tokens[i])).sum()) for i, _ in group]

    mine = np.array(logp())
    with student.adapter_off():
        base = np.array(logp()) if reference else np.zeros(3)
    logits = 0.3 * (mine - base) + 0.7 * np.array([lead for _, lead in group])
    wanted = np.logaddexp.reduce(logits) - logits[0]
    loss, _ = task_loss("preference", made)
    batch = collate([[row]], student.dtype)
    assert float(loss(student, student, batch).detach()) == pytest.approx(wanted, rel=1e-4)


def test_without_an_adapter_there_is_no_reference(corpus: Corpus, byte_folder: Path) -> None:
    made = config(byte_folder)
    student = load_student(made.model_copy(update={"method": "full"}))  # what the settings would refuse
    retriever: Any = Fixed(corpus)
    batch = collate([list(preference_rows(corpus, made, retriever))[:1]], student.dtype)
    loss, _ = task_loss("preference", made)
    with pytest.raises(ConfigError, match="no adapter to switch off"):
        loss(student, student, batch)
    free = config(byte_folder, method="full", reference=False)
    student = load_student(free)
    loss, _ = task_loss("preference", free)
    assert np.isfinite(float(loss(student, student, batch).detach()))
