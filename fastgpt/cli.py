"""The command line: `fastgpt prepare | train | sample | eval | inspect`."""

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
from typing import Any, TypeVar

import tyro
from tyro.conf import Positional

from fastgpt.config import CONFIG, PRESETS, TokenizerName, TrainConfig, override, preset
from fastgpt.errors import InputError, TrainingStopped
from fastgpt.inspect.command import inspect_command

USAGE = f"""\
fastgpt: train GPT-2 with hand-written kernels

  fastgpt prepare CORPUS --out FOLDER    turn text into token shards
  fastgpt train PRESET [options]         train; presets: {", ".join(PRESETS)}
  fastgpt sample RUN --prompt TEXT       write text with a trained model
  fastgpt eval RUN                       loss over a whole validation split
  fastgpt inspect KERNEL --chip h100     a kernel's machine code and its limit on a chip, without a GPU

`fastgpt COMMAND --help` lists the options of a command."""

T = TypeVar("T")


def _parse(cls: type[T], args: Sequence[str], command: str, default: Any = tyro.MISSING_NONPROP) -> T:
    return tyro.cli(
        cls,
        args=list(args),
        prog=f"fastgpt {command}",
        description=cls.__doc__,
        default=default,
        config=(tyro.conf.OmitArgPrefixes,),
    )


def _program() -> str:
    """How the user called fastgpt, for lines that say what to run next."""
    path = Path(sys.argv[0]).absolute()
    if path.name == "__main__.py":
        return "python -m fastgpt"
    if path.name != "fastgpt" or shutil.which("fastgpt") == str(path):
        return "fastgpt"
    return os.path.relpath(path)


# -- prepare -------------------------------------------------------------------------------------------------


@dataclass
class PrepareArgs:
    """Turn text into token shards in llm.c's format, with the tokenizer beside them."""

    corpus: Positional[str]
    """`shakespeare`, `pydocs`, a text file or a folder of text files."""
    out: Path
    """The folder to write; `fastgpt train --corpus FOLDER` reads it."""
    tokenizer: TokenizerName = "gpt2"
    """How text becomes tokens."""
    val_fraction: float = 0.1
    """The share at the end of the text that is kept for validation."""
    shard_tokens: int = 100_000_000
    """Tokens per file."""
    workers: int | None = None
    """Processes for large inputs; by default one per core."""


def prepare_command(args: Sequence[str]) -> None:
    from fastgpt.data import TokenDataset, open_corpus, prepare

    given = _parse(PrepareArgs, args, "prepare")
    folder = prepare(
        open_corpus(given.corpus),
        given.tokenizer,
        given.out,
        val_fraction=given.val_fraction,
        shard_tokens=given.shard_tokens,
        workers=given.workers,
    )
    data = TokenDataset.open(folder)
    train, val = (sum(map(len, shards)) for shards in (data.train, data.val))
    vocab_size = data.tokenizer.vocab_size
    print(f"{folder}: {train:,} training and {val:,} validation tokens, {vocab_size} in the vocabulary")
    print(f"try: {_program()} train char-cpu --corpus {folder}")


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
    from fastgpt.train import train

    trainer = train(config)
    if config.sample_tokens:
        print(f"\n{trainer.sample()}\n")
    best = checkpoint.best(trainer.out_dir)
    if trainer.steps_done < config.max_steps:
        print(f"interrupted after step {trainer.steps_done}: checkpoint written")
        print(f"try: {_program()} train --resume --out-dir {trainer.out_dir}")
        return
    print(f"best checkpoint: {best} (validation loss {trainer.best_val_loss:.4f})")
    print(f"loss curve:      {trainer.out_dir / 'loss.png'}")
    print(f"try:             {_program()} sample {trainer.out_dir} --prompt 'The ' --num-samples 3")


def _train_config(args: Sequence[str]) -> tuple[str, TrainConfig]:
    """The name to call the run by, and its settings: a preset, YAML file or saved run, then the options."""
    first, rest = (args[0], args[1:]) if args and not args[0].startswith("-") else ("", args)
    if first:
        name, default = Path(first).stem, load_settings(first)
    elif "--resume" in rest and (saved := _option(rest, "--out-dir")):
        name, default = Path(saved).name, _from_run(Path(saved))
    elif {"-h", "--help"} & set(rest):
        print(TRAIN_USAGE)
        raise SystemExit(0)
    else:
        raise InputError(f"which preset? Choose one of {', '.join(PRESETS)}, or a YAML file")
    return name, _parse(TrainConfig, rest, f"train {first}".strip(), default)


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


