"""Problems without a file: each by its number, no held-out one in training, the loss on solutions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgpt.data import IGNORE_INDEX, PROBLEM_CORPORA, ProblemSet, answer_of, open_dataset, problem_set
from fastgpt.data.arithmetic import calculation
from fastgpt.data.problems import SPLITS, Family, Rows
from fastgpt.errors import InputError

MUTANTS = {
    "fastgpt/data/problems.py": [
        ('numbers if split == "val" else numbers + self.count("val")', "numbers"),
        ("place[rows] * family.count(self._split) // self._span", "place[rows]"),
        ("np.where(counted[1:], tokens[1:], IGNORE_INDEX)", "tokens[1:]"),
        (
            "np.where(counted[1:], tokens[1:], IGNORE_INDEX)",
            "np.where(counted[:-1], tokens[1:], IGNORE_INDEX)",
        ),
        ("np.uint64(key))\n", "np.uint64(0))\n"),
        ("for n in range(1, self._most)]", "for n in range(1, 2)]"),
        ("if block_size < longest - 1:", "if block_size < longest - 2:"),
        ("permute(order, self.size, key)", "order"),
    ],
}

ADDITION, CALCULATOR = problem_set("addition"), problem_set("calculator")
BLOCK = {"addition": 12, "calculator": 160}


def small() -> ProblemSet:
    """Sums of numbers below 10 and products of those below 20: of 100 and 400, 10 and 30 are held out."""
    families = (Family("+", range(10), range(10), 30), Family("*", range(20), range(20), 30))
    return ProblemSet("small", families, lambda op, a, b: calculation(op, a, b, 2), CALCULATOR.alphabet)


def prompts(problems: ProblemSet, split: str) -> list[str]:
    rows = Rows(problems, split, problems.lengths[1])  # type: ignore[arg-type]
    return [problem.prompt for problem in rows.problems(np.arange(rows.total))]


def test_the_splits_have_every_problem_once_and_share_none() -> None:
    train, val = (set(prompts(small(), split)) for split in SPLITS)
    assert not train & val
    assert train | val == {f"{a}+{b}=" for a in range(10) for b in range(10)} | {
        f"{a}*{b}=" for a in range(20) for b in range(20)
    }
    assert len([prompt for prompt in val if "+" in prompt]) == 10
    assert len([prompt for prompt in val if "*" in prompt]) == 30
    held_out = sorted(int(prompt.split("*")[0]) for prompt in val if "*" in prompt)
    assert len(set(held_out)) > 10  # all over the place


def test_families_come_equally_often_and_their_problems_evenly() -> None:
    numbers = prompts(small(), "train")
    assert len(numbers) == 2 * 370
    counts = np.unique([prompt for prompt in numbers if "+" in prompt], return_counts=True)[1]
    assert (len(counts), counts.min(), counts.max()) == (90, 4, 5)


@pytest.mark.parametrize("name", PROBLEM_CORPORA)
def test_training_draws_no_held_out_problem(name: str) -> None:
    """In whole rows of several seeds, first problems and those that fill up alike."""
    problems = problem_set(name)
    held_out = {problem.prompt for problem in problems.held_out()}
    assert len(held_out) == sum(family.count("val") for family in problems.families)
    for seed in (0, 1):
        x, _ = problems.loader(BLOCK[name], 300, seed=seed).batch(seed)
        texts = [text for row in x for text in problems.tokenizer.decode(row).split("\n")]
        seen = {text.split("=")[0] + "=" for text in texts if "=" in text}
        assert len(seen) > 290
        assert not seen & held_out


@given(st.sampled_from(PROBLEM_CORPORA), st.integers(0, 10**6), st.integers())
def test_every_row_is_solutions_and_the_loss_is_on_them(name: str, step: int, seed: int) -> None:
    problems = problem_set(name)
    tokenizer = problems.tokenizer
    x, y = problems.loader(BLOCK[name], 2, seed=seed).batch(step)
    assert x.shape == y.shape == (2, BLOCK[name])
    assert x.dtype == y.dtype == np.int64
    for inputs, targets in zip(x, y, strict=True):
        asking = True
        for place, character in enumerate(tokenizer.decode(inputs)):
            if place:
                expected = IGNORE_INDEX if asking else inputs[place]
                assert targets[place - 1] == expected
            asking = {"=": False, "\n": True}.get(character, asking)


@given(st.integers(0, 32))
def test_no_text_is_longer_or_shorter_than_the_corners(number: int) -> None:
    family = CALCULATOR.families[number]
    rng = np.random.default_rng(number)
    for _ in range(50):
        a, b = int(rng.choice(family.a)), int(rng.choice(family.b))
        shortest, longest = CALCULATOR.lengths
        assert shortest <= len(CALCULATOR.write(family.operation, a, b).text) <= longest


def test_validation_has_one_problem_a_row_and_its_whole_solution() -> None:
    for name in PROBLEM_CORPORA:
        problems = problem_set(name)
        held_out = problems.held_out(40)
        (batch,) = problems.validation(BLOCK[name], max_samples=40).batches(40)
        assert len(held_out) == 40
        for problem, inputs, targets in zip(held_out, *batch, strict=True):
            assert problems.tokenizer.decode(inputs).startswith(problem.text[:-1])
            solution = problems.tokenizer.decode(targets[targets != IGNORE_INDEX])
            assert solution == problem.text.removeprefix(problem.prompt)
            assert answer_of(problem.text) == problem.answer


def test_a_batch_needs_the_seed_and_the_step_alone() -> None:
    loader = CALCULATOR.loader(160, 8, seed=3)
    first = loader.batch(5)
    loader.batch(6)
    again = CALCULATOR.loader(160, 8, seed=3).batch(5)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    others = [CALCULATOR.loader(160, 8, seed=4).batch(5), loader.batch(4)]
    assert all(not np.array_equal(first[0], other[0]) for other in others)
    held_out = CALCULATOR.validation(160, max_samples=30)
    assert np.array_equal(next(held_out.batches(30))[0], next(held_out.batches(30))[0])


def test_ranks_share_the_batch() -> None:
    """Together they have its rows, each once, and no two of them the same."""
    loader = CALCULATOR.loader(160, 12, seed=1)
    rows = [x for rank in range(4) for x, _ in loader.micro_batches(7, 2, rank, 4)]
    whole = sorted(row.tobytes() for row in loader.batch(7)[0])
    assert sorted(row.tobytes() for x in rows for row in x) == whole
    assert len(set(whole)) == 12


def test_the_same_number_is_filled_up_with_others_in_another_epoch() -> None:
    rows = Rows(small(), "train", 160)
    numbers = np.arange(5)
    (a, _), (b, _), (alone, _) = (rows.read(numbers, key) for key in (1, 2, None))
    first = [small().tokenizer.decode(row).split("\n")[0] for row in alone]
    for row in range(5):
        texts = [small().tokenizer.decode(x[row]) for x in (a, b)]
        assert texts[0] != texts[1]
        assert all(text.startswith(first[row] + "\n") for text in texts)
        assert all(not text.endswith("\n\n") for text in texts)  # full


def test_fingerprints_are_of_what_is_written() -> None:
    marks = {problem_set(name).fingerprint for name in PROBLEM_CORPORA} | {small().fingerprint}
    assert len(marks) == 3
    again = small()
    assert again.fingerprint == small().fingerprint
    object.__setattr__(again, "write", lambda op, a, b: calculation(op, a, b, 3))
    changed = ProblemSet(again.name, again.families, again.write, again.alphabet)
    assert changed.fingerprint != small().fingerprint


def test_a_short_block_is_refused() -> None:
    ADDITION.loader(12, 1, seed=0)
    with pytest.raises(InputError, match="block_size is 11: a problem of 'addition' needs 12 tokens"):
        ADDITION.loader(11, 1, seed=0)
    with pytest.raises(InputError, match="block_size is 100: a problem of 'calculator' needs 145"):
        CALCULATOR.validation(100)


def test_a_data_set_by_name() -> None:
    assert open_dataset("addition", "gpt2") is ADDITION
    assert "990,000 problems to train on and 10,000 held out" in ADDITION.describe()
    assert ADDITION.tokenizer.encode(ADDITION.prompt).size == 8
    with pytest.raises(InputError, match="'additio': did you mean 'addition'"):
        open_dataset("additio", "char")
    with pytest.raises(InputError, match=r"of addition are of another vocabulary \(char, 13 tokens\)"):
        open_dataset("addition", CALCULATOR.tokenizer)
