"""`fastgpt ladder`: the rungs of the lecture "Let's build GPT", trained here, beside the lecture's losses."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from fastgpt import ladder
from fastgpt.benchmarks.timing import measure, working
from fastgpt.config import TrainConfig
from fastgpt.data import TokenDataset, Tokenizer
from fastgpt.errors import InputError
from fastgpt.files import atomic_write
from fastgpt.ladder import RUNGS, Settings, Splits
from fastgpt.runtime import device_name, environment, resolve_device
from fastgpt.train import open_data

EXCERPT = 32  # characters of a sample in the table
BUDGET_S = 1.0  # seconds to time one comparison, 7 rounds at least


@dataclass
class LadderArgs:
    """The lecture "Let's build GPT" as running code. Without options: the list of its rungs."""

    rung: tuple[str, ...] = ()
    """Climb these rungs, by name."""
    all: bool = False
    """Climb all of them."""
    corpus: str = "shakespeare"
    """`shakespeare`, `pydocs`, a text file, or a folder of text files."""
    fallback_corpus: str | None = None
    """Used instead, with a notice, when the corpus cannot be downloaded."""
    size: Literal["auto", "lecture", "reduced"] = "auto"
    """Of the rung `scaled`: the lecture's network, for a GPU, or a smaller one; auto looks at the device."""
    steps: int | None = None
    """Training steps of every rung, for a quick look; by default each has its own."""
    eval_batches: int = 200
    """A loss is the mean over this many random batches of its split."""
    sample_tokens: int = 300
    """Characters that each trained rung writes."""
    seed: int = 1337
    """Of weights, batches and samples: a rung alone gives what it gives with --all."""
    device: str = "auto"
    """auto, cuda, mps or cpu."""
    out: Path | None = None
    """The folder for ladder.md and ladder.json; by default runs/ladder-TIME."""


@dataclass(frozen=True)
class Trained:
    """What training a rung gave; `seconds` of training by the clock, `cpu_seconds` those of all threads."""

    name: str
    settings: Settings
    parameters: int
    train_loss: float
    val_loss: float
    lecture: float | None
    seconds: float
    cpu_seconds: float
    sample: str


@dataclass(frozen=True)
class Way:
    """One of several ways to compute the same. `apart` is the largest difference from the first in float64,
    `ms` the median time in fp32, `ratio` the median of the first one's time over this one's."""

    size: str
    name: str
    apart: float
    ms: float | None
    ratio: float | None


@dataclass(frozen=True)
class Compared:
    """What a rung without training gave."""

    name: str
    ways: list[Way]


Result = Trained | Compared


def command(args: Sequence[str]) -> None:
    from fastgpt.cli import parse

    given = parse(LadderArgs, args, "ladder")
    names = _chosen(given)
    if names:
        climb(given, names)
    else:
        print(listing())


