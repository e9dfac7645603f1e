"""What `auto` means: for each operation, device and class of shapes the implementation measured fastest.

Two files of choices are read, and the first that has an entry counts: the user's record in the cache folder,
which `fastgpt bench ops --record` writes; and the table beside this file, which comes with the package and
holds what was measured by the same command. Without an entry the choice is eager.

A file holds {device name: {operation: {class: Choice}}}; in the table, "cpu" stands for any CPU.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastgpt.errors import InputError
from fastgpt.files import atomic_write, cache_dir

EAGER = "eager"
CLASSES = ("tiny", "small", "medium", "large")
# Elements from which the next class begins. A kernel of 2^16 elements is all launch and start-up; 2^20 fit
# the caches of a core and fill a GPU just once; 2^24 fit a GPU's L2, and beyond them memory is the limit.
BEGIN = (1 << 16, 1 << 20, 1 << 24)
SHIPPED = Path(__file__).parent / "measured.json"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """The fastest implementation of an operation for a class of shapes on one device, and the evidence."""

    implementation: str
    ratio: float
    """Eager's time over its time: of each case the median over rounds, of the class their geometric mean."""
    worst: float
    """The least of those cases."""
    cases: int
    """How many."""
    compiled: str
    """The one inside `torch.compile`, where the time to beat is that of the compiled reference."""
    compiled_ratio: float | None
    """The compiled reference's time over its time, as `ratio`; None where it was not measured."""
    threads: int | None
    run: str
    versions: str


class Found(NamedTuple):
    """A choice and the file it is from."""

    choice: Choice
    path: Path


Choices = dict[str, dict[str, dict[str, Choice]]]


def shape_class(elements: int) -> str:
    """tiny, small, medium or large."""
    return CLASSES[bisect.bisect_right(BEGIN, elements)]


def user_record() -> Path:
    """Where `--record` keeps choices."""
    return cache_dir() / "choices.json"


def find(operation: str, device: torch.device, cls: str | None) -> Found | None:
    """The recorded choice for a class of shapes; for None, which is any, that of the largest class there is.

    Raises:
        InputError: a file that holds something else than choices.
    """
    names = _device_names(device)
    for path, keys in ((user_record(), names[:1]), (SHIPPED, names)):
        for key in keys:
            classes = _read(path).get(key, {}).get(operation, {})
            wanted = (cls,) if cls else reversed(CLASSES)
            for name in wanted:
                if name in classes:
                    return Found(classes[name], path)
    return None


@functools.cache
def _device_names(device: torch.device) -> tuple[str, str]:
    from fastgpt.runtime import device_name  # which imports all of the package

    return device_name(device), device.type


def record(chosen: dict[str, dict[str, Choice]], device_name: str, path: Path) -> None:
    """Keep choices by operation and class in a file, in place of those it has for the same."""
    choices = _parse(path) if path.exists() else {}
    operations = choices.setdefault(device_name, {})
    for operation, classes in chosen.items():
        operations[operation] = operations.get(operation, {}) | classes
    values = {
        device: {
            op: {cls: dataclasses.asdict(c) for cls, c in classes.items()} for op, classes in found.items()
        }
        for device, found in choices.items()
    }
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(values, indent=1) + "\n")
    forget()


@functools.cache
def _read(path: Path) -> Choices:
    """The choices of a file, as it is when it is first asked for; none where there is no file."""
    return _parse(path) if path.exists() else {}


def _parse(path: Path) -> Choices:
    try:
        values: dict[str, Any] = json.loads(path.read_text())
        return {
            device: {
                op: {cls: _choice(c) for cls, c in classes.items()} for op, classes in operations.items()
            }
            for device, operations in values.items()
        }
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path} holds no choices of implementations ({error}): delete it") from None


def _choice(values: dict[str, Any]) -> Choice:
    return Choice(**values)


@functools.cache
def say_once(line: str) -> None:
    log.warning("%s", line)


def forget() -> None:
    """Read the files again when they are next asked for."""
    _read.cache_clear()
    from fastgpt.ops import registry

    registry.automatic.cache_clear()
