"""Prompt templates: load, check, render, fit the token budget.

A template is one Jinja file whose first comment is its header (YAML: purpose, version, format,
variables, and for some a terminator, labels or a system text). It runs in Jinja's sandbox with
StrictUndefined. What a template writes itself and what it is given are kept as separate segments
(see tokens.py), so data can hold Jinja syntax or control tokens and stays data.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2
import yaml
from jinja2 import meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import BaseModel, ConfigDict, Field

from penchant.errors import ConfigError, DataError
from penchant.files import sha256_text
from penchant.resources import shipped
from penchant.tokens import MAX_DATA_CHARS, Prompt, Segment, clean

NAMES = ("item", "user", "next_item", "yes_no", "choose")
# What each template may be given. `item` is given the item's own columns instead.
_GIVEN = {
    "user": {"history"},
    "next_item": {"history"},
    "yes_no": {"history", "item"},
    "choose": {"history", "candidates"},
}


# What turns text already written, with values in it, into a value again.
_CAPTURING = (
    nodes.Macro,
    nodes.CallBlock,
    nodes.FilterBlock,
    nodes.AssignBlock,
    nodes.Block,
    nodes.Extends,
    nodes.Import,
    nodes.FromImport,
)


# Undefined attributes, what the sandbox refuses, and what a template's own expressions run into.
_RENDERING = (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)


class Header(BaseModel):
    """The YAML in a template's first comment."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    purpose: str = Field(description="what the template is for, in a sentence")
    version: int = Field(description="raised by hand at each change of meaning")
    format: Literal["plain", "chat"] = Field(description="chat: wrapped by the model's own chat template")
    variables: list[str] = Field(description="every variable the template uses, and no other")
    terminator: str = Field(default="\n", description="what ends an item's text; part of what is scored")
    system: str | None = Field(default=None, description="system message, format chat only")
    labels: list[str] = Field(default_factory=list, description="the answers scored, each a single token")


@dataclass(frozen=True, slots=True)
class Rendered:
    """A prompt, its length in tokens (None when not counted), and how many of the oldest events were dropped."""

    prompt: Prompt
    n_tokens: int | None
    dropped: int


@dataclass(frozen=True, slots=True)
class ItemTexts:
    """The items' texts in catalogue order, and how many were cut to MAX_DATA_CHARS."""

    texts: list[str]
    truncated: int


