"""Settings: YAML and options into one typed model, and everything wrong named."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from penchant.errors import ConfigError
from penchant.training.config import CONFIGS, ChooseConfig, NextItemConfig, PreferenceConfig, TrainConfig, YesNoConfig
from penchant.training.settings import describe, read_settings

CONFIG_FOLDER = Path(__file__).resolve().parents[2] / "finetune" / "configs"
SHIPPED = sorted(p for p in CONFIG_FOLDER.glob("*.yaml") if p.stem.partition("-")[0] in CONFIGS)


def read(*options: str, kind: type[TrainConfig] = NextItemConfig, path: Path | None = None) -> Any:
    return read_settings(kind, path, options)


# -- shipped files ---------------------------------------------------------------------------------


def test_every_recipe_ships_a_file() -> None:
    assert {path.stem.partition("-")[0] for path in SHIPPED} == set(CONFIGS)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_file_is_valid(path: Path) -> None:
    found = read(kind=CONFIGS[path.stem.partition("-")[0]], path=path)
    for key, value in yaml.safe_load(path.read_text()).items():
        got = getattr(found, key)
        if isinstance(got, BaseModel):
            got = {k: getattr(got, k) for k in value}
        assert got == value, key


def test_a_shipped_file_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("preference-beside", "preference-beside.yaml"):
        assert read(kind=PreferenceConfig, path=Path(name)) == read(
            kind=PreferenceConfig, path=CONFIG_FOLDER / "preference-beside.yaml"
        )
    (tmp_path / "preference-beside").write_text("beside: 3.0")
    assert read(kind=PreferenceConfig, path=Path("preference-beside")).beside == 3.0, "a file of that name is the file"
    for name in ("preference-besides", "there/preference-beside"):
        with pytest.raises(ConfigError, match="cannot be read") as raised:
            read(kind=PreferenceConfig, path=Path(name))
        assert "preference-beside" in str(raised.value.remedy)


def commands() -> list[tuple[str, str]]:
    """Every command that a program's docstring, a shipped file's head or a README shows: recipe and options."""
    top = CONFIG_FOLDER.parents[1]
    texts = [ast.get_docstring(ast.parse(path.read_text())) or "" for path in sorted((top / "finetune").glob("*.py"))]
    texts += [re.sub(r"^# ?", "", path.read_text(), flags=re.MULTILINE) for path in SHIPPED]
    texts += [(top / name).read_text() for name in ("README.md", "finetune/README.md")]
    program = r"(?:(?:accelerate launch|torchrun) --\w+ \d+ |python )finetune/(\w+)\.py [^`\n]*"
    shown = re.compile(rf"{program}|penchant finetune (\w+) [^`\n]*")
    found = [one for text in texts for one in shown.finditer(re.sub(r"\\\n\s*", " ", text))]
    named = [(one[1] or one[2], one[0]) for one in found]
    return [(name, line) for name, line in named if name in CONFIGS]  # not where RECIPE stands for any


def test_every_command_shown_is_one_that_runs() -> None:
    shown = commands()
    assert {recipe for recipe, _ in shown} == set(CONFIGS)
    for recipe, line in shown:
        words = shlex.split(line, comments=True)
        words = words[next(i for i, word in enumerate(words) if recipe in word) + 1 :]
        config = None
        for option in ("--data", "--out", "--config"):
            if option in words:
                at = words.index(option)
                config = Path(words[at + 1]) if option == "--config" else config
                del words[at : at + 2]
        words = [word for word in words if word not in ("--dry-run", "--resume", "--settings", "...")]
        path = config if config is None or config.name == str(config) else CONFIG_FOLDER.parents[1] / config
        found = read(*words, kind=CONFIGS[recipe], path=path)
        if many := re.search(r"--(?:num_processes|nproc_per_node) (\d+)", line):
            assert found.packs_per_step >= int(many[1]), f"{line}: a process without a pack"
        if found.start_from:
            assert "lora" not in found.model_fields_set, f"{line}: the adapter's own settings are kept"


# -- options ---------------------------------------------------------------------------------------


def test_options_stand_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("learning_rate: 1.0e-4\nepochs: 2\nlora: {r: 4, alpha: 8}\n")
    found = read("--epochs", "3", "--lora.r", "32", "--lora.rslora", "true", path=path)
    assert (found.learning_rate, found.epochs) == (1e-4, 3)
    assert (found.lora.r, found.lora.alpha, found.lora.rslora) == (32, 8, True)


@pytest.mark.parametrize(
    ("options", "name", "value"),
    [
        (["--learning-rate", "1e-3"], "learning_rate", 1e-3),
        (["--learning-rate=1e-3"], "learning_rate", 1e-3),
        (["--learning_rate", "0.5"], "learning_rate", 0.5),
        (["--max-steps", "1e2"], "max_steps", 100),
        (["--max-minutes", "2.5"], "max_minutes", 2.5),
        (["--max-minutes", "null"], "max_minutes", None),
        (["--gradient-checkpointing", "true"], "gradient_checkpointing", True),
        (["--eval-minutes", "[10, 30, 90]"], "eval_minutes", [10, 30, 90]),
        (["--report-to", "[tensorboard, wandb]"], "report_to", ["tensorboard", "wandb"]),
        (["--model", "smollm2-135m"], "model", "smollm2-135m"),
        (["--model=/a/b=c"], "model", "/a/b=c"),
        (["--start-from", "runs/mine-lora"], "start_from", "runs/mine-lora"),
        (["--mode", "single"], "mode", "single"),
        (["--valid-from", "2020-01-02"], "valid_from", datetime(2020, 1, 2)),
        (["--valid-from", "2020-01-02T03:04:05Z"], "valid_from", datetime(2020, 1, 2, 3, 4, 5, tzinfo=UTC)),
        (["--epochs", "1", "--epochs", "2"], "epochs", 2),
        (["--model", "2024-13-01"], "model", "2024-13-01"),
    ],
)
def test_an_options_value_is_read_as_yaml(options: list[str], name: str, value: Any) -> None:
    assert getattr(read(*options), name) == value


def test_nested_lists_and_none() -> None:
    found = read("--lora.targets", "[q_proj, v_proj]", "--lora.last-layers", "3")
    assert found.lora.targets == ["q_proj", "v_proj"]
    assert found.lora.last_layers == 3
    assert read("--lora.targets", "all-linear").lora.targets == "all-linear"
    wanted = ["unexposed", "hard"]
    assert read("--negatives", "[unexposed, hard]", kind=YesNoConfig).negatives == wanted


@given(rate=st.floats(1e-12, 1e3), r=st.integers(1, 512))
def test_whatever_python_prints_of_a_number_is_read_back(rate: float, r: int) -> None:
    found = read("--learning-rate", repr(rate), f"--lora.r={r}")
    assert found.learning_rate == rate
    assert found.lora.r == r


# -- what is wrong ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--learning-rte", "1"], "no setting is called learning_rte"),
        (["--lora.rank", "8"], "lora.rank"),
        (["--lora", "8"], "lora"),
        (["--lora.r.x", "8"], "lora.r.x"),
        (["--learning-rate.x", "8"], "learning_rate"),
        (["--learning-rate", "-1"], "learning_rate.*greater than 0"),
        (["--learning-rate", "fast"], "learning_rate.*fast"),
        (["--learning-rate", ".inf"], "learning_rate.*finite"),
        (["--learning-rate", "1e999"], "learning_rate.*finite"),
        (["--learning-rate", ".nan"], "learning_rate"),
        (["--epochs", "0"], "epochs"),
        (["--max-steps", "1.5"], "max_steps"),
        (["--dtype", "float8"], "dtype.*float8"),
        (["--mode", "sparse"], "mode"),
        (["--valid-from", "2020-99-99"], "valid_from"),
        (["--gradient-checkpointing", "perhaps"], "gradient_checkpointing"),
        (["--eval-minutes", "10"], "eval_minutes"),
        (["--warmup", "1"], "warmup"),
        (["--seed", "-3"], "seed"),
        (["--learning-rate"], "has no value"),
        (["--learning-rate", "--epochs", "3"], "--learning-rate has no value"),
        (["--epochs", "[1"], "is no value"),
        (["loose"], "'loose' is no option"),
        (["--method", "full", "--quantization", "nf4"], "method full"),
    ],
)
def test_a_wrong_option_is_named(options: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read(*options)


def test_an_unknown_setting_lists_those_there_are() -> None:
    with pytest.raises(ConfigError) as raised:
        read("--leters", "5", kind=ChooseConfig)
    assert "letters" in str(raised.value.remedy)
    assert "learning_rate" in str(raised.value.remedy)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"learning_rate: [", "cannot be read as YAML"),
        (b"- 1\n- 2\n", "no mapping"),
        (b"just words", "no mapping"),
        (b"\xff\xfe\x00", "cannot be read as YAML"),
        (b"valid_from: 2020-99-99", "cannot be read as YAML"),
        (b"learning_rat: 1", "learning_rat"),
        (b"lora: 5\n", "lora"),
        (b"!!python/object/apply:os.system [true]", "cannot be read as YAML"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=words) as raised:
        read(path=path)
    assert raised.value.where == str(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read(path=tmp_path / "absent.yaml")


def test_a_nested_option_over_a_file_whose_group_is_none_of_one(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("lora: 5\n")
    with pytest.raises(ConfigError, match="lora is no group of settings"):
        read("--lora.r", "8", path=path)


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("# nothing\n")
    assert read(path=path) == NextItemConfig()


# -- the list of all -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_every_setting_is_listed_with_what_it_means(name: str) -> None:
    kind = CONFIGS[name]
    lines = describe(kind).splitlines()
    listed = {line.split()[0].removeprefix("--").replace("-", "_") for line in lines}
    wanted: set[str] = set()
    for field, info in kind.model_fields.items():
        if inspect.isclass(info.annotation) and issubclass(info.annotation, BaseModel):
            wanted |= {f"{field}.{inner}" for inner in info.annotation.model_fields}
        else:
            wanted.add(field)
    assert listed == wanted
    assert len(lines) == len(wanted)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_listed_setting_says_what_it_is(name: str) -> None:
    for kind in (CONFIGS[name], CONFIGS[name].model_fields["lora"].annotation):
        assert kind is not None
        for field, info in kind.model_fields.items():
            assert info.description or field in ("lora", "negatives_per_positive"), field
