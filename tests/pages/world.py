"""The files that the pages name, small: texts, token shards, runs, results, weights and kernels."""

from __future__ import annotations

import json
import shutil
import string
from pathlib import Path

import torch
import zstandard
from texts import pseudo_text

from fastgpt.data import GPT2Tokenizer, open_corpus, prepare
from fastgpt.formats import hugging_face
from fastgpt.pretrained import read_pretrained

from .blocks import ROOT
from .commands import call
from .runner import small

# What of the repository commands of the pages name; benchmarks/results is written to, and so is not among it.
REPOSITORY = ("csrc", "examples", "kernels", "tests", "benchmarks/*.py", "benchmarks/studies/*.py")
WORDS = "runs/words"  # trained on tokens of GPT-2
RESULTS = ROOT / "benchmarks/results/amd-epyc-2-cores/cpu-1.csv"
ENDINGS = ["drinks.", "sings.", "waits.", "ends."]
HELLASWAG = {"ctx": "A man fills a kettle. He", "endings": ENDINGS, "label": 2}
TRITON_KERNEL = """
import triton
import triton.language as tl


@triton.jit
def kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, 2 * tl.load(x_ptr + at, at < N), at < N)
"""
CUDA_KERNEL = 'extern "C" __global__ void kernel(float* x) { x[threadIdx.x] *= 2; }\n'


def make(folder: Path) -> Path:
    """Fill a folder; FASTGPT_CACHE is where GPT-2's merges are kept. Returns the folder."""
    text = pseudo_text(9_000) + string.printable + pseudo_text(1_000, seed=1)
    for name in ("input.txt", "my.txt", "my-texts/a.txt", "my-corpus/a.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "mine.yaml").write_text("preset: char-cpu\nmax_steps: 2\n")
    (folder / "hellaswag_val.jsonl").write_text(json.dumps(HELLASWAG) + "\n")
    (folder / "lambada_test.jsonl").write_text(json.dumps({"text": "a man fills a kettle"}) + "\n")
    (folder / "pages").mkdir()
    documents = [{"body": pseudo_text(9_000, seed=number)} for number in range(3)]
    lines = "".join(json.dumps(document) + "\n" for document in documents)
    (folder / "pages/a.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    (folder / "mine.py").write_text(TRITON_KERNEL)
    (folder / "mine.cu").write_text(CUDA_KERNEL)
    _results(folder)
    _tokens_and_runs(folder)
    _hub(folder / "hub/gpt2")
    return folder


def copy(world: Path, folder: Path) -> None:
    """The world for one page, which may write into it."""
    shutil.copytree(world, folder, dirs_exist_ok=True)
    for path in (path for name in REPOSITORY for path in ROOT.glob(name)):
        link = folder / path.relative_to(ROOT)
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(path)


def _results(folder: Path) -> None:
    """The recorded results of a CPU, of one operation: a page of all takes seconds."""
    header, *rows = RESULTS.read_text().splitlines(keepends=True)
    few = [row for row in rows if ",rms_norm," in row]
    for name in ("new.csv", "old.csv", "RESULTS", "OLD", "runs/bench-20261124/cpu-1.csv"):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(header + "".join(few))


def _tokens_and_runs(folder: Path) -> None:
    """Shards of GPT-2's tokens, and two runs: one of characters, one of GPT-2's tokens."""
    prepare(open_corpus(folder / "input.txt"), "gpt2", folder / "FOLDER")
    shutil.copytree(folder / "FOLDER", folder / "data/fineweb-edu-sample-10BT-gpt2")
    for preset, run, corpus, context in (
        ("char-cpu", "RUN", "input.txt", "512"),
        ("gpt2-124m", WORDS, "FOLDER", "16"),
    ):
        options = ["--corpus", str(folder / corpus), "--out-dir", str(folder / run), "--block-size", context]
        status, said = call(small(["train", preset, *options]))
        assert status == 0, said
    shutil.copytree(folder / "RUN", folder / "runs/mine")


def _hub(folder: Path) -> None:
    """GPT-2 as the hub has it, but with the sizes of the runs: what `gpt2` is downloaded as."""
    source = read_pretrained(str(folder.parents[1] / WORDS))
    folder.parent.mkdir()
    hugging_face.write(folder, source.config, source.model, GPT2Tokenizer(), torch.float32)
