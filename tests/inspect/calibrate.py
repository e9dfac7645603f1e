"""Computed ceilings beside published measurements: none may be beaten.

python tests/inspect/calibrate.py          JSON; the table of docs/inspect.md with --table
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastgpt.chips import chip
from fastgpt.inspect import build, shipped
from fastgpt.inspect.bounds import Launch, Work
from fastgpt.inspect.report import Analysis, analyse
from fastgpt.kernels.attention import attention_forward
from fastgpt.kernels.examples import Example, meta
from fastgpt.kernels.layer_norm import layer_norm_backward

HERE = Path(__file__).parent


class Case(NamedTuple):
    """A published figure in `unit`, and the work that it is counted for: flops, or bytes."""

    name: str
    chip: str
    published: float
    unit: str
    counted: float
    kernels: Callable[[str], list[Analysis]]
    source: str


def launched(call: Callable[[], Any]) -> Callable[[str], list[Analysis]]:
    def find(name: str) -> list[Analysis]:
        one = chip(name)
        calls = shipped.calls("calibration", Example("calibration", call), one)
        built = [(found, found.compile(one.sm)) for found in calls]
        return [analyse(c.title, b, one, c.launch(b), c.work(), c.values()) for c, b in built]

    return find


def copied(name: str) -> list[Analysis]:
    """2^28 floats in blocks of 1024."""
    one, count = chip(name), 1 << 28
    kernel = build.load_triton(HERE / "slow.py", "copy")
    built = build.compile_user(kernel, "*fp32,*fp32,i32:16", {"BLOCK": 1024}, warps=8, stages=1, sm=one.sm)
    return [analyse("copy", built, one, Launch(count // 1024, built.warps), Work(bytes=8 * count))]


def attention() -> Any:
    """The tutorial's: batch 4, 32 heads of 64, 1024 tokens, causal, fp16."""
    return attention_forward(meta(4, 1024, 3, 32, 64, dtype=torch.float16), None, None, None, 0.0, None, None)


def norm_backward() -> Any:
    """The tutorial's: 4096 rows of 8192, fp16."""
    x, w, row = (meta(*shape, dtype=torch.float16) for shape in [(4096, 8192), (8192,), (4096,)])
    return layer_norm_backward(x, x, w, row.float(), row.float(), True)


CASES = [
    Case("FlashAttention forward, D 64, T 1024, causal, fp16", "h100", 291, "TFLOP/s",
         2 * 2 * 4 * 32 * 1024 * 1024 * 64 / 2, launched(attention),
         "Triton's tutorial 06-fused-attention, its recorded output, taken to be an H100's"),
    Case("LayerNorm backward, 4096 x 8192, fp16", "a100", 968.5, "GB/s",
         3 * 4096 * 8192 * 2, launched(norm_backward),
         "Triton's tutorial 05-layer-norm, its recorded output, taken to be an A100's"),
    Case("copy within memory", "h100", 2573, "GB/s", 8 << 28, copied,
         "p2pBandwidthLatencyTest on HGX H100 SXM, github.com/NVIDIA/nccl/issues/1264"),
    Case("copy within memory", "a100-pcie", 1727, "GB/s", 8 << 28, copied,
         "A800 80GB PCIe, github.com/mli/transformers-benchmarks/issues/4"),
]  # fmt: skip


def results() -> list[dict[str, Any]]:
    found = []
    for case in CASES:
        analyses = case.kernels(case.chip)
        seconds = sum(a.bounds.ceiling for a in analyses if a.bounds)
        ceiling = case.counted / seconds / (1e12 if case.unit == "TFLOP/s" else 1e9)
        slowest = max(analyses, key=lambda a: a.bounds.ceiling if a.bounds else 0.0)
        found.append(
            {
                "name": case.name,
                "chip": case.chip,
                "published": case.published,
                "unit": case.unit,
                "ceiling": round(ceiling, 1),
                "binding": slowest.bounds.binding if slowest.bounds else None,
                "ratio": round(case.published / ceiling, 2),
                "source": case.source,
            }
        )
    return found


def line(r: dict[str, Any]) -> str:
    """A row of the table of docs/inspect.md."""
    return (
        f"| {r['name']} | {r['chip']} | {r['published']:g} {r['unit']} | {r['ceiling']:.0f} ({r['binding']}) "
        f"| {r['ratio']:.2f} | {r['source']} |"
    )


if __name__ == "__main__":
    print("\n".join(map(line, results())) if "--table" in sys.argv else json.dumps(results()))
