"""`fastgpt bench generate`: tokens a second of prefill and of decode, with and without a KV cache.

Before anything is timed, each contender is led along the same text, and at every place its greedy token must
be the one of a float64 model, or tie with it: see `Oracle`.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt import ops
from fastgpt.benchmarks.environment import clocks_during, now
from fastgpt.benchmarks.results import RESULTS, Row, Status, append
from fastgpt.benchmarks.runs import Run, aligned, number
from fastgpt.benchmarks.steps import initial_model, missing
from fastgpt.benchmarks.timing import Timing, failure, measure, release_memory, working
from fastgpt.benchmarks.train import network
from fastgpt.config import GPTConfig, preset
from fastgpt.errors import InputError
from fastgpt.evaluate import evaluating
from fastgpt.generate import captured_decode, choose
from fastgpt.graphs import WARM_UP, CapturedStep, can_capture
from fastgpt.model import GPT, KVCache, StaticCache
from fastgpt.ops.choices import shape_class
from fastgpt.runtime import resolve_device

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CACHE, GRAPH, NO_CACHE = "", "-graph", "-without-cache"
IMPLEMENTATIONS = ("eager", "native", "triton")


@dataclass(frozen=True)
class Defaults:
    preset: str
    dtype: str
    batches: tuple[int, ...]
    implementations: tuple[str, ...]


DEFAULTS = {
    "cpu": Defaults("char-cpu", "float32", (1, 8), ("eager", "native")),
    "cuda": Defaults("gpt2", "bfloat16", (1, 8, 32), ("eager", "native", "triton")),
}


@dataclass
class GenerateArgs:
    """Time greedy text generation: prefill and decode, with and without a KV cache."""

    preset: str | None = None
    """By default char-cpu, on a GPU gpt2."""
    batches: tuple[int, ...] = ()
    """Sequences at a time."""
    prompt: int | None = None
    """Tokens of the prompt; by default half the context."""
    new_tokens: int | None = None
    """Tokens to add, the first of which is prefill's; by default a quarter of the context."""
    implementations: tuple[str, ...] = ()
    """eager, native, triton; each with a cache and without, and on a GPU those that have a kernel for a cache
    of fixed shape also as a CUDA graph."""
    dtype: str | None = None
    """Of the weights: float32 or bfloat16; by default float32, on a GPU bfloat16."""
    device: str = "auto"
    """auto, cuda, cuda:N or cpu."""
    threads: int | None = None
    """Of a CPU; by default one for each core."""
    budget: float = 60.0
    """Seconds of rounds in all, shared evenly; each batch size and direction has 7 rounds at least."""
    out: Path = RESULTS
    """Results go to OUT/MACHINE/RUN.csv."""
    run: str | None = None
    """A name for this run; by default the time."""
    resume: bool = False
    """Go on with that run, or without --run with this machine's newest: skip the batch sizes it has."""


class Writer:
    """A contender: a model that continues prompts by one implementation.

    Args:
        model: used as it is, in evaluation mode.
        implementation: of the operations.
        kind: CACHE; GRAPH, decoding with a cache as a CUDA graph; or NO_CACHE, which computes the whole text
            for each token.
        prompt: (B, P) token ids.
        new_tokens: how many follow; P + new_tokens is at most the context.
    """

    def __init__(self, model: GPT, implementation: str, kind: str, prompt: Tensor, new_tokens: int) -> None:
        self.model, self.implementation, self.name = model, implementation, implementation + kind
        self.prompt, self.new_tokens = prompt, new_tokens
        self.cache: KVCache | None = None
        self.static: StaticCache | None = None
        if kind != NO_CACHE:
            device, dtype = prompt.device, model.token_embedding.dtype
            self.cache = KVCache(model.config, len(prompt), device=device, dtype=dtype)
            if kind == GRAPH:
                self.static = StaticCache(self.cache)
                self.step: CapturedStep = captured_decode(model, self.static)

    def prefill(self) -> Tensor:
        """The token after the prompt, (B,)."""
        if self.cache is not None:
            self.cache.length = 0
        return self._next(self.prompt)

    def decode(self, first: Tensor) -> Tensor:
        """The tokens after `first`, which follows the prompt: (B, new_tokens - 1)."""
        self._rewind()
        text = torch.cat([self.prompt, first[:, None]], dim=1)
        for _ in range(self.new_tokens - 1):
            text = torch.cat([text, self._next(text)[:, None]], dim=1)
        return text[:, self.prompt.size(1) + 1 :]

    def follow(self, text: Tensor) -> Tensor:
        """What it would say in place of each of the last `new_tokens` of a text that begins with the prompt:
        (B, new_tokens)."""
        start = self.prompt.size(1)
        said = [self.prefill()]
        self._rewind()
        said += [self._next(text[:, :end]) for end in range(start + 1, text.size(1))]
        return torch.stack(said, dim=1)

    def _rewind(self) -> None:
        """To the end of the prompt, whose keys and values the cache has from `prefill`."""
        if self.cache is not None:
            self.cache.length = self.prompt.size(1)
        if self.static is not None:
            self.static.seek(self.prompt.size(1))

    def _next(self, text: Tensor) -> Tensor:
        with ops.use(self.implementation), evaluating(self.model):
            if self.static is not None and text.size(1) > self.prompt.size(1):
                return choose(self.step(text[:, -1]), temperature=0)
            if self.cache is None:
                x = self.model.hidden(text)
            else:
                x = self.model.hidden(text[:, self.cache.length :], self.cache)
            return choose(self.model.logits(x[:, -1]), temperature=0)


