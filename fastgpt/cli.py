"""The command line: `fastgpt COMMAND ...`; all commands are in COMMANDS."""

from __future__ import annotations

import dataclasses
import difflib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import tyro
from tyro.conf import Positional

from fastgpt.config import CONFIG, PRESETS, TrainConfig, override, preset
from fastgpt.errors import InputError, TrainingStopped
from fastgpt.files import read_text
from fastgpt.inspect.command import inspect_command

if TYPE_CHECKING:
    from fastgpt.data import ProblemSet
    from fastgpt.pretrained import Source

USAGE = f"""\
fastgpt: train GPT-2 with hand-written kernels

  fastgpt prepare CORPUS [--out FOLDER]  text, data files or a data set of the hub into token shards
  fastgpt train PRESET [options]         train; presets: {", ".join(PRESETS)}
  fastgpt plan PRESET --gpus 64 --chip h100  memory, exchange and time on GPUs, computed without any
  fastgpt sample RUN --prompt TEXT       write text with a trained model
  fastgpt eval RUN [--task NAME]         loss on validation text, HellaSwag, LAMBADA, or any text file
  fastgpt export RUN --to hf --out FOLDER  for transformers, or --to llmc
  fastgpt ladder [--rung NAME | --all]   the lecture "Let's build GPT" step by step, beside its losses
  fastgpt bench SUITE [options]          measure; `fastgpt bench` lists the suites
  fastgpt inspect KERNEL --chip h100     a kernel's machine code and its limit on a chip, without a GPU
  fastgpt info                           what runs here and why: the first attachment of a bug report

`fastgpt COMMAND --help` lists the options of a command."""

T = TypeVar("T")


def parse(cls: type[T], args: Sequence[str], command: str, default: Any = tyro.MISSING_NONPROP) -> T:
    return tyro.cli(
        cls,
        args=list(args),
        prog=f"fastgpt {command}",
        description=cls.__doc__,
        default=default,
        config=(tyro.conf.OmitArgPrefixes,),
    )


def program() -> str:
    """How the user called fastgpt, for lines that say what to run next."""
    path = Path(sys.argv[0]).absolute()
    if path.name == "__main__.py":
        return "python -m fastgpt"
    if path.name != "fastgpt" or shutil.which("fastgpt") == str(path):
        return "fastgpt"
    return os.path.relpath(path)


# -- train ---------------------------------------------------------------------------------------------------

TRAIN_USAGE = f"""\
usage: fastgpt train PRESET [options]
       fastgpt train FILE.yaml [options]        fields by name, and `preset: NAME` to start from one
       fastgpt train --resume --out-dir RUN     continue, with the settings of that run

presets: {", ".join(PRESETS)}
`fastgpt train PRESET --help` lists every option with that preset's values."""


def train_command(args: Sequence[str]) -> None:
    name, config = _train_config(args)
    if config.out_dir is None:
        if config.resume:
            raise InputError("--resume needs --out-dir RUN, the run to continue")
        config = dataclasses.replace(
            config, out_dir=Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
        )
    from fastgpt import checkpoint  # torch is imported only now, so that --help and typing errors are quick
    from fastgpt.exam import describe
    from fastgpt.train import train

    trainer = train(config)
    if not trainer.world.main:
        return
    if config.sample_tokens:
        print(f"\n{trainer.sample()}\n")
    best = checkpoint.best(trainer.out_dir)
    if trainer.steps_done < config.max_steps:
        print(f"interrupted after step {trainer.steps_done}: checkpoint written")
        print(f"try: {program()} train --resume --out-dir {trainer.out_dir}")
        return
    if trainer.scores:
        print(f"held-out problems: {describe(trainer.scores)}")
    print(f"best checkpoint: {best} (validation loss {trainer.best_val_loss:.4f})")
    print(f"loss curve:      {trainer.out_dir / 'loss.png'}")
    prompt = trainer.data.prompt
    print(f"try:             {program()} sample {trainer.out_dir} --prompt '{prompt}' --num-samples 3")


