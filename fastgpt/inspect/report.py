"""An inspected kernel as text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fastgpt.chips import Chip
from fastgpt.inspect import sass
from fastgpt.inspect.addresses import Access, accesses
from fastgpt.inspect.bounds import Bounds, Launch, Work, bounds
from fastgpt.inspect.build import Built
from fastgpt.inspect.findings import findings
from fastgpt.inspect.occupancy import Occupancy, occupancy, waves


@dataclass(frozen=True)
class Analysis:
    """A kernel on a chip, with all that was found."""

    title: str
    built: Built
    chip: Chip
    launch: Launch | None
    fits: Occupancy
    bounds: Bounds | None
    accesses: list[Access]
    findings: list[str]

    def record(self) -> dict[str, Any]:
        """As JSON takes it."""
        body = self.built.code.body()
        return {
            "title": self.title,
            "chip": self.chip.name,
            "sm": self.built.sm,
            "constants": {key: str(value) for key, value in self.built.constants.items()},
            "registers": self.built.registers,
            "local_bytes": self.built.local_bytes,
            "shared_bytes": self.built.shared_bytes,
            "threads": self.built.threads,
            "occupancy": asdict(self.fits),
            "programs": self.launch.programs if self.launch else None,
            "main_loop": self.built.code.main_loop() is not None,
            "mix": sass.mix(body),
            "widths": sass.widths(body),
            "bounds_us": {k: v * 1e6 for k, v in self.bounds.seconds.items()} if self.bounds else None,
            "ceiling_us": self.bounds.ceiling * 1e6 if self.bounds else None,
            "binding": self.bounds.binding if self.bounds else None,
            "tflops": self.bounds.tflops if self.bounds else None,
            "gbytes": self.bounds.gbytes if self.bounds else None,
            "trips": self.bounds.trips if self.bounds else None,
            "findings": self.findings,
        }


def analyse(
    title: str, built: Built, chip: Chip, launch: Launch | None, work: Work, values: Sequence[Any] = ()
) -> Analysis:
    """Everything about a compiled kernel; without a launch there are no bounds.

    `values` are the scalar arguments that are known: see `addresses.accesses`.
    """
    fits = occupancy(chip.limits, built.threads, built.registers, built.shared_bytes)
    touched = accesses(built.stages.get("ptx", ""), values)
    limits = None
    if launch is not None:
        limits = bounds(
            built.code.body(),
            chip,
            fits,
            launch,
            work,
            loop=built.code.main_loop() is not None,
            flops_of_round=products_of_round(built.stages.get("ttgir", "")),
        )
    found = findings(built, fits, launch, limits, touched, chip.sms)
    return Analysis(title, built, chip, launch, fits, limits, touched, found)


def products_of_round(ttgir: str) -> float:
    """Flops of a round of the first loop with tcgen05 products, whose machine code has no shapes."""
    operands = r"tc_gen5_mma\b[^\n]*?: !ttg\.memdesc<(\d+)x(\d+)x[^\n]*?!ttg\.memdesc<\d+x(\d+)x"
    for loop in re.findall(r"\bscf\.(?:for|while)\b[\s\S]*?(?=\bscf\.(?:for|while)\b|\Z)", ttgir):
        if products := re.findall(operands, _inside(loop)):
            return float(sum(2 * int(m) * int(k) * int(n) for m, k, n in products))
    return 0.0


def _inside(loop: str) -> str:
    """A loop's lines: until one is indented no more than its first."""
    lines = loop.splitlines()
    body = next((line for line in lines[1:] if line.strip()), "")
    indent = len(body) - len(body.lstrip())
    kept = []
    for line in lines[1:]:
        if line.strip() and len(line) - len(line.lstrip()) < indent:
            break
        kept.append(line)
    return "\n".join(kept)


def text(analysis: Analysis) -> str:
    """Several lines."""
    built, fits = analysis.built, analysis.fits
    code, loop = built.code, built.code.main_loop()
    body = code.body()
    constants = " ".join(f"{key}={value}" for key, value in built.constants.items())
    assumed = ", assumed: see --block" if built.threads_are == "assumed" else ""
    lines = [
        f"{analysis.title} on {analysis.chip.name} (sm_{built.sm})",
        f"  {constants}" if constants else "",
        f"  {built.registers} registers, {built.local_bytes} bytes spilled, {built.shared_bytes} bytes of "
        f"shared memory, {built.threads} threads{assumed}",
        f"  occupancy {fits.share:.0%}: {fits.blocks} blocks, {fits.warps} warps of an SM, limited by "
        f"{fits.limit}",
    ]
    if analysis.launch is not None and fits.blocks:
        count = waves(analysis.launch.programs, analysis.chip.sms, fits.blocks)
        lines.append(f"  {analysis.launch.programs} blocks: {count:.2f} waves of {analysis.chip.sms} SMs")
    where = f"main loop, {_source(body)}," if loop else "no loop: all of the kernel,"
    lines.append(f"  {where} {len(body)} of {len(code.instructions)} instructions: {_counts(sass.mix(body))}")
    lines += [f"    {line}" for line in _memory(analysis, body)]
    lines += _bounds(analysis)
    lines += [f"  finding: {finding}" for finding in analysis.findings] or ["  findings: none"]
    return "\n".join(line for line in lines if line)


