"""A download ends, one way or the other, in time, and appears whole or not at all."""

from __future__ import annotations

import hashlib
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fastgpt.data import DownloadError, download
from fastgpt.errors import InputError

CONTENT = bytes(range(256)) * 300  # several chunks
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


class Handler(BaseHTTPRequestHandler):
    """/good, /slow (stops midway), /drip (a byte at a time), /short (less than announced); else 404."""

    requests: list[str]
    released: threading.Event

    def do_GET(self) -> None:
        self.requests.append(self.path)
        if self.path not in ("/good", "/slow", "/drip", "/short"):
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        if self.path == "/good":
            self.wfile.write(CONTENT)
            return
        self.wfile.write(CONTENT[:20000])
        self.wfile.flush()
        while self.path != "/short" and not self.released.wait(0.05):
            if self.path == "/drip":
                self.wfile.write(b"x")

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    Handler.requests = []
    Handler.released = threading.Event()
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.handle_error = lambda *args: None  # type: ignore[method-assign]  # clients hang up here on purpose
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{http.server_address[1]}"
        Handler.released.set()
        http.shutdown()
        thread.join()


def test_download_once(server: str, tmp_path: Path) -> None:
    path = tmp_path / "cache" / "file"
    for _ in range(2):
        assert download(server + "/good", path, sha256=SHA256) == path
        assert path.read_bytes() == CONTENT
    assert Handler.requests == ["/good"]


def test_a_damaged_file_is_downloaded_again(server: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(CONTENT[:-1])
    download(server + "/good", path, sha256=SHA256)
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("/good", "not the expected file"),
        ("/short", "not the expected file"),
        ("/missing", "HTTP 404"),
        ("/slow", "timed out|no answer"),
        ("/drip", "no answer within 0.5 seconds"),
    ],
)
def test_a_failed_download_ends_soon_and_leaves_nothing(
    server: str, tmp_path: Path, page: str, message: str
) -> None:
    start = time.monotonic()
    with pytest.raises(DownloadError, match=message) as caught:
        download(server + page, tmp_path / "file", sha256="0" * 64, timeout=0.5)
    assert time.monotonic() - start < 5
    assert isinstance(caught.value, InputError)
    assert "\n" not in str(caught.value)
    assert files(tmp_path) == []


def test_a_failed_download_keeps_the_file_that_was_there(server: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("of another version")
    with pytest.raises(DownloadError):
        download(server + "/missing", path, sha256=SHA256)
    assert path.read_text() == "of another version"


def test_nobody_listens(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/"
        with pytest.raises(DownloadError, match="cannot download"):
            download(url, tmp_path / "file", sha256=SHA256)


def test_a_server_that_never_answers(tmp_path: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        start = time.monotonic()
        with pytest.raises(DownloadError, match=r"timed out|no answer"):
            url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
            download(url, tmp_path / "file", sha256=SHA256, timeout=0.3)
        assert time.monotonic() - start < 5


def test_a_name_look_up_that_hangs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No socket timeout covers name resolution."""
    released = threading.Event()

    def getaddrinfo(*args: object) -> None:
        released.wait(10)
        raise OSError

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    start = time.monotonic()
    with pytest.raises(DownloadError, match="no answer within"):
        download("http://nowhere.invalid/", tmp_path / "file", sha256=SHA256, timeout=0.3)
    assert time.monotonic() - start < 5
    released.set()


def test_no_network(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"looked up nowhere\.invalid"):
        download("http://nowhere.invalid/", tmp_path / "file", sha256=SHA256)


def test_a_place_that_cannot_be_written(server: str, tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(DownloadError, match="cannot write"):
        download(server + "/good", tmp_path / "taken" / "file", sha256=SHA256)
