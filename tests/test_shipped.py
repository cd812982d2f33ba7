"""Every configuration and task that is shipped is read by what reads it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from penchant.errors import ConfigError
from penchant.evaluation.tasks import load_task
from penchant.resources import shipped
from penchant.run_folder import FitConfig

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    """eval/benchmark.py, imported from where it lies."""
    spec = importlib.util.spec_from_file_location("benchmark", ROOT / "eval" / "benchmark.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmark"] = module
    spec.loader.exec_module(module)
    return module


def test_the_suites_are_of_shipped_tasks_that_can_be_ranked(benchmark: ModuleType) -> None:
    named = [name for suite in benchmark.SUITES.values() for name in suite]
    assert all(load_task(name).split is not None for name in named)
    # Every shipped ranking task is in one of them.
    ranked = {path.stem for path in shipped("tasks").glob("*.yaml") if load_task(path.stem).split is not None}
    assert ranked == set(named)


def test_a_seed_of_the_command_line_counts_once(benchmark: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is named twice"):
        benchmark.main(tasks=["ml-100k-quick"], out=tmp_path, seeds="0,1,0")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ["eval/benchmark.py", "nobodys"],
        ["eval/memorisation.py", "nowhere"],
    ],
    ids=lambda arguments: Path(arguments[0]).stem,
)
def test_a_program_of_eval_says_what_was_wrong_in_one_message(arguments: list[str], tmp_path: Path) -> None:
    program, *given = arguments
    done = subprocess.run(
        [sys.executable, ROOT / program, *given, "--out", "out.json"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert "remedy: " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("path", sorted(shipped("configs").glob("fit-*.yaml")), ids=lambda p: p.stem)
def test_each_fit_configuration_is_valid(path: Path) -> None:
    FitConfig.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))


def test_the_tables_in_the_readme_are_what_the_results_say() -> None:
    found = subprocess.run(
        [sys.executable, "eval/tables.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr


def test_the_configuration_in_the_readme_is_valid() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = [part.partition("```")[0] for part in text.split("```yaml")[1:]]
    assert blocks
    for block in blocks:
        FitConfig.model_validate(yaml.safe_load(block))
