"""What a chip can do at most: the denominators of utilisation figures."""

from __future__ import annotations

import re

# Dense matmul peaks in TFLOP/s, without sparsity: (bf16 or fp16 with fp32 accumulation, tf32, fp32), from
# NVIDIA's datasheets of each product; GeForce figures from the architecture whitepapers (Ampere GA102
# appendix A, Ada appendix A). The pattern is matched against the whole name that the driver reports.
_PEAKS: tuple[tuple[str, tuple[float, float | None, float]], ...] = (
    (r"NVIDIA A100.*", (312.0, 156.0, 19.5)),
    (r"NVIDIA H100 PCIe", (756.0, 378.0, 51.0)),
    (r"NVIDIA H100 NVL", (835.0, 417.5, 60.0)),
    (r"NVIDIA (H100|H200)( 80GB HBM3)?", (989.0, 494.5, 67.0)),
    (r"NVIDIA B200", (2250.0, 1125.0, 75.0)),
    (r"NVIDIA A10G?", (125.0, 62.5, 31.2)),
    (r"NVIDIA L4", (121.0, 60.0, 30.3)),
    (r"NVIDIA L40S", (362.0, 183.0, 91.6)),
    (r"NVIDIA GeForce RTX 3090", (71.0, 35.6, 35.6)),
    (r"NVIDIA GeForce RTX 4090", (165.2, 82.6, 82.6)),
    (r"Tesla V100-SXM.*", (125.0, None, 15.7)),
    (r"Tesla T4", (65.0, None, 8.1)),
)


def peak_flops(device_name: str, precision: str) -> float | None:
    """FLOP/s of dense matmuls on the chip of that name in `fp32 | tf32 | bf16 | fp16`; None if unknown."""
    for pattern, (half, tf32, fp32) in _PEAKS:
        if re.fullmatch(pattern, device_name):
            tflops = {"bf16": half, "fp16": half, "tf32": tf32, "fp32": fp32}[precision]
            return tflops * 1e12 if tflops else None
    return None
