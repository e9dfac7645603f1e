"""How many held-out problems a model solves: it writes down the solution, and the answer is right or not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from fastgpt.data import Problem, ProblemSet, Tokenizer, answer_of
from fastgpt.evaluate import Total, alone
from fastgpt.generate import generate, until_all_ended
from fastgpt.model import GPT

BATCH_SIZE = 256  # problems at once
SHOWN = 8
NAMES = {"+": "add", "-": "subtract", "*": "multiply", "/": "divide"}
SCORES = {f"accuracy_{name}": name for name in NAMES.values()}  # keys of the metrics, beside `accuracy`


@dataclass(frozen=True)
class Exam:
    """Held-out problems. An answer counts if all of it is right, whatever the steps before it are."""

    data: ProblemSet
    problems: Sequence[Problem]

    @classmethod
    def of(cls, data: ProblemSet, count: int | None = None) -> Exam:
        """All held-out problems of a data set, or `count`, spread evenly over its families."""
        return cls(data, data.held_out(count))

    def share(self, rank: int, world_size: int) -> Exam:
        """Every `world_size`-th problem, from number `rank` on."""
        return Exam(self.data, self.problems[rank::world_size])

    def evaluate(
        self, model: GPT, *, batch_size: int = BATCH_SIZE, progress: str | None = None, total: Total = alone
    ) -> dict[str, float]:
        """The share of right answers: `accuracy`, and `accuracy_add` and so on for each operation.

        `total` adds up over ranks of which each has a share of the problems.
        """
        written = solve(model, self.data.tokenizer, self.problems, batch_size=batch_size, progress=progress)
        right = [answer_of(text) == p.answer for p, text in zip(self.problems, written, strict=True)]
        own = [[sum(right), len(right)]]
        for operation in NAMES:
            these = [ok for p, ok in zip(self.problems, right, strict=True) if p.operation == operation]
            own.append([sum(these), len(these)])
        counts = total(torch.tensor(own, dtype=torch.float64)).tolist()  # right and asked, exactly
        return {
            name: solved / asked
            for name, (solved, asked) in zip(["accuracy", *SCORES], counts, strict=True)
            if asked
        }

    def show(self, model: GPT) -> str:
        """Some of the problems as the model solves them, a line each."""
        count = min(SHOWN, len(self.problems))
        chosen = [self.problems[(2 * n + 1) * len(self.problems) // (2 * count)] for n in range(count)]
        lines = []
        for problem, text in zip(chosen, solve(model, self.data.tokenizer, chosen), strict=True):
            reading, right = self.data.read(answer_of(text)), self.data.read(problem.answer)
            reads = "" if reading == answer_of(text) else f", which reads {reading}"
            verdict = "right" if answer_of(text) == problem.answer else f"wrong, it is {right}"
            lines.append(f"{text.rstrip()}{reads}: {verdict}")
        return "\n".join(lines)


def describe(scores: Mapping[str, float | None]) -> str:
    """The scores of an exam in one line."""
    each = {name: scores.get(key) for key, name in SCORES.items()}
    parts = [f"{name} {value:.4f}" for name, value in each.items() if value is not None]
    return f"accuracy {scores['accuracy']:.4f}" + (f" ({', '.join(parts)})" if len(parts) > 1 else "")


def solve(
    model: GPT,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    *,
    batch_size: int = BATCH_SIZE,
    progress: str | None = None,
) -> list[str]:
    """Each prompt with what the model writes after it, the most likely token each time, up to its end.

    Args:
        model: where it is, used in evaluation mode.
        tokenizer: its own; whose `eot` ends a solution.
        problems: of which only the prompts are read.
        batch_size: prompts at once, which are equally long.
        progress: what to call the progress bar, which only a terminal shows; None for none.
    """
    written = [""] * len(problems)
    batches = list(_batches(problems, batch_size))
    for batch in tqdm(batches, desc=progress, disable=None if progress else True):
        prompts = np.stack([tokenizer.encode(problems[i].prompt) for i in batch]).astype(np.int64)
        idx = torch.from_numpy(prompts).to(model.token_embedding.device)  # (B, T)
        room = model.config.block_size + 1 - idx.size(1)  # the last token is written, and never read
        # No CUDA graph: an exam is part of training, where other threads may use the GPU during a capture.
        tokens = generate(model, idx, room, temperature=0, graph=False)
        answers = until_all_ended(tokens, tokenizer.eot)  # (B, n)
        for i, row in zip(batch, answers.tolist(), strict=True):
            end = row.index(tokenizer.eot) + 1 if tokenizer.eot in row else len(row)
            written[i] = problems[i].prompt + tokenizer.decode(row[:end])
    return written


def _batches(problems: Sequence[Problem], batch_size: int) -> Iterator[list[int]]:
    """Numbers of problems with prompts of one length; texts of about one length end together."""
    order = sorted(range(len(problems)), key=lambda i: (len(problems[i].prompt), len(problems[i].text)))
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) == batch_size or len(problems[i].prompt) != len(problems[batch[0]].prompt)):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
