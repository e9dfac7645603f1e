"""The emulator catches the bugs it is for, and has nothing to say where there is none."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import cuda_emulator
import pytest

pytestmark = pytest.mark.skipif(cuda_emulator.absent() is not None, reason=str(cuda_emulator.absent()))

SOURCE = Path(__file__).with_name("planted.cu")
# What must notice each bug: "schedules" (in one of them at least the result differs), a sanitizer, which says
# this, or the emulator itself with a message, in every schedule.
SANITIZED = ["greedy:early", "reverse:late"]  # schedules with the sanitizers, which are slow
BUGS: dict[str, dict[str, str]] = {
    "missing_barrier": {"schedules": "", "thread": "data race"},
    "missing_barrier_of_a_loop": {"schedules": "", "thread": "data race"},
    "missing_warp_barrier": {"schedules": "", "thread": "data race"},
    "weak_wait": {"schedules": ""},
    "wait_without_barrier": {"schedules": "", "thread": "data race"},
    "add_across_blocks": {"thread": "data race"},
    "write_by_two_threads": {"schedules": "", "thread": "data race"},
    "shuffle_of_exited_lanes": {"message": "of which lane .* has exited|waits for lane .*, which exits"},
    "shuffle_outside_of_mask": {"message": "reads lane 20, which is not in mask 0000ffff"},
    "shared_write_past_the_end": {
        "message": "wrote past the end of shared array tile",
        "address": "index 64 out of bounds",
    },
    "shared_read_past_the_end": {"schedules": "", "address": "use-after-poison"},
    "global_read_past_the_end": {"address": "heap-buffer-overflow"},
    "uninitialised_shared": {"schedules": ""},
    "misaligned_vector": {"message": "access of 16 bytes at .*no multiple of 16"},
    "misaligned_copy": {"message": "access of 16 bytes at .*no multiple of 16"},
    "copy_to_global": {"message": "cp_async_16 of .*, which is not in shared memory"},
    "divergent_barriers": {"message": "__syncthreads, where other threads wait at __syncthreads"},
    "barrier_after_exit": {"message": "have exited|one exits"},
    "barrier_and_shuffle": {"message": "deadlock in block .*__shfl_xor_sync|one exits|have exited"},
}


@pytest.fixture(scope="session")
def programs() -> dict[str, Path]:
    """The planted kernels, plain and with each sanitizer."""
    return {
        checked: cuda_emulator.build([SOURCE], "planted", checked) for checked in cuda_emulator.SANITIZERS
    }


def run(program: Path, name: str, bug: bool, schedule: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **cuda_emulator.OPTIONS, "FASTGPT_EMULATOR_SCHEDULE": schedule}
    return subprocess.run(
        [program, name, str(int(bug))], env=environment, capture_output=True, text=True, timeout=100
    )


@pytest.mark.parametrize("name", BUGS)
def test_clean_without_the_bug(programs: dict[str, Path], name: str) -> None:
    outputs = set()
    for checked, program in programs.items():
        for schedule in SANITIZED if checked else cuda_emulator.SCHEDULES:
            done = run(program, name, False, schedule)
            assert done.returncode == 0, done.stderr
            assert "error" not in done.stdout
            outputs.add(done.stdout)
    assert len(outputs) == 1


@pytest.mark.parametrize("name", BUGS)
def test_caught(programs: dict[str, Path], name: str) -> None:
    expected = BUGS[name]
    right = run(programs[""], name, False, "greedy").stdout
    plain = [run(programs[""], name, True, schedule) for schedule in cuda_emulator.SCHEDULES]
    if "message" in expected:
        for done in plain:
            assert re.search(r"error: planted: .*" + expected["message"], done.stdout), done.stdout
    if "schedules" in expected:
        assert any(done.stdout != right for done in plain)
    for checked in ("address", "thread"):
        if checked in expected:
            reports = [run(programs[checked], name, True, schedule) for schedule in SANITIZED]
            assert any(expected[checked] in done.stderr for done in reports), reports[0].stderr
            assert any(name in done.stderr for done in reports)  # the report is about the kernel


def test_the_message_says_where(programs: dict[str, Path]) -> None:
    lines = SOURCE.read_text().splitlines()
    line = next(i for i, text in enumerate(lines, 1) if "d.bug ? 20 : 15" in text)
    said = run(programs[""], "shuffle_outside_of_mask", True, "greedy").stdout
    assert f"error: planted: planted.cu:{line}: __shfl_sync reads lane 20" in said
    assert "in block (0, 0, 0), thread (15, 0, 0)" in said


def test_an_unknown_schedule_is_refused(programs: dict[str, Path]) -> None:
    done = run(programs[""], "missing_barrier", False, "roundrobin")
    assert done.returncode != 0
    assert "no schedule 'roundrobin': it is greedy, reverse or random:SEED" in done.stderr
