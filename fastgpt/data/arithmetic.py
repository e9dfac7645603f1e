"""Arithmetic problems as text: what is asked, the steps on the way, and the answer.

`addition` has the digits of its answer alone, from the units on, the order in which they are computed:

    123+456=9750                              numbers of fixed width; reads 0579

`calculation` works as on paper, from the units on, and writes each digit's step down:

    47+85=047+085:7+5+0=12,4+8+1=13,0+0+1=01=132            x+y+carry=carry and digit
    5-12=005-012<012-005:2-5-0=17,1-0-1=00,0-0-0=00=-7      x-y-borrow=borrow and digit; < turns it round
    12*34=012*034:2*4+0+0=08,...;2*3+4+0=10,...;...=408     x*y+sum so far+carry=carry and digit
    87/24=087/024:000:0,008:0,087>063>039>015:3=3r15        rest, less the divisor while it goes: how often

The problem is as a user would type it; the steps begin by filling it up with zeros, so that each digit has
its place. Whatever comes after the last = is the answer, and END ends the text.
"""

from __future__ import annotations

from dataclasses import dataclass

END = "\n"


@dataclass(frozen=True)
class Problem:
    """A problem and its solution: `text` is the `prompt`, the `steps`, the `answer` and END."""

    operation: str
    """One of + - * /."""
    prompt: str
    """What is asked, up to the =."""
    steps: str
    """With the = at their end; none for `addition`."""
    answer: str
    """The digits as the text has them."""

    @property
    def text(self) -> str:
        return self.prompt + self.steps + self.answer + END


def answer_of(text: str) -> str:
    """The answer in the text of a solution, whoever wrote it: what stands after the last =, up to END."""
    return text.split(END, 1)[0].rpartition("=")[2]


def backwards(answer: str) -> str:
    """The number in an answer of `addition`: its digits from the last to the first, without zeros before."""
    return answer[::-1].lstrip("0") or "0"


def addition(a: int, b: int, digits: int) -> Problem:
    """a + b in numbers of `digits` digits; the sum has one more, and its units come first."""
    return Problem("+", f"{a:0{digits}}+{b:0{digits}}=", "", f"{a + b:0{digits + 1}}"[::-1])


def calculation(operation: str, a: int, b: int, digits: int) -> Problem:
    """a + b, a - b, a * b, or a / b with a remainder, for 0 <= a, b < 10^digits (b > 0 in a division)."""
    write = {"+": _add, "-": _subtract, "*": _multiply, "/": _divide}[operation]
    steps, answer = write(a, b, digits)
    filled = f"{a:0{digits}}{operation}{b:0{digits}}"
    return Problem(operation, f"{a}{operation}{b}=", f"{filled}{steps}=", answer)


def _digits(n: int, digits: int) -> list[int]:
    """From the units on."""
    return [int(digit) for digit in reversed(f"{n:0{digits}}")]


def _add(a: int, b: int, digits: int) -> tuple[str, str]:
    steps, carry = [], 0
    for x, y in zip(_digits(a, digits), _digits(b, digits), strict=True):
        total = x + y + carry
        steps.append(f"{x}+{y}+{carry}={total:02}")
        carry = total // 10
    return ":" + ",".join(steps), str(a + b)


def _subtract(a: int, b: int, digits: int) -> tuple[str, str]:
    steps, borrow = [], 0
    large, small = max(a, b), min(a, b)
    for x, y in zip(_digits(large, digits), _digits(small, digits), strict=True):
        difference = x - y - borrow
        steps.append(f"{x}-{y}-{borrow}={int(difference < 0)}{difference % 10}")
        borrow = int(difference < 0)
    turned = f"<{b:0{digits}}-{a:0{digits}}" if a < b else ""
    return f"{turned}:" + ",".join(steps), str(a - b)


def _multiply(a: int, b: int, digits: int) -> tuple[str, str]:
    rows, total = [], [0] * (2 * digits)  # the sum of the rows so far, from the units on
    for place, y in enumerate(_digits(b, digits)):
        row, carry = [], 0
        for at, x in enumerate(_digits(a, digits), place):
            value = x * y + total[at] + carry
            row.append(f"{x}*{y}+{total[at]}+{carry}={value:02}")
            carry, total[at] = divmod(value, 10)
        total[place + digits] = carry
        rows.append(",".join(row))
    return ":" + ";".join(rows), str(a * b)


def _divide(a: int, b: int, digits: int) -> tuple[str, str]:
    steps, rest = [], 0
    for digit in reversed(_digits(a, digits)):
        rest = 10 * rest + digit
        rests = [rest]
        while rest >= b:
            rest -= b
            rests.append(rest)
        steps.append(">".join(f"{r:0{digits}}" for r in rests) + f":{len(rests) - 1}")
    quotient, remainder = divmod(a, b)
    return ":" + ",".join(steps), f"{quotient}r{remainder}"
