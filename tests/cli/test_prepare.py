"""penchant prepare: the options reach the reading, the last line is the folder, --check has its exit code."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from penchant.cli.prepare import prepare_command
from penchant.data.dataset import Dataset
from penchant.errors import ConfigError, PenchantError

app = typer.Typer()
app.command("prepare")(prepare_command)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    log, items = tmp_path / "log.csv", tmp_path / "items.csv"
    log.write_text("userId,item_id,timestamp,place\nu,1,1,home\nu,2,2,work\nv,3,3,home\n")
    items.write_text("item_id,title\n1,Heat\n2,Alien\n")
    return log, items


def test_it_saves_and_ends_with_the_folder(files: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--map", "user_id=userId", "--context", "place", "--unknown-items", "drop"]
    result = run(*files, "--out", out, *arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == str(out)
    assert "2 interactions, 1 users, 2 items" in result.stdout
    assert "1 events of unknown items" in result.stdout
    assert Dataset.load(out).interactions.columns == ["user_id", "item_id", "timestamp", "place"]


def test_files_without_headers(tmp_path: Path) -> None:
    (tmp_path / "u.data").write_text("u\t1\t5\t7\n")
    (tmp_path / "u.item").write_bytes('1|Misérables "Les"|x\n'.encode("latin-1"))
    arguments = ["--sep", "\\t", "--columns", "user_id,item_id,rating,timestamp", "--items-sep", "|"]
    arguments += ["--items-columns", "item_id,title", "--items-encoding", "latin-1", "--no-quote", "--no-header"]
    result = run(tmp_path / "u.data", tmp_path / "u.item", "--out", tmp_path / "out", *arguments)
    assert result.exit_code == 0, result.output
    assert Dataset.load(tmp_path / "out").items.rows() == [("1", 'Misérables "Les"')]


def test_check_prints_every_rule_and_writes_nothing(files: tuple[Path, Path], tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    result = run(*files, "--check", "--map", "user_id=userId")
    assert result.exit_code == 2
    lines = result.stdout.splitlines()
    assert any(line.startswith("FAIL  events are of known items") for line in lines)
    assert any(line.startswith("WARN  users have 3 events or more") for line in lines)
    assert any(line.startswith("PASS  times can be read") for line in lines)
    assert "      ids: 3" in lines
    assert sorted(tmp_path.iterdir()) == before


def test_check_ends_well_when_there_are_only_warnings(files: tuple[Path, Path]) -> None:
    assert run(*files, "--check", "--map", "user_id=userId", "--unknown-items", "drop").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--out"),
        (["--check", "--map", "user_id"], "not name=column"),
        (["--check", "--map", "title=a", "--map", "title=b"], "mapped twice"),
        (["--check", "--no-header"], "column names"),
        (["--check", "--encoding", "hex"], "no text encoding"),
        (["--out", "x"], "no column 'user_id'"),
    ],
)
def test_errors_are_ours(files: tuple[Path, Path], arguments: list[str], said: str) -> None:
    result = run(*files, *arguments)
    assert isinstance(result.exception, PenchantError)
    assert said in str(result.exception)
    assert isinstance(result.exception, ConfigError) or arguments == ["--out", "x"]


def test_every_option_has_a_help_text() -> None:
    command = typer.main.get_command(app)
    assert all(getattr(parameter, "help", None) for parameter in command.params if parameter.name != "help")
