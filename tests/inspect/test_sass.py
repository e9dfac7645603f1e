"""Machine code is read right: kinds, widths, shapes of products, loops, and the schedule inside."""

from __future__ import annotations

import pytest

from fastgpt.chips import chip
from fastgpt.inspect import sass
from fastgpt.inspect.bounds import Launch, Work, bounds
from fastgpt.inspect.occupancy import occupancy
from fastgpt.inspect.schedule import alone, clocks


def instruction(opcode: str, operands: str = "", *, stall: int = 1, sets: int = 7, waits: int = 0) -> str:
    """A line of nvdisasm: `sets` is the barrier that the result signals, `waits` a mask of barriers."""
    control = stall | sets << 5 | 7 << 8 | waits << 11
    return (
        f"        /*%04x*/                   {opcode} {operands} ;   /* 0x{0:016x} */\n"
        f"                                                           /* 0x{control << 41:016x} */\n"
    )


def code(*lines: str) -> sass.Code:
    """The kernel `k` of these lines, of which those that end in a colon are labels."""
    text, address = "//--------------------- .text.k  ------\n", 0
    for line in lines:
        if line.endswith(":") or line.startswith("\t"):
            text += line + "\n"
        else:
            text += line % address
            address += 16
    return sass.parse(text)["k"]


def one(opcode: str) -> sass.Instruction:
    return code(instruction(opcode)).instructions[0]