def _source(body: Sequence[sass.Instruction]) -> str:
    """The file that most of the instructions come from, with its first and last line."""
    places = [i.source.rsplit(":", 1) for i in body if i.source]
    if not places:
        return "source unknown"
    file = Counter(path for path, _ in places).most_common(1)[0][0]
    lines = [int(line) for path, line in places if path == file]
    return f"{file.rsplit('/', 1)[-1]}:{min(lines)}-{max(lines)}"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in counts.items())


def _memory(analysis: Analysis, body: Sequence[sass.Instruction]) -> list[str]:
    found = [
        f"{name}: " + ", ".join(f"{count} of {size} bytes" for size, count in sizes.items())
        for name, sizes in sass.widths(body).items()
    ]
    copies = Counter(i.name for i in body if re.fullmatch(sass.ASYNC_COPIES, i.name))
    if copies:
        found.append(f"asynchronous copies: {_counts(dict(copies))}")
    known = analysis.accesses
    if known:
        wasteful = sum(access.wasteful for access in known)
        found.append(f"addresses of {len(known)} accesses followed, {wasteful} of them wasteful (heuristic)")
    return found


def _bounds(analysis: Analysis) -> list[str]:
    limits = analysis.bounds
    if limits is None:
        return ["  no bounds: they need --grid" if analysis.launch is None else "  no bounds: nothing fits"]
    shown = ", ".join(f"{name} {seconds * 1e6:.2f}" for name, seconds in limits.seconds.items())
    rates = [f"{limits.tflops:.1f} TFLOP/s"] if limits.tflops else []
    rates += [f"{limits.gbytes:.0f} GB/s"] if limits.gbytes else []
    lines = [f"  bounds in us: {shown}"]
    if analysis.built.code.main_loop() is not None:
        lines.append(f"  rounds of the main loop in a block: {limits.trips:.1f}")
    ceiling = f"  computed ceiling: {limits.ceiling * 1e6:.2f} us by {limits.binding}"
    return [*lines, f"{ceiling}: {', '.join(rates)}" if rates else ceiling]


def compared(analyses: Sequence[Analysis], columns: Sequence[str]) -> str:
    """The same kernel side by side: one column for each chip or configuration."""
    rows = [("", list(columns))]
    rows.append(("registers", [str(a.built.registers) for a in analyses]))
    rows.append(("spilled bytes", [str(a.built.local_bytes) for a in analyses]))
    rows.append(("shared bytes", [str(a.built.shared_bytes) for a in analyses]))
    rows.append(("threads", [str(a.built.threads) for a in analyses]))
    rows.append(("occupancy", [f"{a.fits.share:.0%} ({a.fits.limit})" for a in analyses]))
    rows.append(("blocks", [str(a.launch.programs) if a.launch else "-" for a in analyses]))
    rows.append(("loop", [str(len(a.built.code.body())) for a in analyses]))
    for kind in (*sass.PIPES, *sass.OTHERS):
        counts = [sass.mix(a.built.code.body()).get(kind, 0) for a in analyses]
        if any(counts):
            rows.append((f"  {kind}", [str(count) for count in counts]))
    names = dict.fromkeys(name for a in analyses if a.bounds for name in a.bounds.seconds)
    for name in names:
        found = [a.bounds.seconds.get(name) if a.bounds else None for a in analyses]
        rows.append((f"us, {name}", ["-" if s is None else f"{s * 1e6:.2f}" for s in found]))
    rows.append(
        ("computed ceiling, us", [f"{a.bounds.ceiling * 1e6:.2f}" if a.bounds else "-" for a in analyses])
    )
    rows.append(("by", [a.bounds.binding if a.bounds else "-" for a in analyses]))
    rows.append(("TFLOP/s", [_number(a.bounds.tflops) if a.bounds else "-" for a in analyses]))
    rows.append(("GB/s", [_number(a.bounds.gbytes) if a.bounds else "-" for a in analyses]))
    rows.append(("findings", [str(len(a.findings)) for a in analyses]))
    return table(rows)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def table(rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Names to the left, the rest to the right, in columns."""
    cells = [[name, *values] for name, values in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = []
    for name, *values in cells:
        right = "  ".join(value.rjust(width) for value, width in zip(values, widths[1:], strict=True))
        lines.append(f"{name.ljust(widths[0])}  {right}".rstrip())
    return "\n".join(lines)
