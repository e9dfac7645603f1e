"""A Hugging Face GPT-2 that runs on fastgpt's operations: the same results, other kernels.

    python examples/patch_gpt2.py                               a small random network, without a network
    python examples/patch_gpt2.py --model gpt2 --ops triton     OpenAI's weights, on an NVIDIA GPU

Needs transformers: pip install 'fastgpt[hf]'.
"""

from __future__ import annotations

import argparse
import copy

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from fastgpt import ops, patch_gpt2, unpatch_gpt2


def small() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=4, n_embd=128, n_positions=256))


def loss_and_gradients(model: GPT2LMHeadModel, idx: torch.Tensor) -> list[torch.Tensor]:
    """The loss, and the gradient of each parameter. Training has no use for a cache of keys and values."""
    loss = model(idx, labels=idx, use_cache=False).loss
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def main() -> None:
    parser = argparse.ArgumentParser(description="Put fastgpt's operations into a Hugging Face GPT-2.")
    parser.add_argument("--model", help="gpt2, gpt2-medium, ... or a folder; by default a small random one")
    parser.add_argument("--ops", default="auto", help="auto, eager, triton or native")
    given = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = GPT2LMHeadModel.from_pretrained(given.model) if given.model else small()
    model = model.to(device).eval()  # evaluation mode: dropout would draw other numbers
    original = copy.deepcopy(model)
    patch_gpt2(model)
    ops.use(given.ops)

    idx = torch.randint(model.config.vocab_size, (2, 128), device=device)
    for ours, theirs in zip(
        loss_and_gradients(model, idx), loss_and_gradients(original, idx), strict=True
    ):  # up to rounding: sums are added in another order
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    print(f"loss and {len(list(model.parameters()))} gradients agree on {device}, ops {given.ops}")

    greedy = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": model.config.eos_token_id}
    new, old = (m.generate(idx[:1, :8], **greedy)[0].tolist() for m in (model, original))
    print(f"generation: {'the same tokens' if new == old else 'tokens that differ by rounding'}: {new[8:]}")
    unpatch_gpt2(model)


if __name__ == "__main__":
    main()
