"""Single operations of fastgpt in a model of another kind.

    python examples/one_kernel.py

The model guesses the next byte from the eight before it. It has two operations: `add_layer_norm`, which adds
a branch to the residual stream and normalises the sum in one pass, and `linear_cross_entropy`, the classifier
and its loss without the logits of all rows in memory. Everything else is plain PyTorch.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt import ops

CONTEXT, VOCAB = 8, 256
TEXT = b"the quick brown fox jumps over the lazy dog. " * 200


class NextByte(nn.Module):
    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, width)
        self.mix = nn.Linear(CONTEXT * width, width)
        self.branch = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, VOCAB, bias=False)

    def hidden(self, idx: Tensor) -> Tensor:
        """(B, CONTEXT) bytes -> (B, width)."""
        x = self.mix(self.embedding(idx).flatten(1))
        normed, _ = ops.add_layer_norm(self.branch(x), x, self.norm.weight, self.norm.bias)
        return normed

    def loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        """The mean cross entropy, nats a byte: as F.cross_entropy(self.classifier(hidden), targets) is."""
        return ops.linear_cross_entropy(self.hidden(idx), self.classifier.weight, targets)


def main() -> None:
    parser = argparse.ArgumentParser(description="Two operations of fastgpt in another model.")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--ops", default="auto", help="auto, eager, triton or native")
    given = parser.parse_args()

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    windows = torch.tensor(list(TEXT), device=device).unfold(0, CONTEXT + 1, 1)  # (N, CONTEXT + 1)
    model = NextByte().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    with ops.use(add_layer_norm=given.ops, linear_cross_entropy=given.ops):
        for step in range(given.steps):
            rows = windows[torch.randint(len(windows), (64,), device=device)]
            loss = model.loss(rows[:, :-1], rows[:, -1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 50 == 0 or step == given.steps - 1:
                print(f"step {step}: loss {loss.item():.3f}")
        idx, targets = windows[:100, :-1], windows[:100, -1]
        plain = F.cross_entropy(model.classifier(model.hidden(idx)), targets)
        torch.testing.assert_close(model.loss(idx, targets), plain, rtol=1e-4, atol=1e-5)
    print("the loss is that of F.cross_entropy")


if __name__ == "__main__":
    main()
