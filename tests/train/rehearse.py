"""The reproduction of GPT-2 in small, on a CPU, from text to a page of curves, by the commands a user types.

    python tests/train/rehearse.py FOLDER        `make rehearse`; FOLDER must not exist, and is kept

Python's own help texts become token shards of GPT-2's byte pair encoding. A small GPT-2 is trained on them
by two processes under torchrun, one of which is killed; the run is resumed, evaluated, exported, and sampled
here and by transformers. No network is needed. Every command is printed, then what was checked of its
outcome; the first check that fails ends the rehearsal with status 1. FOLDER/log.txt has what they print.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from ranks import pid_of_rank

from fastgpt import checkpoint
from fastgpt.data import TokenDataset, open_corpus
from fastgpt.errors import InputError
from fastgpt.metrics import read_metrics

SHARD, VAL = 20_000, 8_192  # tokens
STEPS, EVERY, LOG_EVERY = 40, 10, 5  # checkpoints and evaluations EVERY
KILL_AT = 25  # a logged step after a checkpoint, so that steps are done again
MODEL = {"n-layer": 4, "n-head": 4, "n-embd": 128, "block-size": 128}
BATCH = {"batch-size": 8, "micro-batch-size": 2}  # 4 rows for each process, in two micro-batches
BETTER_BY = 2.0  # nats that the validation loss must fall below that of guessing, log(50257) = 10.8
PROMPTS = ("The", "If an exception is raised", "class Shape:\n")
NEW_TOKENS = 40
SECONDS = 600  # for any one command

# Written for this file: a context, an ending that fits, and three that do not.
HELLASWAG = (
    (
        "A woman fills a kettle at the kitchen tap and sets it on the stove. She",
        ("waits for the water to boil.", "paints the stove blue.", "swims to the shore.", "sells the tap."),
    ),
    (
        "Two boys are building a tower of wooden blocks. The taller boy",
        ("puts another block on top.", "eats the tower.", "drives the blocks home.", "melts in the sun."),
    ),
    (
        "A man is changing a flat tire beside the road. After loosening the nuts, he",
        ("lifts the car with a jack.", "sings to the nuts.", "plants the tire.", "reads the road aloud."),
    ),
    (
        "A gardener digs a row of small holes and opens a paper bag. He",
        ("drops a seed into each hole.", "reads the bag a story.", "folds the holes.", "climbs into it."),
    ),
    (
        "The violinist tightens her bow and lifts the instrument to her shoulder. She",
        ("begins to play.", "mows the bow.", "pours it into a cup.", "parks the shoulder."),
    ),
    (
        "Rain starts to fall while they are hiking. They",
        ("put on their jackets.", "drink the mountain.", "unplug the clouds.", "fry the path."),
    ),
    (
        "A baker takes a tray of bread out of the oven. He",
        ("leaves the loaves to cool.", "asks it for a ticket.", "teaches it to dance.", "combs it."),
    ),
    (
        "A girl throws a ball across the lawn for her dog. The dog",
        ("brings it back.", "mails a letter.", "solves the lawn.", "becomes a ball."),
    ),
)


class FailedError(AssertionError):
    """A check that did not hold."""


def check(holds: bool, what: str, found: object = "") -> None:
    """Say that `what` was found to be so, or stop."""
    if not holds:
        raise FailedError(f"not so: {what}" + (f" (found {found})" if found != "" else ""))
    print(f"  ok: {what}", flush=True)


class Rehearsal:
    """The commands, run in one folder as a user would; each method is a step, in order."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # where fastgpt and torchrun are
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        self.last = Path(f"run/checkpoints/step-{STEPS:06d}")

    def command(
        self, line: str, *more: str, while_running: Callable[[subprocess.Popen[bytes]], None] | None = None
    ) -> str:
        """Run a command line, with more arguments that may hold spaces. Returns what it printed.

        With `while_running`, which is given the process, the command must fail, else succeed.
        """
        arguments, start = [*line.split(), *more], time.monotonic()
        print("$ " + shlex.join(arguments), flush=True)
        program = shutil.which(arguments[0], path=self.environment["PATH"])
        if program is None:
            raise FailedError(f"{arguments[0]} is not installed beside {sys.executable}")
        with (self.folder / "log.txt").open("a+") as log:
            log.write(f"$ {shlex.join(arguments)}\n")
            log.flush()
            begin = log.tell()
            process = subprocess.Popen(
                [program, *arguments[1:]], cwd=self.folder, env=self.environment, stdout=log, stderr=log
            )
            try:
                if while_running:
                    while_running(process)
                status = process.wait(SECONDS)
            except subprocess.TimeoutExpired:
                raise FailedError(f"more than {SECONDS} s: {line}") from None
            finally:
                process.terminate()  # torchrun then ends its workers; nothing where it has ended
            log.seek(begin)
            out = log.read()
        if bool(status) != bool(while_running):
            raise FailedError(f"status {status}: {line}\n" + "\n".join(out.splitlines()[-15:]))
        print(f"  {time.monotonic() - start:.0f} s", flush=True)
        return out

    def prepare(self) -> None:
        texts = [" ".join(document.read().split()) for document in open_corpus("pydocs").documents]
        lines = (json.dumps({"text": text}) + "\n" for text in texts)
        (self.folder / "corpus.jsonl").write_text("".join(lines))
        self.command(
            f"fastgpt prepare corpus.jsonl --out data --tokenizer gpt2 "
            f"--shard-tokens {SHARD} --val-tokens {VAL}"
        )
        data = TokenDataset.open(self.folder / "data")
        check(
            len(data.train) >= 3 and len(data.val) == 1, f"{len(data.train)} training shards, one to validate"
        )
        tokens = [int(token) for token in chain(*map(np.asarray, (*data.val, *data.train)))]
        again = data.tokenizer.decode(tokens)
        documents = "".join(f"<|endoftext|>{text}" for text in texts)
        check(again == documents, f"their {len(tokens):,} tokens are the text of all {len(texts)} documents")

    def train(self) -> None:
        with (self.folder / "hellaswag.jsonl").open("w") as file:
            for number, (context, (right, *wrong)) in enumerate(HELLASWAG):
                label = number % 4
                endings = [*wrong[:label], right, *wrong[label:]]
                file.write(json.dumps({"ctx": context, "endings": endings, "label": label}) + "\n")
        settings: dict[str, object] = {**MODEL, **BATCH, "max-steps": STEPS, "warmup-steps": 10}
        settings |= {"learning-rate": 3e-3, "log-every": LOG_EVERY, "eval-every": EVERY, "sample-tokens": 0}
        settings |= {"checkpoint-every": EVERY, "hellaswag": "hellaswag.jsonl", "hellaswag-every": EVERY}
        options = " ".join(f"--{name} {value}" for name, value in settings.items())
        torchrun = "torchrun --standalone --nproc-per-node 2 -m fastgpt train"
        out = self.command(
            f"{torchrun} gpt2-124m --corpus data --out-dir run --device cpu {options}",
            while_running=self._kill_one,
        )
        run = self.folder / "run"
        check("rank 0 of 2 lost the others" in out, "SIGKILL of rank 1 stopped rank 0, which said so")
        before = read_metrics(run)
        saved = int(checkpoint.find(run, "last").name.removeprefix("step-"))
        check(
            saved < before[-1]["step"] < STEPS,
            f"killed after step {before[-1]['step']}, checkpoint of {saved}",
        )
        out = self.command(f"{torchrun} --resume --out-dir run")
        check(f"after step {saved}" in out, f"resumed after step {saved}")
        self._check_metrics(before, saved)

    def _kill_one(self, process: subprocess.Popen[bytes]) -> None:
        """Kill rank 1 once step KILL_AT is logged."""
        deadline = time.monotonic() + SECONDS
        while not any(row["step"] >= KILL_AT for row in read_metrics(self.folder / "run")):
            if process.poll() is not None or time.monotonic() > deadline:
                return  # the command's status, or its missing checkpoint, says more
            time.sleep(0.1)
        os.kill(pid_of_rank(1, process.pid), signal.SIGKILL)
        print(f"  kill -KILL rank 1, after step {KILL_AT}", flush=True)

    def _check_metrics(self, before: list[dict[str, Any]], saved: int) -> None:
        rows = read_metrics(self.folder / "run")
        steps = [row["step"] for row in rows]
        check(steps == list(range(LOG_EVERY, STEPS + 1, LOG_EVERY)), "each step logged once, in order", steps)
        tokens = [BATCH["batch-size"] * MODEL["block-size"] * step for step in steps]
        check([row["tokens"] for row in rows] == tokens, "tokens counted on across the kill")
        keys = ("step", "train_loss", "val_loss", "lr", "grad_norm")
        twice = [step for step in steps if saved < step <= before[-1]["step"]]
        same = [tuple(row[key] for key in keys) for row in before]
        now = [tuple(row[key] for key in keys) for row in rows[: len(before)]]
        check(same == now and bool(twice), f"steps {twice}, done twice, gave the same bits", (same, now))
        losses = [row["val_loss"] for row in rows if row["val_loss"] is not None]
        limit = math.log(50257) - BETTER_BY
        shown = ", ".join(f"{loss:.3f}" for loss in losses)
        check(losses == sorted(losses, reverse=True), f"validation loss falls: {shown}")
        check(losses[-1] < limit, f"and is below {limit:.1f}, {BETTER_BY} better than guessing")

    def evaluate(self) -> None:
        trained = read_metrics(self.folder / "run")[-1]
        out = self.command(f"fastgpt eval {self.last} --device cpu")
        loss = _number(r"loss ([\d.]+) nats", out)
        check(abs(loss - trained["val_loss"]) < 2e-4, f"validation loss {loss:.4f}, as in training", trained)
        out = self.command(f"fastgpt eval {self.last} --task hellaswag --data hellaswag.jsonl --device cpu")
        for name in ("acc", "acc_norm"):
            found = _number(rf"{name} ([\d.]+)", out)
            check(
                abs(found - trained[f"hellaswag_{name}"]) < 1e-4, f"HellaSwag {name} {found}, as in training"
            )

    def export_and_sample(self) -> None:
        self.command(f"fastgpt export {self.last} --to hf --out exported")
        from transformers import AutoTokenizer, GPT2LMHeadModel

        model = GPT2LMHeadModel.from_pretrained(self.folder / "exported", local_files_only=True).eval()
        tokenizer = AutoTokenizer.from_pretrained(self.folder / "exported", local_files_only=True)
        model.generation_config.eos_token_id = None  # fastgpt writes on after the end of a text
        print("  loaded by transformers' GPT2LMHeadModel and AutoTokenizer", flush=True)
        for prompt in PROMPTS:
            greedy = f"--temperature 0 --max-new-tokens {NEW_TOKENS} --device cpu"
            out = self.command(f"fastgpt sample {self.last} {greedy} --prompt", prompt)
            ids = tokenizer(prompt, return_tensors="pt")
            theirs = model.generate(**ids, do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=50256)
            text = tokenizer.decode(theirs[0])
            check(out.endswith(text + "\n"), f"both write {text!r}", out)

    def report(self) -> None:
        self.command("fastgpt bench report run --out report")
        page = (self.folder / "report" / "index.html").read_text()
        figures = re.findall(r'<figure class="chart" id="([^"]+)">', page)
        wanted = {"run-loss", "run-lr", "run-grad-norm", "run-tokens-per-s", "run-hellaswag"}
        check(wanted <= set(figures), f"{self.folder / 'report' / 'index.html'} draws {', '.join(figures)}")


def _number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    if found is None:
        raise FailedError(f"no {pattern!r} in: {text}")
    return float(found[1])


def main() -> int:
    if len(sys.argv) != 2 or Path(sys.argv[1]).exists():
        print("usage: python tests/train/rehearse.py FOLDER, which must not exist yet", file=sys.stderr)
        return 2
    folder = Path(sys.argv[1]).resolve()
    folder.mkdir(parents=True)
    rehearsal, start = Rehearsal(folder), time.monotonic()
    steps = (
        rehearsal.prepare,
        rehearsal.train,
        rehearsal.evaluate,
        rehearsal.export_and_sample,
        rehearsal.report,
    )
    try:
        for step in steps:
            step()
    except (AssertionError, InputError) as error:
        print(f"rehearsal failed: {error}", file=sys.stderr)
        print(f"what the commands printed: {folder / 'log.txt'}", file=sys.stderr)
        return 1
    print(f"rehearsal complete in {time.monotonic() - start:.0f} s: {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
