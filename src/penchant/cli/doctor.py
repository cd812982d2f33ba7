"""``penchant doctor``: what this machine has, which extras work, and why the others don't."""

from __future__ import annotations

import os
import platform
import shutil

import typer

_EVALUATION = ("bm25s", "implicit", "statsmodels")
# Distribution's module, what it is for, how to get it.
_EXTRAS = (
    ("bitsandbytes", "4- and 8-bit weights", "pip install 'penchant[quant]'"),
    ("faiss", "approximate retrieval for large catalogues", "pip install 'penchant[faiss]'"),
    ("vllm", "GPU serving", "pip install 'penchant[vllm]'"),
    ("ray", "batch jobs on many machines", "pip install 'penchant[ray]'"),
    *((name, "baselines and tests of an evaluation", "pip install 'penchant[eval]'") for name in _EVALUATION),
)


def doctor_command() -> None:
    """Print Python, torch, device, memory, cache and extras, a line each; exit code 1 where the core is broken."""
    import importlib

    from penchant import __version__
    from penchant.fetch import KNOWN, cache_folder, is_cached

    def line(name: str, text: str) -> None:
        typer.echo(f"{name:<14} {text}")

    line("penchant", __version__)
    line("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    broken = False
    for name in ("torch", "transformers", "peft"):
        try:
            module = importlib.import_module(name)
        except (ImportError, OSError, RuntimeError) as error:
            broken = True
            line(name, f"does not import: {error}")
        else:
            line(name, module.__version__)
    if not broken:
        from penchant.engine.device import describe_device

        line("device", describe_device())
    line("memory", _memory())
    root = cache_folder()
    existing = next(p for p in (root, *root.parents) if p.exists())
    usable = "writable" if os.access(existing, os.W_OK) else "NOT writable"
    line("cache", f"{root} ({usable}, {shutil.disk_usage(existing).free / 2**30:.1f} GiB free)")
    for name in KNOWN:
        line("", f"{name}: {'cached' if is_cached(name) else 'not fetched yet'}")
    for module_name, purpose, remedy in _EXTRAS:
        try:
            module = importlib.import_module(module_name)
        except (ImportError, OSError, RuntimeError) as error:
            line(module_name, f"not usable ({error}); for {purpose}: {remedy}")
        else:
            line(module_name, f"{getattr(module, '__version__', 'found')}, for {purpose}")
    if broken:
        raise typer.Exit(1)


def _memory() -> str:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return f"{pages:.1f} GiB, {available:.1f} GiB free"
