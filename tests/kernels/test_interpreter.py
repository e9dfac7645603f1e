"""The interpreter computes bf16 as hardware does, or nothing that it says about bf16 kernels counts."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

device = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def _dot(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(out_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at), input_precision="ieee"))


@triton.jit
def _cast(x_ptr, narrow_ptr, wide_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    narrow = tl.load(x_ptr + i).to(tl.bfloat16)
    tl.store(narrow_ptr + i, narrow)
    tl.store(wide_ptr + i, narrow.to(tl.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dot(dtype: torch.dtype) -> None:
    a, b = (torch.randn(16, 16, device=device).to(dtype) for _ in range(2))
    out = torch.full((16, 16), torch.nan, device=device)
    _dot[(1,)](a, b, out, N=16)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


def test_bf16_rounds_to_nearest_even() -> None:
    """Ties both ways, the carry into the exponent, the largest number, subnormals, infinities and NaN."""
    bits = torch.tensor(
        [0x3F808000, 0x3F818000, 0x3F808001, 0x3FFFFFFF, 0x7F7FFFFF, 0x00018000, 0x7F800000, 0x7F800001],
        dtype=torch.int32,
    )
    x = torch.cat([bits.view(torch.float32), torch.randn(120)])
    x = torch.cat([x, -x]).to(device)
    narrow, wide = torch.empty_like(x, dtype=torch.bfloat16), torch.empty_like(x)
    _cast[(1,)](x, narrow, wide, N=256)
    torch.testing.assert_close(narrow, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(wide, x.bfloat16().float(), rtol=0, atol=0, equal_nan=True)