def _train_config(args: Sequence[str]) -> tuple[str, TrainConfig]:
    """The name to call the run by, and its settings: a preset, YAML file or saved run, then the options."""
    first, rest = (args[0], args[1:]) if args and not args[0].startswith("-") else ("", args)
    if first:
        name, default = Path(first).stem, load_settings(first)
    elif "--resume" in rest and (saved := _option(rest, "--out-dir")):
        name, default = Path(saved).name, settings_of_run(Path(saved))
    elif {"-h", "--help"} & set(rest):
        print(TRAIN_USAGE)
        raise SystemExit(0)
    else:
        raise InputError(f"which preset? Choose one of {', '.join(PRESETS)}, or a YAML file")
    return name, parse(TrainConfig, rest, f"train {first}".strip(), default)


def _option(args: Sequence[str], name: str) -> str | None:
    """The value of an option, written `--name value` or `--name=value`."""
    for arg, following in zip(args, [*args[1:], None], strict=True):
        if arg == name:
            return following
        if arg.startswith(f"{name}="):
            return arg.removeprefix(f"{name}=")
    return None


def load_settings(name: str) -> TrainConfig:
    """The settings of a preset or of a YAML file."""
    return _from_yaml(Path(name)) if name.endswith((".yaml", ".yml")) else preset(name)


def _from_yaml(path: Path) -> TrainConfig:
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected `field: value` lines, got {type(values).__name__}")
    start = preset(values.pop("preset")) if "preset" in values else TrainConfig()
    return override(start, values, source=str(path))


def settings_of_run(out_dir: Path) -> TrainConfig:
    """The settings that a run was started with."""
    path = out_dir / CONFIG
    if not path.exists():
        raise InputError(f"{out_dir} holds no run to resume (no {CONFIG})")
    return override(TrainConfig(), json.loads(path.read_text()), source=str(path))


# -- sample --------------------------------------------------------------------------------------------------


@dataclass
class SampleArgs:
    """Write text with a trained model."""

    run: Positional[str]
    """A run, a checkpoint, a Hugging Face GPT-2 folder, a .pt file of nanoGPT, a .bin file of llm.c, or gpt2,
    gpt2-medium, gpt2-large, gpt2-xl."""
    prompt: str = ""
    """The text to continue."""
    prompt_file: Path | None = None
    """Read the prompt from this file."""
    num_samples: int = 1
    """How many continuations."""
    max_new_tokens: int = 500
    """Their length."""
    temperature: float = 0.8
    """Below 1 is safer, above 1 wilder, 0 takes the most likely token."""
    top_k: int | None = None
    """Choose among the k most likely tokens only."""
    top_p: float | None = None
    """Choose among the most likely tokens that together have this probability."""
    seed: int = 1337
    """The same seed writes the same text: sample n is what --seed (seed + n - 1) alone writes."""
    batch_size: int = 16
    """Continuations written at once; the text does not depend on it."""
    device: str = "auto"
    """auto, cuda, mps or cpu."""
    cache: bool = True
    """Keep keys and values of earlier tokens; without, each token costs a whole forward pass."""
    graph: bool = True
    """Replay the work of a token as one CUDA graph, on an NVIDIA GPU and with the cache; without, each of its
    kernels is launched anew."""


def sample_command(args: Sequence[str]) -> None:
    given = parse(SampleArgs, args, "sample")
    if min(given.num_samples, given.max_new_tokens, given.batch_size) < 1:
        raise InputError("num_samples, max_new_tokens and batch_size must be at least 1")
    prompt = _prompt(given)
    from fastgpt.generate import encode_prompt, generate_texts
    from fastgpt.pretrained import model_from, read_pretrained, tokenizer_of
    from fastgpt.runtime import resolve_device

    device = resolve_device(given.device)
    source = read_pretrained(given.run)
    tokenizer = tokenizer_of(source)
    model = model_from(source).to(device)
    idx = encode_prompt(tokenizer, prompt).to(device)  # (T,)
    if len(idx) > model.config.block_size:
        print(
            f"note: the prompt has {len(idx)} tokens; the model sees the last {model.config.block_size}",
            file=sys.stderr,
        )
    problems = _problems(source)
    samples = generate_texts(
        model,
        tokenizer,
        idx,
        given.max_new_tokens,
        seeds=range(given.seed, given.seed + given.num_samples),
        batch_size=given.batch_size,
        temperature=given.temperature,
        top_k=given.top_k,
        top_p=given.top_p,
        use_cache=given.cache,
        graph=None if given.graph else False,
    )
    for number, pieces in enumerate(samples, 1):
        if given.num_samples > 1:
            print(f"--- sample {number} of {given.num_samples} ---")
        print(prompt, end="", flush=True)
        written = prompt
        for text in pieces:
            print(text, end="", flush=True)
            written += text
        print()
        if problems and (note := _reading(problems, written)):
            print(note, file=sys.stderr)


