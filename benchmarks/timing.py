"""How everything is timed: contenders in interleaved rounds, each against the baseline in the same round.

docs/benchmarking.md argues each choice. A contender is a call without arguments, or several calls that do the
same on copies of the inputs, which take turns. They must have been checked for right results before.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgpt.benchmarks.results import Status
from fastgpt.errors import InputError
from fastgpt.runtime import keep_freed_memory

Call = Callable[[], object]
Clock = Callable[[], float]

MIN_SAMPLE_S = 1e-3  # on a CPU: shorter calls are repeated, so that the clock and one interrupt weigh little
GRAPH_BELOW_S = 100e-6  # on a GPU: shorter calls are timed as CUDA graphs, since launching takes as long
FLUSH_BYTES = 256 << 20  # more than any L2 cache
FLUSHES = 4  # reads of those bytes before each call: the host gets 0.3 ms ahead at 3 TB/s
CONTROL = "baseline, again"


@dataclass(frozen=True)
class Timing:
    """What `measure` found of one contender."""

    status: Status
    """ok, oom or failed; without ok there are no samples."""
    note: str = ""
    """How it was timed, or the error."""
    samples_us: tuple[float, ...] = ()
    """Microseconds a call, in each round."""
    baseline: str | None = None
    ratios: tuple[float, ...] = ()
    """The baseline's time over this one's in each round: above 1 is faster. Of the baseline itself: over a
    second timing of it in the same round, so that its spread is what noise does to a ratio."""
    peak_memory_bytes: int | None = None
    """The most that one call held beyond what was allocated before it."""

    def fields(self) -> dict[str, Any]:
        """Those fields of a `results.Row` that a timing fills."""
        p20, median, p80 = percentiles(self.samples_us)
        ratio_p20, ratio, ratio_p80 = percentiles(self.ratios)
        return {
            "status": self.status,
            "note": self.note,
            "median_us": median,
            "p20_us": p20,
            "p80_us": p80,
            "rounds": len(self.samples_us) or None,
            "outliers": outliers(self.samples_us) if self.samples_us else None,
            "baseline": self.baseline,
            "ratio": ratio,
            "ratio_p20": ratio_p20,
            "ratio_p80": ratio_p80,
            "peak_memory_bytes": self.peak_memory_bytes,
        }


def percentiles(values: Sequence[float]) -> tuple[float | None, float | None, float | None]:
    """p20, median and p80, interpolated; None of nothing."""
    if not values:
        return None, None, None
    p20, median, p80 = np.percentile(values, [20, 50, 80])
    return float(p20), float(median), float(p80)


def outliers(values: Sequence[float]) -> int:
    """How many are beyond 1.5 interquartile ranges from the quartiles."""
    low, high = np.percentile(values, [25, 75])
    reach = 1.5 * (high - low)
    return sum(bool(value < low - reach or value > high + reach) for value in values)


def measure(
    contenders: Mapping[str, Call | Sequence[Call]],
    *,
    device: torch.device,
    budget_s: float,
    baseline: str | None = None,
    min_rounds: int = 7,
    max_rounds: int = 200,
    warmup_s: float = 0.1,
    sample_s: float = MIN_SAMPLE_S,
    control: bool = True,
    memory: bool = True,
    seed: int = 0,
    clock: Clock = time.perf_counter,
) -> dict[str, Timing]:
    """Time the contenders against each other: every round times each of them once, in an order of its own.

    Args:
        contenders: by name; a call, or several that do the same on copies of the inputs.
        device: where they run. Call this inside `working(device)`.
        budget_s: rounds begin until this much time has passed since the first; at least `min_rounds` of them,
            at most `max_rounds`.
        baseline: the one that ratios compare with; the first by default. Without its time there are none.
        warmup_s: how long each is called before anything counts.
        sample_s: of a CPU, how long a sample is at least, of calls one after another.
        control: time the baseline twice in each round; see `Timing.ratios`.
        memory: find the peak memory, with one call more.
        seed: of the orders.
        clock: seconds; what times calls on a CPU.

    Returns:
        A Timing for each contender. One that raises is out, with its error as the note; the others go on.

    Raises:
        InputError: no contenders, or a baseline that is not one of them.
    """
    if not contenders:
        raise InputError("contenders is empty: there is nothing to time")
    baseline = next(iter(contenders)) if baseline is None else baseline
    if baseline not in contenders:
        raise InputError(f"baseline = {baseline!r}: it must be one of {', '.join(contenders)}")
    stopwatch = _CudaStopwatch(device) if device.type == "cuda" else _Stopwatch(clock, sample_s)
    lanes = {name: _Lane(_as_list(calls), stopwatch, name) for name, calls in contenders.items()}
    for lane in lanes.values():
        lane.attempt(functools.partial(lane.prepare, warmup_s, clock, device if memory else None))
    if control and lanes[baseline].failure is None:
        lanes[CONTROL] = lanes[baseline].again()
    order = list(lanes.values())
    shuffle = random.Random(seed).shuffle
    start, rounds = clock(), 0
    while rounds < min_rounds or (rounds < max_rounds and clock() - start < budget_s):
        shuffle(order)  # not only rotated: that would leave each with the same predecessor
        for lane in order:
            lane.attempt(lane.sample)
        rounds += 1
    return {name: _timing(name, lanes, baseline) for name in contenders}


def _as_list(calls: Call | Sequence[Call]) -> list[Call]:
    return [calls] if callable(calls) else list(calls)


@dataclass
class _Lane:
    """A contender on its way through `measure`."""

    calls: list[Call]
    stopwatch: _Stopwatch
    name: str
    repeat: int = 1
    turn: int = 0
    samples: list[float] = field(default_factory=list)
    peak: int | None = None
    note: str = ""
    failure: Status | None = None

    def prepare(self, warmup_s: float, clock: Clock, memory_on: torch.device | None) -> None:
        seconds = self._warm_up(warmup_s, clock)
        if memory_on is not None:
            self.peak = peak_memory(self.calls[0], memory_on)
        self.calls, self.note = self.stopwatch.prepared(self.calls, seconds)
        self.repeat = self.stopwatch.repeats(seconds)

    def _warm_up(self, warmup_s: float, clock: Clock) -> float:
        """Call for that long, each of the calls once at least; the least seconds that one took."""
        start, least, done = clock(), math.inf, 0
        while done < len(self.calls) or clock() - start < warmup_s:
            least = min(least, self.stopwatch.seconds([self.calls[done % len(self.calls)]]))
            done += 1
        return least

    def again(self) -> _Lane:
        return _Lane(self.calls, self.stopwatch, CONTROL, self.repeat)

    def sample(self) -> None:
        turns = [self.calls[(self.turn + i) % len(self.calls)] for i in range(self.repeat)]
        self.turn += self.repeat
        self.samples.append(self.stopwatch.seconds(turns) / self.repeat * 1e6)

    def attempt(self, step: Callable[[], None]) -> None:
        """Run a step, if none failed before. A failure is kept for what it is."""
        if self.failure is not None:
            return
        try:
            step()
        except Exception as error:
            self.failure, self.note = failure(error)
            self.calls = []  # lets go of what they hold
            release_memory()


def _timing(name: str, lanes: Mapping[str, _Lane], baseline: str) -> Timing:
    lane = lanes[name]
    if lane.failure is not None:
        return Timing(lane.failure, lane.note, baseline=baseline)
    other = lanes.get(CONTROL) if name == baseline else lanes[baseline]
    ratios: tuple[float, ...] = ()
    if other is not None and other.failure is None:
        pairs = zip(lane.samples, other.samples, strict=True)
        ratios = tuple(theirs / mine for mine, theirs in pairs)
    return Timing("ok", lane.note, tuple(lane.samples), baseline, ratios, lane.peak)


class _Stopwatch:
    """Times calls on a CPU by a clock."""

    def __init__(self, clock: Clock, sample_s: float = MIN_SAMPLE_S) -> None:
        self.clock, self.sample_s = clock, sample_s

    def seconds(self, calls: Sequence[Call]) -> float:
        """How long these calls take, one after another."""
        start = self.clock()
        for call in calls:
            call()
        return self.clock() - start

    def prepared(self, calls: list[Call], seconds: float) -> tuple[list[Call], str]:
        """The calls as they are to be timed, which took `seconds` each, and a note on how that is."""
        return calls, ""

    def repeats(self, seconds: float) -> int:
        """How many calls make one sample."""
        return max(1, math.ceil(self.sample_s / max(seconds, 1e-9)))


class _CudaStopwatch(_Stopwatch):
    """Times calls on a GPU by events on the current stream, which must not be the default one."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(time.perf_counter)
        self.device = device
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush = torch.ones(FLUSH_BYTES // 4, device=device)
        self.sink = torch.empty((), device=device)

    def seconds(self, calls: Sequence[Call]) -> float:
        total = 0.0
        for call in calls:
            # Reading leaves no lines in L2 that the call would have to write back, as zeroing would.
            for _ in range(FLUSHES):
                torch.sum(self.flush, dim=0, out=self.sink)
            self.start.record()
            call()
            self.end.record()
            self.end.synchronize()
            total += self.start.elapsed_time(self.end) * 1e-3
        return total

    def prepared(self, calls: list[Call], seconds: float) -> tuple[list[Call], str]:
        if seconds >= GRAPH_BELOW_S:
            return calls, "launched"
        try:
            return [self._captured(call) for call in calls], "CUDA graph"
        except Exception as error:
            torch.cuda.synchronize(self.device)  # raises again if the device is lost
            return calls, f"launched: it cannot be captured in a CUDA graph ({one_line(error)})"

    def _captured(self, call: Call) -> Call:
        graph = torch.cuda.CUDAGraph()
        # On the stream where forward ran, since autograd runs backward there.
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(self.device)):
            call()
        graph.replay()
        return graph.replay

    def repeats(self, seconds: float) -> int:
        return 1


