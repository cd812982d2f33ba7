"""The leak check of a run: every prompt and training row made again from the interactions, and nothing later in it.

What needs the data alone (masks, training rows, histories of targets) is checked before anything is fitted; what an
encoder reads of events and what the LLM is asked, as soon as they are there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from penchant.adapter_card import check_data
from penchant.data.history import Targets
from penchant.data.provenance import NONE, REMEDY, Ints, LeakCheck, Own, Part, Rows, check_rows, flat
from penchant.data.split import Split
from penchant.errors import DataError
from penchant.evaluation.baselines.events import TrainingEvents
from penchant.evaluation.systems import Queries
from penchant.interest.behaviour import Behaviour
from penchant.interest.fit import training_behaviours, training_sequences
from penchant.interest.inputs import Columns, Reading
from penchant.schema import TIME, USER
from penchant.tokens import Prompt
from penchant.weigh import weighed_on

if TYPE_CHECKING:
    from penchant.recommend import Recommender

# Events of histories looked at together: 4M positions are 32 MB.
_BLOCK = 4_000_000


def check_run(model: Recommender, targets: Targets | None = None, asked: Targets | None = None) -> LeakCheck:
    """Both halves for a fitted model: ``check_split``, and what its encoder reads and its LLM is asked.

    ``asked`` are the targets that will go through the LLM stage. Their prompts and those of the validation users that
    the LLM's weight was chosen on are rendered (this loads the engine) and searched for their answers.
    """
    return check_split(model.split, targets) + check_model(model, targets, asked)


def check_split(split: Split, targets: Targets | None = None) -> LeakCheck:
    """What the split alone decides, before anything is fitted; DataError at a leak.

    The training rows and the histories of all validation and test targets, and of ``targets`` where these are
    others, must be, event by event, what the interactions say was past.
    """
    own, log = Own.of(split), split.log
    for what, theirs, ours in (
        ("user", log.user, own.user),
        ("item", log.item, own.item),
        ("time", log.time, own.time),
    ):
        if not np.array_equal(theirs, ours):
            raise DataError(
                f"the run's event log has another {what} than the interactions", where="leak check", remedy=REMEDY
            )
    found = _check_training(split, own)
    for part, some in _parts(split, targets):
        found += _check_prompts(split, own, some, part)
    return found


def check_model(model: Recommender, targets: Targets | None = None, asked: Targets | None = None) -> LeakCheck:
    """What a model's encoder reads, and (with ``asked``) what its LLM is asked; DataError at a leak.

    ConfigError where its weights were trained on another split of the same data.
    """
    sources = (model.engine_source, (model.embedder or {}).get("source"))
    found = LeakCheck()
    for source in sources:
        found += check_weights(source, model.split)
    check_reading(model.split, model.columns, model.reading, targets)
    if asked is None or not len(asked):
        return found
    on = weighed_on(model)
    return found + _check_rendered(model, on.targets.take(on.found)) + _check_rendered(model, asked)


def check_weights(source: dict[str, Any] | None, split: Split) -> LeakCheck:
    """What the cards of an engine's adapter and model say that these were trained on, against the split."""
    return LeakCheck(weights=tuple(check_data(source, split.dataset.content_hash, split.spec)))


def check_reading(split: Split, columns: Columns, reading: Reading, targets: Targets | None = None) -> None:
    """What an encoder reads of events (items, types, gaps, ratings, words), in training and of histories alike.

    It must be what the interactions say when nothing but the events before each target is there to be read. Training
    rows must be what they are when the held-out events are not there.
    """
    own, events = Own.of(split), split.dataset.interactions
    texts = columns.texts(events)
    place = {text: row for row, text in enumerate(dict.fromkeys(t for column in texts for t in column if t))}
    words = np.array([[place.get(t or "", -1) for t in column] for column in texts], dtype=np.int32).T
    value = columns.values(events)
    coded = events.select(TIME, *(column.name for column in columns.coded if column.name in events.columns))

    def derived(position: Ints, history: Ints) -> Behaviour:
        """These events alone; those of one ``history`` follow each other."""
        alone = coded[position].with_columns(pl.Series(USER, history)) if columns.coded else coded
        return Behaviour(
            own.item[position].astype(np.int32),
            columns.codes(alone),
            words[position] if texts else None,
            None if value is None else value[position],
        )

    trained = np.flatnonzero(split.train)
    user = own.user[trained]
    length = np.unique(user, return_counts=True)[1]
    _require_read(split, training_behaviours(split, reading), derived(trained, user), length, user, "in training")
    for part, some in _parts(split, targets):
        for block, position, start in _blocks(some):
            length = np.diff(start)
            ours = derived(position, np.repeat(np.arange(len(block)), length))
            read = reading.before(block.position)
            _require_read(split, read, ours, length, own.user[position], f"before a {part} target")


def _parts(split: Split, targets: Targets | None) -> list[tuple[Part, Targets]]:
    """What is predicted: the split's own targets, and those given where they are others."""
    parts: list[tuple[Part, Targets]] = [("valid", split.valid), ("test", split.test)]
    if targets is not None and targets is not split.valid and targets is not split.test:
        parts.append(("given", targets))
    return parts


