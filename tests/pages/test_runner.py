"""The runner of the pages notices what it is for: each kind of mistake, in a page made for it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .blocks import ROOT, Problem, blocks, inline
from .commands import check_inline, commands, make_targets, options_of_fastgpt
from .runner import Compiler, run_page, small


def sh(text: str, *markers: str) -> str:
    return "".join(f"<!-- {marker} -->\n" for marker in markers) + f"```sh\n{text}\n```\n"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: Compiler) -> object:
    """Runs a page with this text, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(text: str, *, slow: bool = False) -> None:
        page = tmp_path / "page.md"
        page.write_text(text)
        run_page(page, compiler, slow=slow)

    return run


NETWORK = "run: no, needs the network"


# (text of a page, what the runner says about it)
MISTAKES = [
    # No marker, and nothing that tests can run.
    (sh("wget https://example.org/x"), "page.md:1: wget .*: nothing that the tests run: mark the block"),
    (sh("make lint"), "make lint calls no fastgpt: mark the block"),
    # Options, values, files, targets and extras that do not exist: whether the command is run or not.
    (sh("fastgpt plan gpt2 --gpu 8"), r"(?s)plan gpt2 --gpu 8.*[Uu]nrecognized"),
    (sh("fastgpt plan gpt2 --gpu 8", NETWORK), r"(?s)plan gpt2 --gpu 8.*[Uu]nrecognized"),
    (sh("fastgpt train gpt2 --weights bf8", NETWORK), "bf8"),
    (sh("fastgpt train gpt3", NETWORK), "unknown preset 'gpt3'"),
    (sh("fastgpt smaple RUN", NETWORK), "unknown command 'smaple'"),
    (sh("fastgpt bench op", NETWORK), "no suite 'op'"),
    (sh("fastgpt inspect gelu --chips h100", NETWORK), "--chips"),
    (sh("torchrun --procs 8 -m fastgpt train gpt2", NETWORK), "--procs"),
    (sh("torchrun --standalone -m fastgpt train gpt2 --corpse x", NETWORK), "--corpse"),
    (sh("make tarin", NETWORK), "make tarin: .*tarin"),
    (sh("python nothing.py", NETWORK), "there is no nothing.py"),
    (sh("pip install 'fastgpt[dada]'", NETWORK), "the extras are data, dev"),
    # What fails when it is run.
    (sh("fastgpt plan gpt2 --gpus 9 --gpus-per-node 8"), "must be a multiple of gpus_per_node"),
    (sh("python -c 'import nothing'"), "No module named 'nothing'"),
    (sh("ls 'unfinished"), "No closing quotation"),
    ("```python\nassert 1 + 1 == 3\n```\n", "page.md:1: AssertionError"),
    ("text\n\n```python\nfrom fastgpt import nothing\n```\n", "page.md:3: ImportError"),
    # Fences and markers.
    ("```\nfastgpt info\n```\n", "page.md:1: the fence is of no language"),
    ("```sh\nfastgpt info\n", "the fence has no end"),
    ("    fastgpt info --all\n", "a command in an indented block"),
    (sh("fastgpt info", "run: no, needs a rest"), "'no, needs a rest' must be one of slow, no, needs"),
    (sh("fastgpt info", NETWORK + ": wget"), "a marker is about 'wget', which the block does not have"),
    (sh("fastgpt info", "run with: fastgpt plan --gpus 8"), "is about no command of the block"),
    (f"<!-- {NETWORK} -->\ntext\n", "a marker must stand right before a fence"),
]


@pytest.mark.parametrize(("text", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_noticed(run: object, text: str, message: str) -> None:
    with pytest.raises(Problem, match=message):
        run(text)


def test_a_page_without_mistakes(run: object, tmp_path: Path) -> None:
    """In order, in one folder; files in pieces; options of markers; lines that are left out."""
    run(
        '```python title="a.py"\nx = 1\n```\n'
        '```python title="a.py"\nprint(x + 1)\n```\n'
        + sh("python a.py # two\nls a.py && mkdir b")
        + sh("fastgpt plan gpt2 --gpus 9", "run with: fastgpt plan gpt2 --gpus 8")
        + sh("wget x\nfastgpt info", NETWORK + ": wget")
        + sh("ls nothing", "run: slow")
        + "```python\nfrom pathlib import Path\nassert Path('b').is_dir()\n```\n"
        + "```python\nPath('b/c').touch()\n```\n"
    )
    assert (tmp_path / "b/c").exists()
    with pytest.raises(Problem, match="ls nothing"):
        run(sh("ls nothing", "run: slow"), slow=True)


def test_a_page_chooses_and_the_budget_is_small_where_it_does_not() -> None:
    words = small(["train", "gpt2", "--max-steps", "60"])
    assert words[:2] == ["train", "gpt2"]
    assert words.index("3") < words.index("60") == len(words) - 1
    assert small(["train", "--resume", "--out-dir", "RUN"]) == ["train", "--resume", "--out-dir", "RUN"]
    assert small(["bench", "generate", "--budget", "60"])[-2:] == ["--budget", "0.5"]


def test_commands_are_taken_apart() -> None:
    script = (
        "A=1 B='x y' fastgpt info  # why\n\nmake a && torchrun --standalone \\\n  -m fastgpt train 'a # b'"
    )
    first, second, third = commands(script)
    assert (first.words, first.environment) == (("fastgpt", "info"), {"A": "1", "B": "x y"})
    assert second.words == ("make", "a")
    assert third.fastgpt() == ["train", "a # b"]


def test_recipes_of_make() -> None:
    calls = [" ".join(command.words[:3]) for command in make_targets(("bench",))]
    assert calls[:3] == ["fastgpt bench ops", "fastgpt bench train", "fastgpt bench generate"]
    assert make_targets(("train",))[0].words[:3] == ("fastgpt", "train", "char-cpu")


def test_inline_code(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("Use `fastgpt\ninfo` or ``a ` b``.\n\n```sh\n`no`\n```\n\n    and `fastgpt eval RUN`\n")
    assert [code for _, code in inline(page)] == ["fastgpt info", "a ` b", "fastgpt eval RUN"]
    for code in ("fastgpt eval", "fastgpt bench train", "fastgpt train PRESET --help", "make lint"):
        check_inline(code)
    for code in ("fastgpt evil", "fastgpt bench trian", "fastgpt eval --task val", "make lnit"):
        with pytest.raises(Problem):
            check_inline(code)


def test_options_are_those_of_all_commands() -> None:
    assert {
        "--gpus-per-node",
        "--guard-z",
        "--fail-if-slower",
        "--arch",
        "--prompt-file",
    } <= options_of_fastgpt()
    assert "--gpu" not in options_of_fastgpt()


def test_every_reason_is_given_by_a_page() -> None:
    """One that no page gives any more goes."""
    from .blocks import REASONS
    from .test_pages import pages

    text = "".join(page.read_text() for page in pages())
    assert all(f"<!-- run: no, {reason}" in text for reason in REASONS)


def test_readme_is_among_the_pages() -> None:
    assert any(re.search("make train", block.text) for block in blocks(ROOT / "README.md"))
