"""`fastgpt bench train`: whole training steps of GPT-2 against PyTorch's own ways to take them.

Every contender starts from the same weights and sees the same random tokens. First its losses over some
steps must be those of fp32 eager steps; then all are timed in interleaved rounds. Rows go to the run's CSV,
losses and the time of a step by operation beside it, into RUN-train.jsonl.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fastgpt.benchmarks.attribution import GROUPS, attribute
from fastgpt.benchmarks.contest import Case, Entry, Reference, contest, largest_difference, row_of
from fastgpt.benchmarks.environment import clocks_during
from fastgpt.benchmarks.results import RESULTS, Row, append
from fastgpt.benchmarks.runs import Run, aligned, cold_compiler, number
from fastgpt.benchmarks.steps import Precision, Recipe, initial_model, random_batches
from fastgpt.benchmarks.timing import working
from fastgpt.config import GPTConfig, TrainConfig, preset
from fastgpt.errors import InputError
from fastgpt.metrics import format_mfu
from fastgpt.model import GPT
from fastgpt.runtime import Precision as Peak
from fastgpt.runtime import resolve_device

NANOGPT_VOCAB = 50304  # nanoGPT pads GPT-2's vocabulary to this, and masks nothing
CHARACTERS = 65  # of tiny Shakespeare
PEERS = ("eager", "compile", "max-autotune")


def _peer(how: str, precision: Precision) -> Recipe:
    """nanoGPT's step, or that of its network through torch.compile."""
    mode = {"eager": None, "compile": "default", "max-autotune": "max-autotune"}[how]
    return Recipe(f"{how}-{precision}", precision, compile=mode, padded=False)


def _fastgpt(implementation: str, precision: Precision) -> Recipe:
    return Recipe(f"{implementation}-{precision}", precision, ops=implementation, optimizer="fastgpt")


CONTENDERS: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        *(_peer(how, precision) for how in PEERS for precision in ("fp32", "tf32", "autocast")),
        *(_fastgpt(name, precision) for name in ("native", "triton") for precision in ("fp32", "bf16")),
    )
}
DEFAULT = {
    "cpu": ("eager-fp32", "eager-autocast", "compile-fp32", "compile-autocast", "native-fp32", "native-bf16"),
    "cuda": ("eager-tf32", "eager-autocast", "compile-autocast", "native-bf16", "triton-bf16"),
}
PRESET = {"cpu": "char-cpu", "cuda": "gpt2"}
# By preset; other presets have those of gpt2.
MICRO_BATCHES: dict[str, dict[str, tuple[int, ...]]] = {
    "cpu": {"char-cpu": (12,), "char": (16,), "gpt2": (4,)},
    "cuda": {"char-cpu": (12,), "char": (64,), "gpt2": (4, 8, 16, 32, 64, 128)},
}


@dataclass
class TrainArgs:
    """Time whole training steps against eager PyTorch and torch.compile."""

    preset: str | None = None
    """char-cpu, char, gpt2, gpt2-medium, gpt2-large or gpt2-xl; by default char-cpu, on a GPU gpt2."""
    micro_batches: tuple[int, ...] = ()
    """Sequences in a step, smaller ones first; who is out of memory with one does not try larger ones."""
    block_size: int | None = None
    """Tokens in a sequence; by default the preset's."""
    contenders: tuple[str, ...] = ()
    """By default those of the device; max-autotune-fp32 and others only by name."""
    steps: int = 10
    """Steps whose losses must agree before anything is timed."""
    attribution: bool = True
    """Also where the time of a step goes, by operation."""
    device: str = "auto"
    """auto, cuda, cuda:N or cpu."""
    threads: int | None = None
    """Of a CPU; by default one for each core."""
    budget: float = 600.0
    """Seconds for all: a micro-batch is not begun once they have passed, and what is left out is named."""
    case_seconds: float = 10.0
    """Seconds of rounds for each micro-batch, of which there are 7 at least."""
    out: Path = RESULTS
    """Results go to OUT/MACHINE/RUN.csv."""
    run: str | None = None
    """A name for this run; by default the time."""
    resume: bool = False
    """Go on with that run, or without --run with this machine's newest: skip the micro-batches it has."""


def command(args: Sequence[str]) -> None:
    from fastgpt.cli import parse

    run_train(parse(TrainArgs, args, "bench train"))