def _from_run(out_dir: Path) -> TrainConfig:
    path = out_dir / CONFIG
    if not path.exists():
        raise InputError(f"{out_dir} holds no run to resume (no {CONFIG})")
    return override(TrainConfig(), json.loads(path.read_text()), source=str(path))


# -- sample --------------------------------------------------------------------------------------------------


@dataclass
class SampleArgs:
    """Write text with a trained model."""

    run: Positional[str]
    """A run, a checkpoint, a Hugging Face GPT-2 folder, or gpt2, gpt2-medium, gpt2-large, gpt2-xl."""
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
    """The same seed writes the same text."""
    device: str = "auto"
    """auto, cuda, mps or cpu."""
    cache: bool = True
    """Keep keys and values of earlier tokens; without, each token costs a whole forward pass."""


def sample_command(args: Sequence[str]) -> None:
    given = _parse(SampleArgs, args, "sample")
    if given.num_samples < 1 or given.max_new_tokens < 1:
        raise InputError("num_samples and max_new_tokens must be at least 1")
    prompt = _prompt(given)
    import torch

    from fastgpt.generate import encode_prompt, generate, stream_text
    from fastgpt.pretrained import model_from, read_pretrained
    from fastgpt.runtime import resolve_device

    device = resolve_device(given.device)
    source = read_pretrained(given.run)
    model = model_from(source).to(device)
    idx = encode_prompt(source.tokenizer, prompt)[None].to(device)  # (1, T)
    if idx.size(1) > model.config.block_size:
        print(
            f"note: the prompt has {idx.size(1)} tokens; the model sees the last {model.config.block_size}",
            file=sys.stderr,
        )
    generator = torch.Generator(device).manual_seed(given.seed)
    for number in range(given.num_samples):
        if given.num_samples > 1:
            print(f"--- sample {number + 1} of {given.num_samples} ---")
        tokens = generate(
            model,
            idx,
            given.max_new_tokens,
            temperature=given.temperature,
            top_k=given.top_k,
            top_p=given.top_p,
            generator=generator,
            use_cache=given.cache,
        )
        print(prompt, end="", flush=True)
        for text in stream_text(source.tokenizer, tokens):
            print(text, end="", flush=True)
        print()


def _prompt(given: SampleArgs) -> str:
    if given.prompt_file is None:
        return given.prompt
    if given.prompt:
        raise InputError("--prompt and --prompt-file exclude each other: give one")
    try:
        return given.prompt_file.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{given.prompt_file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{given.prompt_file} is not UTF-8 text: byte {error.start} cannot be decoded"
        ) from None


# -- eval ----------------------------------------------------------------------------------------------------


@dataclass
class EvalArgs:
    """The mean loss of a model over the whole validation split of a corpus."""

    run: Positional[str]
    """A run or a checkpoint in it."""
    corpus: str | None = None
    """By default the corpus that the run was trained on."""
    batch_size: int = 16
    """Windows per forward pass."""
    device: str = "auto"
    """auto, cuda, mps or cpu."""


def eval_command(args: Sequence[str]) -> None:
    given = _parse(EvalArgs, args, "eval")
    import math

    from fastgpt.data import TokenDataset, ValidationSet, prepared
    from fastgpt.evaluate import validation_loss
    from fastgpt.pretrained import model_from, read_pretrained
    from fastgpt.runtime import resolve_device

    device = resolve_device(given.device)
    source = read_pretrained(given.run)
    model = model_from(source).to(device)
    corpus, val_fraction = given.corpus, TrainConfig.val_fraction
    if corpus is None:
        run = Path(given.run) if (Path(given.run) / "checkpoints").exists() else source.path.parent.parent
        trained = _from_run(run)
        corpus, val_fraction = trained.corpus, trained.val_fraction
    data = TokenDataset.open(prepared(corpus, source.tokenizer, val_fraction=val_fraction))
    block_size, vocab_size = model.config.block_size, model.config.vocab_size
    windows = ValidationSet(data.val, block_size, vocab_size=vocab_size, names=data.names["val"])
    loss = validation_loss(model, windows, batch_size=given.batch_size, device=device)
    print(
        f"{source.path}: loss {loss:.4f} nats a token, perplexity {math.exp(loss):.2f}, "
        f"over {len(windows)} windows of {block_size} tokens of {corpus}"
    )


# -- the command itself --------------------------------------------------------------------------------------

COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "prepare": prepare_command,
    "train": train_command,
    "sample": sample_command,
    "eval": eval_command,
    "inspect": inspect_command,
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