def kinds(implementation: str, device: torch.device) -> list[str]:
    """The contenders of an implementation there. A graph with another's attention would not be its own."""
    rows = {row.name for row in ops.table() if row.operation == "decode_attention"}
    graph = can_capture(device) and implementation in rows
    return [CACHE, *([GRAPH] if graph else []), NO_CACHE]


class Oracle:
    """The logits of a float64 eager model along a text, and by how much eager ones in a dtype differ.

    An implementation may be off by twice what PyTorch in the same dtype is off by at most, `error`: that is
    the bound of every kernel here. Two logits less than 4 error apart may then change places; so a token is
    right if its float64 logit is within 4 error of the largest.

    Args:
        model: in its dtype; a copy is made in float64.
        text: (B, P + N); it judges what follows the first P tokens.
        prompt: P.
    """

    def __init__(self, model: GPT, text: Tensor, prompt: int) -> None:
        exact = copy.deepcopy(model).double()
        logits, self.error = [], 0.0
        with ops.use("eager"), evaluating(model), evaluating(exact):
            for row in text.split(1):  # (1, P + N): logits of all would be gigabytes
                wanted, theirs = (m.logits(m.hidden(row[:, :-1])[:, prompt - 1 :]) for m in (exact, model))
                self.error = max(self.error, float((theirs.double() - wanted).abs().max()))
                logits.append(wanted)
        self.logits = torch.cat(logits)  # (B, N, V)

    def verdict(self, said: Tensor) -> str | None:
        """What is wrong with greedy tokens (B, N), or None."""
        best, token = self.logits.max(-1)
        gap = best - self.logits.gather(-1, said[..., None])[..., 0]  # (B, N)
        wrong = (gap > 4 * self.error).nonzero()
        if not len(wrong):
            return None
        b, n = wrong[0].tolist()
        return (
            f"{len(wrong)} of {said.numel()} greedy tokens are wrong, first in sequence {b} at place {n}: "
            f"{said[b, n].item()} instead of {token[b, n].item()}, whose logit is {gap[b, n].item():.3g} "
            f"larger, where {4 * self.error:.3g} is a tie"
        )


def command(args: Sequence[str]) -> None:
    from fastgpt.cli import parse

    run_generate(parse(GenerateArgs, args, "bench generate"))


def run_generate(given: GenerateArgs) -> Path:
    """Run the suite; returns the file of results.

    Raises:
        InputError: an option names what does not exist, or is out of range.
    """
    device = resolve_device(given.device)
    if device.type not in DEFAULTS:
        raise InputError(f"device {given.device!r}: generation is timed on cuda and cpu")
    defaults = DEFAULTS[device.type]
    name, dtype = given.preset or defaults.preset, given.dtype or defaults.dtype
    if dtype not in DTYPES:
        raise InputError(f"dtype = {dtype!r}: choose from {', '.join(DTYPES)}")
    implementations = given.implementations or defaults.implementations
    for implementation in implementations:
        if implementation not in IMPLEMENTATIONS:
            raise InputError(
                f"implementations has {implementation!r}: choose from {', '.join(IMPLEMENTATIONS)}"
            )
    config = network(preset(name), None)
    context = config.block_size
    prompt = context // 2 if given.prompt is None else given.prompt
    new_tokens = context // 4 if given.new_tokens is None else given.new_tokens
    if prompt < 1 or new_tokens < 2 or prompt + new_tokens > context:
        raise InputError(
            f"prompt = {prompt} and new_tokens = {new_tokens}: they must be at least 1 and 2, and at most "
            f"{context} together, the context of {name}"
        )
    with working(device, given.threads):
        run = Run.open("generate", given, device)
        print(f"{run.where['device_name']}, run {run.name}: {name} {dtype} -> {run.path}", flush=True)
        model = talkative(config).to(device, DTYPES[dtype])
        batches = given.batches or defaults.batches
        for batch in batches:
            generator = torch.Generator().manual_seed(batch)
            text = torch.randint(config.vocab_size, (batch, prompt + new_tokens), generator=generator)
            race = _Race(name, dtype, model, text.to(device), prompt, implementations)
            if (name, race.shape) in run.done:
                continue
            rows = race.rows(given.budget / (2 * len(batches)), run)
            append(rows, run.path)
            print(f"\n{name} {race.shape}\n{table(rows)}", flush=True)
    return run.path


