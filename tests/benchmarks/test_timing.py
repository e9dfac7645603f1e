"""How things are timed: statistics, interleaving and failures, on a clock that the contenders set."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import pytest
import torch

from fastgpt.benchmarks import timing
from fastgpt.benchmarks.timing import (
    Timing,
    measure,
    outliers,
    peak_memory,
    percentiles,
    random_tensor,
    working,
)
from fastgpt.errors import InputError

CPU = torch.device("cpu")


class FakeClock:
    """A clock that stands still but for what contenders do; it remembers who ran."""

    def __init__(self) -> None:
        self.now = 0.0
        self.ran: list[str] = []

    def __call__(self) -> float:
        return self.now

    def contender(self, name: str, *seconds: float) -> Callable[[], None]:
        """Takes these seconds in turn, and the last of them from then on."""
        left = list(seconds)

        def run() -> None:
            self.ran.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def timed(clock: FakeClock, contenders: dict[str, object], **options: object) -> dict[str, Timing]:
    settings = {"budget_s": 0.0, "warmup_s": 0.0, "memory": False, "clock": clock, **options}
    return measure(contenders, device=CPU, **settings)  # type: ignore[arg-type]


def test_medians_and_ratios(clock: FakeClock) -> None:
    found = timed(clock, {"slow": clock.contender("slow", 0.6), "fast": clock.contender("fast", 0.2)})
    assert found["slow"].fields()["median_us"] == pytest.approx(0.6e6)
    fields = found["fast"].fields()
    assert fields["median_us"] == pytest.approx(0.2e6)
    assert fields["ratio"] == pytest.approx(3.0)
    assert (fields["baseline"], fields["rounds"], fields["status"]) == ("slow", 7, "ok")


def test_ratios_are_of_the_same_round(clock: FakeClock) -> None:
    """A machine that slows down for everyone changes no ratio, though it doubles the medians' spread."""
    slowing = [1.0, 1.0, *(1.0 * 2**i for i in range(7))]  # the first two are warm-up
    eager = clock.contender("eager", *slowing[1:])
    mine = clock.contender("mine", *(s / 4 for s in slowing[1:]))
    fields = timed(clock, {"eager": eager, "mine": mine}, control=False)["mine"].fields()
    assert fields["ratio"] == fields["ratio_p20"] == fields["ratio_p80"] == pytest.approx(4.0)
    assert fields["p80_us"] > 4 * fields["p20_us"]


def test_the_baseline_is_timed_against_itself(clock: FakeClock) -> None:
    found = timed(clock, {"a": clock.contender("a", 0.1), "b": clock.contender("b", 0.1)}, min_rounds=10)
    assert found["a"].fields()["ratio"] == pytest.approx(1.0)
    assert clock.ran.count("a") == 1 + 2 * 10
    assert clock.ran.count("b") == 1 + 10
    assert timed(clock, {"a": clock.contender("a", 0.1)}, control=False)["a"].fields()["ratio"] is None


def test_every_round_has_an_order_of_its_own(clock: FakeClock) -> None:
    names = "abcd"
    timed(clock, {n: clock.contender(n, 0.1) for n in names}, control=False, min_rounds=40)
    rounds = ["".join(clock.ran[i : i + 4]) for i in range(4, len(clock.ran), 4)]
    assert len(rounds) == 40
    assert all(sorted(order) == list(names) for order in rounds)
    predecessors = {order[order.index("b") - 1] for order in rounds if order[0] != "b"}
    assert predecessors == set("acd")  # no rotation, in which each has always the same


def test_short_calls_are_repeated(clock: FakeClock) -> None:
    """A sample is a millisecond at least, and says microseconds of one call."""
    fields = timed(clock, {"a": clock.contender("a", 1e-5)}, control=False)["a"].fields()
    assert fields["median_us"] == pytest.approx(10.0)
    assert len(clock.ran) == 1 + 7 * 100


def test_copies_take_turns(clock: FakeClock) -> None:
    copies = [clock.contender(str(i), 1.0) for i in range(3)]
    timed(clock, {"a": copies}, control=False, min_rounds=6)
    assert clock.ran == list("012" * 3)


def test_rounds_fill_the_budget(clock: FakeClock) -> None:
    options = {"control": False, "budget_s": 5.0, "min_rounds": 2}
    assert len(timed(clock, {"a": clock.contender("a", 0.5)}, **options)["a"].samples_us) == 10
    assert len(timed(clock, {"a": clock.contender("a", 9.0)}, **options)["a"].samples_us) == 2
    options["max_rounds"] = 4
    assert len(timed(clock, {"a": clock.contender("a", 0.5)}, **options)["a"].samples_us) == 4


