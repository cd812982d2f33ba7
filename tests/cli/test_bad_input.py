"""Whatever a user gets wrong ends in one error of ours: what, where, the remedy, exit code 2, nothing half-written."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

# penchant and ready are of conftest.py beside this file.
Call = Callable[..., Any]
Refuse = Callable[..., str]

STAGE = re.compile(r"\[ *[\d.]+ s\] ")
TWO_FILES = ("interactions.csv", "items.csv")
LOG = "user_id,item_id,timestamp\nu,1,5\nu,2,6\nv,1,7\n"
ITEMS = "item_id,title\n1,Heat\n2,Alien\n"


def contents(root: Path) -> dict[str, bytes | None]:
    """Every path under ``root`` with its bytes (None for a folder): what must not change."""
    return {str(p.relative_to(root)): p.read_bytes() if p.is_file() else None for p in sorted(root.rglob("*"))}


@pytest.fixture
def refuse(penchant: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Refuse:
    """Call a verb that must fail in the promised way, in ``tmp_path``; returns the error."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object, said: str | list[str], warnings: int = 0) -> str:
        before = contents(tmp_path)
        ended = penchant(*arguments)
        assert ended.code == 2, ended.out + ended.err
        assert "Traceback" not in ended.out + ended.err
        lines = [line for line in ended.err.splitlines() if not STAGE.match(line)]
        assert lines, "an exit code says nothing"
        assert lines[0].startswith("error: "), ended.err
        assert sum(line.startswith("error: ") for line in lines) == 1, ended.err
        message = "\n".join(lines)
        for fragment in [said] if isinstance(said, str) else said:
            assert fragment in message
        assert contents(tmp_path) == before, "something was written, or something was lost"
        return message

    return call


# -- prepare -----------------------------------------------------------------------------------

# What is wrong; the interactions and the items (None: no such file); options; what the error must name.
PREPARE: dict[str, tuple[str | bytes | None, str | bytes | None, list[str], list[str]]] = {
    "missing interactions": (None, ITEMS, [], ["interactions.csv: no such file", "check the path"]),
    "missing items": (LOG, None, [], ["items.csv: no such file"]),
    "empty interactions": ("", ITEMS, [], ["interactions.csv", "empty"]),
    "empty items": (LOG, "", [], ["items.csv", "empty"]),
    "a header alone": ("user_id,item_id,timestamp\n", ITEMS, [], ["interactions.csv: there are no rows"]),
    "no items": (LOG, "item_id,title\n", [], ["items.csv: there are no rows"]),
    "missing column": (
        LOG.replace("timestamp", "when"),
        ITEMS,
        [],
        ["interactions.csv", "'timestamp'", "user_id, item_id, when", "--map"],
    ),
    "missing title column": (LOG, ITEMS.replace("title", "name"), [], ["items.csv", "'title'", "item_id, name"]),
    "mapped to what is not there": (LOG, ITEMS, ["--map", "user_id=customer"], ["interactions.csv", "customer"]),
    "duplicate item": (LOG, ITEMS + "1,Again\n", [], ["items.csv, row 4, column 'item_id'", "'1'"]),
    "unparsable timestamp": (
        LOG + "v,2,yesterday\n",
        ITEMS,
        [],
        ["interactions.csv, row 5, column 'timestamp'", "'yesterday' is not a time", "2024-01-31T18:30:00"],
    ),
    "NaN timestamp": (LOG + "v,2,NaN\nv,2,nan\n", ITEMS, [], ["row 5, column 'timestamp'", "'NaN'", "1 more row"]),
    "missing timestamp": (LOG + "v,2,\n", ITEMS, [], ["row 5, column 'timestamp'", "the time is missing"]),
    "milliseconds": (LOG + "v,2,1700000000000\n", ITEMS, [], ["row 5", "after the year 2200", "--time-unit ms"]),
    "null user": (LOG + ",2,8\n", ITEMS, [], ["interactions.csv, row 5, column 'user_id'", "empty"]),
    "blank user": (LOG + "  ,2,8\n", ITEMS, [], ["interactions.csv, row 5, column 'user_id'", "empty"]),
    "null item": (LOG + "v,,8\n", ITEMS, [], ["interactions.csv, row 5, column 'item_id'", "empty"]),
    "null id of an item": (LOG, ITEMS + ",Nobody\n", [], ["items.csv, row 4, column 'item_id'", "empty"]),
    "ids like floats": (LOG.replace(",1,", ",1.0,").replace(",2,", ",2.0,"), ITEMS, [], ["item_id", "1.0"]),
    "unknown item": (LOG + "v,99,8\n", ITEMS, [], ["interactions.csv, row 5", "99", "--unknown-items drop"]),
    "no title": (LOG, ITEMS + "3,\n", [], ["items.csv, row 4", "title", "3", "--items-without-title drop"]),
    "blank title": (LOG, ITEMS + '3,"  "\n', [], ["items.csv, row 4", "title"]),
    "latin-1 items": (
        LOG,
        ITEMS.encode() + "3,Amélie\n".encode("latin-1"),
        [],
        ["items.csv: not utf-8 text", "0xe9", "line 4", "--items-encoding"],
    ),
    "utf-16 interactions": (LOG.encode("utf-16"), ITEMS, [], ["interactions.csv: not utf-8 text", "utf-16"]),
    "an encoding nobody knows": (LOG, ITEMS, ["--encoding", "klingon"], ["klingon"]),
    "too few fields": (LOG + "v,2\n", ITEMS, [], ["interactions.csv, row 5", "2 fields where the table has 3"]),
    "too many fields": (LOG, ITEMS + "3,Crash, the film\n", [], ["items.csv, row 4", "3 fields"]),
    "an open quote": (LOG, ITEMS + '3,"Crash\n', [], ["items.csv, row 4", "quote"]),
    "a column twice": (LOG.replace("timestamp", "user_id"), ITEMS, [], ["row 1", "two columns", "user_id"]),
    "binary": (bytes(range(256)) * 4, ITEMS, [], ["interactions.csv"]),
    "zeros": (bytes(4096), ITEMS, [], ["interactions.csv"]),
    "no file format": (LOG, ITEMS, ["--sep", "\n"], ["separator"]),
    "a rating that is none": (
        "user_id,item_id,timestamp,rating\nu,1,5,3\nu,2,6,good\n",
        ITEMS,
        ["--positive-threshold", "3"],
        ["interactions.csv, row 3, column 'rating'", "'good' is not a rating"],
    ),
    "nothing left": (LOG, ITEMS, ["--min-user-events", "50"], ["no events are left of 3 rows", "loosen"]),
    "a negative minimum": (LOG, ITEMS, ["--map", "x"], ["'x' is not name=column"]),
}


