"""From prompts and item texts to token ids, with template and data kept apart.

A prompt is a sequence of segments. Template segments are ours: their control tokens (``<|im_end|>``
and the like) are meant. Data segments come from outside (titles, reviews, histories): nothing in
them may become a control token. Each segment is tokenised on its own, so a merge of the tokenizer
never crosses the seam, and an item has the same token sequence in a prompt, in the catalogue's trie,
in scoring and in a training label.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import jinja2

from penchant.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Longer data is cut here: no catalogue names its items with more, and one 10,000-character title
# must not push a whole history out of the prompt.
MAX_DATA_CHARS = 200

# Characters that reorder or hide what follows them; the joiners of emoji and scripts stay.
_BIDI = re.compile("[\u202a-\u202e\u2066-\u2069\u200e\u200f\ufeff]")


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a prompt: ``is_data`` is True for text from outside, False for the template's own."""

    text: str
    is_data: bool


@dataclass(frozen=True, slots=True)
class Prompt:
    """What an engine runs. With ``chat`` the segments are the user's message, wrapped by the model's chat template."""

    segments: tuple[Segment, ...]
    chat: bool = False
    system: str | None = None

    @property
    def text(self) -> str:
        """The segments joined, for reading; never tokenise this."""
        return "".join(segment.text for segment in self.segments)


def clean(value: object, limit: int | None = MAX_DATA_CHARS) -> str:
    """One line of visible text from any value.

    Whitespace runs (newlines included) become one space; control, bidirectional-override and lone
    surrogate characters go; past ``limit`` characters the text is cut at a word's end where one is
    near, and an ellipsis says so.
    """
    text = " ".join(str(value).split())
    if not text.isascii() or not text.isprintable():
        text = _BIDI.sub("", text)
        text = "".join(c for c in text if unicodedata.category(c) not in ("Cc", "Cs"))
        text = " ".join(text.split())
    if limit is not None and len(text) > limit:
        cut = text[: limit - 1]
        space = cut.rfind(" ")
        text = (cut[:space] if space > limit // 2 else cut) + "…"
    return text


class TextCodec:
    """A tokenizer behind the rules above. ``tokenizer`` is any Hugging Face tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        added = {token.content: id_ for id_, token in tokenizer.added_tokens_decoder.items()}
        special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        # Added runs of blanks (GPT-NeoX and others) are ordinary text, not control.
        control = {text: id_ for text, id_ in {**added, **special}.items() if text.strip()}
        self.control_ids = frozenset(int(i) for i in control.values())
        # An overlapping match needs a look-ahead; the longest first so that none is hidden by its own prefix.
        words = sorted((re.escape(t) for t in control if len(t) > 1), key=len, reverse=True)
        self._control = re.compile(f"(?=({'|'.join(words)}))") if words else None
        self.bos_ids = self._leading_ids()
        self._encode_cached = lru_cache(maxsize=65536)(self._encode)

    def _leading_ids(self) -> tuple[int, ...]:
        """What the tokenizer itself puts before a text (BOS for some families, nothing for others)."""
        plain = list(self.tokenizer("a", add_special_tokens=False)["input_ids"])
        full = list(self.tokenizer("a", add_special_tokens=True)["input_ids"])
        for start in range(len(full) - len(plain) + 1):
            if full[start : start + len(plain)] == plain:
                return tuple(full[:start])
        raise ModelError(
            "the tokenizer changes a text's own tokens when it adds special ones",
            where=type(self.tokenizer).__name__,
            remedy="use a tokenizer that only puts tokens before or after the text",
        )

    def _encode(self, text: str, is_data: bool) -> tuple[int, ...]:
        if not text:
            return ()
        pieces = [text]
        if is_data and self._control is not None and self._control.search(text):
            # Cut every control word after its first character: no piece holds a whole one any more.
            cuts = sorted({found.start() + 1 for found in self._control.finditer(text)})
            pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        ids: list[int] = []
        for piece in pieces:
            ids.extend(self.tokenizer(piece, add_special_tokens=False)["input_ids"])
        if is_data:
            self._refuse_control(text, ids)
        return tuple(ids)

    def _refuse_control(self, text: str, ids: Iterable[int]) -> None:
        found = self.control_ids.intersection(ids)
        if found:
            raise DataError(
                f"text {text[:80]!r} would become the control token {self.tokenizer.convert_ids_to_tokens(min(found))}",
                where="tokenising data",
                remedy="change that text: this tokenizer has no other way to write it",
            )

    def encode_data(self, text: str) -> tuple[int, ...]:
        """Ids of text from outside; never a control token, no BOS."""
        return self._encode_cached(text, True)

    def encode_template(self, text: str) -> tuple[int, ...]:
        """Ids of our own text; control tokens in it are meant, no BOS."""
        return self._encode_cached(text, False)

    def encode_items(self, texts: Sequence[str], terminator: str) -> list[tuple[int, ...]]:
        """One canonical token sequence an item: its text, then the terminator, each tokenised on its own."""
        end = self.encode_template(terminator)
        bulk = [i for i, text in enumerate(texts) if self._control is None or not self._control.search(text)]
        ids: list[tuple[int, ...]] = [()] * len(texts)
        if bulk:
            encoded = self.tokenizer([texts[i] for i in bulk], add_special_tokens=False)["input_ids"]
            for i, row in zip(bulk, encoded, strict=True):
                self._refuse_control(texts[i], row)
                ids[i] = tuple(row)
        for i in set(range(len(texts))).difference(bulk):
            ids[i] = self._encode(texts[i], True)
        return [row + end for row in ids]

    def encode(self, prompt: Prompt | str) -> list[int]:
        """All ids of a prompt, BOS first where the tokenizer has one; a plain string is all data."""
        if isinstance(prompt, str):
            return [*self.bos_ids, *self.encode_data(prompt)]
        before, after = ("", "")
        ids: list[int] = []
        if prompt.chat:
            # The chat template writes its own BOS.
            before, after = self._chat_frame(prompt.system)
        else:
            ids.extend(self.bos_ids)
        ids.extend(self.encode_template(before))
        for segment in prompt.segments:
            ids.extend(self._encode_cached(segment.text, segment.is_data))
        ids.extend(self.encode_template(after))
        return ids

    @lru_cache(maxsize=8)  # noqa: B019 - a codec lives as long as its engine
    def _chat_frame(self, system: str | None) -> tuple[str, str]:
        """What the model's chat template writes before and after a user's message."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise ModelError(
                "this model has no chat template, and the prompt asks for one (format: chat)",
                where=type(self.tokenizer).__name__,
                remedy="use a template with `format: plain`, or a model tuned for chat",
            )
        marker = "penchant-message-goes-here"
        # The system text is always given: some templates (SmolLM2's, Qwen's) else write one of their own.
        messages = [{"role": "system", "content": system or "You are a helpful assistant."}]
        messages.append({"role": "user", "content": marker})
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except jinja2.TemplateError as error:
            raise ModelError(
                f"the model's chat template refuses a system and a user message: {error}",
                where=type(self.tokenizer).__name__,
                remedy="use a template with `format: plain`",
            ) from error
        if not isinstance(text, str) or text.count(marker) != 1:
            raise ModelError(
                "the chat template does not write the user's message exactly once",
                where=type(self.tokenizer).__name__,
                remedy="use a template with `format: plain`",
            )
        before, after = text.split(marker)
        return before, after
