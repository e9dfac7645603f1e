"""The Triton kernels of `fastgpt.ops`, one file per operation.

To add a kernel for the operation `foo`:

1. `kernels/foo.py`: equations, least bytes and launch geometry at the top; kernels `_foo_forward(x_ptr, ...,
   BLOCK: tl.constexpr)` with int64 row offsets; launchers `foo_forward` and `foo_backward` that call
   `.contiguous()`, allocate with `torch.empty`, look up a `Config` by `chip(device).family` and call
   `launch(kernel, grid, *args, num_warps=..., BLOCK=...)`, which sets the device and skips empty grids.
2. Sums over rows: fp32 partial sums per program, `torch.empty((1 or 2, programs, C))`, then `sum_partials`.
3. `examples()` in the same file: launcher calls at the sizes shipped, which `fastgpt.inspect` compiles for
   every chip and `tests/kernels/test_compile.py` holds against a record (`make inspect-table`).
4. `fastgpt/ops/foo.py`: `_call` (check_dtypes, then `kernels.forward(...)`), `_fake_forward`,
   `_fake_backward`, `_save`, `_gradients`, an `Operator` of them, `add_triton(FOO, "foo")`;
   tests/ops/test_table.py then runs it, and tests/kernels/test_foo.py adds what is special.
5. `MUTANTS` in that test file: at least two ways to break the kernel; `tests/mutants.py` sees that they fail.
6. `docs/kernels/foo.md`: bytes, flops, tiling, registers, the computed limit, what was rejected.
"""
