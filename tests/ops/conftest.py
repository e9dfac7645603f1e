from collections.abc import Iterator

import cuda_emulator
import pytest
import torch

from fastgpt import ops

cuda_emulator.register_rows()


@pytest.fixture(autouse=True, scope="session")
def emulated_kernels(request: pytest.FixtureRequest) -> None:
    if any("emulated" in item.nodeid for item in request.session.items):
        cuda_emulator.loaded()


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """The tensors here are tiny: starting threads would cost more than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def same_start() -> Iterator[None]:
    """Every test starts from the same random state and leaves the choice of implementations as it was."""
    torch.manual_seed(0)
    with ops.use():
        yield
