"""Data sets of the hub: the right one is asked for, and its stream goes on at any document.

`datasets` itself streams here, from parquet files made by the test in place of the hub.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import pyarrow
import pytest
from pyarrow import parquet

from fastgpt.data import Source, hub, hub_source, is_hub_name
from fastgpt.data.hub import short_name, subset_of
from fastgpt.errors import InputError

MUTANTS = {
    "fastgpt/data/hub.py": [
        ('"document": number + 1, "state"', '"document": number, "state"'),
        ("            if number >= first:\n", "            if True:\n"),
        ('stream.load_state_dict(mark["state"])', "pass"),
        ('if mark.get("datasets") == __version__:', "if mark:"),
        ("split=split, revision=revision, streaming", "split=split, streaming"),
        ("split=split, revision", "revision"),
        ("load_dataset(dataset, config, split", "load_dataset(dataset, split"),
        ("if revision is not None and re.fullmatch", "if revision is None and re.fullmatch"),
        ("    except InputError:\n        raise\n", ""),
        ("int(billions[1]) * 10**9", "int(billions[1]) * 10**6"),
    ],
}

COMMIT, OTHER = "a" * 40, "b" * 40
TEXTS = [f"document {number}" for number in range(47)]


class Hub(list[tuple[Any, ...]]):
    """What was asked of the hub; it has one data set, in three parquet files."""

    def __init__(self, folder: Path) -> None:
        self.files = []
        for first, last in ((0, 20), (20, 27), (27, 47)):
            self.files.append(str(folder / f"{first:02}.parquet"))
            table = pyarrow.table({"id": range(first, last), "text": TEXTS[first:last]})
            parquet.write_table(table, self.files[-1], row_group_size=6)

    def load_dataset(self, path: str, name: str | None = None, **options: Any) -> datasets.IterableDataset:
        self.append(("load", path, name, options))
        return LOAD_DATASET("parquet", data_files=self.files, split="train", streaming=True)

    def dataset_info(self, name: str, *, revision: str | None, timeout: float) -> SimpleNamespace:
        self.append(("info", name, revision))
        return SimpleNamespace(sha=COMMIT)


LOAD_DATASET = datasets.load_dataset


@pytest.fixture(autouse=True)
def the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", made.load_dataset)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", made.dataset_info)
    return made


def read(source: Source, position: Any = None) -> list[str]:
    return [text for _, text in source.read(position)]


def test_fineweb_edu_is_asked_for_as_the_lecture_does(the_hub: Hub) -> None:
    source = hub_source(*subset_of("fineweb-edu", None, "10BT"))
    assert the_hub == [("info", "HuggingFaceFW/fineweb-edu", None)]
    assert read(source) == TEXTS
    options = {"split": "train", "revision": COMMIT, "streaming": True}
    assert the_hub[1:] == [("load", "HuggingFaceFW/fineweb-edu", "sample-10BT", options)]
    assert (source.name, source.tokens, source.size) == ("fineweb-edu-sample-10BT", 10**10, None)
    assert source.identity == {
        "dataset": "HuggingFaceFW/fineweb-edu",
        "name": "sample-10BT",
        "split": "train",
        "column": "text",
        "revision": COMMIT,
    }


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("fineweb-edu", None, None), ("HuggingFaceFW/fineweb-edu", "sample-10BT")),
        (("fineweb-edu", "CC-MAIN-2024-10", None), ("HuggingFaceFW/fineweb-edu", "CC-MAIN-2024-10")),
        (("fineweb", None, "350BT"), ("HuggingFaceFW/fineweb", "sample-350BT")),
        (("openwebtext", None, None), ("Skylion007/openwebtext", None)),
        (("hf:allenai/c4", "en", None), ("allenai/c4", "en")),
    ],
)
def test_names_and_subsets(arguments: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    assert is_hub_name(arguments[0])
    assert subset_of(*arguments) == expected
    assert short_name(*expected) == "-".join(filter(None, (expected[0].split("/")[1], expected[1])))


def test_names_of_files_and_two_subsets() -> None:
    assert not is_hub_name("./openwebtext")
    assert not is_hub_name("allenai/c4")
    with pytest.raises(InputError, match="--name en and --sample 10BT both choose"):
        subset_of("hf:allenai/c4", "en", "10BT")


def test_another_split_column_and_revision(the_hub: Hub) -> None:
    source = hub_source("a/b", split="test", column="id", revision="v1.0")
    with pytest.raises(InputError, match="^a/b, document 1: column 'id' holds int, not text"):
        read(source)
    assert the_hub == [
        ("info", "a/b", "v1.0"),
        ("load", "a/b", None, {"split": "test", "revision": COMMIT, "streaming": True}),
    ]
    the_hub.clear()
    assert hub_source("a/b", revision=OTHER).identity["revision"] == OTHER  # a commit is what it is
    assert the_hub == []


def test_the_stream_goes_on_at_any_document(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "MARK_DOCUMENTS", 4)
    source = hub_source("a/b")
    found = list(source.read(None))
    for number in range(0, len(TEXTS), 3):
        again = list(source.read(json.loads(json.dumps(found[number][0]))))
        assert [text for _, text in again] == TEXTS[number:]
        assert [position["document"] for position, _ in again] == list(range(number, len(TEXTS)))
        assert read(source, again[-1][0]) == TEXTS[-1:]  # and so does one that went on itself


def test_what_was_read_is_not_read_again(monkeypatch: pytest.MonkeyPatch, the_hub: Hub) -> None:
    """Nor counted, for which all of it would be downloaded: the first file is another by then."""
    monkeypatch.setattr(hub, "MARK_DOCUMENTS", 4)
    found = list(hub_source("a/b").read(None))
    parquet.write_table(pyarrow.table({"id": [0], "text": ["other"]}), the_hub.files[0])
    assert read(hub_source("a/b"), found[25][0]) == TEXTS[25:]


def test_another_version_of_datasets_counts_from_the_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the version before has left may mean something else to it."""
    monkeypatch.setattr(hub, "MARK_DOCUMENTS", 4)
    position = list(hub_source("a/b").read(None))[30][0]
    position["mark"] = {**position["mark"], "datasets": "3.0.0", "state": "of another form"}
    assert read(hub_source("a/b"), position) == TEXTS[30:]


def test_a_missing_column_names_the_others() -> None:
    with pytest.raises(
        InputError, match="^a/b, document 1 has no column 'body': choose with .* from id, text"
    ):
        read(hub_source("a/b", column="body"))


def test_without_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"a/b comes through datasets: pip install 'fastgpt\[data\]'"):
        hub_source("a/b")
    with pytest.raises(InputError, match="comes through datasets"):
        hub_source("a/b", revision=COMMIT)  # of a run that goes on


def test_a_network_that_fails_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, the_hub: Hub) -> None:
    source = hub_source("a/b")
    Path(the_hub.files[1]).write_bytes(b"")  # in place of a connection that breaks in the middle
    texts = []
    with pytest.raises(
        InputError, match="reading a/b .* failed: .* the same command again: it goes on after"
    ):
        for _, text in source.read(None):
            texts.append(text)
    assert texts == TEXTS[:20]

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    with pytest.raises(InputError, match="reading a/b .* failed: no route to host. .* the same command"):
        hub_source("a/b")


def test_a_data_set_that_is_a_script(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("Dataset scripts are no longer supported, but found b.py")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(InputError, match="a/b is a script.* try --revision refs/convert/parquet"):
        read(hub_source("a/b"))