def _blocks(targets: Targets) -> Iterator[tuple[Targets, Ints, Ints]]:
    """Some targets at a time, the positions of the events before them, flat, and where each one's begin there."""
    log = targets.log
    events = np.cumsum(targets.position - log.start[targets.user])
    edges = np.searchsorted(events, np.arange(_BLOCK, events[-1] if len(events) else 0, _BLOCK))
    for first, last in pairwise([0, *edges.tolist(), len(targets)]):
        some = targets.take(np.arange(first, last))
        before = [log.before(int(p)) for p in some.position]
        yield some, *flat([np.arange(s.start, s.stop, dtype=np.int64) for s in before])


# -- what the split decides ------------------------------------------------------------------------


def _check_training(split: Split, own: Own) -> LeakCheck:
    """What is learnt from are each user's training events, all before any held-out one."""
    position = np.flatnonzero(split.train)
    if not len(position):
        return LeakCheck()
    edge = np.flatnonzero(np.diff(own.user[position])) + 1
    start = np.concatenate([[0], edge, [len(position)]]).astype(np.int64)
    items, starts = flat(training_sequences(split))
    if not np.array_equal(starts, start) or not np.array_equal(items, own.item[position]):
        raise DataError("a training sequence is not its user's training events", where="leak check", remedy=REMEDY)
    plain = TrainingEvents.of(split)  # the baselines'
    for theirs, ours in ((plain.user, own.user), (plain.item, own.item), (plain.time, own.time)):
        if not np.array_equal(theirs, ours[position]):
            raise DataError("the baselines learn from other than training events", where="leak check", remedy=REMEDY)
    # Dense: every event is a target, and an input of those after it.
    rows = Rows(
        user=own.user[position[start[:-1]]],
        inputs=np.delete(position, start[1:] - 1),
        input_start=start - np.arange(len(start)),
        targets=position,
        target_start=start,
        text_time=NONE,
        text_start=np.zeros(len(start), dtype=np.int64),
    )
    return check_rows(split, rows, "train", own=own)


def _check_prompts(split: Split, own: Own, targets: Targets, part: Part) -> LeakCheck:
    """Histories as the run takes them, from the log and as evaluation's queries, against the events before."""
    found = LeakCheck()
    for some, inputs, start in _blocks(targets):
        nothing = np.zeros(len(some) + 1, dtype=np.int64)
        rows = Rows(some.user.astype(np.int64), inputs, start, some.position, np.arange(len(some) + 1), NONE, nothing)
        found += check_rows(split, rows, part, own=own)
        for histories in ([some.history(i) for i in range(len(some))], Queries.of(some).history):
            items, starts = flat(histories)
            if not np.array_equal(starts, start) or not np.array_equal(items, own.item[inputs]):
                raise DataError(
                    f"a {part} history is not the events before its target", where="leak check", remedy=REMEDY
                )
    return found


# -- what a model reads and renders ----------------------------------------------------------------


def _require_read(
    split: Split, read: Sequence[Behaviour], ours: Behaviour, length: Ints, user: Ints, where: str
) -> None:
    """DataError unless the behaviours ``read``, one after another, are ``ours``; ``user`` (n,) whose each event is."""
    theirs = {name: [getattr(one, name) for one in read if len(one)] for name in ("item", "codes", "words", "value")}
    same_length = np.array_equal([len(one) for one in read], length)
    for name, parts in theirs.items():
        right = getattr(ours, name)
        if right is None and all(part is None for part in parts):
            continue
        if same_length and right is not None and all(part is not None for part in parts):
            given = np.concatenate([right[:0], *parts])
            wrong = (given != right) & ~(np.isnan(given) & np.isnan(right))
            if not wrong.any():
                continue
            who = f", user {split.log.user_ids[user[np.nonzero(wrong)[0][0]]]}"
        else:
            who = ""
        raise DataError(
            f"the {name} that the encoder reads {where} are not of the events before it",
            where=f"leak check{who}",
            remedy=REMEDY,
        )


def _check_rendered(model: Recommender, targets: Targets) -> LeakCheck:
    targets = targets.take(np.flatnonzero(targets.position > targets.log.start[targets.user]))  # the LLM sees no other
    histories = [targets.history(i) for i in range(len(targets))]
    check_contents(
        [model.ranker.question_of(history) for history in histories],
        [model.texts[i] for i in targets.item],
        [[model.texts[i] for i in history] for history in histories],
    )
    return LeakCheck(texts=len(targets))


# -- contents --------------------------------------------------------------------------------------


def check_contents(prompts: Sequence[Prompt | str], answers: Sequence[str], histories: Sequence[Sequence[str]]) -> None:
    """No prompt may name its own answer (the target's text), unless the user had an item of that name before.

    ``histories`` holds each user's item texts: an answer inside a longer one of these ("Toy Story" in "Toy Story 2")
    is no leak. Of a Prompt only the data is read, of a text all of it. Raises DataError naming the first.
    """
    for number, (prompt, answer, history) in enumerate(zip(prompts, answers, histories, strict=True)):
        text = prompt if isinstance(prompt, str) else "\n".join(s.text for s in prompt.segments if s.is_data)
        if not answer or answer not in text:
            continue
        # Only names that hold the answer may explain it; blanking a shorter one would tear the answer apart.
        for known in sorted((h for h in history if answer in h), key=len, reverse=True):
            text = text.replace(known, "\n")
        if re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text):
            raise DataError(
                f"prompt {number:,} names its own answer, {answer!r}, and the user did not have it before",
                where="leak check",
                remedy=REMEDY,
            )
