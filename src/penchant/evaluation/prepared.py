"""What all systems of a task share: its data and targets, the LLM, its item vectors, what is read of the events.

Each is made when it is first asked for, and once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from penchant.data.provenance import LeakCheck
from penchant.data.split import Split
from penchant.evaluation.leaks import check_reading, check_split, check_weights
from penchant.evaluation.tasks import Asked, Task, asked_of, read_data, split_of
from penchant.interest.inputs import Columns, Reading
from penchant.interest.vectors import Scaling, default_layer, embed_items, item_vectors
from penchant.interest.words import Words, read_events
from penchant.prompt import Templates
from penchant.recommend import Stages

if TYPE_CHECKING:
    from penchant.engine import Engine


class Prepared:
    """A task and what is made of it. ``load`` brings the LLM, ``data_dir`` holds the data sets' folders."""

    task: Task
    load: Callable[[], Engine]
    data_dir: Path | None
    stages: Stages

    @cached_property
    def split(self) -> Split:
        return split_of(self.task, read_data(self.task, self.data_dir))

    @cached_property
    def asked(self) -> Asked:
        return asked_of(self.task, self.split, self.data_dir)

    @cached_property
    def engine(self) -> Engine:
        engine = self.load()
        self.checked += check_weights(engine.source, self.split)
        return engine

    @cached_property
    def checked(self) -> LeakCheck:
        """What of the leak check stands in every table."""
        return check_split(self.split, self.asked.targets)

    @cached_property
    def templates(self) -> Templates:
        return Templates(None)

    @cached_property
    def texts(self) -> list[str]:
        items = self.split.dataset.items.to_dict(as_series=False)
        return self.templates.item_texts(items, self.split.log.item_ids).texts

    @cached_property
    def layer(self) -> int:
        return default_layer(self.engine.n_layers) if self.task.fit.layer is None else self.task.fit.layer

    @cached_property
    def raw_vectors(self) -> NDArray[np.float32]:
        """LLM vectors of the items as they come, (n_items, d)."""
        fit = self.task.fit.model_copy(update={"layer": self.layer})
        done = self.stages("embed items", len(self.texts) * max(1, len(fit.fields)))
        return embed_items(
            self.engine, self.split.dataset.items, self.texts, fit, self.templates.hash("item"), progress=done
        )

    @cached_property
    def vectors(self) -> NDArray[np.float32]:
        """The same, scaled as the task says."""
        return Scaling.fit(self.raw_vectors, self.task.fit.scale).apply(self.raw_vectors)

    @cached_property
    def events(self) -> tuple[Columns, Reading, Words | None]:
        """What our encoder reads of events beside their items."""

        def embed(texts: Sequence[str]) -> NDArray[np.float32]:
            done = self.stages("embed the users' words", len(texts))
            return item_vectors(self.engine, texts, layer=self.layer, pooling=self.task.fit.pooling, progress=done)

        columns, reading, words = read_events(self.split, self.task.fit.encoder, embed)
        check_reading(self.split, columns, reading, self.asked.targets)
        return columns, reading, words