@pytest.mark.parametrize("case", PREPARE)
def test_prepare(refuse: Refuse, tmp_path: Path, case: str) -> None:
    *tables, options, said = PREPARE[case]
    for name, text in zip(TWO_FILES, tables, strict=True):
        if text is not None:
            (tmp_path / name).write_bytes(text.encode() if isinstance(text, str) else text)
    message = refuse("prepare", *TWO_FILES, "--out", "out", *options, said=said)
    assert "remedy: " in message


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv.gz", ".xlsx", ""])
def test_prepare_a_file_that_is_not_what_its_name_says(refuse: Refuse, tmp_path: Path, suffix: str) -> None:
    (tmp_path / "items.csv").write_text(ITEMS)
    (tmp_path / f"log{suffix}").write_bytes(b"\x1f\x8b" + b"nonsense" * 20)
    refuse("prepare", f"log{suffix}", "items.csv", "--out", "out", said=[f"log{suffix}", "remedy: "])


def test_prepare_a_file_whose_name_is_too_long(refuse: Refuse) -> None:
    refuse("prepare", "n" * 300, "items.csv", "--out", "out", said="no such file")


def test_prepare_without_out(refuse: Refuse, ready: Any) -> None:
    refuse("prepare", ready.log, ready.items, said=["--out", "no folder to write"])


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("thesis.txt", "is a file"),
        ("thesis.txt/data", "cannot be written there"),
        ("mine", "holds other files (thesis.txt)"),
        ("run", "holds other files"),
        (".", "holds other files"),
        ("n" * 300, "cannot be written there"),
    ],
)
def test_prepare_replaces_a_dataset_and_nothing_else(
    refuse: Refuse, ready: Any, tmp_path: Path, out: str, said: str
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    shutil.copytree(ready.run, tmp_path / "run")
    refuse("prepare", ready.log, ready.items, "--out", out, said=[said, "remedy: "])


def test_prepare_into_the_folder_one_stands_in(
    refuse: Refuse, ready: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    refuse("prepare", ready.log, ready.items, "--out", ".", said="cannot be replaced")


# -- fit: data and options ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "said"),
    [
        ("nope", "no such dataset folder"),
        ("file", "no such dataset folder"),
        ("empty", "not a dataset folder"),
        ("run", "not a dataset folder"),
        ("torn", "not valid JSON"),
        ("altered", "SHA-256"),
        ("short", "is missing"),
        ("odd", "lacks files"),
    ],
)
def test_fit_on_a_folder_that_is_no_dataset(refuse: Refuse, ready: Any, tmp_path: Path, folder: str, said: str) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    shutil.copytree(ready.run, tmp_path / "run")
    for name in ("torn", "altered", "short", "odd"):
        shutil.copytree(ready.data, tmp_path / name)
    os.truncate(tmp_path / "torn" / "manifest.json", 100)
    with (tmp_path / "altered" / "items.parquet").open("ab") as handle:
        handle.write(b"x")
    (tmp_path / "short" / "interactions.parquet").unlink()
    manifest = json.loads((tmp_path / "odd" / "manifest.json").read_text())
    (tmp_path / "odd" / "manifest.json").write_text(json.dumps(manifest | {"files": []}))
    refuse("fit", folder, *ready.fit[2:], "--out", "out", said=[folder, said, "remedy: "])


@pytest.mark.parametrize(
    ("events", "said"),
    [
        ("a,1,1\nb,2,2\n", "no user has a validation event"),
        ("a,1,1\na,2,2\na,1,3\n", "no user has two training events"),
    ],
)
def test_fit_on_too_little(refuse: Refuse, penchant: Call, ready: Any, tmp_path: Path, events: str, said: str) -> None:
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp\n" + events)
    assert penchant("prepare", "log.csv", ready.items, "--out", "data").code == 0
    for target in (["--out", "out"], ["--dry-run"]):
        refuse("fit", "data", *ready.fit[2:], *target, said=[said, "remedy: "])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "give --out RUN, or --dry-run"),
        (["--out", "out", "--epochs", "0"], "encoder.epochs"),
        (["--out", "out", "--candidates", "0"], "candidates"),
        (["--out", "out", "--max-history", "-3"], "max_history"),
        (["--out", "out", "--prompt-tokens", "2"], "prompt_tokens"),
        (["--out", "out", "--prompt-tokens", "16"], "over the budget of 16"),
        (["--out", "out", "--validation-users", "0"], "validation_users"),
        (["--out", "out", "--seed", "-1"], "seed"),
        (["--out", "out", "--seed", str(2**70)], "seed"),
        (["--out", "out", "--dtype", "float64"], "unknown dtype 'float64'"),
        (["--out", "out", "--device", "abacus"], "unknown device 'abacus'"),
        (["--out", "out", "--device", "mps"], "mps"),
        (["--out", "out", "--valid-from", "1970-01-12"], "need --split global-time"),
        (["--out", "out", "--split", "global-time", "--targets", "some"], "unknown targets 'some'"),
        (
            ["--out", "out", "--split", "global-time", "--valid-from", "1970-01-13", "--test-from", "1970-01-12"],
            "validation window is empty",
        ),
        (["--out", "out", "--split", "global-time", "--valid-from", "1960-01-01"], "no training event is left"),
        (["--out", "out", "--prompts", "nope"], "nope: no such folder of templates"),
        (["--out", "out", "--config", "nope.yaml"], "nope.yaml"),
    ],
    ids=lambda value: " ".join(value[2:] or ["nothing"]) if isinstance(value, list) else "",
)
def test_fit_with_a_wrong_option(refuse: Refuse, ready: Any, options: list[str], said: str) -> None:
    refuse(*ready.fit, *options, said=said)


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("thesis.txt", "is a file"),
        ("thesis.txt/run", "cannot be written there"),
        ("mine", "no run, and saving would replace it"),
        ("data", "no run, and saving would replace it"),
    ],
)
def test_fit_replaces_a_run_and_nothing_else(refuse: Refuse, ready: Any, tmp_path: Path, out: str, said: str) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    shutil.copytree(ready.data, tmp_path / "data")
    message = refuse("fit", "data", *ready.fit[2:], "--out", out, said=[said, "remedy: "])
    assert out in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("candidats: 3", ["candidats", "the settings are: encoder, layer"]),
        ("candidates: many", ["candidates", "'many'"]),
        ("encoder: {dims: 8}", ["encoder.dims"]),
        ("encoder: 5", ["encoder", "(given: 5)"]),
        ("encoder: {heads: 3}", ["3 heads do not divide dim 64"]),
        ("encoder: {use_ids: false, use_text: false}", ["sees nothing"]),
        ("pooling: max", ["pooling", "'mean' or 'last'"]),
        ("layer: 99", ["layer 99 of a model with 2"]),
        ("seed: -1", ["seed"]),
        ("seed: 2020-99-99", ["cannot be read as YAML"]),
        ("- candidates", ["no mapping of settings"]),
        ("just text", ["no mapping of settings"]),
        ("a: [", ["cannot be read as YAML"]),
        ("a: !!python/object/apply:os.system ['true']", ["cannot be read as YAML"]),
        ("1: 2", ["1: "]),
        ("candidates: 3\n\xff", ["cannot be read as YAML"]),
    ],
)
def test_fit_with_a_wrong_yaml(refuse: Refuse, ready: Any, tmp_path: Path, text: str, said: list[str]) -> None:
    (tmp_path / "fit.yaml").write_bytes(text.encode("latin-1"))
    quick = ["--dtype", "float32", "--device", "cpu", "--epochs", "1"]
    message = refuse(
        "fit", ready.data, "--model", ready.model, *quick, "--config", "fit.yaml", "--out", "out", said=said
    )
    assert "remedy: " in message


