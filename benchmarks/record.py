"""What won, for `ops.use("auto")`: from the rows of a run to recorded choices."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping

from fastgpt.benchmarks.contenders import COMPILE, EAGER
from fastgpt.benchmarks.results import Row
from fastgpt.ops import table
from fastgpt.ops.choices import Choice

MARGIN = 0.03  # saved on average, since another implementation gives other last bits
WORST = 0.95  # no case may lose more than a twentieth, noise included

Speeds = dict[str, float]
"""Of one case, for each contender how many times faster than eager it was: its `ratio`."""


def choose(rows: Iterable[Row]) -> dict[str, dict[str, Choice]]:
    """For each operation and class of shapes the fastest implementation of the table, and its evidence.

    Of an operation with a derivative, forward and backward together count. One that was not right, or did not
    run, in some case of a class where others did is no choice for that class. A class in which nothing but
    eager ran has no entry.
    """
    found: dict[str, dict[str, Choice]] = defaultdict(dict)
    for (operation, cls), cases in sorted(_by_class(rows).items()):
        names = {row.name for row in table() if row.operation == operation} - {EAGER}
        usable = [speeds for case in cases if EAGER in (speeds := _speeds(case))]
        candidates = [name for name in sorted(names) if usable and all(name in speeds for speeds in usable)]
        if not candidates:
            continue
        best, ratio, worst = _best(usable, candidates, EAGER)
        compiled = [speeds for speeds in usable if COMPILE in speeds]
        inside, compiled_ratio, _ = _best(compiled, candidates, COMPILE) if compiled else (EAGER, None, 1.0)
        row = cases[0][0]
        found[operation][cls] = Choice(
            implementation=best,
            ratio=round(ratio, 3),
            worst=round(worst, 3),
            cases=len(usable),
            compiled=inside,
            compiled_ratio=None if compiled_ratio is None else round(compiled_ratio, 3),
            threads=row.threads,
            run=row.run,
            versions=row.versions,
        )
    return dict(found)


def _by_class(rows: Iterable[Row]) -> dict[tuple[str, str], list[list[Row]]]:
    """The cases that count for each operation and class of shapes, each with its rows."""
    cases: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        if row.suite == "ops" and row.kind == "measured":
            cases[row.case].append(row)
    both = {group[0].operation for group in cases.values() if group[0].direction == "both"}
    counted: dict[tuple[str, str], list[list[Row]]] = defaultdict(list)
    for group in cases.values():
        first = group[0]
        if first.direction == ("both" if first.operation in both else "forward"):
            counted[first.operation, first.shape_class].append(group)
    return counted


def _speeds(case: Iterable[Row]) -> Speeds:
    return {
        row.contender: 1.0 if row.contender == EAGER else row.ratio
        for row in case
        if row.status == "ok" and row.baseline == EAGER and row.ratio
    }


def _best(cases: list[Speeds], candidates: list[str], rival: str) -> tuple[str, float, float]:
    """The fastest of the candidates, its mean and worst ratio to the rival; eager if none beats that."""
    best = EAGER, 1.0, 1.0
    for name in candidates:
        ratios = [speeds[name] / speeds[rival] for speeds in cases]
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        if mean >= max(1 + MARGIN, best[1]) and min(ratios) >= WORST:
            best = name, mean, min(ratios)
    return best


def lines(chosen: Mapping[str, Mapping[str, Choice]]) -> list[str]:
    """One for each choice."""
    return [
        f"{operation:<22}{cls:<8}{choice.implementation:<8}{choice.ratio:5.2f}x as fast as eager "
        f"in {choice.cases} case(s), at worst {choice.worst:.2f}x; inside torch.compile {choice.compiled}"
        for operation, classes in chosen.items()
        for cls, choice in classes.items()
    ]
