"""No barrier and no wait of the CUDA kernels can be taken away unnoticed (tests/cuda_barriers.py)."""

from __future__ import annotations

import cuda_barriers
import cuda_emulator
import pytest

pytestmark = pytest.mark.skipif(cuda_emulator.absent() is not None, reason=str(cuda_emulator.absent()))

ALL = list(cuda_barriers.barriers())
QUICK = [
    barrier for barrier in ALL if barrier.file == "partials.cuh"
]  # seconds; each of the others takes minutes


@pytest.mark.parametrize("barrier", QUICK, ids=str)
def test_removal_is_noticed(barrier: cuda_barriers.Barrier) -> None:
    assert cuda_barriers.noticed(barrier)


@pytest.mark.slow
@pytest.mark.parametrize("barrier", [barrier for barrier in ALL if barrier not in QUICK], ids=str)
def test_every_removal_is_noticed(barrier: cuda_barriers.Barrier) -> None:
    assert cuda_barriers.noticed(barrier)


def test_barriers_are_found() -> None:
    text = "a(); __syncthreads();\n__syncwarp();\nptx::cp_async_wait<0>();\ncp_async_wait<N>(); // sync"
    assert [m.group() for m in cuda_barriers.BARRIER.finditer(text)] == [
        "__syncthreads();",
        "__syncwarp();",
        "ptx::cp_async_wait<0>();",
        "cp_async_wait<N>();",
    ]