# -- fit: templates ----------------------------------------------------------------------------

HEADER = "{#\npurpose: x\nversion: 1\nformat: plain\nvariables: [VARIABLES]\n#}\n"
ITEM = HEADER.replace("VARIABLES", "title")
NEXT = HEADER.replace("VARIABLES", "history")


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("item", ITEM + "{{ titel }}", "uses undeclared variable titel"),
        ("item", ITEM + "{{ title", "not a valid Jinja template"),
        ("item", ITEM + "{% if title %}", "not a valid Jinja template"),
        ("item", ITEM + "{{ title | shout }}", "No filter named 'shout'"),
        ("item", "{{ title }}", "has no header"),
        ("item", "", "has no header"),
        ("item", "{# purpose: x", "has no header"),
        ("item", "{# purpose: [ #}{{ title }}", "header that is not valid"),
        ("item", "{# #}{{ title }}", "header that is not valid"),
        ("item", ITEM.replace("version: 1", "version: 2020-99-99") + "{{ title }}", "header that is not valid"),
        ("item", ITEM.replace("version: 1", "version: 1\nauthor: me") + "{{ title }}", "author"),
        ("item", ITEM.replace("format: plain", "format: fancy") + "{{ title }}", "format"),
        ("item", HEADER.replace("VARIABLES", "price") + "{{ price }}", "wants the item column price"),
        ("item", ITEM, "item 1 has an empty text"),
        ("item", ITEM + "{{ title.director }}", "no attribute 'director'"),
        ("item", ITEM + "{{ title.__class__.__mro__ }}", "unsafe"),
        ("item", ITEM + "{{ title + 1 }}", "TypeError"),
        ("item", ITEM + "{{ title | int // 0 }}", "ZeroDivisionError"),
        ("item", ITEM + "{{ title.encode('ascii') }}", "UnicodeEncodeError"),
        ("item", ITEM + "{{ '{}{}'.format(title) }}", "IndexError"),
        ("item", ITEM + "{% for x in 5 %}{% endfor %}", "TypeError"),
        ("item", ITEM + "{% for x in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("item", ITEM + '{% include "item.jinja" %}', "RecursionError"),
        ("item", ITEM + '{% include "/etc/passwd" %}', "not one of the templates"),
        ("next_item", NEXT + "{% for e in history %}{{ e.text }}; {% endfor %}", "not prefix-closed"),
        ("next_item", NEXT + "{{ history[-1].text }}", "no element"),
        ("next_item", HEADER.replace("VARIABLES", "history, price") + "{{ price }}", "declares price"),
        ("nextitem", NEXT + "x", "no template is called nextitem.jinja"),
    ],
)
def test_fit_with_a_wrong_template(refuse: Refuse, ready: Any, tmp_path: Path, file: str, text: str, said: str) -> None:
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / f"{file}.jinja").write_text(text)
    for target in (["--out", "out"], ["--dry-run"]):
        message = refuse(*ready.fit, "--prompts", "prompts", *target, said=[said, "remedy: "])
        assert f"{file}.jinja" in message


