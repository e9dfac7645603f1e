"""Data sets of the Hugging Face hub, streamed through `datasets`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from fastgpt.data.corpora import HUB_CORPORA, HUB_PREFIX
from fastgpt.data.sources import Position, Source, text_of
from fastgpt.errors import InputError

SAMPLE = "10BT"  # of FineWeb and FineWeb-Edu: the lecture's
# nanoGPT's data/openwebtext/readme.md; samples say it in their names. For the progress bar.
PUBLISHED_TOKENS = {"Skylion007/openwebtext": 9_040_017_095}
MARK_DOCUMENTS = 1000  # how often the place in the stream is noted, which takes as long as a short document
TIMEOUT_SECONDS = 30


def subset_of(name: str, config: str | None, sample: str | None) -> tuple[str, str | None]:
    """The data set that is one of HUB_CORPORA or hf:OWNER/NAME, and its subset (None: its default).

    `sample` is short for the subset f"sample-{sample}". Raises `InputError` when both name a subset.
    """
    if config is not None and sample is not None:
        raise InputError(f"--name {config} and --sample {sample} both choose the subset: give one")
    if config is None and (sample is not None or name.startswith("fineweb")):
        config = f"sample-{sample or SAMPLE}"
    return HUB_CORPORA.get(name) or name.removeprefix(HUB_PREFIX), config


def short_name(dataset: str, config: str | None) -> str:
    """What to call a subset of a data set."""
    return "-".join([dataset.rsplit("/", 1)[-1], *([config] if config else [])])


def hub_source(
    dataset: str,
    config: str | None = None,
    *,
    split: str = "train",
    column: str = "text",
    revision: str | None = None,
) -> Source:
    """The text in `column` of a data set OWNER/NAME of the hub.

    `revision` is a branch, tag or commit (default: main). The identity has the commit, with which a stream
    that goes on another day is of the same text. A position is a document's number, and what `datasets`
    needs to go on at a document shortly before. Raises `InputError` without `datasets`, and when the hub
    cannot be reached or lacks any of this, which may show only in reading.
    """
    commit = _commit(dataset, revision)

    def read(position: Position) -> Iterator[tuple[Position, str]]:
        return _documents(dataset, config, split, column, commit, position)

    identity = {"dataset": dataset, "name": config, "split": split, "column": column, "revision": commit}
    billions = re.fullmatch(r"sample-(\d+)BT", config or "")
    tokens = int(billions[1]) * 10**9 if billions else PUBLISHED_TOKENS.get(dataset)
    return Source(short_name(dataset, config), identity, read, tokens=tokens)


def _commit(dataset: str, revision: str | None) -> str:
    """The commit that `revision` is now."""
    try:
        import datasets  # noqa: F401  (used later, and missed now)
        from huggingface_hub import HfApi
    except ImportError:
        raise InputError(
            f"{dataset} comes through datasets: pip install 'fastgpt[data]', or give local files"
        ) from None
    if revision is not None and re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    try:
        info = HfApi().dataset_info(dataset, revision=revision, timeout=TIMEOUT_SECONDS)
    except Exception as error:  # the hub's client raises many unrelated types
        raise InputError(_message(dataset, error)) from error
    return str(info.sha)


def _documents(
    dataset: str, config: str | None, split: str, column: str, revision: str, position: Position
) -> Iterator[tuple[Position, str]]:
    from datasets import __version__, load_dataset

    first = position["document"] if position else 0
    mark: dict[str, Any] = position["mark"] if position else {}
    try:
        stream = load_dataset(dataset, config, split=split, revision=revision, streaming=True)
        if mark.get("datasets") == __version__:  # another version may understand it otherwise: count, then
            stream.load_state_dict(mark["state"])
        else:
            mark = {"datasets": __version__, "document": 0, "state": stream.state_dict()}
        for number, row in enumerate(stream, mark["document"]):
            if number >= first:
                text = text_of(row, column, f"{dataset}, document {number + 1}")
                yield {"document": number, "mark": mark}, text
            if (number + 1) % MARK_DOCUMENTS == 0:
                mark = {"datasets": __version__, "document": number + 1, "state": stream.state_dict()}
    except InputError:
        raise
    except Exception as error:  # of the network, the hub, or the data set, in many unrelated types
        raise InputError(_message(dataset, error)) from error


def _message(dataset: str, error: Exception) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    if "scripts are no longer supported" in reason:
        return f"{dataset} is a script, which datasets no longer runs: try --revision refs/convert/parquet"
    return (
        f"reading {dataset} from the Hugging Face hub failed: {reason[:500]}. Where the network was at fault "
        "run the same command again: it goes on after the last complete shard"
    )