def run_train(given: TrainArgs) -> Path:
    """Run the suite; returns the file of results.

    Raises:
        InputError: an option names what does not exist, or is out of range.
    """
    device = resolve_device(given.device)
    if device.type not in DEFAULT:
        raise InputError(f"device {given.device!r}: steps are timed on cuda and cpu")
    name = given.preset or PRESET[device.type]
    config = preset(name)
    sizes = _micro_batches(given, device, name)
    recipes = [_recipe(contender) for contender in given.contenders or DEFAULT[device.type]]
    if given.steps < 2:
        raise InputError(f"steps = {given.steps}: it must be at least 2")
    model = network(config, given.block_size)
    with working(device, given.threads), cold_compiler():
        run = Run.open("train", given, device)
        print(f"{run.where['device_name']}, run {run.name}: {name}, micro-batches {sizes} -> {run.path}")
        suite = _Suite(name, dataclasses.replace(config, model=model), initial_model(model), run, given)
        suite.sweep(recipes, sizes, device)
    return run.path


def _micro_batches(given: TrainArgs, device: torch.device, name: str) -> list[int]:
    defaults = MICRO_BATCHES[device.type]
    sizes = sorted(set(given.micro_batches or defaults.get(name, defaults["gpt2"])))
    if sizes[0] < 1:
        raise InputError(f"micro_batches has {sizes[0]}: each must be at least 1")
    return sizes


def _recipe(name: str) -> Recipe:
    if name not in CONTENDERS:
        raise InputError(f"contenders has {name!r}: choose from {', '.join(CONTENDERS)}")
    return CONTENDERS[name]


def network(config: TrainConfig, block_size: int | None) -> GPTConfig:
    """The preset's network with nanoGPT's vocabulary, and without dropout, which is random."""
    vocab_size = CHARACTERS if config.tokenizer == "char" else NANOGPT_VOCAB
    block_size = config.model.block_size if block_size is None else block_size
    return dataclasses.replace(config.model, vocab_size=vocab_size, block_size=block_size, dropout=0.0)