def test_warm_up_is_by_time(clock: FakeClock) -> None:
    """Slow first calls count for nothing."""
    lazy = clock.contender("a", 3.0, 3.0, 0.1)
    fields = timed(clock, {"a": lazy}, warmup_s=5.0, control=False)["a"].fields()
    assert fields["median_us"] == pytest.approx(0.1e6)
    assert fields["outliers"] == 0


def test_one_that_fails_is_out_and_the_others_go_on(clock: FakeClock) -> None:
    def no_memory() -> None:
        torch.empty(1 << 60)

    calls = 0

    def third_time_unlucky() -> None:
        nonlocal calls
        calls += 1
        clock.now += 0.1
        if calls == 3:
            raise ValueError("it broke")

    contenders = {"a": clock.contender("a", 0.1), "oom": no_memory, "late": third_time_unlucky}
    found = timed(clock, contenders)
    assert (found["oom"].status, found["oom"].samples_us) == ("oom", ())
    assert "allocate" in found["oom"].note
    assert (found["late"].status, found["late"].note) == ("failed", "ValueError: it broke")
    assert found["late"].fields()["median_us"] is None
    assert len(found["a"].samples_us) == 7


def test_without_the_baseline_there_are_no_ratios(clock: FakeClock) -> None:
    def broken() -> None:
        raise ValueError("it broke")

    found = timed(clock, {"base": broken, "a": clock.contender("a", 0.1)})
    assert found["a"].fields()["ratio"] is None
    assert found["a"].fields()["median_us"] == pytest.approx(0.1e6)


def test_bad_input() -> None:
    with pytest.raises(InputError, match="contenders is empty"):
        measure({}, device=CPU, budget_s=1.0)
    with pytest.raises(InputError, match="baseline = 'b': it must be one of a"):
        measure({"a": lambda: None}, device=CPU, budget_s=1.0, baseline="b")
    with pytest.raises(InputError, match="threads = 0: this process may use 1 to"), working(CPU, 0):
        pass


def test_statistics() -> None:
    values = [float(v) for v in range(1, 12)]
    assert percentiles(values) == (3.0, 6.0, 9.0)
    assert percentiles([]) == (None, None, None)
    assert outliers(values) == 0
    assert outliers([*values, 100.0, -100.0]) == 2


def test_peak_memory_is_the_most_that_was_held_at_once() -> None:
    x = torch.ones(1 << 18)

    def call() -> torch.Tensor:
        y = x + 1  # 1 MiB
        z = y + 1  # 2 MiB held
        del y
        return z + x  # 2 MiB again

    assert 2 << 20 <= peak_memory(call, CPU) < (2 << 20) + 1024


def test_random_data_has_no_zeros() -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = random_tensor(1000, 1000, device=CPU, dtype=dtype)
        assert x.dtype == dtype
        assert x.abs().min() > 9e-4
        assert np.isclose(x.float().std(), 1.0, atol=0.01)
    assert random_tensor(10, device=CPU, scale=0.02).abs().max() < 0.1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads cannot be pinned here")
def test_work_is_pinned_inside_the_block_alone() -> None:
    everywhere, threads = os.sched_getaffinity(0), torch.get_num_threads()
    with working(CPU, 1):
        assert len(os.sched_getaffinity(0)) == 1
        assert torch.get_num_threads() == 1
    assert os.sched_getaffinity(0) == everywhere
    assert torch.get_num_threads() == threads


# -- a GPU's stopwatch, on a GPU that is made up -------------------------------------------------------------


class FakeGraph:
    def replay(self) -> None:
        pass


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> timing._CudaStopwatch:
    """A stopwatch without events; what captures is a graph."""
    stopwatch = timing._CudaStopwatch.__new__(timing._CudaStopwatch)
    stopwatch.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    return stopwatch


def test_short_calls_become_cuda_graphs(
    fake_cuda: timing._CudaStopwatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = FakeGraph()
    monkeypatch.setattr(fake_cuda, "_captured", lambda call: graph.replay)
    call = lambda: None  # noqa: E731
    assert fake_cuda.prepared([call, call], 50e-6) == ([graph.replay, graph.replay], "CUDA graph")
    assert fake_cuda.prepared([call], 100e-6) == ([call], "launched")


def test_what_cannot_be_captured_says_so(
    fake_cuda: timing._CudaStopwatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(call: object) -> None:
        raise RuntimeError("not permitted:\ncapturing")

    monkeypatch.setattr(fake_cuda, "_captured", refuse)
    call = lambda: None  # noqa: E731
    calls, note = fake_cuda.prepared([call], 50e-6)
    assert calls == [call]
    assert note == "launched: it cannot be captured in a CUDA graph (RuntimeError: not permitted: capturing)"
