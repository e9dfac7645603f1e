"""Where text comes from: two named corpora, or any text file or folder of text files."""

from __future__ import annotations

import difflib
import functools
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastgpt.data.cache import download
from fastgpt.errors import InputError
from fastgpt.files import cache_dir

CORPORA = ("shakespeare", "pydocs")
PROBLEM_CORPORA = ("addition", "calculator")  # made as they are needed, from no text: see `problems`
# A folder is searched for prose and source code; data formats are left alone.
TEXT_SUFFIXES = (
    *(".txt", ".text", ".md", ".rst", ".tex", ".org", ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp"),
    *(".cu", ".cuh", ".rs", ".go", ".java", ".js", ".ts", ".sh"),
)
# Files of many documents, which are streamed into shards once: see `sources`.
DATA_SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst")
HUB_CORPORA = {
    "fineweb-edu": "HuggingFaceFW/fineweb-edu",
    "fineweb": "HuggingFaceFW/fineweb",
    "openwebtext": "Skylion007/openwebtext",
}
HUB_PREFIX = "hf:"  # of any other data set of the Hugging Face hub: see `hub`
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


@dataclass(frozen=True)
class Document:
    """One text. `size` is its bytes in UTF-8; `read()` returns it, newlines untouched, when it is wanted."""

    name: str
    size: int
    read: Callable[[], str]


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order. Equal `fingerprint`s mean equal documents."""

    name: str
    documents: Sequence[Document]
    fingerprint: str

    @property
    def size(self) -> int:
        """Bytes in all documents."""
        return sum(document.size for document in self.documents)


def open_corpus(name_or_path: str | Path) -> Corpus:
    """The corpus of that name (a name wins: write ./pydocs for a folder called pydocs), or at that path.

    - "shakespeare": tiny Shakespeare, 1.1 MB, downloaded once (`DownloadError` when that fails).
    - "pydocs": the help topics inside this Python, 0.5 MB, a document each, in order of their names.
    - a text file, or a folder: every file in it and below with a suffix in `TEXT_SUFFIXES`, in order of
      their paths; hidden files and folders are skipped.

    Text is UTF-8; a byte order mark is dropped. Raises `InputError` when there is no text there (and, when
    it is read, for a file that is not UTF-8).
    """
    if str(name_or_path) == "shakespeare":
        return _shakespeare()
    if str(name_or_path) == "pydocs":
        return _pydocs()
    if str(name_or_path) in PROBLEM_CORPORA:
        raise InputError(f"{name_or_path} is no text: its problems are made in training, as they are needed")
    path = Path(name_or_path).expanduser()
    data_file = path.is_file() and path.name.lower().endswith(DATA_SUFFIXES)
    if data_file or is_hub_name(str(name_or_path)):
        raise InputError(
            f"{name_or_path} holds many documents: make token shards of it once with "
            f"`fastgpt prepare {name_or_path} --out FOLDER`, and use FOLDER as the corpus"
        )
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        return _files(path.name, path.parent, [path])
    if path.exists():
        raise InputError(f"{path} is neither a file nor a folder: a corpus is text files")
    close = difflib.get_close_matches(str(name_or_path), (*CORPORA, *PROBLEM_CORPORA, *HUB_CORPORA), n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise InputError(
        f"no corpus {str(name_or_path)!r}: {hint}It is {', '.join(map(repr, (*CORPORA, *PROBLEM_CORPORA)))}, "
        "or the path of a text file or a folder of text files, and there is nothing at this path. "
        f"`fastgpt prepare` knows {', '.join(HUB_CORPORA)} and {HUB_PREFIX}OWNER/NAME of the hub too"
    )


def is_hub_name(name: str) -> bool:
    """Whether `name` is one of HUB_CORPORA or hf:OWNER/NAME."""
    return name in HUB_CORPORA or name.startswith(HUB_PREFIX)


def _shakespeare() -> Corpus:
    path = download(SHAKESPEARE_URL, cache_dir() / "shakespeare.txt", sha256=SHAKESPEARE_SHA256)
    document = Document("shakespeare", path.stat().st_size, functools.partial(_read_text, path))
    return Corpus("shakespeare", [document], SHAKESPEARE_SHA256)


def _pydocs() -> Corpus:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise InputError(
            "this Python comes without pydoc_data.topics, the text of the pydocs corpus: "
            "use another Python, or give a text file"
        ) from None
    documents = []
    digest = hashlib.sha256()
    for name, text in sorted(topics.items()):
        data = text.encode()
        digest.update(f"{name}\0{len(data)}\0".encode() + data)
        documents.append(Document(name, len(data), functools.partial(str, text)))
    return Corpus("pydocs", documents, digest.hexdigest())


def files_below(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The files in a folder and below with one of these suffixes; hidden files and folders are skipped."""
    paths = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(parent, name)
            if not name.startswith(".") and name.lower().endswith(suffixes) and path.is_file():
                paths.append(path)
    return paths


def in_order(root: Path, paths: list[Path]) -> tuple[list[Path], str]:
    """The files below `root` in order, and a fingerprint of their names, sizes and times of change."""
    digest = hashlib.sha256()
    paths = sorted(paths, key=lambda path: path.relative_to(root).as_posix())
    for path in paths:
        relative, status = path.relative_to(root).as_posix(), path.stat()
        digest.update(os.fsencode(f"{relative}\0{status.st_size}\0{status.st_mtime_ns}\n"))
    return paths, digest.hexdigest()


def _folder(folder: Path) -> Corpus:
    paths = files_below(folder, TEXT_SUFFIXES)
    if not paths:
        raise InputError(
            f"no text in the folder {folder}: only {' '.join(TEXT_SUFFIXES)} files count; "
            "give any other file by its own path"
        )
    return _files(folder.resolve().name, folder, paths)


def _files(name: str, root: Path, paths: list[Path]) -> Corpus:
    """The corpus of files below `root`, a document each."""
    paths, fingerprint = in_order(root, paths)
    documents = []
    for path in paths:
        relative, size = path.relative_to(root).as_posix(), path.stat().st_size
        documents.append(Document(relative, size, functools.partial(_read_text, path)))
    corpus = Corpus(name, documents, fingerprint)
    if corpus.size == 0:
        raise InputError(f"no text in {root / paths[0].name if len(paths) == 1 else root}: empty")
    return corpus


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text: byte 0x{error.object[error.start]:02x} at offset {error.start} "
            f"({error.reason}). Convert it first, for example: iconv -f LATIN1 -t UTF-8"
        ) from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
