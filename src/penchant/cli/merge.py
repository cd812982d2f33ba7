"""``penchant merge``: an adapter into a plain model that anything can serve."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def merge_command(
    adapter: Annotated[Path, typer.Argument(help="A peft adapter's folder.")],
    out: Annotated[Path, typer.Option(help="Folder of the merged model.")],
    base: Annotated[str | None, typer.Option(help="The base model, by default the one the adapter names.")] = None,
    dtype: Annotated[str, typer.Option(help="What it is saved as: bfloat16, float16 or float32.")] = "bfloat16",
) -> None:
    """Merge in float32 from the unquantised base, and say how far scores moved. Prints the folder last."""
    from penchant.engine.noise import quiet_libraries

    quiet_libraries()
    from penchant.training.merge import merge

    merged = merge(adapter, out, base=base, dtype=dtype)  # type: ignore[arg-type]
    typer.echo(
        f"scores moved by {merged.mean_moved:.2g} nats a text on average and {merged.max_moved:.2g} at most, "
        f"saved as {merged.dtype}"
    )
    typer.echo(str(merged.folder))
