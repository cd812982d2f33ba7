"""A packed forward says what separate forwards say, and nobody in a pack sees anybody else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.training.helpers import row_logprobs, settings, stirred

from penchant.errors import DataError
from penchant.training.batch import collate
from penchant.training.rows import Row, RowBuilder
from penchant.training.student import Student


@pytest.fixture(scope="module")
def student(byte_folder: Path) -> Student:
    return stirred(settings(byte_folder))


def random_row(rng: np.random.Generator, *, rivals: bool = True, choices: tuple[int, ...] = ()) -> Row:
    """A trunk with targets here and there, rivals of all lengths behind some of them, or an answer at its end."""

    def some(n: int) -> list[int]:
        return rng.integers(3, 280, size=n).tolist()

    builder = RowBuilder(some(int(rng.integers(6, 30))), user=int(rng.integers(100)), choices=choices)
    if choices:
        builder.answer(int(rng.choice(choices)), weight=float(rng.uniform(0.5, 2)))
        return builder.build()
    n = builder._n_trunk
    at = int(rng.integers(1, 4))
    while at < n:
        length = int(rng.integers(1, 6))
        if at + length > n:
            break
        group = builder.supervise(at, length, weight=float(rng.uniform(0.5, 2)))
        if rivals and rng.random() < 0.7:
            for _ in range(int(rng.integers(1, 4))):
                builder.branch(at, some(int(rng.integers(1, 7))), group)
        at += length + int(rng.integers(0, 3))
    return builder.build()


def packed(student: Student, packs: list[list[Row]]) -> torch.Tensor:
    return student(collate(packs, student.dtype))


@pytest.mark.parametrize("seed", range(4))
def test_a_packs_log_probabilities_are_those_of_plain_forwards(student: Student, seed: int) -> None:
    rng = np.random.default_rng(seed)
    packs = [[random_row(rng, rivals=seed % 2 == 0) for _ in range(n)] for n in (3, 1, 2)]
    with torch.no_grad():
        got = packed(student, packs)
        wanted = torch.cat([row_logprobs(student, row) for rows in packs for row in rows])
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-5)


def test_a_choices_logits_are_those_of_a_plain_forward(student: Student) -> None:
    rng = np.random.default_rng(7)
    choices = (11, 40, 233)
    rows = [random_row(rng, choices=choices) for _ in range(4)]
    with torch.no_grad():
        got = packed(student, [rows[:3], rows[3:]])
        for row, logits in zip(rows, got, strict=True):
            plain = student.causal_lm(input_ids=torch.from_numpy(row.tokens).long().unsqueeze(0)).logits[0, -1]
            torch.testing.assert_close(logits, plain[list(choices)], atol=1e-4, rtol=1e-5)


def test_gradients_of_a_pack_are_those_of_plain_forwards(student: Student) -> None:
    rng = np.random.default_rng(3)
    rows = [random_row(rng) for _ in range(3)]

    def gradients(loss: torch.Tensor) -> dict[str, torch.Tensor]:
        student.zero_grad()
        torch.autograd.backward(loss)
        return {name: p.grad.clone() for name, p in student.trainable().items() if p.grad is not None}

    batch = collate([rows[:2], rows[2:]], student.dtype)
    got = gradients(-(student(batch) * batch.weight).sum())
    weights = torch.from_numpy(np.concatenate([row.weight for row in rows]))
    wanted = gradients(-(torch.cat([row_logprobs(student, row) for row in rows]) * weights).sum())
    assert set(got) == set(wanted) == set(student.trainable())
    for name in wanted:
        size = float(wanted[name].abs().max())
        assert size > 0
        torch.testing.assert_close(got[name], wanted[name], atol=1e-4 * size, rtol=1e-3)
    student.zero_grad()


def test_changing_one_user_changes_no_logit_of_another(student: Student) -> None:
    rng = np.random.default_rng(5)
    a, b, c = (random_row(rng) for _ in range(3))
    batch = collate([[a, b, c]], student.dtype)
    with torch.no_grad():
        before = student(batch)
        batch.tokens[0, : len(a)] = torch.from_numpy(rng.integers(3, 280, size=len(a)))
        after = student(batch)
    n = len(a.label)
    assert not torch.equal(before[:n], after[:n])
    assert torch.equal(before[n:], after[n:])


def test_a_user_changes_neither_those_after_it_nor_those_before(student: Student) -> None:
    rng = np.random.default_rng(6)
    a, b, c = (random_row(rng) for _ in range(3))
    batch = collate([[a, b, c]], student.dtype)
    n, m = len(a.label), len(b.label)
    with torch.no_grad():
        before = student(batch)
        batch.tokens[0, len(a) : len(a) + len(b)] = 9
        after = student(batch)
    assert torch.equal(before[:n], after[:n])
    assert torch.equal(before[n + m :], after[n + m :])
    assert not torch.equal(before[n : n + m], after[n : n + m])


def test_rivals_do_not_see_each_other_nor_the_title_they_stand_against(student: Student) -> None:
    builder = RowBuilder([5, 6, 7, 8, 9, 10])
    group = builder.supervise(2, 3)
    builder.branch(2, [20, 21, 22], group)
    builder.branch(2, [30, 31, 32], group)
    row = builder.build()
    batch = collate([[row]], student.dtype)
    with torch.no_grad():
        before = student(batch)
        batch.tokens[0, 2:6] = 50  # the title itself, and what follows in the trunk
        batch.tokens[0, 6:8] = 51  # the first rival
        after = student(batch)
    second = slice(6, 9)
    assert row.sequence[second].tolist() == [2, 2, 2]
    assert torch.equal(before[second], after[second])


def test_padding_has_no_say(student: Student) -> None:
    rng = np.random.default_rng(8)
    short, long = RowBuilder([4, 5, 6, 7]), random_row(rng)
    short.supervise(1, 3)
    row = short.build()
    batch = collate([[row], [long]], student.dtype)
    assert batch.tokens.shape[1] == len(long) > len(row)
    assert batch.n_tokens == len(row) + len(long)
    with torch.no_grad():
        alone = student(collate([[row]], student.dtype))
        before = student(batch)
        batch.tokens[0, len(row) :] = 77
        batch.position[0, len(row) :] = 13
        after = student(batch)
    assert torch.isfinite(before).all()
    assert torch.equal(before, after)
    torch.testing.assert_close(before[: len(alone)], alone, atol=1e-4, rtol=1e-5)


def test_positions_begin_anew_with_each_row(student: Student) -> None:
    rng = np.random.default_rng(9)
    row, other = random_row(rng), random_row(rng)
    with torch.no_grad():
        first = packed(student, [[row, other]])[: len(row.label)]
        second = packed(student, [[other, row]])[len(other.label) :]
    torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-5)


def test_the_batch_counts_targets_and_keeps_groups_apart(student: Student) -> None:
    rng = np.random.default_rng(10)
    rows = [random_row(rng) for _ in range(4)]
    batch = collate([rows[:1], rows[1:]], student.dtype)
    assert batch.n_targets == sum(row.n_targets for row in rows)
    assert batch.group.tolist() == sorted(batch.group.tolist())
    assert len(batch.group) == sum(len(row.group) for row in rows) == int(batch.sequence.max()) + 1
    assert batch.label.tolist() == [t for row in rows for t in row.label.tolist()]


def test_two_label_sets_in_one_batch_are_refused(student: Student) -> None:
    rng = np.random.default_rng(11)
    rows = [random_row(rng, choices=(3, 4)), random_row(rng, choices=(3, 5))]
    with pytest.raises(DataError, match="different label sets"):
        collate([rows], student.dtype)
