"""Launch choices by measurement instead of from the tables: off unless FASTGPT_TUNE asks for it.

    FASTGPT_TUNE=1        measure where a choice is not in the cache yet, and keep what is found
    FASTGPT_TUNE=read     take what is in the cache, and measure nothing

A launcher marked `@tunable` asks `tuned(name, static, candidates)` for its choice. With tuning off that is
`static`. Else the call itself is the benchmark: the launcher runs on copies of its tensors with `static` and
with each candidate, in turns. One that gives something else (see `agrees`) is out; the fastest of the rest is
taken if it saves MARGIN of the time, since another choice means other last bits than everywhere else.

A choice is kept for the name, the dtypes and the sizes of the call, rounded up to powers of 2 as tiles are,
in a JSON file of the cache folder for this chip, Triton and the source of the kernels.

Nothing is measured, and what is not in the cache comes from the tables, on CPU tensors, while a CUDA graph is
captured or a compiler traces, and where the copies do not fit the memory. One of several processes must not
measure at all.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import re
import statistics
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from fastgpt.errors import InputError
from fastgpt.files import atomic_write, cache_dir

ENVIRONMENT = "FASTGPT_TUNE"
# CUDA events resolve half a microsecond, a fortieth of a kernel of 20: less than this is not a difference.
MARGIN = 0.03
ROUNDS = 11  # of every choice; the median counts
FLUSH_BYTES = 256 << 20  # more than any L2 cache, and long enough to write for the host to get ahead
ALIGNMENT = 256  # bytes: copies keep what Triton's compiler is told about addresses

C = TypeVar("C", bound=Any)  # a NamedTuple of launch choices
F = TypeVar("F", bound=Callable[..., Any])
Timer = Callable[[Callable[[], Any], torch.device], float]
log = logging.getLogger(__name__)


class Offer(NamedTuple):
    """What a choice is between: that of the tables, and what tuning may take instead."""

    static: Any
    candidates: Sequence[Any]


class Call(NamedTuple):
    """A launcher and what it was called with."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    options: dict[str, Any]

    def tensors(self) -> list[Tensor]:
        return [x for x in (*self.args, *self.options.values()) if isinstance(x, Tensor)]

    def on_copies(self) -> tuple[Call, list[Tensor]]:
        """The same call on copies of its tensors, and the copies."""
        tensors = self.tensors()
        copies = copies_of(tensors)
        replaced = {id(tensor): copy for tensor, copy in zip(tensors, copies, strict=True)}
        args = tuple(replaced.get(id(x), x) for x in self.args)
        return Call(self.function, args, {k: replaced.get(id(x), x) for k, x in self.options.items()}), copies

    def __call__(self) -> Any:
        return self.function(*self.args, **self.options)


@dataclass
class Session:
    """Tuning, switched on."""

    measure: bool
    timer: Timer | None  # None: CUDA events, and so only on CUDA tensors
    choices: dict[Path, dict[str, Any]] = field(default_factory=dict)  # what each file of the cache holds
    lock: threading.RLock = field(default_factory=threading.RLock)


class _Local(threading.local):
    """What the current thread is doing: autograd runs backward kernels in one of its own."""

    call: Call | None = None
    trial: tuple[str, Any] | None = None
    asked: dict[str, Offer] | None = None


_local = _Local()


def _from_environment() -> Session | None:
    value = os.environ.get(ENVIRONMENT, "")
    if value not in ("", "0", "1", "read"):
        raise InputError(
            f"{ENVIRONMENT}={value!r}: it must be 1 (measure launch choices), read (use those that were "
            "measured) or 0"
        )
    return None if value in ("", "0") else Session(measure=value == "1", timer=None)


_session = _from_environment()


@contextmanager
def tuning(*, measure: bool = True, timer: Timer | None = None) -> Iterator[None]:
    """Tune inside the block, as FASTGPT_TUNE=1 does, or `read` without `measure`; `timer` measures."""
    global _session
    before, _session = _session, Session(measure, timer)
    try:
        yield
    finally:
        _session = before


def tunable(launcher: F) -> F:
    """Let `launcher` ask `tuned` for its choices, all of them before it launches what writes an argument."""

    @functools.wraps(launcher)
    def run(*args: Any, **options: Any) -> Any:
        if _session is None:
            return launcher(*args, **options)
        before, _local.call = _local.call, Call(launcher, args, options)
        try:
            return launcher(*args, **options)
        finally:
            _local.call = before

    return run  # type: ignore[return-value]


