"""The command line called in this process, and a dataset and a run made by it once for all tests of the verbs."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tests.conftest import toy_frames

from penchant.cli import main


@dataclass(frozen=True)
class Outcome:
    """How a call ended: exit code, and what it wrote to stdout and stderr."""

    code: int
    out: str
    err: str

    @property
    def last(self) -> str:
        """The last line on stdout."""
        return self.out.splitlines()[-1] if self.out else ""


Call = Callable[..., Outcome]

# A fit of the tiny model that takes a moment.
QUICK = ["--dtype", "float32", "--device", "cpu", "--epochs", "3", "--validation-users", "5", "--candidates", "8"]


def call_penchant(*arguments: object, encoding: str = "utf-8") -> Outcome:
    """``penchant ARGUMENTS`` in this process; whatever is not an exit is a bug and goes through."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True) for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["penchant", *map(str, arguments)])
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        with pytest.raises(SystemExit) as ended:
            main()
    code = ended.value.code
    texts = [stream.buffer.getvalue().decode(encoding) for stream in (out, err)]  # type: ignore[attr-defined]
    return Outcome(code if isinstance(code, int) else int(code is not None), *texts)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models as tiny as these gain nothing from threads, and on a busy machine threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def penchant() -> Call:
    return call_penchant


@dataclass(frozen=True)
class Ready:
    """What the verbs made of the toy data: ``run`` as fitted, ``llm`` the same with a say for the LLM."""

    log: Path
    items: Path
    data: Path
    model: Path
    run: Path
    llm: Path
    fit_out: str
    fit_err: str

    @property
    def fit(self) -> list[object]:
        """The verb and its arguments, up to --out."""
        return ["fit", self.data, "--model", self.model, *QUICK]


@pytest.fixture(scope="session")
def ready(byte_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Ready:
    root = tmp_path_factory.mktemp("ready")
    log, items = root / "log.csv", root / "items.csv"
    for frame, path in zip(toy_frames(), (log, items), strict=True):
        frame.write_csv(path)
    with pytest.MonkeyPatch.context() as patch:
        # The fixture that does this for every test runs after those of the session.
        patch.setenv("PENCHANT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        assert call_penchant("prepare", log, items, "--out", root / "data").code == 0
        fitted = call_penchant("fit", root / "data", "--model", byte_folder, *QUICK, "--out", root / "run")
        assert fitted.code == 0, fitted.err
        from penchant.fusion import Fusion
        from penchant.recommend import Recommender

        model = Recommender.load(root / "run")
        model.fusion = Fusion(0.5, 1.0, 0.5, 0.5, 5)
        model.save(root / "llm")
    return Ready(log, items, root / "data", byte_folder, root / "run", root / "llm", fitted.out, fitted.err)


def contents(root: Path) -> dict[str, bytes | None]:
    """Every path under ``root`` with its bytes (None for a folder): what must not change."""
    return {str(p.relative_to(root)): p.read_bytes() if p.is_file() else None for p in sorted(root.rglob("*"))}