def test_fit_with_a_template_in_another_encoding(refuse: Refuse, ready: Any, tmp_path: Path) -> None:
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "item.jinja").write_bytes((ITEM + "Amélie {{ title }}").encode("latin-1"))
    refuse(*ready.fit, "--prompts", "prompts", "--out", "out", said=["item.jinja: not UTF-8", "remedy: "])


# -- fit: models -------------------------------------------------------------------------------


def without(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def cut(name: str, to: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, to)


def holding(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        old = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(old | changes))

    return change


def one_weight_short(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (without("model.safetensors"), "has no *.safetensors weights (found none in other formats either)"),
        (pickled, "found pytorch_model.bin"),
        (without("config.json"), "has no config.json"),
        (without("tokenizer.json", "tokenizer_config.json"), "cannot be loaded"),
        (cut("model.safetensors", 0), "cannot be loaded"),
        (cut("model.safetensors", 5000), "cannot be loaded"),
        (cut("config.json", 100), "cannot be loaded"),
        (cut("tokenizer.json", 0), "cannot be loaded"),
        (cut("tokenizer.json", 5000), "cannot be loaded"),
        (cut("tokenizer_config.json", 50), "cannot be loaded"),
        (holding("tokenizer.json", "[]"), "cannot be loaded"),
        (holding("tokenizer.json", '{"added_tokens": [], "model": {"type": "BPE"}}'), "cannot be loaded"),
        (holding("tokenizer_config.json", "[]"), "cannot be loaded"),
        (holding("generation_config.json", "[]"), "cannot be loaded"),
        (config(model_type="no-such-kind"), "cannot be loaded"),
        (config(model_type="t5"), "cannot be loaded"),
        (config(hidden_size="32"), "cannot be loaded"),
        (config(vocab_size=10), "cannot be loaded"),
        (config(num_hidden_layers=3), "lacks 9 of the model's weights"),
        (config(model_type="bert", architectures=["BertModel"]), "of the model's weights"),
        (one_weight_short, "lacks 1 of the model's weights, such as model.layers.1.mlp.up_proj.weight"),
    ],
)
def test_fit_with_a_model_folder_that_is_harmed(
    refuse: Refuse, ready: Any, tmp_path: Path, harm: Callable[[Path], None], said: str
) -> None:
    shutil.copytree(ready.model, tmp_path / "model")
    harm(tmp_path / "model")
    quick = ready.fit[4:]
    refuse("fit", ready.data, "--model", "model", *quick, "--out", "out", said=["error: model: ", said, "remedy: "])


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("/no/such/folder", "no such model folder"),
        ("no/such", "no such model folder"),
        ("no-such-model", "no such model folder"),
        ("file", "no such model folder"),
        ("movielens-100k", "no such model folder"),
        ("empty", "has no config.json"),
        ("n" * 300, "no such model folder"),
        ("../../..", "has no config.json"),
    ],
)
def test_fit_with_a_model_that_is_not_there(refuse: Refuse, ready: Any, tmp_path: Path, model: str, said: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    message = refuse(
        "fit", ready.data, "--model", model, *ready.fit[4:], "--out", "out", said=[model, said, "remedy: "]
    )
    assert "smollm2-135m" in message or "owner/name" in message or "not its parent" in message


@pytest.mark.parametrize(
    ("adapter", "said"), [("nope", "no such adapter folder"), ("empty", "has no adapter_config.json")]
)
@pytest.mark.parametrize("option", ["--adapter", "--ranker"])
def test_fit_with_an_adapter_that_is_none(
    refuse: Refuse, ready: Any, tmp_path: Path, option: str, adapter: str, said: str
) -> None:
    (tmp_path / "empty").mkdir()
    refuse(*ready.fit, option, adapter, "--out", "out", said=[adapter, said, "remedy: "])


# -- the cache of vectors ----------------------------------------------------------------------


@pytest.mark.parametrize("to", [0, 100, 2000])
def test_fit_with_a_corrupt_vector_cache(
    refuse: Refuse, penchant: Call, ready: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: int
) -> None:
    monkeypatch.setenv("PENCHANT_CACHE", str(tmp_path / "cache"))
    assert penchant(*ready.fit, "--out", tmp_path / "run").code == 0
    (cached,) = (tmp_path / "cache" / "vectors").iterdir()
    os.truncate(cached, to)
    refuse(*ready.fit, "--out", "out", said=[f"{cached}: is corrupt", "remedy: delete it"])
    cached.unlink()
    assert penchant(*ready.fit, "--out", tmp_path / "out").code == 0, "the remedy works"


def test_fit_with_a_cache_that_is_a_file(
    refuse: Refuse, ready: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("mine")
    monkeypatch.setenv("PENCHANT_CACHE", str(tmp_path / "cache"))
    refuse(*ready.fit, "--out", "out", said=["cache", "cannot be written there"])


# -- runs --------------------------------------------------------------------------------------

RUN_FILES = [
    "manifest.json",
    "split.json",
    "split.npz",
    "encoder.safetensors",
    "vectors.npy",
    "prior.npy",
    "dataset/manifest.json",
    "dataset/interactions.parquet",
    "dataset/items.parquet",
    *(f"prompts/{name}.jinja" for name in ("item", "user", "next_item", "yes_no", "choose")),
]
USE = {
    "recommend": ["recommend", "run", "--user", "u0"],
    "evaluate": ["evaluate", "run", "--llm-users", "2"],
    "prompt": ["prompt", "run", "--user", "u0"],
}


def test_the_files_of_a_run_are_all_harmed_below(ready: Any) -> None:
    # The journal of updates, which grows, has its own tests (tests/test_live.py).
    there = sorted(str(p.relative_to(ready.run)) for p in ready.run.rglob("*") if p.is_file())
    assert sorted([*RUN_FILES, "live.jsonl"]) == there


@pytest.mark.parametrize("harm", ["missing", "empty", "half", "last byte", "a folder"])
@pytest.mark.parametrize("file", RUN_FILES)
def test_a_run_with_a_corrupt_file(refuse: Refuse, ready: Any, tmp_path: Path, file: str, harm: str) -> None:
    shutil.copytree(ready.run, tmp_path / "run")
    path = tmp_path / "run" / file
    data = path.read_bytes()
    path.unlink()
    if harm == "a folder":
        path.mkdir()
    elif harm != "missing":
        path.write_bytes(
            {"empty": b"", "half": data[: len(data) // 2], "last byte": data[:-1] + bytes([data[-1] ^ 1])}[harm]
        )
    message = refuse(*USE["recommend"], said=["error: run", "remedy: "])
    named = ("prompts", Path(file).name, "not a dataset folder")
    assert any(name in message for name in named), message


@pytest.mark.parametrize("verb", USE)
@pytest.mark.parametrize(
    ("folder", "said"),
    [
        ("nope", "no such run"),
        ("file", "no such run"),
        ("empty", "no such file"),
        ("data", "not a run of `penchant fit`"),
        ("listed", "not a run of `penchant fit`"),
        ("old", "has format 0"),
        ("bare", "not a run of `penchant fit`"),
    ],
)
def test_a_folder_that_is_no_run(refuse: Refuse, ready: Any, tmp_path: Path, verb: str, folder: str, said: str) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    shutil.copytree(ready.data, tmp_path / "data")
    manifest = json.loads((ready.run / "manifest.json").read_text())
    for name, value in (("listed", []), ("old", manifest | {"format": 0}), ("bare", manifest | {"files": None})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(json.dumps(value))
    name, _, *options = USE[verb]
    refuse(name, folder, *options, said=[folder, said, "remedy: "])


def test_a_run_whose_templates_were_changed(refuse: Refuse, ready: Any, tmp_path: Path) -> None:
    shutil.copytree(ready.run, tmp_path / "run")
    with (tmp_path / "run" / "prompts" / "item.jinja").open("a") as handle:
        handle.write("!")
    refuse(*USE["recommend"], said=["run/prompts: differ from those the run was fitted with", "--prompts"])


def test_a_run_whose_dataset_was_changed(refuse: Refuse, penchant: Call, ready: Any, tmp_path: Path) -> None:
    shutil.copytree(ready.run, tmp_path / "run")
    (tmp_path / "log.csv").write_text(ready.log.read_text().replace("u0,", "you,"))
    shutil.rmtree(tmp_path / "run" / "dataset")
    assert penchant("prepare", "log.csv", ready.items, "--out", "run/dataset").code == 0
    refuse(*USE["recommend"], said=["run", "of another dataset"])


def test_a_run_whose_model_is_gone_or_another(refuse: Refuse, penchant: Call, ready: Any, tmp_path: Path) -> None:
    shutil.copytree(ready.model, tmp_path / "model")
    assert penchant("fit", ready.data, "--model", "model", *ready.fit[4:], "--out", "run").code == 0
    generate = [*USE["recommend"], "--method", "generate"]
    assert penchant(*generate).code == 0
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    refuse(*generate, said=["the run was fitted with the model", "fit again"])
    shutil.rmtree(tmp_path / "model")
    refuse(*generate, said="no such model folder")
    assert penchant(*USE["recommend"], "--method", "retrieve").code == 0, "which needs no model"


# -- recommend, evaluate, prompt ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--user", "nobody"], ["no user 'nobody'", "user_id", "remedy: "]),
        (["--user", "u00"], ["no user 'u00'", "near: u0"]),
        (["--user", ""], ["no user ''"]),
        (["--user", "u0", "--user", "nobody"], ["no user 'nobody'"]),
        (["--history", "1,99,2"], ["unknown item '99'", "history, column item_id", "remedy: "]),
        (["--history-title", "Heat (1996)"], ["no item has the title 'Heat (1996)'", "near: Heat (1995)"]),
        (["--user", "u0", "--allow", "1,x"], ["unknown item 'x'", "allow, column item_id"]),
        (["--user", "u0", "--deny", "x"], ["unknown item 'x'", "deny, column item_id"]),
        ([], ["give one of users, history and history_titles (given: none)"]),
        (["--user", "u0", "--history", "1"], ["give one of", "(given: users, history)"]),
        (["--history", "1", "--history-title", "Heat (1995)"], ["(given: history, history_titles)"]),
        (["--user", "u0", "-k", "0"], ["k is 0", "at least 1"]),
        (["--user", "u0", "-k", "-5"], ["k is -5"]),
        (["--user", "u0", "--method", "guess"], ["unknown method 'guess'", "use rank, retrieve or generate"]),
        (["--user", "u0", "--where", "nonsense"], ["--where", "cannot read the condition 'nonsense'", "genres~Comedy"]),
        (["--user", "u0", "--where", ""], ["cannot read the condition ''"]),
        (["--user", "u0", "--where", "price<3"], ["price", "the items have the columns item_id, title, genres, year"]),
        (["--user", "u0", "--where", "*=x"], ["the items have the columns"]),
        (["--user", "u0", "--where", "^.*$~x"], ["the items have the columns"]),
        (["--user", "u0", "--where", "year>new"], ["--where year>new", "'new' is not a number"]),
        (["--user", "u0", "--where", "year>nan"], ["'nan' is not a number"]),
        (["--user", "u0", "--out", "recs.xlsx"], ["recs.xlsx: cannot write .xlsx", "use .parquet or .csv"]),
        (["--user", "u0", "--out", "recs"], ["recs: cannot write a file without suffix"]),
        (["--user", "u0", "--out", "folder.csv"], ["folder.csv", "cannot be written there"]),
        (["--user", "u0", "--out", "file/recs.csv"], ["file/recs.csv", "cannot be written there"]),
        (["--user", "u0", "--out", "n" * 300 + ".csv"], ["cannot be written there"]),
    ],
    ids=lambda value: " ".join(value)[:40] or "nobody" if isinstance(value, list) else "",
)
def test_recommend_with_a_wrong_option(
    refuse: Refuse, ready: Any, tmp_path: Path, options: list[str], said: list[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.csv").mkdir()
    refuse("recommend", ready.run, *options, said=said)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["-k", "0"], "k is 0"),
        (["--llm-users", "-1"], "llm_users is -1"),
        (["--seed", "-1"], "seed is -1"),
        (["--llm-users", "0", "--json", "folder"], "cannot be written there"),
        (["--llm-users", "0", "--json", "file/report.json"], "cannot be written there"),
        (["--llm-users", "0", "--json", "."], "cannot be written there"),
    ],
)
def test_evaluate_with_a_wrong_option(
    refuse: Refuse, ready: Any, tmp_path: Path, options: list[str], said: str
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis").write_text("mine")
    refuse("evaluate", ready.run, *options, said=[said, "remedy: "])


def test_evaluate_a_run_that_kept_nothing_to_test_on(
    refuse: Refuse, penchant: Call, ready: Any, tmp_path: Path
) -> None:
    assert penchant(*ready.fit, "--split", "none", "--out", tmp_path / "run").code == 0
    refuse("evaluate", "run", said=["no targets to evaluate on", "remedy: "])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--user", "nobody"], "no user 'nobody'"),
        (["--user", "u0", "--template", "haiku"], "unknown template 'haiku'"),
        (["--user", "u0", "--template", "yes_no", "--item", "99"], "unknown item '99'"),
        (["--user", "u0", "--template", "choose", "--item", "1"], "asks about no item"),
    ],
)
def test_prompt_with_a_wrong_option(refuse: Refuse, ready: Any, options: list[str], said: str) -> None:
    refuse("prompt", ready.run, *options, said=[said, "remedy: "])


@pytest.mark.parametrize("template", ["yes_no", "choose"])
def test_prompt_for_a_user_who_has_every_item(
    refuse: Refuse, penchant: Call, ready: Any, tmp_path: Path, template: str
) -> None:
    events = [f"all,{item},{item}" for item in range(1, 17)]
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp\n" + "\n".join(events) + "\n")
    assert penchant("prepare", "log.csv", ready.items, "--out", "data").code == 0
    assert penchant("fit", "data", *ready.fit[2:], "--out", "run").code == 0
    refuse("prompt", "run", "--user", "all", "--template", template, said=["every item already", "remedy: "])
    assert penchant("prompt", "run", "--user", "all", "--template", "yes_no", "--item", "1").code == 0
    assert penchant("recommend", "run", "--user", "all").code == 0


@pytest.mark.parametrize("template", ["yes_no", "choose"])
def test_prompt_for_a_model_without_a_chat_template(
    refuse: Refuse, penchant: Call, ready: Any, tmp_path: Path, template: str
) -> None:
    shutil.copytree(ready.model, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    assert penchant("fit", ready.data, "--model", "model", *ready.fit[4:], "--out", "run").code == 0
    refuse("prompt", "run", "--user", "u0", "--template", template, said=["no chat template", "remedy: "])


def test_fetch_what_nobody_knows(refuse: Refuse) -> None:
    refuse("fetch", "movielens-1b", said=["'movielens-1b'", "choose one of", "movielens-100k"])


def test_the_command_line_itself(penchant: Call, ready: Any) -> None:
    """A verb, option or number that typer refuses: its usage, exit code 2, no traceback."""
    for arguments in (["fly"], ["recommend"], ["recommend", ready.run, "-k", "ten"], ["fit", ready.data, "--sail"]):
        ended = penchant(*arguments)
        assert ended.code == 2
        assert ended.out == ""
        assert "Usage: " in ended.err
        assert "Traceback" not in ended.err


def test_an_argument_that_is_no_text(refuse: Refuse, ready: Any) -> None:
    """A path from an old file system, byte 0xff in it: most libraries here could not open it."""
    refuse("prepare", ready.log, ready.items, "--out", "data\udcff", said=["argument", "not UTF-8", "rename"])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["doctor", "--help"]])
