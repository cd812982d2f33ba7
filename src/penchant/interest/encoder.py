"""The interest encoder: behaviours and contents as LLM vectors in, interest and item vectors out.

u = E_u(what the user did), c = E_c(what the item is), r(u, c) = R(u, c).

An item is its LLM text vector through a trained projection, plus an ID embedding. A history is read by a causal
transformer over these (SASRec, Kang and McAuley 2018, section 3), a GRU or a recency-weighted mean. With IDs alone and
the transformer it is SASRec. Beside what is trained may stand the likeness of texts as the LLM sees them (match.py),
and the memory of what stood near what (neighbours.py).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from scipy import sparse
from torch import nn
from torch.nn import functional as F

from penchant.errors import ConfigError, StorageError
from penchant.interest.behaviour import Batch, Behaviour, History, pad
from penchant.interest.config import EncoderConfig
from penchant.interest.match import TextMatch
from penchant.interest.neighbours import Neighbours
from penchant.interest.relevance import Relevance
from penchant.interest.sequence import SEQUENCES, Interests


class InterestEncoder(nn.Module):
    """E_u, E_c and R of one model.

    ``text`` (n_items, d_text) are standardised LLM vectors, or None without text. ``columns`` are the sizes of the
    input columns (codes from 0 to size - 1). ``words`` (n_texts, d_words) are the standardised LLM vectors of the
    users' own words, ``n_words`` how many texts an event may have.
    """

    text: torch.Tensor | None
    words: torch.Tensor | None
    warm: torch.Tensor

    def __init__(
        self,
        config: EncoderConfig,
        n_items: int,
        text: NDArray[np.float32] | None,
        *,
        columns: Sequence[int] = (),
        words: NDArray[np.float32] | None = None,
        n_words: int = 0,
    ) -> None:
        super().__init__()
        self.config = config
        self.n_items = n_items
        self._kept: torch.Tensor | None = None
        self._kept_texts: torch.Tensor | None = None
        # Not parameters and not saved with the weights: the run keeps the vectors themselves.
        self.register_buffer("text", None if text is None else torch.from_numpy(text), persistent=False)
        self.register_buffer("words", None if words is None else torch.from_numpy(words), persistent=False)
        # Items that training knows. The others have no ID: where there is text, it speaks for them alone.
        self.register_buffer("warm", torch.ones(n_items, dtype=torch.bool))
        dim = config.dim
        self.ids = nn.Embedding(n_items, dim) if config.use_ids else None
        self.project = (
            nn.Sequential(nn.Linear(text.shape[1], 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
            if text is not None and config.use_text
            else None
        )
        self.columns = nn.ModuleList(nn.Embedding(size, dim, padding_idx=0) for size in columns)
        self.n_words = n_words
        self.listen = nn.Linear(words.shape[1], dim) if words is not None and n_words else None
        self.sequence = SEQUENCES[config.kind](config)
        self.several = Interests(dim, config.interests) if config.interests > 1 else None
        self.norm = nn.LayerNorm(dim)
        self.relevance = Relevance(config)
        self._make_room(config)
        if self.ids is not None:
            nn.init.normal_(self.ids.weight, std=0.02)

    def _make_room(self, config: EncoderConfig) -> None:
        """For what is fitted beside the trained weights, nothing of it yet."""
        dim, text = config.dim, self.text
        self.match = TextMatch(config.match, dim, text.shape[1]) if config.match and text is not None else None
        self.neighbours = Neighbours(config.near, self.n_items, dim) if config.near else None

    def with_beside(self, config: EncoderConfig) -> InterestEncoder:
        """A copy of what is trained, with room for what ``config``, alike but for that, has beside it."""
        made = copy.deepcopy(self)
        made.config = config
        made._make_room(config)
        return made.eval()

    # -- E_c -----------------------------------------------------------------------------------

    def items(self) -> torch.Tensor:
        """E_c: the representation of every item, (n_items, dim)."""
        parts: list[torch.Tensor] = []
        if self.project is not None:
            parts.append(self.project(self.text))
        if self.ids is not None:
            ids = self.ids.weight
            if self.project is not None:
                keep = self.warm[: len(ids), None].to(ids.dtype)
                if self.training and self.config.id_dropout:
                    # Whole IDs, as inputs and as targets: what is left of such an item is its text.
                    keep = keep * (torch.rand(len(ids), 1, device=ids.device) >= self.config.id_dropout)
                ids = ids * keep
            # Items added later have no ID.
            parts.append(F.pad(ids, (0, 0, 0, self.n_items - len(ids))))
        return torch.stack(parts).sum(0)

    def fork(self, n_items: int, n_words: int) -> InterestEncoder:
        """The same weights (shared) with its first items and texts alone: what is added to one is not in the other."""
        made = copy.copy(self)
        made._buffers = dict(self._buffers)
        made.n_items, made._kept, made._kept_texts = n_items, None, None
        made.text = None if self.text is None else self.text[:n_items]
        made.words = None if self.words is None else self.words[:n_words]
        return made

    def add_items(self, text: NDArray[np.float32]) -> int:
        """Serve new items from their standardised LLM vectors (n, d_text) alone; returns the first one's index."""
        if self.text is None or self.project is None:
            raise ConfigError(
                "the encoder reads IDs alone, so an item it was not trained on has no vector",
                where="add_items",
                remedy="fit with use_text",
            )
        first = self.n_items
        new = torch.from_numpy(text).to(self.text)
        self.text = torch.cat([self.text, new])
        self.n_items += len(text)
        if self._kept is not None:  # the others need not be projected again
            with torch.inference_mode():
                self._kept = torch.cat([self._kept, self.project(new)])
        if self._kept_texts is not None and self.match is not None:
            with torch.inference_mode():
                self._kept_texts = torch.cat([self._kept_texts, self.match.texts(new)])
        return first

    def add_words(self, vectors: NDArray[np.float32]) -> int:
        """Add standardised LLM vectors (n, d_words) of new texts to the table; returns the first one's row."""
        if self.words is None:
            raise ConfigError("the encoder reads no words", where="add_words", remedy="fit with inputs review or query")
        first = len(self.words)
        self.words = torch.cat([self.words, torch.from_numpy(vectors).to(self.words)])
        return first

    # -- E_u -----------------------------------------------------------------------------------

    def forward(self, history: Batch, items: torch.Tensor) -> torch.Tensor:
        """Interest after each event: (n, L, dim), or (n, L, K, dim) for K interests."""
        # Scaled as in SASRec: unscaled, positions drown the items for the first epochs of a sparse log.
        x = items[history.item] * math.sqrt(self.config.dim)
        if history.codes is not None:
            for place, column in enumerate(self.columns):
                x = x + column(history.codes[..., place])
        if history.words is not None and self.listen is not None and self.words is not None:
            for place in range(self.n_words):
                at = history.words[..., place]
                x = x + self.listen(self.words[at.clamp(min=0)]) * (at >= 0)[..., None]
        states: torch.Tensor = self.sequence(x)
        if self.several is not None:
            states = self.several(states)
        return self.norm(states)

    def batch(self, rows: Sequence[History], *, value: bool = False) -> Batch:
        """Histories as this encoder reads them, on its device; the caller cuts them to ``max_length``."""
        return pad(rows, len(self.columns), self.n_words, value=value).to(self.norm.weight.device)

    def train(self, mode: bool = True) -> InterestEncoder:
        """As of every module; what was kept for serving is forgotten, for the weights may have changed."""
        self._kept = self._kept_texts = None
        return super().train(mode)

    def _serve(self) -> None:
        if self.training:
            self.eval()

    def _served_items(self) -> torch.Tensor:
        """E_c, computed once until ``train``, ``eval`` or new items: a request must not project the catalogue."""
        if self._kept is None:
            self._kept = self.items()
        return self._kept

    def _served_texts(self, match: TextMatch) -> Any:
        """The items' texts as ``match`` compares them, computed once likewise."""
        if self._kept_texts is None and self.text is not None:
            self._kept_texts = match.texts(self.text)
        return self._kept_texts

    @property
    def matching(self) -> TextMatch | None:
        """The text match, where there is one and validation gave it a say."""
        return self.match if self.match is not None and float(self.match.weight) > 0 else None

    @property
    def width(self) -> int:
        """Dimensions of what ``encode`` and ``item_matrix`` give: ``dim``, and those of the text match."""
        match = self.matching
        return self.config.dim + (0 if match is None else match.extra)

    # -- as numpy, for serving -----------------------------------------------------------------

    @torch.inference_mode()
    def item_matrix(self) -> NDArray[np.float32]:
        """E_c as R compares it, (n_items, width) float32, for an index."""
        self._serve()
        items = self.relevance.items(self._served_items())
        match = self.matching
        if match is not None:
            warm = F.pad(self.warm, (0, self.n_items - len(self.warm)))  # items added later are cold
            items = match.items(items, warm, self._served_texts(match))
        return items.float().cpu().numpy()

    @torch.inference_mode()
    def encode(self, histories: Sequence[History], batch: int = 256) -> NDArray[np.float32]:
        """E_u as R compares it: the interest of each history (oldest event first, none of them empty).

        (n, width) float32; (n, K, width) for K interests.
        """
        self._serve()
        several = (self.config.interests,) if self.config.interests > 1 else ()
        match = self.matching
        out = np.zeros((len(histories), *several, self.width), dtype=np.float32)
        if not len(histories):
            return out
        items = self._served_items()
        whole = [Behaviour.of(history) for history in histories]
        recent = [history[-self.config.max_length :] for history in whole]
        order = sorted(range(len(recent)), key=lambda i: len(recent[i]))
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            read = self.batch([recent[i] for i in rows])
            states = self(read, items)[torch.arange(len(rows)), read.length - 1]
            users = self.relevance.users(states)
            if match is not None:
                users = match.users(users, match.newest([whole[i].item for i in rows], self._served_texts(match)))
            out[rows] = users.float().cpu().numpy()
        return out

    def bonus(self, histories: Sequence[History], interest: NDArray[np.float32]) -> sparse.csr_array | None:
        """What neighbours add to each history's scores, (n, n_items) and nowhere negative; None where they have no say.

        ``interest`` is what ``encode`` makes of the histories.
        """
        near = self.neighbours
        if near is None or not float(near.weight) > 0:
            return None
        found = near.standardised([Behaviour.of(history).item for history in histories])
        # Beside the text match the encoder's own score is standardised already.
        scale = np.ones(len(histories)) if self.matching is not None else near.deviation(interest)
        value = found.data * np.repeat(float(near.weight) * scale, np.diff(found.indptr)).astype(np.float32)
        return sparse.csr_array((value, found.indices, found.indptr), shape=(len(histories), self.n_items))

    @torch.inference_mode()
    def scores(self, interest: NDArray[np.float32], vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """R of every pair, (n, m), without the neighbours' ``bonus``: interests (n, width) or (n, K, width) from
        ``encode``, rows of ``item_matrix``.
        """
        self._serve()
        return self.relevance.pairs(torch.from_numpy(interest), torch.from_numpy(vectors)).numpy()

    # -- on disk -------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write the trained weights as safetensors; the text vectors are the run's to keep."""
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, path)

    @classmethod
    def load(
        cls,
        path: Path,
        config: EncoderConfig,
        n_items: int,
        text: NDArray[np.float32] | None,
        *,
        columns: Sequence[int] = (),
        words: NDArray[np.float32] | None = None,
        n_words: int = 0,
    ) -> InterestEncoder:
        """Read weights written by ``save`` into an encoder of the same shape; StorageError where they don't fit."""
        with torch.random.fork_rng(devices=[]):  # its first weights are thrown away; the caller's randomness is not
            encoder = cls(config, n_items, text, columns=columns, words=words, n_words=n_words)
        try:
            encoder.load_state_dict(load_file(path))
        except (OSError, RuntimeError, SafetensorError) as error:
            raise StorageError(
                f"cannot be read as this encoder: {error}", where=str(path), remedy="make the run again"
            ) from error
        return encoder.eval()
