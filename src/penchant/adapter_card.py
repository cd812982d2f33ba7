"""What an adapter of ours was trained with, kept beside it, so that nobody serves it with another template."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from penchant.errors import ConfigError
from penchant.files import read_json
from penchant.prompt import NAMES, Templates

CARD = "penchant.json"


def read_card(adapter: str | Path | None) -> dict[str, Any] | None:
    """The card of an adapter's folder; None where the adapter is not one of ours (or only a hub id)."""
    if adapter is None or not (Path(adapter) / CARD).is_file():
        return None
    card = read_json(Path(adapter) / CARD)
    return card if isinstance(card, dict) else None


def trained_part(source: Mapping[str, Any] | None) -> str | None:
    """Where the card of what an engine serves would lie: its adapter, or the (merged, or wholly trained) model."""
    source = source or {}
    return source.get("adapter") or source.get("model")


def described(source: Mapping[str, Any] | None) -> str:
    """How an engine's adapter was trained, recipe by recipe, by its card and those of what it went on from."""
    told, folder = list[str](), (source or {}).get("adapter")
    while (card := read_card(folder)) is not None and len(told) < 10:
        outcome = card.get("outcome") or {}
        minutes = (outcome.get("seconds") or 0) / 60
        told.append(
            f"{card.get('recipe')} ({outcome.get('best_step')} of {outcome.get('steps')} steps, {minutes:.0f} min)"
        )
        folder = (card.get("config") or {}).get("start_from")
    return ", then ".join(reversed(told)) or "its card does not say how it was trained"


def check_templates(adapter: str | Path | None, templates: Templates) -> None:
    """ConfigError where what we trained was trained with another text of a template than it would be served with."""
    card = read_card(adapter)
    if card is None:
        return
    for name, trained in card.get("templates", {}).items():
        if name not in NAMES:
            raise ConfigError(
                f"was trained with a template that this version has not: {name!r}",
                where=str(adapter),
                remedy="serve it with the version it was trained with, or train it again",
            )
        if templates.hash(name) != trained:
            raise ConfigError(
                f"was trained with another text of the template {name!r}",
                where=str(adapter),
                remedy=f"give its own templates: --prompts {Path(adapter or '') / 'prompts'}, or train it again",
            )


def check_vectors(adapter: str | Path | None, layer: int, pooling: str) -> None:
    """ConfigError where an adapter trained to embed would give its vectors at another ``layer`` (from 0) or pooling."""
    card = read_card(adapter)
    trained = None if card is None else card.get("vectors")
    if isinstance(trained, dict) and trained != {"layer": layer, "pooling": pooling}:
        raise ConfigError(
            f"was trained to embed at layer {trained.get('layer')} with pooling {trained.get('pooling')}, "
            f"and would be used at layer {layer} with pooling {pooling}",
            where=str(adapter),
            remedy="set layer and pooling to what it was trained with (see `penchant fit --config`)",
        )


def check_likes(adapter: str | Path | None) -> None:
    """ConfigError where an adapter learnt yes and no from histories that say what was liked: a ranker's don't."""
    card = read_card(adapter)
    if card is not None and card.get("marks_likes"):
        raise ConfigError(
            "was trained on histories that say of each item whether it was liked, and would be asked with ones that "
            "don't",
            where=str(adapter),
            remedy="train yes_no on a dataset without like_threshold; `penchant evaluate RUN --task tallrec-movie` "
            "asks as it was trained: a run with this adapter, fitted with another question",
        )


def check_data(source: dict[str, Any] | None, data: str, split: dict[str, Any]) -> list[str]:
    """What a reader must know of the data that an engine's weights were trained on, a line each.

    ``source`` is the engine's; ``data`` (a content hash) and ``split`` (its spec) are what it is evaluated on.
    ConfigError where the data are the same and the split is not: what is held out here may have been learnt.
    """
    source = source or {}
    adapter, model = source.get("adapter"), source.get("model")
    unknown, notes = "what of it is in these targets can't be known", list[str]()
    # A merged or wholly trained model has the card in its own folder.
    for trained in _lineage([adapter, model], silent=[model]):
        folder = trained["at"]
        if not trained["known"]:
            what = "the adapter" if folder == str(adapter) else "what training went on from,"
            notes.append(f"{what} {folder} does not say what it was trained on; {unknown}")
        elif trained["data"] != data:
            notes.append(f"{folder} was trained on other data; {unknown}")
        elif trained["split"] != split:
            raise ConfigError(
                f"was trained on the same data under another split ({trained['split']}; here it is {split}), and may "
                "have learnt what is held out here",
                where=folder,
                remedy="train it again with this split, or evaluate a run that was fitted with its own",
            )
    return list(dict.fromkeys(notes))


def ancestors_of(start_from: Path | None, base: Path) -> list[dict[str, Any]]:
    """What training goes on from, for its card: the adapter ``start_from`` and the base where that was trained too, and
    what these went on from. A card cannot rely on their folders: they may be moved, deleted or trained again.
    """
    return list(_lineage([start_from, base], silent=[base]))


def _lineage(folders: Sequence[str | Path | None], silent: Sequence[str | Path | None]) -> Iterator[dict[str, Any]]:
    """The trained ones of these folders, and what each went on from: at (its folder), known (whether a card says on
    what it was trained), data and split. Those of ``silent`` may be without a card: a plain base was trained on nothing
    of ours.
    """
    waiting, seen = list(folders), {"None"}
    bare = {str(folder) for folder in silent}
    while waiting:
        folder = str(waiting.pop(0))
        if folder in seen:
            continue
        seen.add(folder)  # a model that was trained on into its own folder names itself
        card = read_card(folder)
        if card is None:
            if folder not in bare:
                yield {"at": folder, "known": False, "data": None, "split": None}
            continue
        yield {"at": folder, "known": True, "data": card.get("data"), "split": card.get("split")}
        if "ancestors" in card:
            yield from card["ancestors"]
            continue
        config = card.get("config") or {}  # an older card: it only names them
        waiting += [config.get("start_from"), config.get("model")]
        bare.add(str(config.get("model")))
