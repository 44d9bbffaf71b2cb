"""Downloads from a local server: complete, wrong, cut short, too long, zipped."""

from __future__ import annotations

import hashlib
import io
import socket
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from skipstone.data.fetch import SourceFile, locate, offline

GOOD = b"to be or not to be\n" * 1000
DIGEST = hashlib.sha256(GOOD).hexdigest()


def zipped(data: bytes, member: str = "raw") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, data)
    return buffer.getvalue()


FILES = {
    "/good": GOOD,
    "/wrong": GOOD[:-1] + b"!",
    "/long": GOOD + b"x" * (3 << 20),
    "/zip": zipped(GOOD),
    "/wrongzip": zipped(GOOD[::-1]),
    "/otherzip": zipped(GOOD, "else"),
}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        short = self.path == "/short"
        data = GOOD if short else FILES.get(self.path)
        self.send_response(200 if data is not None else 404)
        self.send_header("Content-Length", str(len(data or b"")))
        self.end_headers()
        try:
            self.wfile.write((data or b"")[: 500 if short else None])
        except OSError:  # the client stopped reading, which is what /long is about
            self.close_connection = True

    def log_message(self, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    def handle_error(self, request: object, address: object) -> None:
        """A client that hangs up is part of these tests."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as server:
        server.asked = []  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Path, Path]:
    monkeypatch.setenv("SKIPSTONE_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("SKIPSTONE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SKIPSTONE_OFFLINE", raising=False)
    monkeypatch.setenv("no_proxy", "*")
    return tmp_path / "data", tmp_path / "cache"


def source(server: Server, path: str, **fields: object) -> SourceFile:
    address = f"http://127.0.0.1:{server.server_address[1]}{path}"
    return SourceFile(path="name/file.txt", size=len(GOOD), sha256=DIGEST, url=address, **fields)  # type: ignore[arg-type]


def kept(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_download_lands_in_the_cache_and_is_not_repeated(server: Server, folders: tuple[Path, Path]) -> None:
    path = locate(source(server, "/good"))
    assert path == folders[1] / "name" / "file.txt"
    assert path.read_bytes() == GOOD
    assert locate(source(server, "/good")) == path
    assert server.asked == ["/good"]  # type: ignore[attr-defined]
    assert kept(folders[1]) == [path]


def test_a_file_of_the_data_folder_comes_first(server: Server, folders: tuple[Path, Path], tmp_path: Path) -> None:
    for folder in folders:
        (folder / "name").mkdir(parents=True)
        (folder / "name" / "file.txt").write_bytes(GOOD)
    assert locate(source(server, "/good")) == folders[0] / "name" / "file.txt"
    (folders[0] / "name" / "file.txt").unlink()
    assert locate(source(server, "/good")) == folders[1] / "name" / "file.txt"
    (folders[1] / "name" / "file.txt").unlink()
    (tmp_path / "system.txt").write_bytes(GOOD)
    assert locate(source(server, "/good", system=(str(tmp_path / "system.txt"),))) == tmp_path / "system.txt"
    assert server.asked == []  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/wrong", "has SHA-256 .* the published file has"),
        ("/long", f"has more than {len(GOOD)} bytes, the published file has {len(GOOD)}"),
        ("/short", f"has 500 bytes, the published file has {len(GOOD)}|IncompleteRead"),
        ("/none", "404"),
    ],
)
def test_a_bad_download_keeps_nothing(server: Server, folders: tuple[Path, Path], path: str, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        locate(source(server, path))
    assert "\n" not in str(caught.value)
    assert path in str(caught.value)
    assert kept(folders[1]) == []


def test_an_interrupt_keeps_nothing(
    server: Server, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("skipstone.data.fetch._copy", stop)
    with pytest.raises(KeyboardInterrupt):
        locate(source(server, "/good"))
    assert kept(folders[1]) == []


def test_an_archive_is_checked_before_and_after_it_is_unpacked(server: Server, folders: tuple[Path, Path]) -> None:
    size = len(FILES["/zip"])
    for path, fields, message in (
        ("/zip", {"download_size": size + 1}, f"has {size} bytes, the published file has {size + 1}"),
        ("/wrongzip", {}, "raw in .*/wrongzip has SHA-256"),
        ("/otherzip", {}, "not the expected archive of raw"),
        ("/good", {}, "not the expected archive of raw"),
    ):
        with pytest.raises(ValueError, match=message):
            locate(source(server, path, member="raw", **fields))  # type: ignore[arg-type]
        assert kept(folders[1]) == []
    path = locate(source(server, "/zip", member="raw", download_size=size))
    assert path.read_bytes() == GOOD
    assert kept(folders[1]) == [path]


def test_another_file_of_that_name_is_named_and_left_alone(server: Server, folders: tuple[Path, Path]) -> None:
    file = folders[0] / "name" / "file.txt"
    file.parent.mkdir(parents=True)
    for data, message in ((b"mine", "has 4 bytes"), (FILES["/wrong"], "has SHA-256")):
        file.write_bytes(data)
        with pytest.raises(ValueError, match=rf"file\.txt {message}.*move it away"):
            locate(source(server, "/good"))
        assert file.read_bytes() == data
    assert server.asked == []  # type: ignore[attr-defined]


def test_no_server_is_one_clear_line(server: Server) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"http://127.0.0.1:{closed.getsockname()[1]}/good"
    gone = replace(source(server, "/good"), url=address)
    with pytest.raises(FileNotFoundError, match=r"downloading http://127\.0\.0\.1:\d+/good failed \(.+\); put it at"):
        locate(gone)


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("yes", True), ("0", False), ("", False)])
def test_offline_is_set_or_not(monkeypatch: pytest.MonkeyPatch, server: Server, value: str, expected: bool) -> None:
    monkeypatch.setenv("SKIPSTONE_OFFLINE", value)
    assert offline() is expected
    if expected:
        with pytest.raises(FileNotFoundError, match="SKIPSTONE_OFFLINE is set"):
            locate(source(server, "/good"))
        assert server.asked == []  # type: ignore[attr-defined]