class Templates:
    """The project's templates, each overridden by a file of the same name in the user's ``folder``."""

    def __init__(self, folder: Path | str | None = None) -> None:
        paths = [shipped("prompts")]
        if folder is not None:
            if not Path(folder).is_dir():
                raise ConfigError("no such folder of templates", where=str(folder), remedy="check --prompts")
            paths.insert(0, Path(folder))
            there = sorted(p.name for p in Path(folder).glob("*.jinja"))
            unknown = [name for name in there if Path(name).stem not in NAMES]
            if unknown or not there:
                raise ConfigError(
                    f"no template is called {', '.join(unknown)}" if unknown else "holds no template",
                    where=str(folder),
                    remedy=f"the templates are: {', '.join(f'{name}.jinja' for name in NAMES)}",
                )
        self.folder = None if folder is None else Path(folder)
        self._sources: dict[str, str] = {}
        for name in NAMES:
            path = next(p / f"{name}.jinja" for p in paths if (p / f"{name}.jinja").is_file())
            self._sources[name] = _read(path)
        self._set_up({name: str(_first(paths, name)) for name in NAMES})

    @classmethod
    def from_sources(cls, sources: Mapping[str, str], where: str) -> Templates:
        """Templates saved with a run: ``sources`` maps each of NAMES to its file's text."""
        templates = cls.__new__(cls)
        templates.folder = None
        missing = [name for name in NAMES if name not in sources]
        if missing:
            raise ConfigError(f"templates missing: {', '.join(missing)}", where=where, remedy="make the run again")
        templates._sources = {name: sources[name] for name in NAMES}
        templates._set_up({name: f"{where}:{name}" for name in NAMES})
        return templates

    def _set_up(self, where: dict[str, str]) -> None:
        self._where = where
        self.headers: dict[str, Header] = {}
        bodies: dict[str, str] = {}
        for name, source in self._sources.items():
            self.headers[name], bodies[f"{name}.jinja"] = _split_header(source, where[name])
        self._marker = f"\x00{secrets.token_hex(16)}:"
        self._environment = ImmutableSandboxedEnvironment(
            loader=jinja2.DictLoader(bodies),
            undefined=jinja2.StrictUndefined,
            finalize=self._keep_apart,
            autoescape=False,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
        )
        self._templates: dict[str, jinja2.Template] = {}
        for name in NAMES:
            self._check(name, bodies)

    @property
    def sources(self) -> dict[str, str]:
        """Each template's file text, to be saved with a model."""
        return dict(self._sources)

    def hash(self, *names: str) -> str:
        """SHA-256 of the templates' texts (all of them, or those named); travels with models and outputs."""
        return sha256_text(*(part for name in (names or NAMES) for part in (name, self._sources[name])))

    def _check(self, name: str, bodies: dict[str, str]) -> None:
        where, header = self._where[name], self.headers[name]
        try:
            used: set[str] = set()
            todo, seen = [f"{name}.jinja"], set[str]()
            while todo:
                file = todo.pop()
                seen.add(file)
                tree = self._environment.parse(bodies[file])
                if captured := next(tree.find_all(_CAPTURING), None):
                    raise ConfigError(
                        f"uses {type(captured).__name__} in line {captured.lineno} after the header",
                        where=where,
                        remedy="write it out: were text once written a value again, data could pass as template",
                    )
                used |= meta.find_undeclared_variables(tree)
                for reference in meta.find_referenced_templates(tree):
                    if reference not in bodies:
                        raise ConfigError(
                            f"includes {reference!r}, which is not one of the templates",
                            where=where,
                            remedy=f"include one of {', '.join(bodies)} by its literal name",
                        )
                    if reference not in seen:
                        todo.append(reference)
            self._templates[name] = self._environment.get_template(f"{name}.jinja")
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(
                f"not a valid Jinja template: {error.message}",
                where=f"{where}, line {error.lineno} after the header",
                remedy="mend the template's syntax",
            ) from error
        undeclared = sorted(used - set(header.variables))
        if undeclared:
            raise ConfigError(
                f"uses undeclared variable {', '.join(undeclared)}",
                where=where,
                remedy=f"name it under `variables:` in the header (now {header.variables}), or take it out",
            )
        impossible = sorted(set(header.variables) - _GIVEN[name]) if name in _GIVEN else []
        if impossible:
            raise ConfigError(
                f"declares {', '.join(impossible)}, which this template is never given",
                where=where,
                remedy=f"`{name}` is given: {', '.join(sorted(_GIVEN[name]))}",
            )
        if header.system is not None and header.format != "chat":
            raise ConfigError("has a system text but format plain", where=where, remedy="set `format: chat`")
        if name == "next_item":
            self._check_prefix_closed()

    def _check_prefix_closed(self) -> None:
        """n items must render as the beginning of n+1, each item followed by exactly the terminator."""
        header, where = self.headers["next_item"], self._where["next_item"]
        rendered = [
            self.render("next_item", {"history": [{"text": f"item {j}"} for j in range(n)]}).prompt.segments
            for n in range(4)
        ]
        for n in range(3):
            grown = (*rendered[n], Segment(f"item {n}", True), Segment(header.terminator, False))
            if rendered[n + 1] != grown:
                raise ConfigError(
                    f"is not prefix-closed: with {n + 1} items it must continue its text for {n} by the item "
                    f"and the terminator {header.terminator!r}",
                    where=where,
                    remedy="write nothing after the loop, and only `{{ event.text }}` and the terminator inside it",
                )
        if header.format != "plain":
            raise ConfigError("must have format plain", where=where, remedy="set `format: plain`")

    @jinja2.pass_context
    def _keep_apart(self, context: jinja2.runtime.Context, value: object) -> str:
        """Jinja's finalize: put a marker where a value goes and keep the value itself aside."""
        if isinstance(value, jinja2.Undefined):
            str(value)  # StrictUndefined raises here, with the variable's name
        kept: list[str] = context["_kept"]
        kept.append(clean(value))
        return f"{self._marker}{len(kept) - 1}\x00"

    def _segments(self, name: str, variables: Mapping[str, Any]) -> tuple[Segment, ...]:
        kept: list[str] = []
        try:
            text = self._templates[name].render({**variables, "_kept": kept})
        except _RENDERING as error:
            raise ConfigError(
                f"{type(error).__name__}: {error}",
                where=self._where[name],
                remedy="use only what the header's variables hold",
            ) from error
        segments: list[Segment] = []
        for i, part in enumerate(text.split(self._marker)):
            index, _, rest = ("", "", part) if i == 0 else part.partition("\x00")
            if i > 0 and kept[int(index)]:
                segments.append(Segment(kept[int(index)], True))
            if rest:
                segments.append(Segment(rest, False))
        return tuple(segments)

    def render(
        self,
        name: str,
        variables: Mapping[str, Any],
        *,
        count: Callable[[Prompt], int] | None = None,
        budget: int | None = None,
    ) -> Rendered:
        """Render a template; with ``count`` (tokens of a prompt) and ``budget`` (tokens) make it fit.

        Too long, it loses the oldest events of ``variables["history"]`` first, and nothing else: where
        the rest alone is over the budget it is a DataError that says by how much.
        """
        header = self.headers[name]

        def with_last(n: int) -> Prompt:
            given = dict(variables)
            if "history" in given:
                given["history"] = history[len(history) - n :]
            return Prompt(self._segments(name, given), chat=header.format == "chat", system=header.system)

        history: Sequence[Any] = variables.get("history", ())
        prompt = with_last(len(history))
        if count is None or budget is None:
            return Rendered(prompt, None, 0)
        n_tokens = count(prompt)
        if n_tokens <= budget:
            return Rendered(prompt, n_tokens, 0)
        fits, too_many = -1, len(history)
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            if count(with_last(middle)) <= budget:
                fits = middle
            else:
                too_many = middle
        if fits < 0:
            need = count(with_last(0))
            raise DataError(
                f"the prompt without any history has {need} tokens, {need - budget} over the budget of {budget}",
                where=self._where[name],
                remedy="raise the token budget, shorten the template, or give fewer candidates",
            )
        prompt = with_last(fits)
        return Rendered(prompt, count(prompt), len(history) - fits)

    def item_texts(self, items: Mapping[str, Sequence[Any]], ids: Sequence[str]) -> ItemTexts:
        """Render `item` for a whole catalogue: ``items`` maps column names to values, one an item.

        A column the template wants and the items lack, or an item whose text is empty, is an error.
        """
        wanted = self.headers["item"].variables
        missing = [name for name in wanted if name not in items]
        if missing:
            raise ConfigError(
                f"wants the item column {', '.join(missing)}",
                where=self._where["item"],
                remedy=f"the items have: {', '.join(items)}",
            )
        columns = [items[name] for name in wanted]
        texts: list[str] = []
        truncated = 0
        for row, item_id in enumerate(ids):
            given = {
                name: "" if column[row] is None else column[row] for name, column in zip(wanted, columns, strict=True)
            }
            whole = "".join(segment.text for segment in self._segments("item", given))
            text = clean(whole)
            truncated += any(len(clean(v, None)) > MAX_DATA_CHARS for v in (*given.values(), whole))
            if not text:
                raise DataError(
                    f"item {item_id} has an empty text", where=self._where["item"], remedy="give it a title or drop it"
                )
            texts.append(text)
        return ItemTexts(texts, truncated)


def _first(paths: Sequence[Path], name: str) -> Path:
    return next(p / f"{name}.jinja" for p in paths if (p / f"{name}.jinja").is_file())


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"not UTF-8 ({error})", where=str(path), remedy="save the template as UTF-8") from error


def _split_header(source: str, where: str) -> tuple[Header, str]:
    start = source.lstrip()
    comment, found, body = start.partition("#}")
    if not start.startswith("{#") or not found:
        raise ConfigError(
            "has no header", where=where, remedy="begin the file with {# purpose, version, format, variables #} as YAML"
        )
    try:
        header = Header.model_validate(yaml.safe_load(comment[2:]))
    except (yaml.YAMLError, ValueError) as error:  # ValueError: pydantic's, or a YAML date like 2020-99-99
        raise ConfigError(
            f"has a header that is not valid: {error}", where=where, remedy="see prompts/ for examples"
        ) from error
    return header, body.removeprefix("\n")