# -- memory and errors ---------------------------------------------------------------------------------------


def peak_memory(call: Call, device: torch.device) -> int:
    """The most bytes that PyTorch's allocator held during a call, beyond what it held before.

    On a CPU the profiler reports every allocation and release. What libraries take elsewhere (oneDNN's
    scratch space, a kernel's own buffers) is in neither figure.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    from torch.profiler import ProfilerActivity, profile

    with quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held = np.cumsum([0, *(nbytes for _, nbytes in changes)])
    return int(held.max())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the lines that the profiler's library writes to the file of standard error itself."""
    sys.stderr.flush()
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def first_call(call: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """What a call gives and the seconds it took, to the end of its work: the first one compiles."""
    start = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - start


def failure(error: Exception) -> tuple[Status, str]:
    """How a row reports an error: its status and note."""
    out_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    # What the CPU's allocator raises is a plain RuntimeError.
    out_of_memory |= isinstance(error, RuntimeError) and "allocate memory" in str(error)
    return ("oom" if out_of_memory else "failed"), one_line(error)


def one_line(error: Exception, limit: int = 200) -> str:
    """The error's type and the beginning of its message."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def release_memory() -> None:
    """Give back what a failed or finished case held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# -- data and threads ----------------------------------------------------------------------------------------


def random_tensor(
    *shape: int, device: torch.device, dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> Tensor:
    """Normal values, none of them 0 or next to it, from the global random state.

    Zeros would flatter: a chip's power, and with it its clock, depends on how many bits flip.
    """
    x = torch.randn(shape, device=device)
    return (torch.where(x.abs() < 1e-3, 1e-3, x) * scale).to(dtype)


@contextlib.contextmanager
def working(device: torch.device, threads: int | None = None) -> Iterator[None]:
    """What `measure` wants around it: on a GPU a stream of its own, on a CPU pinned threads, and a C library
    that keeps freed memory, for all contenders and from here on, as `fastgpt train` has it.

    Args:
        threads: of a CPU; by default one for each core that this process may use.

    Raises:
        InputError: more threads than cores.
    """
    if device.type == "cuda":
        stream = torch.cuda.Stream(device)
        with torch.cuda.device(device), torch.cuda.stream(stream):
            yield
        stream.synchronize()
        return
    keep_freed_memory()
    with _pinned(threads):
        yield


def cores() -> list[list[int]]:
    """The processors this process may use, those that are threads of one core together."""
    if not hasattr(os, "sched_getaffinity"):  # macOS
        return [[cpu] for cpu in range(os.cpu_count() or 1)]
    together: dict[str, list[int]] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        key = siblings.read_text() if siblings.exists() else str(cpu)
        together.setdefault(key, []).append(cpu)
    return list(together.values())


@contextlib.contextmanager
def _pinned(threads: int | None) -> Iterator[None]:
    """So many threads, and all that this process has on so many cores."""
    found = cores()
    threads = len(found) if threads is None else threads
    # One processor of each core before the second of any, which would share its units with the first.
    available = [cpu for turn in itertools.zip_longest(*found) for cpu in turn if cpu is not None]
    if not 1 <= threads <= len(available):
        raise InputError(f"threads = {threads}: this process may use 1 to {len(available)} processors")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    # Threads exist once they have worked, and each has an affinity of its own.
    torch.ones(1 << 20).mul_(2)
    _confine(available[:threads])
    try:
        yield
    finally:
        _confine(available)
        torch.set_num_threads(before)


def _confine(cpus: Sequence[int]) -> None:
    """Keep every thread of this process on these processors, where the system can do that."""
    if not hasattr(os, "sched_setaffinity"):  # macOS
        return
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.sched_setaffinity(int(task.name), cpus)
