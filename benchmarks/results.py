"""Rows of results: one schema, appended as CSV under `<results>/<machine>/`.

A row is one contender in one case. `kind` says whether its times were measured or computed; nothing that
draws or compares rows may mix the two without saying so.
"""

from __future__ import annotations

import csv
import dataclasses
import os
import re
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastgpt.errors import InputError

Kind = Literal["measured", "computed"]
Suite = Literal["ops", "train", "ladder", "generate"]
# ok: timed. wrong: its result was not the reference's, so it was not timed. oom: memory did not suffice.
# missing: not installed, or it cannot run here. failed: it raised. `note` says more of each.
Status = Literal["ok", "wrong", "oom", "missing", "failed"]
RESULTS = Path("benchmarks/results")


@dataclass(frozen=True)
class Row:
    """One contender in one case. Fields that do not apply are None.

    The order of the fields is that of the columns of the file.
    """

    # What ran.
    suite: Suite
    operation: str
    """The operation, or of whole steps the preset: "gpt2"; of the ladder its rung."""
    direction: str
    """forward, backward or both; of whole steps step; of generation prefill or decode."""
    contender: str
    """The implementation: eager, compile, triton, native, or a peer's name."""
    dtype: str
    """float32, bfloat16, float16; of whole steps the precision."""
    shape: str
    """Sizes by name: "B=8 T=1024 C=768"."""
    shape_class: str
    """What `ops.use("auto")` looks up: tiny, small, medium or large, by elements."""
    # How it went.
    kind: Kind
    status: Status
    note: str
    # What was found: microseconds a call.
    median_us: float | None = None
    p20_us: float | None = None
    p80_us: float | None = None
    rounds: int | None = None
    outliers: int | None = None
    """Rounds beyond 1.5 interquartile ranges from the quartiles."""
    ratio: float | None = None
    """Median over rounds of the baseline's time over this one's in the same round: above 1 is faster. Of the
    baseline itself: over a second timing of it, so that p20 and p80 show what noise does to a ratio."""
    ratio_p20: float | None = None
    ratio_p80: float | None = None
    baseline: str | None = None
    """The contender that `ratio` compares with."""
    flops: int | None = None
    """The least work of a call: `fastgpt.ops.Cost`."""
    bytes: int | None = None
    limit_us: float | None = None
    """Computed: the least time that this device's peak and bandwidth allow for that work."""
    peak_memory_bytes: int | None = None
    compile_s: float | None = None
    tokens_per_s: float | None = None
    mfu: float | None = None
    loss: float | None = None
    """Of whole steps: the loss after the last."""
    # Where and when.
    run: str = ""
    """The same for all rows of one invocation."""
    time: str = ""
    """ISO 8601, UTC."""
    machine: str = ""
    device: str = ""
    """cpu or cuda."""
    device_name: str = ""
    threads: int | None = None
    driver: str = ""
    clocks: str = ""
    """Of a GPU, while it worked: "sm 1980 MHz, memory 2619 MHz"."""
    versions: str = ""
    """"python 3.12.1, torch 2.14.1, cuda 13.0, triton 3.8.0, fastgpt 0.1.0"."""
    git: str = ""

    @property
    def case(self) -> tuple[str, ...]:
        """What contenders of one comparison have in common."""
        return (self.suite, self.operation, self.direction, self.dtype, self.shape, self.device)


FIELDS = {field.name: typing.get_type_hints(Row)[field.name] for field in dataclasses.fields(Row)}


def machine_name(device_name: str, threads: int) -> str:
    """The name of the folder for results of such a device: "nvidia-h100-80gb-hbm3", "amd-epyc-2-cores"."""
    name = re.sub(r"\((?:r|tm)\)|cpu|processor|@.*", " ", device_name.lower())
    slug = "-".join(re.findall(r"[a-z0-9.]+", name)) or "machine"
    return slug if "nvidia" in slug else f"{slug}-{threads}-cores"


def path_of(out: Path, machine: str, run: str) -> Path:
    """The file that holds the rows of one run, of all suites."""
    return out / machine / f"{run}.csv"


def newest_run(out: Path, machine: str) -> str | None:
    """The name of the run that wrote to this machine's folder last; None if none did."""
    files = sorted((out / machine).glob("*.csv"), key=lambda path: path.stat().st_mtime)
    return files[-1].stem if files else None


def append(rows: Iterable[Row], path: Path) -> None:
    """Add rows at the end of `path`, which is made with its header where there is none.

    Raises:
        InputError: the file has other columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        _check_header(path)
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if file.tell() == 0:
            writer.writerow(FIELDS)
        for row in rows:
            writer.writerow(["" if v is None else v for v in dataclasses.astuple(row)])
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[Row]:
    """The rows of a file, or of all files under a folder, in the order they were written.

    Raises:
        InputError: no such file, other columns, or a value that is not of its column's type.
    """
    if path.is_dir():
        return [row for file in sorted(path.rglob("*.csv")) for row in read(file)]
    if not path.exists():
        raise InputError(f"{path}: no such file of results (`fastgpt bench ops` writes one)")
    _check_header(path)
    with path.open(newline="") as file:
        return [_parse(values, f"{path}:{number}") for number, values in enumerate(csv.DictReader(file), 2)]


def _check_header(path: Path) -> None:
    with path.open(newline="") as file:
        header = next(csv.reader(file), [])
    if header != list(FIELDS):
        differing = sorted(set(header) ^ set(FIELDS)) or "their order"
        raise InputError(
            f"{path} has other columns than this version writes ({differing}): move it away, or compare it "
            "with the version that wrote it"
        )


def _parse(values: dict[str, Any], where: str) -> Row:
    parsed: dict[str, Any] = {}
    for name, hint in FIELDS.items():
        text = values[name]
        try:
            parsed[name] = _value(text, hint)
        except (ValueError, TypeError):
            raise InputError(f"{where}: {name} = {text!r}: it must be of type {hint}") from None
    return Row(**parsed)


def _value(text: str, hint: Any) -> Any:
    if isinstance(hint, types.UnionType):
        if text == "":
            return None
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) is Literal:
        if text not in typing.get_args(hint):
            raise ValueError(text)
        return text
    return hint(text)
