"""`fastgpt eval`: one model, one task, one line of results. Under torchrun the ranks share the task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from fastgpt.config import TrainConfig
from fastgpt.errors import InputError

if TYPE_CHECKING:
    from fastgpt.distributed import World
    from fastgpt.model import GPT
    from fastgpt.pretrained import Source
    from fastgpt.tasks import HellaSwag, Lambada, Text


@dataclass
class EvalArgs:
    """Evaluate a model: by default its mean loss over the whole validation split of a corpus."""

    run: Positional[str]
    """A run, a checkpoint, or anything else that `fastgpt sample` reads."""
    task: Literal["val", "hellaswag", "lambada", "text"] = "val"
    """`val`: the validation split; `text`: a sliding window over any text; two benchmarks."""
    corpus: str | None = None
    """For val: by default the corpus that the run was trained on."""
    data: Path | None = None
    """For text: the file. For hellaswag and lambada: a jsonl file; by default the hub's."""
    stride: int | None = None
    """For text: how far the window moves; by default half of block_size."""
    limit: int | None = None
    """For hellaswag and lambada: only the first examples."""
    batch_size: int = 16
    """Windows, or continuations, per forward pass."""
    device: str = "auto"
    """auto, cuda, mps or cpu."""


def command(args: Sequence[str]) -> None:
    from fastgpt.cli import parse

    given = parse(EvalArgs, args, "eval")
    _check(given)
    from fastgpt.distributed import joined
    from fastgpt.pretrained import model_from, read_pretrained

    with joined(given.device, TrainConfig.timeout_minutes) as world:
        with world.one_first():
            source = read_pretrained(given.run)
        model = model_from(source).to(world.device)
        evaluate = {"val": _val, "text": _text}.get(given.task, _benchmark)
        world.say(f"{source.path}: {evaluate(given, source, model, world)}")


def _check(given: EvalArgs) -> None:
    """Options that the task would ignore, and numbers out of range."""
    of_tasks = {
        "corpus": ("val",),
        "data": ("hellaswag", "lambada", "text"),
        "stride": ("text",),
        "limit": ("hellaswag", "lambada"),
    }
    for name, tasks in of_tasks.items():
        if getattr(given, name) is not None and given.task not in tasks:
            raise InputError(f"--{name} is for --task {' or '.join(tasks)}, not {given.task}")
    if given.task == "text" and given.data is None:
        raise InputError("--task text needs --data FILE, the text")
    for name in ("limit", "batch_size"):
        value = getattr(given, name)
        if value is not None and value < 1:
            raise InputError(f"{name} = {value}: it must be at least 1")


def _val(given: EvalArgs, source: Source, model: GPT, world: World) -> str:
    from fastgpt.checkpoint import Checkpoint
    from fastgpt.cli import settings_of_run
    from fastgpt.data import ProblemSet, open_dataset
    from fastgpt.evaluate import validation_loss
    from fastgpt.exam import Exam, describe
    from fastgpt.pretrained import tokenizer_of

    corpus, val_fraction = given.corpus, TrainConfig.val_fraction
    if corpus is None:
        if not isinstance(source, Checkpoint):
            raise InputError(f"{source.path} is no run of fastgpt's: name the text with --corpus")
        run = Path(given.run) if (Path(given.run) / "checkpoints").exists() else source.path.parent.parent
        trained = settings_of_run(run)
        corpus, val_fraction = trained.corpus, trained.val_fraction
    with world.one_first():
        data = open_dataset(corpus, tokenizer_of(source), val_fraction=val_fraction)
    samples = data.validation(model.config.block_size)
    loss = validation_loss(
        model,
        samples.share(world.rank, world.size),
        batch_size=given.batch_size,
        device=world.device,
        mean=world.mean,
    )
    found = f"loss {loss:.4f} nats a token, perplexity {math.exp(loss):.2f}, over {len(samples)} "
    if not isinstance(data, ProblemSet):
        return found + f"windows of {model.config.block_size} tokens of {corpus}"
    exam = Exam.of(data).share(world.rank, world.size)
    scores = exam.evaluate(model, progress=corpus if world.main else None, total=world.sum)
    return f"{describe(scores)}, {found}held-out problems of {corpus}"


def _benchmark(given: EvalArgs, source: Source, model: GPT, world: World) -> str:
    from fastgpt.pretrained import tokenizer_of
    from fastgpt.tasks import HellaSwag, Lambada

    benchmark = HellaSwag if given.task == "hellaswag" else Lambada
    with world.one_first():
        task = benchmark.open(given.data, tokenizer_of(source), given.limit)
    scores = _scores(given, task, model, world, benchmark.NAME)
    count = f"{len(task.queries)} {benchmark.UNIT} of {given.data or benchmark.HUB[0]}"
    return f"{benchmark.NAME} {_line(scores)}, over {count}"


def _text(given: EvalArgs, source: Source, model: GPT, world: World) -> str:
    from fastgpt.pretrained import tokenizer_of
    from fastgpt.tasks import Text

    assert given.data is not None  # checked above
    task = Text.open(given.data, tokenizer_of(source), model.config.block_size, given.stride)
    result = _scores(given, task, model, world, "text")
    return (
        f"loss {result['loss']:.4f} nats a token, perplexity {result['perplexity']:.2f}, "
        f"{result['bits_per_byte']:.4f} bits a byte, over {result['tokens']:,} tokens of {given.data}"
    )


def _scores(
    given: EvalArgs, task: HellaSwag | Lambada | Text, model: GPT, world: World, name: str
) -> dict[str, float]:
    """Of the whole task, which the ranks share."""
    return task.share(world.rank, world.size).evaluate(
        model, batch_size=given.batch_size, progress=name if world.main else None, total=world.sum
    )


def _line(scores: dict[str, float]) -> str:
    digits = {"perplexity": 2}
    return ", ".join(f"{name} {value:.{digits.get(name, 4)}f}" for name, value in scores.items())
