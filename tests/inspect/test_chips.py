"""The chips' figures agree with each other, and with what the driver calls the chips."""

from __future__ import annotations

import pytest

from fastgpt.chips import Chip, chip, chip_named, chips, peak_flops
from fastgpt.errors import InputError

ALL = list(chips().values())


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("NVIDIA A100 80GB PCIe", "a100-pcie"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("Tesla V100-SXM2-16GB", "v100"),
    ],
)
def test_names_of_the_driver(device: str, name: str) -> None:
    found = chip_named(device)
    assert found is not None and found.name == name
    assert [c.name for c in ALL if chip_named(device) == c] == [name]


@pytest.mark.parametrize("device", ["NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090 D", "AMD"])
def test_other_chips_are_unknown(device: str) -> None:
    assert chip_named(device) is None
    assert peak_flops(device, "bf16") is None


def test_peaks() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert peak_flops("Tesla T4", "bf16") is None
    assert chip("h100").peak("tf32") == 494.5e12


@pytest.mark.parametrize("one", ALL, ids=lambda one: one.name)
def test_figures_agree(one: Chip) -> None:
    """The fp32 peak is two flops a lane and clock of all SMs: a slip in any of the four figures shows."""
    fp32 = one.peak("fp32")
    assert fp32 is not None
    assert fp32 == pytest.approx(2 * one.limits.lanes["fp32"] * one.sms * one.clock_hz, rel=0.03)
    # tensor cores do a power of two of multiply-adds a clock; their clock may be lower than the highest
    fp16 = one.peak("fp16")
    assert fp16 is not None
    ratio = fp16 / (2 * one.sms * one.clock_hz)
    assert any(0.85 <= ratio / size <= 1.03 for size in (256, 512, 1024, 2048, 4096)), ratio
    assert 0.2e12 < one.bandwidth < 10e12 and one.l2 >= 4 << 20 and one.source
    assert one.limits.shared_block + one.limits.reserved <= one.limits.shared


def test_architectures() -> None:
    assert chip("sm_90a").name == chip("sm_90").name == chip("NVIDIA H100 80GB HBM3").name == "h100"
    assert chip("sm_120").sm == 120
    with pytest.raises(InputError, match=r"no chip 'sm_42': choose one of a100, .*sm_120"):
        chip("sm_42")