class _Suite:
    """One invocation on one preset."""

    def __init__(self, preset: str, config: TrainConfig, initial: GPT, run: Run, given: TrainArgs) -> None:
        self.preset, self.config, self.initial, self.run, self.given = preset, config, initial, run, given

    def sweep(self, recipes: list[Recipe], sizes: list[int], device: torch.device) -> None:
        """Every micro-batch in turn, as far as memory and the budget reach."""
        print(mfu_formula(self.initial, device))
        start = time.monotonic()
        too_large: dict[str, int] = {}  # contenders, and the micro-batch they were out of memory with
        held: dict[str, tuple[int, int]] = {}  # the bytes of the last micro-batch, and its size
        for size in sizes:
            case = Case(
                self.initial,
                self.config,
                random_batches(self.initial.config, size, device),
                check_steps=self.given.steps,
                seconds=lambda: self.given.case_seconds,
                profile=attribute if self.given.attribution else None,
            )
            if (self.preset, case.shape) in self.run.done:
                continue
            if time.monotonic() - start > self.given.budget:
                print(f"micro-batch {size} did not fit into {self.given.budget:g} s: go on with --resume")
                continue
            for entry in self._time(recipes, case, too_large, held):
                if entry.status == "oom":
                    too_large.setdefault(entry.recipe.name, size)
                elif entry.peak_memory_bytes:
                    held[entry.recipe.name] = (entry.peak_memory_bytes, size)

    def _time(
        self,
        recipes: list[Recipe],
        case: Case,
        too_large: dict[str, int],
        held: dict[str, tuple[int, int]],
    ) -> list[Entry]:
        torch._dynamo.reset()  # a new size is compiled as itself, not as one of many
        able = [recipe for recipe in recipes if recipe.name not in too_large]
        size = len(case.batches[0][0])
        # As if all of it grew with the batch: too much, by the weights.
        expected = {name: bytes_ * size // of for name, (bytes_, of) in held.items()}
        reference = Reference.of(case, [recipe.precision for recipe in able]) if able else None
        entries: list[Entry] = []
        with clocks_during(case.device) as clocks:
            if reference is not None:
                entries = contest(able, case, reference, baseline=fastest_peer, expected=expected)
        against_fastest(entries)
        for recipe in recipes:
            if recipe.name in too_large:
                note = f"not tried: out of memory at micro-batch {too_large[recipe.name]}"
                entries.append(Entry(recipe, "computed", "oom", note))
        named = {"suite": "train", "operation": self.preset, "clocks": clocks.text}
        rows = [row_of(e, case, self.run.where, contender=e.recipe.name, **named) for e in entries]
        append(rows, self.run.path)
        self._write(entries, case)
        print(f"\n{self.preset} {case.shape}\n{times(rows)}", flush=True)
        if reference is not None:
            print(f"\n{losses(entries, reference)}", flush=True)
        if shares := attribution(entries):
            print(f"\n{shares}", flush=True)
        return entries

    def _write(self, entries: list[Entry], case: Case) -> None:
        """Losses and attributions of a case, a JSON object for each contender."""
        for entry in entries:
            record = {
                "run": self.run.name,
                "preset": self.preset,
                "shape": case.shape,
                "contender": entry.recipe.name,
                "status": entry.status,
                "losses": entry.losses,
                "attribution": dataclasses.asdict(entry.profile) if entry.profile else None,
            }
            with self.run.path.with_name(f"{self.run.name}-train.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")


def fastest_peer(entries: list[Entry]) -> Entry:
    """By the steps that were checked; of all, where no peer is left."""
    peers = [entry for entry in entries if entry.recipe.ops == "eager"]
    return min(peers or entries, key=lambda entry: entry.step_s)


def against_fastest(entries: list[Entry]) -> None:
    """Compare with the peer whose rounds were the fastest, should it be another than was expected."""
    together = [e for e in entries if e.timing and e.timing.status == "ok" and e.timing.baseline]
    timings = {e.recipe.name: e.timing for e in together if e.timing}
    peers = [e.recipe.name for e in together if e.recipe.ops == "eager"]
    if not peers:
        return
    best = min(peers, key=lambda name: statistics.median(timings[name].samples_us))
    if timings[best].baseline == best:
        return
    for entry in together:
        timing = timings[entry.recipe.name]
        pairs = zip(timing.samples_us, timings[best].samples_us, strict=True)
        ratios = () if entry.recipe.name == best else tuple(theirs / mine for mine, theirs in pairs)
        entry.timing = dataclasses.replace(timing, baseline=best, ratios=ratios)


# -- what is printed -----------------------------------------------------------------------------------------


def mfu_formula(model: GPT, device: torch.device) -> str:
    """How MFU is computed, in numbers."""
    c, n = model.config, model.num_params(embeddings=False)
    text = (
        f"MFU = tokens/s x (6 N + 12 L C T) / peak, with N = {n:,} parameters less positions, "
        f"L = {c.n_layer}, C = {c.n_embd}, T = {c.block_size}: {model.flops_per_token():,} flops a token"
    )
    peaks = {name: Peak(name, device).peak_flops() for name in ("fp32", "tf32", "bf16")}
    known = ", ".join(f"{name} {peak / 1e12:g}" for name, peak in peaks.items() if peak)
    return f"{text}; peaks in TFLOP/s: {known or 'unknown here, so MFU is n/a'}"


def times(rows: Sequence[Row]) -> str:
    """A line for each contender."""
    title = ["contender", "ms a step", "p20", "p80", "tokens/s", "MFU"]
    lines = [[*title, "ratio", "p20", "p80", "GB", "compile s"]]
    for row in rows:
        if row.median_us is None:
            lines.append([row.contender, row.status])
            continue
        found = (row.median_us, row.p20_us, row.p80_us)
        cells = [row.contender, *(number(us and us / 1e3, ".4g") for us in found)]
        cells += [number(row.tokens_per_s, ",.0f"), format_mfu(row.mfu)]
        cells += [number(ratio, ".2f") for ratio in (row.ratio, row.ratio_p20, row.ratio_p80)]
        memory = None if row.peak_memory_bytes is None else row.peak_memory_bytes / 1e9
        lines.append([*cells, number(memory, ".3g"), number(row.compile_s, ".1f")])
    notes = [f"{row.contender}: {row.status}, {row.note}" for row in rows if row.status != "ok"]
    baseline = next((row.baseline for row in rows if row.baseline), None)
    if baseline:
        notes.insert(0, f"ratio: the time of {baseline} over the contender's, in the same round")
    return "\n".join([aligned(lines), *notes])


def losses(entries: Iterable[Entry], reference: Reference) -> str:
    """The losses that were compared, and by how much each contender's differ at most."""
    title = ["losses of steps", *map(str, range(1, len(reference.losses) + 1)), "differ by"]
    lines = [title, _losses_line("fp32 oracle", reference.losses, "")]
    for entry in entries:
        if len(entry.losses) == len(reference.losses):
            off = largest_difference(entry.losses, reference.losses)
            allowed = reference.allowed[entry.recipe.precision]
            lines.append(_losses_line(entry.recipe.name, entry.losses, f"{off:.1e} of {allowed:.1e}"))
    return aligned(lines)


def _losses_line(name: str, values: Sequence[float], end: str) -> list[str]:
    return [name, *(f"{value:.4f}" for value in values), end]


def attribution(entries: Iterable[Entry]) -> str:
    """Milliseconds of a step by group, a column for each contender; "" where none was profiled."""
    found = {entry.recipe.name: entry.profile for entry in entries if entry.profile is not None}
    if not found:
        return ""
    lines = [["ms a step, profiled", *found]]
    for group in GROUPS:
        if any(profile.groups[group] for profile in found.values()):
            cells = (f"{p.groups[group] / 1e3:.3g} ({p.share(group):4.0%})" for p in found.values())
            lines.append([group, *cells])
    return aligned([*lines, ["all", *(f"{p.wall_us / 1e3:.3g}" for p in found.values())]])
