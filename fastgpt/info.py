"""`fastgpt info`: what runs here and why; the first attachment of a bug report."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastgpt.ops import choices, registry
from fastgpt.runtime import device_name, environment


def describe() -> str:
    """The environment, and for each device of this machine what `auto` means there, with its evidence."""
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    found = environment(devices[-1])
    del found["command"]
    lines = [f"{name + ':':<12}{'none' if value is None else value}" for name, value in found.items()]
    for device in devices:
        lines += ["", f"{device}: {device_name(device)}", *_implementations(device), *_choices(device)]
    record = choices.user_record()
    absent = "" if record.exists() else " (not there: `fastgpt bench ops --record` writes it)"
    lines += ["", f"record:     {record}{absent}", f"shipped:    {choices.SHIPPED}"]
    return "\n".join(lines)


def _implementations(device: torch.device) -> Iterator[str]:
    """How many operations each implementation runs there, and why not all."""
    rows = registry.table()
    for name in dict.fromkeys(row.name for row in rows):
        reasons = [row.missing(device) for row in rows if row.name == name]
        why = dict.fromkeys(reason for reason in reasons if reason)
        runs = f"{reasons.count(None)} of {len(reasons)} operations"
        yield f"  {name:<10}{runs}{': ' if why else ''}{'; '.join(why)}"


def _choices(device: torch.device) -> Iterator[str]:
    """What `auto` is for each operation and class of shapes; one line for those without a record."""
    unrecorded = []
    for operation in dict.fromkeys(row.operation for row in registry.table()):
        found = [(cls, choices.find(operation, device, cls)) for cls in choices.CLASSES]
        if not any(entry for _, entry in found):
            unrecorded.append(operation)
        for cls, entry in found:
            if entry is not None:
                yield f"  {operation:<22}{cls:<8}{_evidence(operation, device, cls, entry)}"
    if unrecorded:
        yield f"  eager, since nothing is recorded: {', '.join(unrecorded)}"


def _evidence(operation: str, device: torch.device, cls: str, found: choices.Found) -> str:
    choice = found.choice
    runs = registry.automatic(operation, device, cls)
    instead = "" if runs == choice.implementation else f" (cannot run: {runs} runs instead)"
    source = "your record" if found.path == choices.user_record() else "shipped"
    threads = f", {choice.threads} threads" if choice.threads else ""
    return (
        f"{choice.implementation:<8}{instead}{choice.ratio:.2f}x as fast as eager (worst of {choice.cases}: "
        f"{choice.worst:.2f}x); compiled {choice.compiled}; {source}, run {choice.run}{threads}, "
        f"{choice.versions}"
    )