def talkative(config: GPTConfig) -> GPT:
    """A model whose greedy text depends on all that it has read: fresh weights repeat the last token."""
    model = initial_model(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=config.n_embd**-0.5)
    return model


class _Race:
    """All contenders on one text."""

    def __init__(
        self, preset: str, dtype: str, model: GPT, text: Tensor, prompt: int, implementations: Sequence[str]
    ) -> None:
        self.preset, self.dtype, self.model, self.text, self.prompt = preset, dtype, model, text, prompt
        self.new_tokens = text.size(1) - prompt
        self.shape = f"B={len(text)} P={prompt} N={self.new_tokens}"
        self.writers = [
            Writer(model, name, kind, text[:, :prompt], self.new_tokens)
            for name in implementations
            for kind in kinds(name, text.device)
        ]
        # Tokens that a call makes or reads, which is what a rate counts.
        self.tokens = {"prefill": len(text) * prompt, "decode": len(text) * (self.new_tokens - 1)}

    def rows(self, seconds: float, run: Run) -> list[Row]:
        """Two for each contender."""
        device = self.text.device
        oracle = Oracle(self.model, self.text, self.prompt)
        refused: dict[str, tuple[Status, str]] = {}
        for writer in self.writers:
            if found := self._refusal(writer, oracle):
                refused[writer.name] = found
        able = [writer for writer in self.writers if writer.name not in refused]
        first = oracle.logits[:, 0].argmax(-1)
        timings: dict[str, dict[str, Timing]] = {"prefill": {}, "decode": {}}
        clocks_text = {}
        for direction, timing in timings.items():
            calls: dict[str, Callable[[], Tensor]] = {
                w.name: w.prefill if direction == "prefill" else functools.partial(w.decode, first)
                for w in able
            }
            with clocks_during(device) as clocks:
                timing.update(measure(calls, device=device, budget_s=seconds) if calls else {})
            clocks_text[direction] = clocks.text
        return [
            self._row(writer.name, direction, timing.get(writer.name), refused, run, clocks_text[direction])
            for direction, timing in timings.items()
            for writer in self.writers
        ]

    def _refusal(self, writer: Writer, oracle: Oracle) -> tuple[Status, str] | None:
        """Why a contender is not timed: its status and a note."""
        if reason := missing(writer.implementation, self.text.device):
            return "missing", reason
        try:
            # Of a graph until replays have spoken, however few tokens there are.
            said = [writer.follow(self.text) for _ in range(1 if writer.static is None else 1 + WARM_UP)]
            wrong = next(filter(None, map(oracle.verdict, said)), None)
        except Exception as error:
            release_memory()
            return failure(error)
        return ("wrong", wrong) if wrong else None

    def _row(
        self,
        name: str,
        direction: str,
        timing: Timing | None,
        refused: dict[str, tuple[Status, str]],
        run: Run,
        clocks: str,
    ) -> Row:
        if timing is None:
            status, note = refused[name]
            found: dict[str, Any] = {"status": status, "note": note}
        else:
            found = timing.fields()
        if median := found.get("median_us"):
            found["tokens_per_s"] = self.tokens[direction] / median * 1e6
        return Row(
            suite="generate",
            operation=self.preset,
            direction=direction,
            contender=name,
            dtype=self.dtype,
            shape=self.shape,
            shape_class=shape_class(len(self.text) * self.model.config.n_embd),
            kind="measured",
            **found,
            **{**run.where, "time": now()},
            clocks=clocks,
        )


def table(rows: Sequence[Row]) -> str:
    """Prefill and decode, a line for each contender."""
    lines = [["contender", "", "ms", "tokens/s", "ratio", "p20", "p80"]]
    for row in rows:
        cells = [row.contender, row.direction]
        if row.median_us is None:
            lines.append([*cells, row.status])
            continue
        cells += [f"{row.median_us / 1e3:.4g}", number(row.tokens_per_s, ",.0f")]
        lines.append([*cells, *(number(ratio, ".2f") for ratio in (row.ratio, row.ratio_p20, row.ratio_p80))])
    notes = {f"{row.contender}: {row.status}, {row.note}": None for row in rows if row.status != "ok"}
    if baseline := next((row.baseline for row in rows if row.baseline), None):
        notes = {f"ratio: the time of {baseline} over the contender's, in the same round": None, **notes}
    return "\n".join([aligned(lines), *notes])
