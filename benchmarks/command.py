"""`fastgpt bench`: one subcommand for each suite, imported when it is asked for."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Sequence

from fastgpt.errors import InputError

# Name: (what runs it, which takes the rest of the command line; what it does).
SUBCOMMANDS = {
    "ops": ("fastgpt.benchmarks.ops:command", "every operation and implementation against its contenders"),
    "train": ("fastgpt.benchmarks.train:command", "whole training steps, losses agreeing, by operation"),
    "ladder": ("fastgpt.benchmarks.ladder:command", "the lecture's speed-ups of GPT-2 one after another"),
    "generate": ("fastgpt.benchmarks.generate:command", "tokens a second of prefill and of decode"),
    "modern": (
        "fastgpt.benchmarks.modern:command",
        "what came after GPT-2: RoPE, Muon, ... one by one, by loss",
    ),
    "finetune": (
        "fastgpt.benchmarks.finetune:command",
        "pretrained on another text or from scratch, by loss: curves",
    ),
    "report": (
        "fastgpt.benchmarks.report:command",
        "a page about results and what changed, or about a training run",
    ),
    "summary": ("fastgpt.benchmarks.summary:command", "what a run found, as tables"),
}


def usage() -> str:
    width = max(map(len, SUBCOMMANDS))
    lines = [
        f"  fastgpt bench {name:<{width}} [options]    {what}" for name, (_, what) in SUBCOMMANDS.items()
    ]
    return "\n".join(
        [
            "usage:",
            *lines,
            "",
            "`fastgpt bench SUITE --help` lists its options; docs/benchmarking.md its method.",
        ]
    )


def command(args: Sequence[str]) -> None:
    """Run the suite that the first argument names with the others.

    Raises:
        InputError: there is no such suite, or it refuses its options.
    """
    if not args or args[0] in ("-h", "--help"):
        print(usage())
        return
    name, *rest = args
    if name not in SUBCOMMANDS:
        close = difflib.get_close_matches(name, SUBCOMMANDS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(SUBCOMMANDS)}"
        raise InputError(f"no suite {name!r}: {hint}")
    module, function = SUBCOMMANDS[name][0].split(":")
    getattr(importlib.import_module(module), function)(rest)
