"""mma and ldmatrix in the emulator: one product, with the operands brought to the lanes in several ways."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import cuda_emulator
import numpy as np
import pytest

pytestmark = pytest.mark.skipif(cuda_emulator.absent() is not None, reason=str(cuda_emulator.absent()))


@pytest.mark.parametrize("checked", cuda_emulator.SANITIZERS)
def test_every_way_gives_the_product(checked: str) -> None:
    """With the sanitizers too, which must not take what the emulator does itself for the kernel's."""
    program = cuda_emulator.build([Path(__file__).with_name("fragments.cu")], "fragments", checked)
    environment = {**os.environ, **cuda_emulator.OPTIONS}
    done = subprocess.run([program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    row, k, column = np.arange(16)[:, None], np.arange(16), np.arange(8)
    a = (row * 5 + k * 3) % 7 - 3
    b = (k[:, None] * 2 + column * 5) % 9 - 4
    assert len(lines) == 6  # three ways, two types
    for line in lines:
        np.testing.assert_array_equal(np.array(line.split(), float).reshape(16, 8), a @ b)
