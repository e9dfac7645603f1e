"""Every command and program in README, CONTRIBUTING and docs/ runs, or is marked with why not."""

from __future__ import annotations

import pkgutil
import re
from pathlib import Path

import pytest

from .blocks import ROOT, Problem, inline, name_of, pages
from .commands import check_inline, options_of_fastgpt
from .runner import Compiler, run_page, slow_pages

# Options of other programs that the pages speak of.
OTHERS = {
    "--no-build-isolation",  # pip
    "--no-isolation",  # python -m build
    "--max-restarts",  # torchrun
    "--nproc-per-node",
    "--standalone",
    "--strict",  # mkdocs
}
# What a page must leave behind, besides running: where it promises more than that.
LEAVES = {
    "docs/index.md": ("runs/char-cpu-*/loss.png", "runs/bench-*/report/index.html", "attention.html"),
    "docs/your-text.md": ("runs/mine-1/checkpoints", "report/index.html", "mine-hf/model.safetensors"),
    "docs/weights.md": ("exported-llmc/model.bin",),
}
PLACES = ("fastgpt", "kernels", "csrc", "benchmarks", "tests", "docs", "examples")


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_page(page: Path, here: Path, compiler: Compiler) -> None:
    run_page(page, compiler)
    for pattern in LEAVES.get(name_of(page), ()):
        assert list(here.glob(pattern)), pattern


@pytest.mark.slow
@pytest.mark.parametrize("page", slow_pages(pages()), ids=name_of)
def test_page_with_what_takes_longer(page: Path, here: Path, compiler: Compiler) -> None:
    run_page(page, compiler, slow=True)


def test_commands_in_running_text(here: Path) -> None:
    """Tables and sentences: whole commands parse, and targets of make exist."""
    problems = []
    for page in pages():
        for place, code in inline(page):
            if re.match(r"(\w+=\S+ )*(fastgpt|torchrun|make) ", code):
                try:
                    check_inline(code)
                except Problem as problem:
                    problems.append(f"{place}: {problem}")
    assert not problems, "\n\n".join(problems)


def test_options_in_running_text() -> None:
    known = options_of_fastgpt() | OTHERS
    unknown = [
        f"{place}: {option}"
        for page in pages()
        for place, code in inline(page)
        for option in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", code)
        if option not in known and not code.startswith(("pip ", "python "))
    ]
    assert not unknown


def test_names_and_files_in_running_text() -> None:
    """`fastgpt.ops.use` can be imported, and `kernels/gelu.py` is a file."""
    unknown = []
    for page in pages():
        for place, code in inline(page):
            if re.fullmatch(r"fastgpt(\.[A-Za-z]\w*)+", code):
                try:
                    pkgutil.resolve_name(code)
                except (ImportError, AttributeError) as error:
                    unknown.append(f"{place}: {code}: {error}")
            elif re.fullmatch(rf"({'|'.join(PLACES)})/[\w./-]*", code):
                any_name = re.search("NAME|MACHINE", code)
                if not any_name and not (ROOT / code).exists():
                    unknown.append(f"{place}: {code}: no such file")
    assert not unknown
