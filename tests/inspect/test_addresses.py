"""Addresses are followed through PTX, and what a warp touches is counted as the hardware does."""

from __future__ import annotations

import pytest

from fastgpt.inspect.addresses import Access, accesses
from fastgpt.inspect.stages import annotated

HEAD = """
	.file	1 "/here/kernel.py"
	ld.param.b64 	%rd1, [k_param_0];
	ld.param.b32 	%r9, [k_param_1];
	.loc	1 12 3
	mov.u32 	%r1, %tid.x;
	and.b32 	%r2, %r1, 31;
"""


def touched(body: str, *values: int | None) -> Access:
    (found,) = accesses(HEAD + body, values)
    return found


@pytest.mark.parametrize(
    ("body", "bytes_", "cost", "ideal", "stride"),
    [
        # neighbours read neighbours: 128 bytes in 4 sectors
        ("mul.wide.s32 %rd2, %r2, 4;\n add.s64 %rd3, %rd1, %rd2;\n ld.global.b32 %r3, [%rd3];", 4, 4, 4, 4),
        # 16 bytes each
        ("shl.b32 %r3, %r2, 4;\n cvt.s64.s32 %rd2, %r3;\n add.s64 %rd3, %rd1, %rd2;\n"
         "@%p1 ld.global.v4.b32 { %r4, %r5, %r6, %r7 }, [ %rd3 + 0 ];", 16, 16, 16, 16),
        # a column of a matrix whose width is an argument: a sector for each thread
        ("mul.lo.s32 %r3, %r2, %r9;\n mul.wide.s32 %rd2, %r3, 4;\n add.s64 %rd3, %rd1, %rd2;\n"
         "ld.global.b32 %r4, [%rd3+8];", 4, 32, 4, 400),
        # all threads the same
        ("ld.global.b32 %r4, [%rd1];", 4, 1, 1, 0),
        # 32 numbers in one bank: 32 passes
        ("shl.b32 %r3, %r2, 7;\n mov.u32 %r4, smem;\n add.s32 %r5, %r4, %r3;\n"
         "ld.shared.b32 %r6, [%r5];", 4, 32, 1, 128),
        # the same swizzled: none is in the way of another
        ("shl.b32 %r3, %r2, 7;\n shl.b32 %r4, %r2, 2;\n xor.b32 %r5, %r3, %r4;\n"
         "st.shared.b32 [%r5], %r6;", 4, 1, 1, None),
        # 8 bytes each, in order: two passes are what 256 bytes take
        ("shl.b32 %r3, %r2, 3;\n st.shared.v2.b32 [%r3], {%r4, %r5};", 8, 2, 2, 8),
    ],
)  # fmt: skip
def test_one_access(body: str, bytes_: int, cost: int, ideal: int, stride: int | None) -> None:
    found = touched(body, None, 100)
    assert (found.bytes, found.cost, found.ideal) == (bytes_, cost, ideal)
    assert stride is None or found.stride == stride
    assert found.line == "/here/kernel.py:12"
    assert found.wasteful == (cost >= 2 * ideal)


def test_neighbours_in_two_instructions() -> None:
    """Eight bytes of every sixteen are half a sector wasted, unless the next instruction takes the others."""
    body = "shl.b32 %r3, %r2, 4;\n cvt.s64.s32 %rd2, %r3;\n add.s64 %rd3, %rd1, %rd2;\n"
    first = touched(body + "ld.global.b64 %rd4, [%rd3];")
    second = touched(body + "ld.global.b64 %rd4, [%rd3+8];")
    assert first.wasteful and second.wasteful
    assert not first.beside(second).wasteful and first.beside(first).wasteful


def test_unknown_addresses_are_left_out() -> None:
    """One that is loaded, and one that comes of it; a register that is written again is forgotten."""
    body = """
	mul.wide.s32 	%rd2, %r2, 4;
	add.s64 	%rd3, %rd1, %rd2;
	ld.global.b32 	%r3, [%rd3];
	mul.wide.s32 	%rd2, %r3, 4;
	add.s64 	%rd3, %rd1, %rd2;
	ld.global.b32 	%r4, [%rd3];
"""
    assert len(accesses(HEAD + body)) == 1


def test_asynchronous_copies_have_two_addresses() -> None:
    body = """
	shl.b32 	%r3, %r2, 4;
	cvt.u64.u32 	%rd2, %r3;
	add.s64 	%rd3, %rd1, %rd2;
	cp.async.cg.shared.global [ %r3 + 0 ], [ %rd3 + 0 ], 0x10, %r8;
"""
    store, load = accesses(HEAD + body)
    assert (store.operation, store.cost, store.ideal) == ("st.shared", 4, 4)
    assert (load.operation, load.cost, load.ideal) == ("ld.global", 16, 16)


def test_stages_have_their_source() -> None:
    ttir = '    %x = tt.load %a loc(#loc2)\n    tt.return loc(#loc)\n#loc = loc("/k.py":3:0)\n'
    ttir += '#loc1 = loc("/k.py":9:2)\n'
    ttir += "#loc2 = loc(callsite(#loc1 at #loc))\n"
    assert [tuple(line) for line in annotated("ttir", ttir)] == [
        ("    %x = tt.load %a", "/k.py:9"),
        ("    tt.return", "/k.py:3"),
    ]
    llir = (
        "  %1 = add i32 %0, 1, !dbg !5\n!1 = !DIFile(filename: \"k.py\", directory: \"/\")\n"
        "!4 = distinct !DISubprogram(name: \"k\", file: !1, line: 2)\n"
        "!5 = !DILocation(line: 8, column: 1, scope: !4)\n"
    )  # fmt: skip
    assert [tuple(line) for line in annotated("llir", llir)] == [("  %1 = add i32 %0, 1", "k.py:8")]
    ptx = '\t.file\t1 "/k.py"\n\t.loc\t1 7 2 // k.py:7:2\n\tadd.s32 \t%r1, %r2, 1;\n'
    assert annotated("ptx", ptx)[-1] == ("\tadd.s32 \t%r1, %r2, 1;", "/k.py:7")
    code = '\t//## File "/k.py", line 4\n        /*0010*/  FADD R1, R2, R3 ;  /* 0x0000000000000001 */\n'
    code += "                             /* 0x0000000000000002 */\n"
    assert [line.source for line in annotated("sass", code)] == ["/k.py:4"]
    assert "0x" not in annotated("sass", code)[0].text


MUTANTS = {
    "fastgpt/inspect/addresses.py": [
        ("self.registers.pop(target, None)", "pass"),
        ("{a // SECTOR for a in touched}", "{a // 128 for a in touched}"),
        ("together = max(128 // max(size, 4), 1)", "together = 32"),
    ],
}
