"""The long run of bf16 attention against fp32: that its contenders are what they are called."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastgpt import GPT, GPTConfig, ops
from fastgpt.benchmarks.attention_precision import CONTENDERS, Args, attention, run, table

MUTANTS = {
    "fastgpt/benchmarks/attention_precision.py": [
        ("ds = (p * (do.float() @ v.float().mT - delta))", "ds = (p * (do.float() @ v.float().mT))"),
        ("return attend(qkv.to(dtype)).to(qkv.dtype)", "return attend(qkv).to(qkv.dtype)"),
    ],
}
MISSING = [row for row in ops.table() if row.name == "native" and row.missing(torch.device("cpu"))]


@pytest.mark.skipif(bool(MISSING), reason="no native kernels here")
@pytest.mark.parametrize("name", CONTENDERS)
def test_contenders_differ_by_their_rounding(name: str) -> None:
    """From fp32: by nothing but the last bits, or by what bf16 rounds, in the loss's gradients too."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=64, block_size=32, n_layer=2, n_head=2, n_embd=32))
    idx = torch.randint(64, (4, 32))
    wanted = torch.autograd.grad(model(idx, idx)[1], model.parameters())
    with attention(*CONTENDERS[name]):
        got = torch.autograd.grad(model(idx, idx)[1], model.parameters())
    exact = CONTENDERS[name][0] == torch.float32
    for a, b in zip(got, wanted, strict=True):
        error = ((a - b).norm() / b.norm()).item()
        assert error < (1e-5 if exact else 0.05)
    assert exact or not torch.equal(got[0], wanted[0])


@pytest.mark.skipif(bool(MISSING), reason="no native kernels here")
def test_a_short_run(text_file: Path, tmp_path: Path) -> None:
    args = Args(machine="none", corpus=str(text_file), steps=20, batch_size=2)
    tiny = GPTConfig(block_size=16, n_layer=1, n_head=2, n_embd=16)
    names = ["fp32, PyTorch", "bf16, native"]
    results = {name: run(name, args, tmp_path / name, model=tiny) for name in names}
    first, second = results.values()
    assert first["steps"] == [10, 20]
    assert first["train_loss"] == pytest.approx(second["train_loss"], rel=0.01)
    lines = table(results).splitlines()
    assert lines[2].startswith("| fp32, PyTorch |")
    assert lines[2].endswith("| +0.00000 | 0.00000 |")
