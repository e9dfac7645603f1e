"""Triton's interpreter, as tests use it: kernels run on CPU tensors where there is no GPU.

tests/conftest.py calls `request()` before anything imports Triton, and `repair()` before kernels run.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import numpy as np
import torch


def request() -> None:
    """Ask for the interpreter if there is no GPU: Triton reads the variable when a kernel is defined."""
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"


def repair() -> None:
    """Give the interpreter the bf16 arithmetic of the hardware, which Triton 3.7 to 3.9 get wrong.

    tl.dot multiplies the bit patterns of bf16 operands as integers, and fp32 is truncated to bf16 where
    hardware rounds to nearest even.

    And make it twice as quick: calls between jit functions no longer prepare the whole language again.
    """
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

    if hasattr(InterpreterBuilder, "repaired"):
        return
    dot, cast, convert = (
        InterpreterBuilder.create_dot,
        InterpreterBuilder.cast_impl,
        InterpreterBuilder.create_fp_to_fp,
    )

    def widened(x: Any) -> Any:
        return TensorHandle(_widen(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x

    def create_dot(self: Any, a: Any, b: Any, *arguments: Any) -> Any:
        return dot(self, widened(a), widened(b), *arguments)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        kinds = source.dtype.scalar, target.scalar
        if kinds == (tl.float32, tl.bfloat16):
            return TensorHandle(_round(source.data), tl.bfloat16)
        if kinds == (tl.bfloat16, tl.float32):
            return widened(source)
        return cast(self, source, target)

    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        if {source.dtype.scalar, target.scalar} == {tl.float32, tl.bfloat16}:
            return cast_impl(self, source, target)
        return convert(self, source, target, rounding)

    run, call = InterpretedFunction.run, InterpretedFunction.__call__
    prepared: set[int] = set()  # modules (their globals) that the current launch has prepared

    def run_kernel(self: Any, *arguments: Any, **options: Any) -> Any:
        prepared.clear()
        return run(self, *arguments, **options)

    def call_function(self: Any, *arguments: Any, **options: Any) -> Any:
        module = id(self.fn.__globals__)
        if module in prepared:
            return self.rewrite()(*arguments, **options)
        prepared.add(module)
        return call(self, *arguments, **options)

    InterpretedFunction.run, InterpretedFunction.__call__ = run_kernel, call_function
    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp
    InterpreterBuilder.repaired = True


def _widen(bits: Any) -> Any:
    """bf16, held as uint16, as fp32."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def _round(x: Any) -> Any:
    """fp32 to the nearest bf16, ties to even, as uint16; NaN stays NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded).reshape(np.shape(x))
