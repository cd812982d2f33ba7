"""What an adapter of ours was trained with, kept beside it, so that nobody serves it with another template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from penchant.errors import ConfigError
from penchant.files import read_json
from penchant.prompt import Templates

CARD = "penchant.json"


def read_card(adapter: str | Path | None) -> dict[str, Any] | None:
    """The card of an adapter's folder; None where the adapter is not one of ours (or only a hub id)."""
    if adapter is None or not (Path(adapter) / CARD).is_file():
        return None
    card = read_json(Path(adapter) / CARD)
    return card if isinstance(card, dict) else None


def check_templates(adapter: str | Path | None, templates: Templates) -> None:
    """ConfigError where an adapter of ours was trained with another text of a template than it would be served with."""
    card = read_card(adapter)
    if card is None:
        return
    for name, trained in card.get("templates", {}).items():
        if templates.hash(name) != trained:
            raise ConfigError(
                f"was trained with another text of the template {name!r}",
                where=str(adapter),
                remedy=f"give its own templates: --prompts {Path(adapter or '') / 'prompts'}, or train it again",
            )
