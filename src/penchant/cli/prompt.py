"""``penchant prompt``: what the model would read for a user, before a token is spent on it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from penchant.errors import ConfigError, DataError


def prompt_command(
    run: Annotated[Path, typer.Argument(help="A folder made by `penchant fit`.")],
    user: Annotated[str, typer.Option(help="A user id.")],
    template: Annotated[
        str | None, typer.Option(help="next_item, user, yes_no or choose; by default what the run asks the LLM.")
    ] = None,
    item: Annotated[
        str | None, typer.Option(help="yes_no: the item asked about; by default the first retrieved.")
    ] = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="Also print each token with its id.")] = False,
) -> None:
    """Print the rendered prompt, its length in tokens, and what was cut."""
    if template not in (None, "next_item", "user", "yes_no", "choose"):
        raise ConfigError(f"unknown template {template!r}", remedy="use next_item, user, yes_no or choose")
    from penchant.engine.noise import quiet_libraries

    quiet_libraries()
    from penchant.filters import indices
    from penchant.rank import MOST_LETTERS
    from penchant.recommend import Recommender

    model = Recommender.load(run)
    asks = {"likelihood": "next_item", "choose": "choose", "yes_no": "yes_no"}[model.config.question]
    template = asks if template is None else template
    if item is not None and template != "yes_no":
        raise ConfigError(f"the template {template} asks about no item", where="--item", remedy="use --template yes_no")
    behaviour = model.behaviour(user)
    history, codec, config = behaviour.item, model.engine.codec, model.config
    if template == "next_item":
        rendered = model.ranker.prompt(history)
    elif template == "user":
        rendered = model.ranker.render("user", history)
    elif item is not None:
        rendered = model.ranker.about(history, indices([item], model.item_index, "--item")[0])
    else:
        retrieved = model.retrieve([behaviour], config.candidates, allowed=model.served(None))[0][0]
        retrieved = retrieved[retrieved >= 0][:MOST_LETTERS]
        if not len(retrieved):
            raise DataError(
                f"user {user!r} has every item already, so there is none to ask about",
                where="prompt",
                remedy="give --item with --template yes_no, or another user",
            )
        if template == "choose":
            rendered, _ = model.ranker.lettered(history, retrieved)
        else:
            rendered = model.ranker.about(history, int(retrieved[0]))
    before = rendered.dropped
    ids = codec.encode(rendered.prompt)
    typer.echo(codec.tokenizer.decode(ids) if rendered.prompt.chat else rendered.prompt.text)
    typer.echo(
        f"[{len(ids)} tokens of a budget of {config.prompt_tokens}; {len(history) - before} of {len(history)} "
        f"events kept, the oldest {before} dropped; template {template}, hash {model.templates.hash(template)[:12]}]"
    )
    if tokens:
        for token_id, token in zip(ids, codec.tokenizer.convert_ids_to_tokens(ids), strict=True):
            typer.echo(f"{token_id}\t{token!r}")
