"""What is written of a problem is right: its answer, and each of the steps before it."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgpt.data.arithmetic import END, addition, answer_of, backwards, calculation

MUTANTS = {
    "fastgpt/data/arithmetic.py": [
        ("        carry = total // 10\n", "        carry = 0\n"),
        ("        borrow = int(difference < 0)\n", "        borrow = 0\n"),
        ("x * y + total[at] + carry", "x * y + total[at]"),
        ("        total[place + digits] = carry\n", ""),
        ("while rest >= b:", "while rest > b:"),
        ("large, small = max(a, b), min(a, b)", "large, small = a, b"),
        ('f"{a + b:0{digits + 1}}"[::-1]', 'f"{a + b:0{digits + 1}}"'),
        ('lstrip("0") or "0"', 'lstrip("0")'),
        ("text.split(END, 1)[0]", "text"),
    ],
}

DIGITS = st.integers(1, 5)


@st.composite
def operands(draw: st.DrawFn) -> tuple[int, int, int]:
    digits = draw(DIGITS)
    number = st.integers(0, 10**digits - 1)
    return draw(number), draw(number), digits


@given(operands())
def test_addition_is_of_fixed_width_and_backwards(given: tuple[int, int, int]) -> None:
    a, b, digits = given
    problem = addition(a, b, digits)
    assert len(problem.text) == 3 * digits + 4
    match = re.fullmatch(r"(\d+)\+(\d+)=(\d+)\n", problem.text)
    assert match is not None
    assert (int(match[1]), int(match[2]), int(match[3][::-1])) == (a, b, a + b)
    assert backwards(answer_of(problem.text)) == str(a + b)


@given(st.sampled_from("+-*/"), operands())
def test_the_last_number_of_a_calculation_is_the_answer(op: str, given: tuple[int, int, int]) -> None:
    a, b, digits = given
    b += op == "/" and b == 0
    problem = calculation(op, a, b, digits)
    assert problem.prompt == f"{a}{op}{b}="
    assert problem.text.startswith(problem.prompt)
    assert problem.text.index(END) == len(problem.text) - 1
    expected = {"+": f"{a + b}", "-": f"{a - b}", "*": f"{a * b}", "/": f"{a // b}r{a % b}" if b else ""}
    assert answer_of(problem.text) == problem.answer == expected[op]
    assert re.fullmatch(rf"{a:0{digits}}\{op}{b:0{digits}}.*=", problem.steps)


@given(st.sampled_from("+-*"), operands())
def test_every_step_is_true(op: str, given: tuple[int, int, int]) -> None:
    """In its tens is what is carried to the next step of the row, or borrowed from it."""
    a, b, digits = given
    body = calculation(op, a, b, digits).steps.split(":")[1].removesuffix("=")
    rows = [row.split(",") for row in body.split(";")]
    assert [len(row) for row in rows] == [digits] * (digits if op == "*" else 1)
    for row in rows:
        carried = 0
        for step in row:
            left, right = step.split("=")
            numbers = [int(number) for number in re.split(r"[+*-]", left)]
            assert numbers[-1] == carried
            value = eval(re.sub(r"\b0+(?=\d)", "", left))
            carried = -(value // 10) if op == "-" else value // 10
            assert right == f"{carried}{value % 10}"


@given(operands())
def test_a_difference_is_turned_round_where_it_is_negative(given: tuple[int, int, int]) -> None:
    a, b, digits = given
    head, body = calculation("-", a, b, digits).steps.removesuffix("=").split(":")
    turned = f"<{b:0{digits}}-{a:0{digits}}" if a < b else ""
    assert head == f"{a:0{digits}}-{b:0{digits}}{turned}"
    assert int("".join(step[-1] for step in reversed(body.split(",")))) == abs(a - b)


@given(operands())
def test_the_digits_of_a_product_are_in_the_rows(given: tuple[int, int, int]) -> None:
    """The units of the first step of each row, and then all of the last row and what it carries."""
    a, b, digits = given
    body = calculation("*", a, b, digits).steps.split(":")[1].removesuffix("=")
    rows = [[step.split("=")[1] for step in row.split(",")] for row in body.split(";")]
    low = [row[0][1] for row in rows[:-1]] + [value[1] for value in rows[-1]] + [rows[-1][-1][0]]
    assert int("".join(reversed(low))) == a * b


@given(operands())
def test_long_division_subtracts_as_often_as_it_goes(given: tuple[int, int, int]) -> None:
    a, b, digits = given
    b = max(b, 1)
    body = calculation("/", a, b, digits).steps.split(":", 1)[1].removesuffix("=")
    quotient, rest = "", 0
    for digit, step in zip(f"{a:0{digits}}", body.split(","), strict=True):
        rests, count = step.split(":")
        values = [int(value) for value in rests.split(">")]
        assert values[0] == 10 * rest + int(digit)
        assert all(x - y == b for x, y in itertools.pairwise(values))
        assert 0 <= values[-1] < b
        assert int(count) == len(values) - 1
        quotient, rest = quotient + count, values[-1]
    assert (int(quotient), rest) == divmod(a, b)


@pytest.mark.parametrize(
    ("text", "answer"), [("1+1=2\n3+3=6\n", "2"), ("1+1=", ""), ("1+1", "1+1"), ("", ""), ("a=b=7r2", "7r2")]
)
def test_the_answer_in_whatever_was_written(text: str, answer: str) -> None:
    assert answer_of(text) == answer


@pytest.mark.parametrize(("written", "number"), [("9750", "579"), ("0000", "0"), ("0010", "100"), ("", "0")])
def test_reading_backwards(written: str, number: str) -> None:
    assert backwards(written) == number
