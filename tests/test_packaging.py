"""The wheel holds all that an installed penchant needs and nothing else, and works where nothing else is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import penchant
from penchant.data.dataset import Dataset
from penchant.data.split import leave_last_out
from penchant.engine.loading import load_engine
from penchant.fusion import Fusion
from penchant.interest.config import EncoderConfig
from penchant.prompt import NAMES, Templates
from penchant.recommend import Recommender
from penchant.resources import shipped
from penchant.run_folder import FitConfig
from tests.conftest import toy_frames

ROOT = Path(__file__).resolve().parents[1]
KINDS = {"prompts": "prompts", "configs": "finetune/configs", "tasks": "eval/tasks"}


def visible(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith(".") and p.is_file())


# -- the editable install ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_editable_install_reads_the_originals(kind: str) -> None:
    assert shipped(kind) == ROOT / KINDS[kind]  # type: ignore[arg-type]
    assert visible(shipped(kind))  # type: ignore[arg-type]


def test_every_template_is_shipped_and_only_those() -> None:
    assert visible(shipped("prompts")) == sorted(f"{name}.jinja" for name in NAMES)


# -- the wheel ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = out.iterdir()
    return made


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_is_for_any_machine(wheel: Path) -> None:
    assert wheel.name == f"penchant-{penchant.__version__}-py3-none-any.whl"


def test_the_wheel_has_every_module(names: set[str]) -> None:
    source = {f"penchant/{p.relative_to(ROOT / 'src' / 'penchant')}" for p in (ROOT / "src").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == source


@pytest.mark.parametrize("kind", KINDS)
def test_the_wheel_ships_what_stands_at_the_top_level(wheel: Path, kind: str) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in visible(ROOT / KINDS[kind]):
            assert archive.read(f"penchant/_shipped/{kind}/{name}") == (ROOT / KINDS[kind] / name).read_bytes()


def test_the_wheel_is_typed_and_licensed(names: set[str]) -> None:
    assert "penchant/py.typed" in names
    assert f"penchant-{penchant.__version__}.dist-info/licenses/LICENSE" in names


def test_the_wheel_holds_nothing_else(names: set[str]) -> None:
    assert {name.split("/")[0] for name in names} == {"penchant", f"penchant-{penchant.__version__}.dist-info"}
    unwanted = ("tests/", "/test_", "__pycache__", ".pyc", "finetune/", "eval/", "conftest", "/runs/", "/results/")
    assert [name for name in names if any(part in name for part in unwanted)] == []
    outside = {name for name in names if not name.endswith(".py") and name.startswith("penchant/")}
    assert {name for name in outside if "/_shipped/" not in name} == {
        "penchant/py.typed",
        "penchant/evaluation/page.html.jinja",
    }


def test_the_metadata_say_how_to_start_it_and_what_it_needs(wheel: Path) -> None:
    info = f"penchant-{penchant.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
        assert "penchant = penchant.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    needed = [line for line in metadata.get_all("Requires-Dist") or [] if "extra ==" not in line]
    for name in ("torch", "transformers", "peft", "polars", "typer", "jinja2", "platformdirs"):
        assert any(line.lower().startswith(name) for line in needed), name
    assert not any(line.startswith(("pytest", "vllm", "bitsandbytes")) for line in needed)


# -- installed ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The python of an empty environment that has the wheel, and borrows its dependencies from this one."""
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, capture_output=True)
    (site,) = folder.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # A path named in a .pth file is searched last, and .pth files in it (our editable install's) are not read.
    borrowed = dict.fromkeys(sysconfig.get_paths()[name] for name in ("purelib", "platlib"))
    (site / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    return folder / "bin" / "python"


def run(python: Path, *arguments: object, cwd: Path) -> str:
    """What ``python ARGUMENTS`` prints (and nothing on stderr), in a folder that is not the repository's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment = {**kept, "PENCHANT_CACHE": str(cwd / "cache"), "OMP_NUM_THREADS": "1"}
    command = [str(python), *map(str, arguments)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=cwd, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_the_installed_wheel_says_its_version(installed: Path, tmp_path: Path) -> None:
    assert run(installed, "-m", "penchant", "--version", cwd=tmp_path) == f"penchant {penchant.__version__}\n"


# Where it is, what it ships, the hash of its templates, and what it recommends.
USE = """
import json, sys
import penchant
from penchant.cli import main
from penchant.prompt import Templates
from penchant.resources import shipped

print(json.dumps({
    "package": penchant.__file__,
    "shipped": {kind: [str(shipped(kind)), sorted(p.name for p in shipped(kind).iterdir())]
                for kind in ("prompts", "configs", "tasks")},
    "templates": Templates().hash(),
}))
sys.argv = ["penchant", "recommend", *sys.argv[1:]]
main()
"""


def test_the_installed_wheel_has_its_files_and_recommends_what_it_would_here(
    installed: Path, byte_folder: Path, tmp_path: Path
) -> None:
    config = FitConfig(encoder=EncoderConfig(epochs=2), validation_users=3, candidates=8)
    engine = load_engine(byte_folder, dtype="float32", device="cpu")
    model = Recommender.fit(leave_last_out(Dataset.read(*toy_frames())), engine, config)
    model.fusion = Fusion(0.5, 1.0)  # so that the LLM, and not the encoder alone, is heard
    model.save(tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()

    out = run(installed, "-c", USE, tmp_path / "run", "--user", "u0", "-k", 4, cwd=tmp_path / "elsewhere")
    first, *answer = out.splitlines()
    said = json.loads(first)
    site = Path(said["package"]).parents[1]
    assert site.parent.parent.parent == installed.parents[1], "the wheel's, not the editable install's"
    for kind, folder in KINDS.items():
        where, files = said["shipped"][kind]
        assert where == str(site / "penchant" / "_shipped" / kind)
        assert set(files) >= set(visible(ROOT / folder))
    assert said["templates"] == Templates().hash()
    here = model.recommend(["u0"], k=4)
    assert [line.split("\t")[2] for line in answer] == here["item_id"].to_list()
    assert [float(line.split("\t")[4]) for line in answer] == pytest.approx(here["score"].to_list(), abs=1e-3)