def _chosen(given: LadderArgs) -> list[str]:
    """The rungs to climb, in the lecture's order.

    Raises:
        InputError: an option is out of range, or names no rung.
    """
    for option, least in (("steps", 1), ("eval_batches", 1), ("sample_tokens", 1), ("seed", 0)):
        value = getattr(given, option)
        if value is not None and value < least:
            raise InputError(f"{option} = {value}: it must be at least {least}")
    for name in given.rung:
        if name not in RUNGS:
            close = difflib.get_close_matches(name, RUNGS, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise InputError(f"no rung {name!r}: {hint}The rungs are {', '.join(RUNGS)}")
    if given.all and given.rung:
        raise InputError("--all and --rung exclude each other: give one")
    return [name for name in RUNGS if given.all or name in given.rung]


def listing() -> str:
    """The rungs, each with what it adds and the lecture's loss."""
    rows = [["rung", "the lecture's loss", "what it adds"]]
    rows += [[name, _number(rung.lecture, "g"), rung.adds] for name, rung in RUNGS.items()]
    code = ladder.__file__
    return f"{table(rows)}\n\nClimb one with --rung NAME, or all with --all; the code to read is {code}"


def climb(given: LadderArgs, names: Sequence[str]) -> list[Result]:
    """Run these rungs, print what each gives, and write all of it after each.

    Raises:
        InputError: the corpus is no text, or too short; there is no such device.
    """
    device = resolve_device(given.device)
    settings = {name: settings_of(name, given, device) for name in names}
    trained = [name for name in names if RUNGS[name].model is not None]
    if trained:  # comparing needs no text
        config = TrainConfig(corpus=given.corpus, fallback_corpus=given.fallback_corpus, tokenizer="char")
        data, config = open_data(config, None)
        if not isinstance(data, TokenDataset):
            raise InputError(f"corpus {given.corpus!r} is no text: the ladder learns to write from one")
        given = dataclasses.replace(given, corpus=config.corpus)
        splits = ladder.splits(data, max(settings[name].block_size for name in trained))
    out = given.out or Path("runs") / f"ladder-{time.strftime('%Y%m%d-%H%M%S')}"
    out.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    for name in names:
        print(f"{name}: {RUNGS[name].adds}", flush=True)
        torch.manual_seed(given.seed)
        if name in trained:
            results.append(climb_one(name, settings[name], splits, data.tokenizer, given, device))
        else:
            results.append(COMPARISONS[name](settings[name], device))
        print(f"{describe(results[-1])}\n", flush=True)
        write(out, results, given, device)
    print(f"{summary(results)}\n\nwritten: {out / 'ladder.md'}, {out / 'ladder.json'}")
    return results


def settings_of(name: str, given: LadderArgs, device: torch.device) -> Settings:
    """A rung's settings here: those of `scaled` (and of the heads compared at its size) follow --size."""
    settings = RUNGS[name].settings
    large = given.size == "lecture" or (given.size == "auto" and device.type == "cuda")
    if settings == ladder.LECTURE and not large:
        settings = ladder.REDUCED
    return settings if given.steps is None else dataclasses.replace(settings, steps=given.steps)


def climb_one(
    name: str,
    settings: Settings,
    splits: Splits,
    tokenizer: Tokenizer,
    given: LadderArgs,
    device: torch.device,
) -> Trained:
    """Train one rung, and let it write."""
    make = RUNGS[name].model
    assert make is not None  # what is only compared does not come here
    model = make(tokenizer.vocab_size, settings).to(device)
    clock, cpu = time.perf_counter(), time.process_time()
    ladder.train(model, splits["train"], settings, device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
    train_loss, val_loss = (
        ladder.estimate_loss(model, splits[split], settings, device, given.eval_batches)
        for split in ("train", "val")
    )
    start = torch.zeros(1, 1, dtype=torch.int64, device=device)  # as in the lecture: there, a newline
    written = model.generate(start, given.sample_tokens)[0, 1:]
    return Trained(
        name=name,
        settings=settings,
        parameters=sum(p.numel() for p in model.parameters()),
        train_loss=train_loss,
        val_loss=val_loss,
        lecture=RUNGS[name].lecture,
        seconds=clock,
        cpu_seconds=cpu,
        sample=tokenizer.decode(written.tolist()),
    )


# -- ways of computing the same ------------------------------------------------------------------------------

Steps = dict[str, Callable[[], object]]


def compare_averages(settings: Settings, device: torch.device) -> Compared:
    """The three ways to average the past: equal, and how fast.

    Raises:
        AssertionError: they are not equal.
    """
    ways = {
        "loops": ladder.average_by_loops,
        "matrix product": ladder.average_by_matrix_product,
        "softmax": ladder.average_by_softmax,
    }
    x = torch.randn(settings.batch_size, settings.block_size, settings.n_embd, dtype=torch.float64)
    apart = [_apart([way(x)], [ways["loops"](x)]) for way in ways.values()]
    device = _timed_on(device)
    x = x.float().to(device)
    steps: Steps = {name: functools.partial(way, x) for name, way in ways.items()}
    return Compared("averaging", _timed(steps, apart, _shape(x), device))


def compare_heads(scaled: Settings, device: torch.device) -> Compared:
    """Separate heads and all heads as one tensor: equal outputs and gradients, and how fast.

    Raises:
        AssertionError: they are not equal.
    """
    device = _timed_on(device)
    ways: list[Way] = []
    for settings in (Settings(), scaled):
        separate, batched = heads_of_both_kinds(settings)
        x, dy = torch.randn(2, settings.batch_size, settings.block_size, settings.n_embd, dtype=torch.float64)
        apart = _apart(outputs_and_gradients(batched, x, dy), outputs_and_gradients(separate, x, dy))
        x, dy = x.float().to(device), dy.float().to(device)
        steps: Steps = {
            "separate heads": functools.partial(_step, separate.float().to(device), x, dy),
            "one tensor": functools.partial(_step, batched.float().to(device), x, dy),
        }
        size = f"{settings.n_head} heads, {_shape(x)}, forward and backward"
        ways += _timed(steps, [0.0, apart], size, device)
    return Compared("batched-heads", ways)


def heads_of_both_kinds(settings: Settings) -> tuple[ladder.ProjectedHeads, ladder.BatchedHeads]:
    """Attention by separate heads and as one tensor: the same weights, float64, without dropout."""
    separate, batched = ladder.ProjectedHeads(settings), ladder.BatchedHeads(settings)
    batched.copy_from(separate)
    return separate.double().eval(), batched.double().eval()


def outputs_and_gradients(
    heads: ladder.ProjectedHeads | ladder.BatchedHeads, x: Tensor, dy: Tensor
) -> list[Tensor]:
    """y, dx (B, T, C), and the gradients of proj's weight and bias and of qkv's weight (3C, C)."""
    qkv = [heads.qkv.weight] if isinstance(heads, ladder.BatchedHeads) else ladder.qkv_weights(heads)
    x = x.requires_grad_()
    y = heads(x)
    dx, dweight, dbias, *dqkv = torch.autograd.grad(y, [x, heads.proj.weight, heads.proj.bias, *qkv], dy)
    return [y, dx, dweight, dbias, torch.cat(dqkv)]


def _step(heads: nn.Module, x: Tensor, dy: Tensor) -> None:
    """Forward and backward, as in a step of training."""
    x.requires_grad_()
    torch.autograd.grad(heads(x), [x, *heads.parameters()], dy)


def _apart(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The largest difference of float64 tensors that are to be the same but for the order of their sums."""
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


def _shape(x: Tensor) -> str:
    return f"(B, T, C) = {tuple(x.shape)}"


def _timed_on(device: torch.device) -> torch.device:
    """Where times are taken: on a CPU or with CUDA."""
    return device if device.type == "cuda" else torch.device("cpu")


def _timed(steps: Steps, apart: Sequence[float], size: str, device: torch.device) -> list[Way]:
    """Time the ways against each other, in interleaved rounds; the first one is the baseline."""
    with working(device, torch.get_num_threads()):
        found = measure(steps, device=device, budget_s=BUDGET_S, memory=False, control=False)
    ways = []
    for (name, timing), difference in zip(found.items(), apart, strict=True):
        fields = timing.fields()  # None where it could not run
        ms = None if fields["median_us"] is None else fields["median_us"] / 1e3
        ways.append(Way(size, name, difference, ms, fields["ratio"]))
    return ways


COMPARISONS = {"averaging": compare_averages, "batched-heads": compare_heads}


# -- what is printed and written -----------------------------------------------------------------------------


def describe(result: Result) -> str:
    """One rung's result, in full."""
    if isinstance(result, Compared):
        rows = [["computed", "by", "apart in float64", "ms", "times as fast"]]
        for way in result.ways:
            numbers = [f"{way.apart:.0e}", _number(way.ms, ".3g"), _number(way.ratio, ".3g")]
            rows.append([way.size, way.name, *numbers])
        return table(rows)
    lecture = f" (the lecture: {_lecture(result)})" if result.lecture else ""
    return (
        f"train loss {result.train_loss:.4f}, validation loss {result.val_loss:.4f}{lecture}, "
        f"{result.parameters:,} parameters, {result.seconds:.1f} s\n\n{result.sample.strip()}"
    )


def summary(results: Sequence[Result]) -> str:
    """A line for each rung."""
    rows = [
        ["rung", "parameters", "train loss", "validation loss", "the lecture's", "s", "CPU s", "sample"],
    ]
    for result in results:
        if isinstance(result, Compared):
            rows.append([result.name, *[""] * 6, "equal"])
            continue
        losses = [f"{loss:.3f}" for loss in (result.train_loss, result.val_loss)]
        seconds = [f"{value:.0f}" for value in (result.seconds, result.cpu_seconds)]
        excerpt = " ".join(result.sample.split())[:EXCERPT]
        rows.append([result.name, f"{result.parameters:,}", *losses, _lecture(result), *seconds, excerpt])
    return table(rows)


def _lecture(result: Trained) -> str:
    """The lecture's loss; what a larger network reached says so."""
    larger = RUNGS[result.name].settings.n_embd > result.settings.n_embd
    return _number(result.lecture, "g") + (", larger" if larger else "")


def table(rows: Sequence[Sequence[str]]) -> str:
    """Markdown, padded so that it reads as text too; the first row is the title."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    title, *rest = [f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows]
    return "\n".join([title, f"|{'|'.join('-' * (width + 2) for width in widths)}|", *rest])


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def write(out: Path, results: Sequence[Result], given: LadderArgs, device: torch.device) -> None:
    """Write ladder.json and ladder.md: everything that is printed, and on what it was measured."""
    where = environment(device)
    corpus = given.corpus if any(isinstance(result, Trained) for result in results) else None
    record = {
        "kind": "measured",
        "environment": where,
        "corpus": corpus,
        "seed": given.seed,
        "eval_batches": given.eval_batches,
        "rungs": [dataclasses.asdict(result) for result in results],
    }
    with atomic_write(out / "ladder.json") as path:
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    on = f"{device_name(device)}, torch {where['torch']}, threads: {where['threads']}"
    text = f", {Path(corpus).name}" if corpus else ""
    parts = ["# The ladder", f"Measured on {on}{text}, seed {given.seed}.", summary(results)]
    for result in results:
        parts.append(f"## {result.name}\n\n{RUNGS[result.name].adds}.")
        if isinstance(result, Compared):
            parts.append(describe(result))
        else:
            parts += [_settings(result.settings), f"````text\n{result.sample.strip()}\n````"]
    with atomic_write(out / "ladder.md") as path:
        path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _settings(settings: Settings) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in dataclasses.asdict(settings).items()) + "."
