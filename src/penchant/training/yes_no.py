"""Rows of yes/no: will this user like this item? From any dataset, or from examples in TALLRec's format."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penchant.errors import DataError
from penchant.prompt import Templates
from penchant.rank import label_tokens, yes_no_labels
from penchant.tokens import TextCodec
from penchant.training.candidates import Retriever
from penchant.training.choose import newest_targets
from penchant.training.config import YesNoConfig
from penchant.training.corpus import Corpus, Positions
from penchant.training.rows import Row, RowBuilder


def yes_no_rows(corpus: Corpus, config: YesNoConfig, retriever: Retriever | None) -> Iterator[Row]:
    """A positive and its negatives for each user's newest training events; the kinds of negatives take turns."""
    rng = np.random.default_rng(config.seed)
    targets = newest_targets(corpus, config.targets_per_user)
    yield from _rows(corpus, config, targets, _hard(config, retriever, targets), rng, held_out=False)


def valid_rows(corpus: Corpus, config: YesNoConfig, retriever: Retriever | None, n: int) -> list[Row]:
    """The same for the validation targets of up to ``n`` seeded users."""
    targets = corpus.split.valid.sample(n, config.seed)
    hard = None
    if "hard" in config.negatives and retriever is not None:
        hard = retriever.for_targets(targets, config.candidates).items
    rng = np.random.default_rng([config.seed, 1])
    return list(_rows(corpus, config, targets.position, hard, rng, held_out=True))


def _hard(config: YesNoConfig, retriever: Retriever | None, targets: Positions) -> NDArray[np.int32] | None:
    if "hard" not in config.negatives or retriever is None:
        return None
    return retriever.for_training(targets, config.candidates, 2).items


def _rows(
    corpus: Corpus,
    config: YesNoConfig,
    targets: Positions,
    hard: NDArray[np.int32] | None,
    rng: np.random.Generator,
    *,
    held_out: bool,
) -> Iterator[Row]:
    log, visible = corpus.split.log, corpus.split.train
    text = np.unique(corpus.texts, return_inverse=True)[1]  # items of one text are one question
    if held_out:
        visible = visible.copy()
        visible[corpus.split.valid.position] = True
    turn = 0
    for i, p in enumerate(targets.tolist()):
        user = int(log.user[p])
        if not len(history := np.arange(log.before(p).start, p)):
            continue
        liked = config.like_threshold is None or corpus.ratings[p] >= config.like_threshold
        if not liked:
            if "disliked" in config.negatives:
                yield _row(corpus, config, history, p, int(log.item[p]), False, held_out)
            continue
        yield _row(corpus, config, history, p, int(log.item[p]), True, held_out)
        # What the user took, also later, is no negative; but what is held out must not be spared in training rows.
        mine = log.all_of(user)
        known = text[log.item[mine][visible[mine]]]
        for _ in range(config.negatives_per_positive):
            kind = config.negatives[turn % len(config.negatives)]
            turn += 1
            if kind == "hard" and hard is not None:
                pool = hard[i][(hard[i] >= 0) & ~np.isin(text[hard[i]], known)]
            elif kind == "unexposed":
                pool = rng.integers(log.n_items, size=64)
                pool = pool[~np.isin(text[pool], known)]
            else:
                continue  # disliked ones come as targets of their own
            if len(pool):
                yield _row(corpus, config, history, p, int(rng.choice(pool)), False, held_out)


def _row(
    corpus: Corpus, config: YesNoConfig, history: Positions, position: int, item: int, answer: bool, held_out: bool
) -> Row:
    prompt, kept = corpus.render(
        "yes_no",
        history,
        max_history=config.max_history,
        budget=config.prompt_tokens,
        liked=config.like_threshold,
        item={"text": corpus.texts[item]},
    )
    if not held_out:
        corpus.require_past(kept, np.array([position]))
    yes, no = answer_tokens(corpus.templates, corpus.codec)
    builder = RowBuilder(prompt, user=int(corpus.split.log.user[position]), choices=(yes, no))
    builder.answer(yes if answer else no)
    return builder.build(kept, np.array([position], dtype=np.int64))


# -- TALLRec's format ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Example:
    """Titles that a user liked and disliked, a target title, and whether it was liked."""

    liked: tuple[str, ...]
    disliked: tuple[str, ...]
    target: str
    answer: bool


_TARGET = re.compile(r'the user will like the target \w+ (".*")\??')


def read_examples(path: Path | str) -> list[Example]:
    """TALLRec's JSON (a list of instruction, input, output), gzipped or not; DataError naming the row that isn't so."""
    file = Path(path)
    try:
        text = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        rows = json.loads(text)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"cannot be read as JSON: {error}", where=str(file), remedy="give TALLRec's format") from error
    if not isinstance(rows, list) or not rows:
        raise DataError("holds no list of examples", where=str(file), remedy="give TALLRec's format")
    return [_example(row, f"{file}, row {i}") for i, row in enumerate(rows)]


def _example(row: Any, where: str) -> Example:
    wanted = "instruction, input and output, with the lines User Preference, User Unpreference and Whether the user ..."
    if not isinstance(row, dict) or not isinstance(row.get("input"), str):
        raise DataError("is no example of TALLRec's", where=where, remedy=f"give {wanted}")
    parts: dict[str, str] = {}
    for line in row["input"].split("\n"):
        for head, name in (("User Preference:", "liked"), ("User Unpreference:", "disliked"), ("Whether", "target")):
            if line.startswith(head):
                parts[name] = line.removeprefix(head).strip()
    answers = {"Yes.": True, "No.": False, "Yes": True, "No": False}
    target = _TARGET.fullmatch(parts.get("target", ""))
    if target is None or not target[1] or str(row.get("output", "")).strip() not in answers:
        raise DataError("is no example of TALLRec's", where=where, remedy=f"give {wanted}")
    liked, disliked = (_titles(parts.get(name, "")) for name in ("liked", "disliked"))
    return Example(liked, disliked, _titles(target[1].replace('""', '"', 1))[0], answers[str(row["output"]).strip()])


def _titles(line: str) -> tuple[str, ...]:
    """The titles of a line such as "A (1990)", "B" written by C; quotation marks inside a title stay."""
    pieces = (piece.removeprefix('"').removesuffix('"') for piece in line.strip().split(', "'))
    return tuple(piece.replace('" written by ', " by ") for piece in pieces if piece.strip())


def example_row(
    example: Example, templates: Templates, codec: TextCodec, config: YesNoConfig, labels: list[int]
) -> Row:
    """One example as a row. Its history has no order: what was liked stands first, as TALLRec has it."""
    history = [{"text": t, "liked": True} for t in example.liked] + [
        {"text": t, "liked": False} for t in example.disliked
    ]
    rendered = templates.render(
        "yes_no",
        {"history": history, "item": {"text": example.target}},
        count=lambda p: len(codec.encode(p)),
        budget=config.prompt_tokens,
    )
    builder = RowBuilder(codec.encode(rendered.prompt), choices=labels)
    builder.answer(labels[0] if example.answer else labels[1])
    return builder.build()


def answer_tokens(templates: Templates, codec: TextCodec) -> list[int]:
    """The tokens of yes and no, in this order; ConfigError unless the template has two labels of one token each."""
    return label_tokens(codec, yes_no_labels(templates))