def _problems(source: Source) -> ProblemSet | None:
    """What a run was trained on, if that was problems."""
    from fastgpt.checkpoint import Checkpoint
    from fastgpt.data import PROBLEM_CORPORA, problem_set

    run = source.path.parent.parent
    if not isinstance(source, Checkpoint) or not (run / CONFIG).exists():
        return None
    corpus = settings_of_run(run).corpus
    return problem_set(corpus) if corpus in PROBLEM_CORPORA else None


def _reading(problems: ProblemSet, written: str) -> str | None:
    """What an answer means that is not written as people do; else nothing."""
    from fastgpt.data import answer_of

    answer = answer_of(written)
    reading = problems.read(answer)
    return None if reading == answer else f"note: an answer begins with its units, so this one is {reading}"


def _prompt(given: SampleArgs) -> str:
    if given.prompt_file is None:
        return given.prompt
    if given.prompt:
        raise InputError("--prompt and --prompt-file exclude each other: give one")
    return read_text(given.prompt_file)


# -- commands in files of their own --------------------------------------------------------------------------


def prepare_command(args: Sequence[str]) -> None:
    from fastgpt.prepare_command import command

    command(args)


def eval_command(args: Sequence[str]) -> None:
    from fastgpt.eval_command import command

    command(args)


def plan_command(args: Sequence[str]) -> None:
    from fastgpt.plan_command import command

    command(args)


def export_command(args: Sequence[str]) -> None:
    from fastgpt.export import command

    command(args)


def ladder_command(args: Sequence[str]) -> None:
    from fastgpt.ladder_command import command

    command(args)


# -- bench ---------------------------------------------------------------------------------------------------


def bench_command(args: Sequence[str]) -> None:
    from fastgpt.benchmarks.command import command

    command(args)


# -- info ----------------------------------------------------------------------------------------------------


@dataclass
class InfoArgs:
    """Print the environment, and for each operation and device which implementation `auto` is and why."""


def info_command(args: Sequence[str]) -> None:
    parse(InfoArgs, args, "info")
    from fastgpt.info import describe

    print(describe())


# -- the command itself --------------------------------------------------------------------------------------

COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "prepare": prepare_command,
    "train": train_command,
    "plan": plan_command,
    "sample": sample_command,
    "eval": eval_command,
    "export": export_command,
    "ladder": ladder_command,
    "bench": bench_command,
    "inspect": inspect_command,
    "info": info_command,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, or 2 for bad input, or 1 where training had to stop."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    if args[0] in ("-V", "--version"):
        from fastgpt import __version__

        print(__version__)
        return 0
    command = args[0]
    if command not in COMMANDS:
        close = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"the commands are {', '.join(COMMANDS)}"
        print(f"fastgpt: error: unknown command {command!r}: {hint}", file=sys.stderr)
        return 2
    logging.basicConfig(format="%(message)s")
    logging.getLogger("fastgpt").setLevel(logging.INFO)
    try:
        COMMANDS[command](args[1:])
    except InputError as error:
        print(f"fastgpt {command}: error: {error}", file=sys.stderr)
        return 2
    except TrainingStopped as error:
        print(f"fastgpt {command}: stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `fastgpt sample ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # a full disk or missing permission, outside the places that say more
        print(f"fastgpt {command}: error: {error}", file=sys.stderr)
        return 2
    return 0
