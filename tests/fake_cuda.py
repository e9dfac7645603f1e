"""In place of torch.cuda on a CPU: a capture records operators without their effects, a replay runs them.

As CUDA graphs do it: a replay reads and writes the same tensors as were captured, does not run Python again,
and so repeats whatever number of the host was in an argument.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fastgpt import graphs

WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal")  # what CUDA refuses in a capture


def tensors(values: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(values) if isinstance(x, Tensor)]


class Recording(TorchDispatchMode):
    """The operators that run inside, of which nothing is left behind but the tensors that they made."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []
        self._before: list[tuple[Tensor, Tensor]] = []  # what is written to, and what was in it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.name().split(".")[0] in WAITS:
            raise RuntimeError("operation not permitted when stream is capturing")
        for number, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written = args[number] if number < len(args) else kwargs.get(argument.name)
                self._before += [(x, x.clone()) for x in tensors(written)]
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, tensors(out)))
        return out

    def undo(self) -> None:
        for tensor, before in reversed(self._before):
            tensor.copy_(before)

    def replay(self) -> None:
        for func, args, kwargs, outs in self.calls:
            for old, new in zip(outs, tensors(func(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():  # neither a view nor in place
                    old.copy_(new)


class FakeCuda:
    """Runs everything at once, and logs waits, captures and replays."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def Stream(self, device: Any = None) -> Any:
        return SimpleNamespace(device=device, wait_stream=lambda other: self.log.append("wait"))

    current_stream = Stream

    def CUDAGraph(self) -> Any:
        return SimpleNamespace(recording=Recording())

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        yield

    @contextlib.contextmanager
    def graph(self, graph: Any, stream: Any) -> Iterator[None]:
        self.log.append("capture")
        with graph.recording:
            yield
        graph.recording.undo()

        def replay() -> None:
            self.log.append("replay")
            graph.recording.replay()

        graph.replay = replay


def install(patch: pytest.MonkeyPatch, *modules: str) -> FakeCuda:
    """Put one in `fastgpt.graphs`; what the named modules ask about devices is then answered with yes."""
    fake = FakeCuda()
    patch.setattr(graphs, "torch", SimpleNamespace(cuda=fake))
    for module in modules:
        patch.setattr(f"{module}.can_capture", lambda device: True)
    return fake
