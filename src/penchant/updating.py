"""What a served model has learnt of users and items since it was fitted: events and items that come and go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from penchant import schema
from penchant.errors import ConfigError, DataError
from penchant.files import is_text
from penchant.filters import indices
from penchant.interest.behaviour import Behaviour
from penchant.interest.vectors import embed_items
from penchant.journal import Journal
from penchant.live import Event, LiveEvents, checked_items, packed, unpacked
from penchant.lookup import find_user
from penchant.run_folder import JOURNAL
from penchant.serving import Served


@dataclass(eq=False)
class Updated(Served):
    """A served model that takes in what happens. Each addition is a record; ``live`` holds them, oldest first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        interactions = self.split.dataset.interactions
        middle = interactions[schema.TIME].median()  # one event without a time, at 0, says nothing of the others
        self._events = LiveEvents(dict(interactions.schema), int(middle) if isinstance(middle, int | float) else 0)
        self._behaviours: dict[str, Behaviour] = {}  # of users with events since the fit
        self._since = np.zeros(len(self.texts))  # events of each item since the fit
        self._journal: Journal | None = None
        additions, self.live = self.live, []
        for record in additions:
            self._replay(record)

    def knows(self, user_id: str) -> bool:
        """Whether the model was given this user's events, at the fit or since."""
        return str(user_id) in self._behaviours or str(user_id) in self.log.user_index

    def user_ids(self) -> list[str]:
        """All whom ``knows`` knows: those of the fit, then those who came since, in the order of their first event."""
        return [*self.log.user_ids, *(name for name in self._behaviours if name not in self.log.user_index)]

    def behaviour(self, user_id: str) -> Behaviour:
        """Everything a user did up to now, oldest first; DataError where the model was given no such user."""
        user_id = str(user_id)
        if user_id in self._behaviours:
            return self._behaviours[user_id]
        return self.reading.of(self.log.all_of(find_user(self.log, user_id)))

    def update(self, user_id: str, events: Sequence[Event] | pl.DataFrame) -> None:
        """Take in new events of a user, known or new: the next answer counts them.

        ``events``: dicts (or a DataFrame) with item_id and, where known, timestamp (datetime or integer microseconds
        UTC; default: now), event_type, rating and whatever other columns the interactions have. They are placed by
        their time. No LLM is asked, unless the encoder reads words and an event has some. Nothing is retrained. In a
        run that was saved or loaded they are on disk when this returns. DataError names the first event that can't be
        used, and then none is taken.
        """
        if not isinstance(user_id, str | int | np.integer) or not str(user_id).strip() or not is_text(str(user_id)):
            raise DataError(f"{user_id!r} is no user id", where="update", remedy="give a text that is not empty")
        user_id = str(user_id)
        taken = self._events.checked(events, self.item_index, user_id)
        if not taken:
            return
        texts = [event[name] for event in taken for name in self.columns.words if event.get(name)]
        new = [text for text in dict.fromkeys(texts) if text.strip() and text not in self.word_rows]
        record: dict[str, Any] = {"user": user_id, "events": taken}
        if new and self.words is not None:
            record["words"] = {"texts": new, "vectors": packed(self.words.scaling.apply(self._embed(new)))}
        self._keep(record)

    def add_items(self, items: Sequence[Mapping[str, Any]] | pl.DataFrame) -> None:
        """Embed new items and serve them at once, from their text alone: dicts (or a DataFrame) with item_id, title and
        whatever other columns the items have.

        Asks the LLM for their vectors. In a run that was saved or loaded they are on disk when this returns. DataError
        names the first item that can't be used, and then none is taken; ConfigError where the encoder reads no text.
        """
        rows = checked_items(items, self.split.dataset.items, self.item_index)
        if not len(rows):
            return
        if self.encoder.project is None:
            raise ConfigError(
                "the encoder reads IDs alone, so an item it was not trained on has no vector",
                where="add_items",
                remedy="fit with use_text",
            )
        texts = self.templates.item_texts(rows.to_dict(as_series=False), rows[schema.ITEM].to_list()).texts
        vectors = embed_items(self._embedder(), rows, texts, self.config, self.templates.hash("item"))
        self._keep({"items": rows.to_dicts(), "texts": texts, "vectors": packed(vectors)})

    def remove_items(self, item_ids: Sequence[str]) -> None:
        """Never recommend these items again, from now on; histories that hold them are read as before.

        In a run that was saved or loaded that is on disk when this returns. DataError where one is unknown.
        """
        names = item_ids if isinstance(item_ids, str) else [str(name) for name in item_ids]
        indices(names, self.item_index, "remove_items")
        if names:
            self._keep({"removed": names})

    def _popularity(self) -> NDArray[np.float64]:
        """Events of each item, at the fit and since, (n_items,)."""
        return super()._popularity() + self._since

    def attach(self, folder: Path) -> None:
        """From now on updates are written to this run's journal, which holds all there were up to now."""
        if self._journal is not None:
            self._journal.close()
        # Absolute: the process may work elsewhere by the time of an update.
        self._journal = Journal(folder.absolute() / JOURNAL, follows=len(self.live), run=self.run)

    def _keep(self, record: dict[str, Any]) -> None:
        """First on disk, then in memory: what was answered once is answered again after a crash."""
        if self._journal is not None:
            self._journal.append(record)
        self._replay(record)

    def _replay(self, record: dict[str, Any]) -> None:
        self.live.append(record)
        if "items" in record:
            self._add_items(record)
            return
        if "removed" in record:
            self.removed[[self.item_index[name] for name in record["removed"]]] = True
            return
        user = record["user"]
        if "words" in record:
            first = self.encoder.add_words(unpacked(record["words"]["vectors"]))
            self.word_rows |= {text: first + i for i, text in enumerate(record["words"]["texts"])}
        self._events.add(user, record["events"])
        for event in record["events"]:
            self._since[self.item_index[event[schema.ITEM]]] += 1
        base = self.split.dataset.interactions
        at = self.log.user_index.get(user)
        part = slice(0, 0) if at is None else self.log.all_of(at)
        events = self._events.of(user, base[part])
        words = None
        if self.columns.words:
            rows = [[self.word_rows.get(text or "", -1) for text in column] for column in self.columns.texts(events)]
            words = np.array(rows, dtype=np.int32).T
        item = np.array([self.item_index[i] for i in events[schema.ITEM]], dtype=np.int32)
        self._behaviours[user] = Behaviour(item, self.columns.codes(events), words)

    def _add_items(self, record: Mapping[str, Any]) -> None:
        rows = pl.DataFrame(record["items"], schema=self.items.schema)
        vectors = unpacked(record["vectors"])
        first = self.encoder.add_items(self.scaling.apply(vectors))
        self.items = pl.concat([self.items, rows])
        self.item_index |= {name: first + i for i, name in enumerate(rows[schema.ITEM])}
        self.texts = [*self.texts, *record["texts"]]
        self.vectors = np.concatenate([self.vectors, vectors])
        self.removed = np.concatenate([self.removed, np.zeros(len(rows), dtype=bool)])
        self._since = np.concatenate([self._since, np.zeros(len(rows))])
        if self.prior is not None:
            self.prior = np.concatenate([self.prior, np.full(len(rows), np.nan)])
        self.index.add(self.encoder.item_matrix()[first:])
        self._trie = self._ranker = None