def test_answers_that_find_no_room(arguments: list[str]) -> None:
    """``penchant ... > file`` on a full disk: one error, and Python's own complaint at its end stays away."""
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "penchant", *arguments]
        done = subprocess.run(command, check=False, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert len(lines) == 2, done.stderr
    assert lines[0].startswith("error: stdout: no room to write it")
    assert lines[1].startswith("  remedy: ")


def test_no_room_for_the_temporary_files_of_libraries(ready: Any, tmp_path: Path) -> None:
    """In a process of its own: the libraries themselves cannot be imported on a disk without a free byte."""
    program = (
        "import resource, signal, sys\n"
        "hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))\n"
        "from penchant.cli import main\n"
        f"sys.argv = ['penchant', 'evaluate', {str(ready.run)!r}, '--llm-users', '0']\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True, cwd=tmp_path, env={**os.environ}
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("  remedy: free disk space"), done.stderr
    assert "Traceback" not in done.stderr


# -- a full disk -------------------------------------------------------------------------------

# One process for all verbs and limits: the file-size limit stands in for a disk with so much room left.
FULL_DISK = """
import contextlib, io, json, resource, shutil, sys, traceback
from pathlib import Path
from penchant.cli import main
import penchant.evaluation.evaluate, penchant.engine.loading  # an import that failed half way cannot be tried again

log, items, data, run, *fit = sys.argv[1:]
users = [argument for n in range(30) for argument in ("--user", f"u{n}")]
cache = Path("cache")
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
said = []

def call(limit, *arguments):
    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["penchant", *arguments]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if limit is None else limit, hard))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
        except BaseException:
            traceback.print_exc()
            code = "crash"
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    said.append([limit, arguments[0], arguments[-1], code, err.getvalue()])

for limit in (0, 1, 100, 1000):
    call(limit, "prepare", log, items, "--out", "out/data")
    for name in ("out/recs.csv", "out/recs.parquet"):
        call(limit, "recommend", run, *users, "--out", name)
    call(limit, "evaluate", run, "--llm-users", "2", "--json", "out/report.json")
for limit in (0, 100, 2175, 2500, 100_000):
    shutil.rmtree(cache, ignore_errors=True)
    call(limit, *fit, "--out", "out/run")
    call(limit, *fit, "--out", "out/run")  # with the vectors cached, if they found room
    # What the cache holds after a full disk is whole: fitting goes on from it.
    call(None, *fit, "--out", "well")
print(json.dumps(said))
"""


def test_a_full_disk(ready: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "recs.csv").write_text("those of yesterday")
    before = contents(tmp_path / "out")
    program = [sys.executable, "-c", FULL_DISK, ready.log, ready.items, ready.data, ready.run, *ready.fit]
    done = subprocess.run(
        [str(part) for part in program],
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PENCHANT_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert len(said) == 4 * 4 + 5 * 3
    for limit, verb, last, code, err in said:
        how = f"{verb} {last} with {limit} bytes: {code}\n{err}"
        if limit is None:
            assert code == 0, how
            continue
        assert code == 2, how
        lines = [line for line in err.splitlines() if not STAGE.match(line)]
        assert lines[0].startswith("error: "), how
        assert len(lines) == 2, how
        assert "free disk space" in lines[1], how
        if verb == "prepare" and "temporary folder" in lines[0]:
            continue  # reading comes first, and on a disk without four free bytes finds no place for its copies
        assert "no room to write it" in lines[0], how
        assert str(tmp_path) in lines[0] or "out/" in lines[0], how
    assert contents(tmp_path / "out") == before
