"""Downloads that never hang or end half done."""

from __future__ import annotations

import queue
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from fastgpt.errors import InputError
from fastgpt.files import atomic_write, sha256_of

# The slowest link that is not called stalled delivers one chunk per `timeout`.
CHUNK_BYTES = 16 * 1024


class DownloadError(InputError):
    """A file could not be downloaded, or what came was not the expected file."""


def download(url: str, path: str | Path, *, sha256: str, timeout: float = 10.0) -> Path:
    """Download `url` to `path`, unless `path` already is the file with this SHA-256; return `path`.

    Raises `DownloadError` when the server cannot be reached or answers with an error, when it sends less
    than 16 KiB within `timeout` seconds (name look-up and connecting count), when the hash is wrong, or
    when `path` cannot be written.
    """
    path = Path(path)
    if path.is_file() and sha256_of(path) == sha256:
        return path
    try:
        with atomic_write(path) as temporary:
            _fetch(url, temporary, timeout)
            actual = sha256_of(temporary)
            if actual != sha256:
                raise DownloadError(
                    f"downloaded {url} but it is not the expected file ({temporary.stat().st_size} bytes, "
                    f"SHA-256 {actual[:16]}..., expected {sha256[:16]}...): try again, or check your proxy"
                )
    except OSError as error:
        raise DownloadError(f"cannot write {path}: {error.strerror}. Set FASTGPT_CACHE") from error
    return path


def _fetch(url: str, target: Path, timeout: float) -> None:
    """Copy `url` into the file `target`."""
    from tqdm import tqdm

    name = url.rsplit("/", 1)[-1]
    with target.open("wb") as file, tqdm(unit="B", unit_scale=True, desc=name, disable=None) as bar:
        for length, chunk in _chunks(url, timeout):
            bar.total = length
            file.write(chunk)
            bar.update(len(chunk))


def _chunks(url: str, timeout: float) -> Iterator[tuple[int | None, bytes]]:
    """The content of `url` in chunks, each with the length of the whole as far as it is known."""
    # A daemon thread reads the network: neither a name look-up nor a server that drips one byte at a
    # time is bounded by a socket's timeout, but waiting for the thread's next chunk is.
    inbox: queue.SimpleQueue[tuple[int | None, bytes] | Exception] = queue.SimpleQueue()
    cancelled = threading.Event()

    def read() -> None:
        try:
            with urllib.request.urlopen(url, timeout=timeout) as response:
                length = response.headers.get("Content-Length")
                chunk = b"-"
                while chunk and not cancelled.is_set():
                    chunk = response.read(CHUNK_BYTES)
                    inbox.put((int(length) if length else None, chunk))
        except Exception as error:  # whatever it is, it is raised where it is waited for
            inbox.put(error)

    threading.Thread(target=read, daemon=True).start()
    try:
        while True:
            item = inbox.get(timeout=timeout)
            if isinstance(item, Exception):
                raise DownloadError(f"cannot download {url}: {_reason(item)}") from item
            if not item[1]:
                return
            yield item
    except queue.Empty:
        raise DownloadError(f"cannot download {url}: no answer within {timeout:g} seconds") from None
    finally:
        cancelled.set()


def _reason(error: Exception) -> str:
    """One line that says why a request failed."""
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} {error.reason}"
    if isinstance(error, urllib.error.URLError):
        return str(error.reason)
    return str(error) or type(error).__name__