@pytest.mark.parametrize(
    ("opcode", "kind", "width", "flops"),
    [
        ("LDG.E.128", "memory", 16, 0),
        ("LDG.E.U16", "memory", 2, 0),
        ("LDG.E.64.CONSTANT", "memory", 8, 0),
        ("STG.E", "memory", 4, 0),
        ("LDGSTS.E.BYPASS.128", "memory", 16, 0),
        ("LDSM.16.MT88.4", "memory", 16, 0),
        ("UTMALDG.2D", "memory", 0, 0),
        ("HMMA.16816.F32.BF16", "tensor", 0, 4096),
        ("HMMA.1688.F32.TF32", "tensor", 0, 2048),
        ("HGMMA.64x128x16.F32.BF16", "tensor", 0, 2 * 64 * 128 * 16 // 4),
        ("UTCHMMA", "tensor", 0, 0),
        ("UTCBAR", "barrier", 0, 0),
        ("FFMA.FTZ", "fp32", 0, 0),
        ("IMAD.WIDE.U32", "imad", 0, 0),
        ("MUFU.EX2", "sfu", 0, 0),
        ("LOP3.LUT", "alu", 0, 0),
        ("UIADD3.X", "uniform", 0, 0),
        ("SHFL.BFLY", "shuffle", 0, 0),
        ("BAR.SYNC.DEFER_BLOCKING", "barrier", 0, 0),
        ("BRA.U", "control", 0, 0),
    ],
)
def test_instructions(opcode: str, kind: str, width: int, flops: int) -> None:
    found = one(opcode)
    assert (found.kind, found.width, found.flops) == (kind, width, flops)


def test_clocks() -> None:
    """Of an A100's SM: 64 fp32 lanes, 16 of special functions, 1024 multiply-adds of tensor cores."""
    a100 = chip("a100")
    assert clocks(one("FFMA"), a100) == 0.5
    assert clocks(one("FFMA2"), a100) == 1.0
    assert clocks(one("MUFU.EX2"), a100) == 2.0
    assert clocks(one("LDS.128"), a100) == 4.0
    assert clocks(one("LDS.U8"), a100) == 1.0
    assert clocks(one("HMMA.16816.F32.BF16"), a100) == pytest.approx(2.0, rel=0.01)
    assert clocks(one("BAR.SYNC"), a100) == 0.0


def test_the_main_loop() -> None:
    """Of three loops the one with products, without the wait for a barrier inside; its source is kept."""
    branch = lambda label: instruction("BRA", f"`(.L_x_{label})")  # noqa: E731
    found = code(
        ".L_x_0:",
        *[instruction("FADD")] * 9,
        branch(0),
        ".L_x_1:",
        '\t//## File "/here/inner.py", line 7 inlined at "/here/outer.py", line 8',
        '\t//## File "/here/outer.py", line 8',
        instruction("HMMA.16816.F32.BF16"),
        ".L_x_2:",
        instruction("SYNCS.PHASECHK.TRANS64.TRYWAIT"),
        branch(2),
        branch(1),
        ".L_x_3:",
        *[instruction("HMMA.16816.F32.BF16")],
        *[instruction("ISETP.GT.AND")] * 5,
        branch(3),
        instruction("EXIT"),
        ".L_x_4:",
        branch(4),
    )
    assert len(found.loops) == 3
    body = found.body()
    assert [i.name for i in body] == ["HMMA", "SYNCS", "BRA", "BRA"]
    assert body[0].source == "/here/inner.py:7"
    assert sass.mix(body) == {"tensor": 1, "barrier": 1, "control": 2}


def test_a_loop_that_fills_is_not_the_main_one() -> None:
    found = code(
        ".L_x_0:",
        *[instruction("STG.E.128")] * 8,
        instruction("BRA", "`(.L_x_0)"),
        ".L_x_1:",
        instruction("LDG.E.128"),
        instruction("BRA", "`(.L_x_1)"),
    )
    assert [i.name for i in found.body()] == ["LDG", "BRA"]


def test_without_a_loop() -> None:
    found = code(instruction("LDG.E.128"), instruction("EXIT"), ".L_x_0:", instruction("BRA", "`(.L_x_0)"))
    assert found.main_loop() is None
    assert [i.name for i in found.body()] == ["LDG", "EXIT"]
    assert sass.widths(found.body()) == {"global load": {16: 1}}


def test_a_warp_alone() -> None:
    """Stalls add up, a wait lasts until the load is there, and a pipe takes a warp's work at its own pace."""
    a100 = chip("a100")
    fixed = code(instruction("FADD", stall=4), instruction("FADD", stall=5)).instructions
    assert alone(fixed, a100, loop=True, cached=False) == 9
    load = instruction("LDG.E", sets=0, stall=2)
    waiting = code(load, instruction("FADD", waits=1)).instructions
    assert alone(waiting, a100, loop=True, cached=False) == a100.limits.latency["dram"] + 1
    assert alone(waiting, a100, loop=True, cached=True) == a100.limits.latency["l2"] + 1
    two = code(load, load, instruction("FADD", waits=1)).instructions
    assert alone(two, a100, loop=True, cached=False) < a100.limits.latency["dram"] + 10, "loads overlap"
    functions = code(*[instruction("MUFU.EX2", stall=1)] * 8).instructions
    assert alone(functions, a100, loop=True, cached=False) == 8 * 8, "8 clocks each on a quarter of an SM"


def test_copies_in_groups() -> None:
    """A wait that allows one group of copies under way is for the one before it."""
    a100 = chip("a100")
    copy = [instruction("LDGSTS.E.128", stall=4), instruction("LDGDEPBAR", stall=4)]
    wait = "DEPBAR.LE", "SB0, 0x%d"
    for allowed, least, most in [(0, 466, 500), (1, 225, 245), (3, 110, 130)]:
        body = code(*copy, instruction(wait[0], wait[1] % allowed, stall=4)).instructions
        assert least <= alone(body, a100, loop=True, cached=False) <= most, allowed


def test_bounds_by_hand() -> None:
    """1000 blocks of 4 warps on an A100: 10 rounds of 100 special functions and a load of 512 bytes."""
    a100 = chip("a100")
    body = code(*[instruction("MUFU.EX2")] * 100, instruction("LDG.E.128", sets=0)).instructions
    fits = occupancy(a100.limits, 128, 32, 0)
    work = Work(flops=1e6, bytes=1000 * 4 * 512 * 10)
    found = bounds(body, a100, fits, Launch(1000, 4), work, loop=True)
    assert found is not None
    assert found.trips == 10
    assert found.seconds["sfu"] == pytest.approx(1000 * 4 * 10 * 100 * 2 / (108 * 1.41e9))
    assert found.seconds["issue"] == pytest.approx(1000 * 4 * 10 * 101 / 4 / (108 * 1.41e9))
    assert found.seconds["bandwidth"] == pytest.approx(20.48e6 / 2039e9)
    assert found.seconds["latency"] == pytest.approx(10 * alone(body, a100, loop=True, cached=False) / 1.41e9)
    assert found.binding == "sfu" and found.ceiling == max(found.seconds.values())
    assert found.gbytes == pytest.approx(20.48e6 / found.ceiling / 1e9)
    given = bounds(body, a100, fits, Launch(1000, 4, trips=20), work, loop=True)
    assert given is not None and given.seconds["sfu"] == pytest.approx(2 * found.seconds["sfu"])
    assert bounds(body, a100, occupancy(a100.limits, 1024, 128, 0), Launch(1, 32), work, loop=True) is None


MUTANTS = {
    "fastgpt/inspect/sass.py": [
        ("max(ends.get(first, 0), position)", "position if len(body) > 99 else 0"),
        ("-len(own) if tensor or moved else len(own)", "len(own)"),
        ('return 2 * m * n * k // 4', 'return 2 * m * n * k'),
    ],
    "fastgpt/inspect/schedule.py": [
        ("i.control >> 11", "i.control >> 10"),
        ("self.now = start + max(stall, 1)", "self.now = start + 1"),
        ("groups[: len(groups) - count]", "groups"),
    ],
}  # fmt: skip
