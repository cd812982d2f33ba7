"""Settings from a YAML file and from options of the command line, into a recipe's typed model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from penchant.errors import ConfigError
from penchant.resources import config_file, config_names
from penchant.training.config import TrainConfig

Config = TypeVar("Config", bound=TrainConfig)


def read_settings(kind: type[Config], path: Path | None, options: Sequence[str] = ()) -> Config:
    """The settings of a YAML file, or of the shipped one of that name, with ``options`` over them: ["--lora.r", "8"].

    An option's name is its field's, with - for _ and a dot into a nested one; its value is read as YAML.
    """
    values: Any = {}
    if path is not None:
        path = config_file(path)
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: not UTF-8, or a date like 2020-99-99
            raise ConfigError(
                f"cannot be read as YAML: {error}",
                where=str(path),
                remedy=f"give a file, or the name of one of: {config_names(fit=False)}",
            ) from error
        if not isinstance(values, dict):
            raise ConfigError(
                "holds no mapping of settings", where=str(path), remedy="write e.g. `learning_rate: 1e-3`"
            )
    for name, value in _pairs(options):
        _set(values, kind, name, value)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]) or "settings"
        raise ConfigError(
            f"{name}: {first['msg']} (given: {first['input']!r})",
            where=str(path) if path else "finetune",
            remedy=f"the settings are: {', '.join(kind.model_fields)}",
        ) from error


def describe(kind: type[TrainConfig]) -> str:
    """One line a setting: its option, default and meaning."""
    lines = []
    for name, field in kind.model_fields.items():
        inner = field.annotation if isinstance(field.annotation, type) else None
        if inner is not None and issubclass(inner, BaseModel):
            lines += [_line(f"{name}.{n}", f.default, f.description) for n, f in inner.model_fields.items()]
        else:
            lines.append(_line(name, field.get_default(call_default_factory=True), field.description))
    return "\n".join(lines)


def _line(name: str, default: Any, description: str | None) -> str:
    return f"  --{name.replace('_', '-'):<26} {default!s:<16} {description or ''}".rstrip()


def _pairs(options: Sequence[str]) -> list[tuple[str, Any]]:
    out = []
    rest = list(options)
    while rest:
        option = rest.pop(0)
        if not option.startswith("--"):
            raise ConfigError(f"{option!r} is no option", where="finetune", remedy="write settings as --name value")
        name, equals, text = option[2:].partition("=")
        if not equals:
            if not rest or (rest[0].startswith("--")):
                raise ConfigError(f"{option} has no value", where="finetune", remedy=f"write {option} VALUE")
            text = rest.pop(0)
        try:
            out.append((name.replace("-", "_"), _value(text)))
        except yaml.YAMLError as error:
            raise ConfigError(f"{option}: {text!r} is no value: {error}", where="finetune") from error
    return out


def _value(text: str) -> Any:
    if "e" in text.lower():
        with suppress(ValueError):
            return float(text)  # YAML 1.1 reads 1e-3 as text
    try:
        return yaml.safe_load(text)
    except ValueError:
        return text  # 2020-99-99 looks like a date and is none: whoever wants a date will say so


def _set(values: dict[str, Any], kind: type[TrainConfig], name: str, value: Any) -> None:
    outer, dot, inner = name.partition(".")
    if outer not in kind.model_fields:
        raise ConfigError(
            f"no setting is called {outer}",
            where="finetune",
            remedy=f"the settings are: {', '.join(kind.model_fields)}",
        )
    if not dot:
        values[outer] = value
        return
    nested = values.get(outer) or {}
    if not isinstance(nested, dict):
        raise ConfigError(f"{outer} is no group of settings", where="finetune")
    values[outer] = {**nested, inner: value}
