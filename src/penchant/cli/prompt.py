"""``penchant prompt``: what the model would read for a user, before a token is spent on it."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Annotated, Any

import typer

from penchant.errors import ConfigError, DataError


def prompt_command(
    run: Annotated[Path, typer.Argument(help="A folder made by `penchant fit`.")],
    user: Annotated[str, typer.Option(help="A user id.")],
    template: Annotated[str, typer.Option(help="next_item, user, yes_no or choose.")] = "next_item",
    item: Annotated[
        str | None, typer.Option(help="yes_no: the item asked about; by default the first retrieved.")
    ] = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="Also print each token with its id.")] = False,
) -> None:
    """Print the rendered prompt, its length in tokens, and what was cut."""
    if template not in ("next_item", "user", "yes_no", "choose"):
        raise ConfigError(f"unknown template {template!r}", remedy="use next_item, user, yes_no or choose")
    if item is not None and template != "yes_no":
        raise ConfigError(f"the template {template} asks about no item", where="--item", remedy="use --template yes_no")
    from penchant.engine.noise import quiet_libraries

    quiet_libraries()
    from penchant.filters import indices
    from penchant.recommend import Recommender

    model = Recommender.load(run)
    history = model.log.item[model.log.all_of(model.user(user))]
    codec, config = model.engine.codec, model.config
    if template == "next_item":
        rendered = model.ranker.prompt(history)
        before = rendered.dropped
    else:
        recent = history[-config.max_history :]
        given: dict[str, Any] = {"history": [{"text": model.texts[i]} for i in recent]}
        retrieved = model.retrieve([history], config.candidates)[0][0]
        retrieved = retrieved[retrieved >= 0]
        if template != "user" and item is None and not len(retrieved):
            raise DataError(
                f"user {user!r} has every item already, so there is none to ask about",
                where="prompt",
                remedy="give --item with --template yes_no, or another user",
            )
        if template == "yes_no":
            chosen = retrieved[0] if item is None else indices([item], model.log.item_index, "--item")[0]
            given["item"] = {"text": model.texts[chosen]}
        if template == "choose":
            labels = string.ascii_uppercase + string.ascii_lowercase
            given["candidates"] = [
                {"label": label, "text": model.texts[i]} for label, i in zip(labels, retrieved, strict=False)
            ]
        rendered = model.templates.render(
            template,
            given,
            count=lambda prompt: len(codec.encode(prompt)),
            budget=min(config.prompt_tokens, model.engine.context_length),
        )
        before = rendered.dropped + len(history) - len(recent)
    ids = codec.encode(rendered.prompt)
    typer.echo(codec.tokenizer.decode(ids) if rendered.prompt.chat else rendered.prompt.text)
    typer.echo(
        f"[{len(ids)} tokens of a budget of {config.prompt_tokens}; {len(history) - before} of {len(history)} "
        f"events kept, the oldest {before} dropped; template {template}, hash {model.templates.hash(template)[:12]}]"
    )
    if tokens:
        for token_id, token in zip(ids, codec.tokenizer.convert_ids_to_tokens(ids), strict=True):
            typer.echo(f"{token_id}\t{token!r}")
