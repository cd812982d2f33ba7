"""``penchant fetch NAME``: get a model or a dataset, once."""

from __future__ import annotations

from typing import Annotated

import typer

from penchant.fetch import KNOWN, fetch
from penchant.files import read_json

_NAMES = ", ".join(KNOWN)


def fetch_command(
    name: Annotated[str, typer.Argument(help=f"One of: {_NAMES}.", show_default=False)],
    force: Annotated[bool, typer.Option("--force", help="Fetch again, over what the cache holds.")] = False,
) -> None:
    """Fetch a model or a dataset into the cache. The last line printed is its folder.

    The cache is PENCHANT_CACHE, or else the user's cache folder. Once fetched, no network is needed.
    """
    folder = fetch(name, force=force)
    manifest = read_json(folder / "manifest.json")
    for key in ("weights", "source", "licence"):
        if key in manifest:
            typer.echo(f"{key}: {manifest[key]}", err=True)
    typer.echo(str(folder))
