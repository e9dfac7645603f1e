"""Train a small GPT on a text of your own, write with it, and load it again.

    python examples/train_on_your_text.py my.txt --out runs/mine

The command line does the same: `fastgpt train char-cpu --corpus my.txt --out-dir runs/mine`.
"""

from __future__ import annotations

import argparse

from fastgpt import GPT
from fastgpt.config import override, preset
from fastgpt.generate import sample_text
from fastgpt.pretrained import read_pretrained, tokenizer_of
from fastgpt.train import train


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a character-level GPT on a text file.")
    parser.add_argument("text", help="a UTF-8 text file, or a folder of them")
    parser.add_argument("--out", default="runs/my-text", help="the folder of the run; it must be new")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--prompt", default="The ")
    parser.add_argument("--length", type=int, default=300, help="characters to write after it")
    given = parser.parse_args()

    settings = {
        "corpus": given.text,
        "out_dir": given.out,
        "max_steps": given.steps,
        "warmup_steps": min(100, given.steps // 10),
        "dropout": 0.1,  # a text of your own is often short: keep the network from learning it by heart
        "sample_tokens": 0,
    }
    trainer = train(override(preset("char-cpu"), settings, source="this example"))
    print(f"validation loss {trainer.best_val_loss:.3f}, curves in {given.out}/loss.png")

    # What any other program does with the run: its best checkpoint, and the tokenizer that belongs to it.
    model, tokenizer = GPT.from_pretrained(given.out), tokenizer_of(read_pretrained(given.out))
    print(sample_text(model, tokenizer, given.prompt, given.length, seed=1))


if __name__ == "__main__":
    main()
