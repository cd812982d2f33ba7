"""Every configuration and task that is shipped is read by what reads it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from penchant.errors import ConfigError
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


@pytest.mark.parametrize("path", sorted(shipped("tasks").glob("*.yaml")), ids=lambda p: p.stem)
def test_each_task_is_valid(benchmark: ModuleType, path: Path) -> None:
    task = benchmark.load_task(path.stem)
    assert (task.fetch is None) != (task.files is None)


@pytest.mark.parametrize("path", sorted(shipped("configs").glob("fit-*.yaml")), ids=lambda p: p.stem)
def test_each_fit_configuration_is_valid(path: Path) -> None:
    FitConfig.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))


def test_a_wrong_task_is_one_error(benchmark: ModuleType, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("version: 1\nsplit: {kind: leave-last-out}\nnonsense: 1\n")
    with pytest.raises(ConfigError, match="nonsense"):
        benchmark.load_task(str(wrong))
