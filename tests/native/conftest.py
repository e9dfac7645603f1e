import pytest
import triton_interpreter

triton_interpreter.request()


@pytest.fixture(autouse=True, scope="session")
def right_bf16() -> None:
    triton_interpreter.repair()
