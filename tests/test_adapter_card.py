"""What an adapter's card says of the data it was trained on, held against what is evaluated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from penchant.adapter_card import CARD, ancestors_of, check_data, check_templates, described
from penchant.errors import ConfigError
from penchant.files import write_json
from penchant.prompt import Templates

LAST = {"kind": "leave-last-out", "min_events": 3}
NONE_HELD = {"kind": "leave-last-out, validation only", "min_events": 2}
UNKNOWN = "what of it is in these targets can't be known"


def trained(folder: Path, data: str | None, split: dict[str, Any] | None, **config: Any) -> str:
    folder.mkdir()
    write_json(folder / CARD, {"data": data, "split": split, "config": config})
    return str(folder)


def test_the_same_data_and_split_need_no_word(tmp_path: Path) -> None:
    adapter = trained(tmp_path / "a", "d", LAST, model="smollm2-135m", start_from=None)
    assert check_data({"model": "smollm2-135m", "adapter": adapter}, "d", LAST) == []
    assert check_data({"model": "smollm2-135m", "adapter": None}, "d", LAST) == []
    assert check_data(None, "d", LAST) == []


@pytest.mark.parametrize("place", ["adapter", "model", "start_from", "config.model"])
def test_another_split_of_the_same_data_is_refused_wherever_it_was_learnt(place: str, tmp_path: Path) -> None:
    other = trained(tmp_path / "other", "d", NONE_HELD)
    source = {"model": "m", "adapter": trained(tmp_path / "a", "d", LAST, start_from=other)}
    if place in ("adapter", "model"):
        source = {"model": "m", "adapter": None} | {place: other}
    if place == "config.model":
        source["adapter"] = trained(tmp_path / "b", "d", LAST, model=other)
    with pytest.raises(ConfigError, match="was trained on the same data under another split") as caught:
        check_data(source, "d", LAST)
    assert caught.value.where == other
    assert check_data(source, "d", NONE_HELD) == [] if place in ("adapter", "model") else True


def test_a_template_that_this_version_has_not_is_said(tmp_path: Path) -> None:
    write_json(tmp_path / CARD, {"templates": {"rank_pairs": "x"}})
    with pytest.raises(ConfigError, match="a template that this version has not: 'rank_pairs'"):
        check_templates(tmp_path, Templates())


def test_other_data_and_no_card_are_said(tmp_path: Path) -> None:
    elsewhere = trained(tmp_path / "a", "other", NONE_HELD)
    assert check_data({"adapter": elsewhere}, "d", LAST) == [f"{elsewhere} was trained on other data; {UNKNOWN}"]
    (tmp_path / "plain").mkdir()
    (note,) = check_data({"adapter": str(tmp_path / "plain")}, "d", LAST)
    assert note.endswith(f"does not say what it was trained on; {UNKNOWN}")
    examples = trained(tmp_path / "b", None, None)
    assert check_data({"adapter": examples}, "d", LAST) == [f"{examples} was trained on other data; {UNKNOWN}"]


@pytest.mark.timeout(10)
def test_a_card_that_names_its_own_folder_is_read_once(tmp_path: Path) -> None:
    own = trained(tmp_path / "a", "other", LAST, model=str(tmp_path / "a"))
    assert check_data({"model": own}, "d", LAST) == [f"{own} was trained on other data; {UNKNOWN}"]


def test_how_an_adapter_was_trained_is_told_from_its_first_recipe_on(tmp_path: Path) -> None:
    first = trained(tmp_path / "a", "d", LAST, start_from=None)
    second = trained(tmp_path / "b", "d", LAST, start_from=first)
    for folder, recipe, steps in ((first, "next_item", 504), (second, "preference", 300)):
        card = {"recipe": recipe, "outcome": {"best_step": steps - 4, "steps": steps, "seconds": 600.0}}
        card["config"] = {"start_from": first if folder == second else None}
        write_json(Path(folder) / CARD, card)
    told = "next_item (500 of 504 steps, 10 min), then preference (296 of 300 steps, 10 min)"
    assert described({"model": "m", "adapter": second}) == told
    assert described({"adapter": None}) == described(None) == "its card does not say how it was trained"
    write_json(Path(first) / CARD, {"recipe": "choose", "config": {"start_from": first}})
    assert described({"adapter": first}).count("choose") == 10  # a card that names itself ends too


def test_a_card_says_itself_what_its_adapter_went_on_from(tmp_path: Path) -> None:
    """Folders are moved, deleted and trained again: what was learnt is not unlearnt by that."""
    base, first, foreign = tmp_path / "base", tmp_path / "first", tmp_path / "foreign"
    trained(base, "d", NONE_HELD)
    trained(first, "d", NONE_HELD)
    foreign.mkdir()
    assert ancestors_of(None, tmp_path / "plain") == []
    assert [(one["at"], one["known"]) for one in ancestors_of(foreign, base)] == [
        (str(foreign), False),
        (str(base), True),
    ]
    for start, said in ((first, "another split"), (foreign, None)):
        second = tmp_path / f"after-{start.name}"
        trained(second, "d", LAST, start_from="runs/relative", model="smollm2-135m")
        card = json.loads((second / CARD).read_text()) | {"ancestors": ancestors_of(start, tmp_path / "plain")}
        write_json(second / CARD, card)
        third = tmp_path / f"third-{start.name}"
        trained(third, "d", LAST)
        card = json.loads((third / CARD).read_text()) | {"ancestors": ancestors_of(second, tmp_path / "plain")}
        write_json(third / CARD, card)
        shutil.rmtree(start)
        shutil.rmtree(second)
        source = {"model": "smollm2-135m", "adapter": str(third)}
        if said is None:
            (note,) = check_data(source, "d", LAST)
            assert note == f"what training went on from, {start} does not say what it was trained on; {UNKNOWN}"
        else:
            with pytest.raises(ConfigError, match=said):
                check_data(source, "d", LAST)


def test_an_older_card_whose_beginning_cannot_be_found_says_so(tmp_path: Path) -> None:
    adapter = trained(tmp_path / "a", "d", LAST, start_from="runs/gone", model="smollm2-135m")
    (note,) = check_data({"model": "smollm2-135m", "adapter": adapter}, "d", LAST)
    assert "went on from, runs/gone does not say" in note