def tuned(name: str, static: C, candidates: Sequence[C], *, exact: bool = False) -> C:
    """The launch choice called `name`: `static`, or the one of `candidates` that was measured to be faster.

    `exact`: no sum depends on the choice, so that all must give the same bits.
    """
    if _local.asked is not None:
        _local.asked[name] = Offer(static, candidates)
    if _local.trial is not None:
        return _local.trial[1] if _local.trial[0] == name else static
    if _session is None or _local.call is None or not candidates:
        return static
    if _session.measure:
        _refuse_several_processes()
    device = _local.call.tensors()[0].device
    path, key = cache_file(device), f"{name} {_size_class(_local.call)}"
    with _session.lock:
        if path not in _session.choices:
            _session.choices[path] = _read(path)
        if key not in _session.choices[path] and _may_measure(device):
            entry = _measured(name, [static, *(c for c in candidates if c != static)], exact, device)
            if entry is None:
                entry = {"choice": static._asdict()}  # not tried again in this process
            else:
                _keep(path, key, entry)
            _session.choices[path][key] = entry
        entry = _session.choices[path].get(key)
    if entry is None:
        return static
    for choice in (static, *candidates):
        if choice._asdict() == entry.get("choice"):
            return choice
    raise InputError(f"{path}: {name} has no choice {entry.get('choice')}; delete the file")


@contextmanager
def trying(name: str, choice: Any) -> Iterator[None]:
    """Inside the block `tuned(name, ...)` is `choice`, and any other is static."""
    before, _local.trial = _local.trial, (name, choice)
    try:
        yield
    finally:
        _local.trial = before


@contextmanager
def listing() -> Iterator[dict[str, Offer]]:
    """What every choice that is asked for inside the block is between, by name."""
    before, _local.asked = _local.asked, {}
    try:
        yield _local.asked
    finally:
        _local.asked = before


# -- what a choice is kept for, and where --------------------------------------------------------------------


def _size_class(call: Call) -> str:
    """What of a call a choice is good for."""
    named = [f"{name}={_class_of(value)}" for name, value in sorted(call.options.items())]
    return " ".join([*map(_class_of, call.args), *named])


def _class_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return _tensor_class(value.dtype, value.shape, value.is_contiguous())
    return str(value) if value is None or isinstance(value, (bool, str)) else f"{value != 0:d}"


@functools.lru_cache(maxsize=4096)
def _tensor_class(dtype: torch.dtype, shape: torch.Size, contiguous: bool) -> str:
    """bfloat16[8,1024,1024]: powers of 2. `~`: rows of no multiple of 16; `/`: gaps, or another order.

    Triton compiles strides that are multiples of 16 to wider accesses.
    """
    sizes = ",".join(str(triton.next_power_of_2(size)) for size in shape)
    uneven = "~" if shape and shape[-1] % 16 else ""
    return f"{str(dtype).removeprefix('torch.')}[{sizes}]{uneven}{'' if contiguous else '/'}"


@functools.cache
def _source_hash() -> str:
    """Of all kernels and launchers: a choice for code that has changed is worth nothing."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def cache_file(device: torch.device) -> Path:
    """Where the choices for a device, this Triton and these kernels are."""
    return cache_dir() / "launches" / _file_name(device)


@functools.cache
def _file_name(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return re.sub(r"[^\w.-]+", "-", f"{name} triton-{triton.__version__} {_source_hash()}.json")


def _read(path: Path) -> dict[str, Any]:
    """The entries of a file of the cache by key; none where there is no file."""
    try:
        entries = json.loads(path.read_text())
    except FileNotFoundError:
        log.info("launch choices: none in %s yet", path)
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"{path} holds no launch choices ({error}): delete it") from None
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise InputError(f"{path} holds no launch choices: delete it")
    log.info("launch choices: %d from %s", len(entries), path)
    return entries


def _keep(path: Path, key: str, entry: dict[str, Any]) -> None:
    """Write an entry beside those that are in the file, by now perhaps of other processes too."""
    entries = (_read(path) if path.exists() else {}) | {key: entry}
    try:
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(entries, indent=1, sort_keys=True) + "\n")
    except OSError as error:  # nothing is lost but the time to measure it again
        log.warning("cannot keep launch choices in %s: %s", path, error.strerror)
    log.info("measured %s: %s", key, entry)


# -- measuring -----------------------------------------------------------------------------------------------


def _refuse_several_processes() -> None:
    """An error where several processes train together.

    Ranks that measured would choose each for itself, at different times, while the others wait in a
    collective. Whether they may is decided here before anything is looked up: a rank whose cache happens to
    be complete must not go on alone. `read` is safe: all ranks of a machine read the same file, once, and
    never write it; those of another machine with another file get other last bits, not other shapes.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        count = max(count, torch.distributed.get_world_size())
    if count > 1:
        raise InputError(
            f"{ENVIRONMENT}=1 in one of {count} processes: launch choices are measured by a process alone. "
            f"Run it once in a single process, then all with {ENVIRONMENT}=read"
        )


def _may_measure(device: torch.device) -> bool:
    assert _session is not None
    if not _session.measure or torch.compiler.is_compiling():
        return False
    if device.type == "cuda":
        return not torch.cuda.is_current_stream_capturing()
    return _session.timer is not None


def _measured(name: str, choices: Sequence[Any], exact: bool, device: torch.device) -> dict[str, Any] | None:
    """What to keep for a choice, of which the first is static; None where the copies do not fit."""
    assert _session is not None and _local.call is not None
    timer = _session.timer or _event_milliseconds
    try:
        valid = _valid(name, choices, exact, _local.call)
        times: list[list[float]] = [[] for _ in valid]
        for _ in range(ROUNDS):  # in turns, so that a change of clocks meets all of them
            for choice, measured in zip(valid, times, strict=True):
                with trying(name, choice):
                    measured.append(timer(_local.call.on_copies()[0], device))
    except torch.OutOfMemoryError:
        log.warning("%s: no memory for the copies that measuring takes; its static choice it is", name)
        return None
    medians = [statistics.median(measured) for measured in times]
    best = min(range(len(valid)), key=medians.__getitem__)
    if medians[best] > (1 - MARGIN) * medians[0]:
        best = 0
    return {
        "choice": valid[best]._asdict(),
        "milliseconds": medians[best],
        "static": valid[0]._asdict(),
        "static_milliseconds": medians[0],
    }


def _valid(name: str, choices: Sequence[Any], exact: bool, call: Call) -> list[Any]:
    """The choices that run on this chip and give what the first gives; this compiles them too."""
    valid: list[Any] = []
    expected: list[Tensor] = []
    for choice in choices:
        copy, tensors = call.on_copies()
        with trying(name, choice):
            try:
                out = copy()
            except OutOfResources:
                if choice is choices[0]:
                    raise
                continue  # a smaller chip of the family
        results = [*tensors, *_tensors_of(out)]
        if not valid:
            expected = results
        elif not all(agrees(a, b, exact) for a, b in zip(results, expected, strict=True)):
            log.warning("%s: %s gives something else than %s, and is not used", name, choice, choices[0])
            continue
        valid.append(choice)
    return valid


def _tensors_of(out: Any) -> list[Tensor]:
    found = out if isinstance(out, tuple) else (out,)
    return [x for x in found if isinstance(x, Tensor)]


def agrees(a: Tensor, b: Tensor, exact: bool) -> bool:
    """Whether two choices gave the same: to the bit, or as near as the tests' bound lets right results be.

    That bound is twice PyTorch's error plus eps of the largest, and PyTorch's error is half of eps at least,
    from rounding alone: 2 eps each, 4 eps between two, in the maximum and the Euclidean norm. NaN and
    infinities must be where they were.
    """
    if exact or not b.is_floating_point():
        return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    bound = 4 * torch.finfo(b.dtype).eps
    wide = torch.promote_types(b.dtype, torch.float32)
    a, b = a.to(wide), b.to(wide)
    finite = b.isfinite()
    others = a.masked_fill(finite, 0), b.masked_fill(finite, 0)
    if not torch.allclose(*others, rtol=0, atol=0, equal_nan=True):
        return False
    difference, size = (a - b).masked_fill(~finite, 0), b.masked_fill(~finite, 0)
    return all(
        bool(torch.linalg.vector_norm(difference, norm) <= bound * torch.linalg.vector_norm(size, norm))
        for norm in ((2, torch.inf) if b.numel() else ())
    )


def copies_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies with the same strides; those that share memory share it again, as in-place kernels count on."""
    spans: dict[tuple[torch.device, int], tuple[int, int]] = {}
    for x in tensors:
        first, end = _span(x)
        low, high = spans.get(_storage(x), (first, end))
        spans[_storage(x)] = min(low, first), max(high, end)
    bases = {}
    copies = []
    for x in tensors:
        low, high = spans[_storage(x)]
        if _storage(x) not in bases:
            raw = torch.empty(0, dtype=torch.uint8, device=x.device)
            bases[_storage(x)] = raw.set_(x.untyped_storage(), low, (high - low,), (1,)).clone()
        offset = (x.storage_offset() * x.element_size() - low) // x.element_size()
        copy = torch.empty(0, dtype=x.dtype, device=x.device)
        copies.append(copy.set_(bases[_storage(x)].untyped_storage(), offset, x.shape, x.stride()))
    return copies


def _storage(x: Tensor) -> tuple[torch.device, int]:
    return x.device, x.untyped_storage().data_ptr()


def _span(x: Tensor) -> tuple[int, int]:
    """The bytes of its storage that x reaches, from a multiple of ALIGNMENT on."""
    first = x.storage_offset()
    last = first + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    end = last + 1 if x.numel() else first
    return first * x.element_size() // ALIGNMENT * ALIGNMENT, end * x.element_size()


def _event_milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    """The time of a call on the device, from a cold cache. Flushing that lets the host get ahead."""
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
        flush.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
