"""The site: built as `make docs` builds it, and its links, on GitHub too."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .blocks import ROOT, name_of, pages
from .runner import environment

pytest.importorskip("mkdocs", reason="make install brings mkdocs-material and mkdocstrings")
pytest.importorskip("mkdocstrings")

LINK = re.compile(r"\]\(([^)\s]+)\)")


def build(config: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(config), "-d", str(out)]
    settings = environment(NO_MKDOCS_2_WARNING="1", NO_COLOR="1")
    return subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    done = build(ROOT / "mkdocs.yml", out)
    assert done.returncode == 0, done.stderr
    return out


def test_every_page_is_built(site: Path) -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        path = page.relative_to(ROOT / "docs").with_suffix("")
        folder = path.parent if path.name == "index" else path
        assert (site / folder / "index.html").exists(), page


def test_files_of_the_repository_are_linked(site: Path) -> None:
    """Links out of docs/ lead to where the repository is published; code that looks like one stays."""
    (repo_url,) = re.findall(r"^repo_url: (\S+)", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    gelu = (site / "kernels/gelu/index.html").read_text()
    assert f'href="{repo_url}/blob/main/kernels/gelu.py"' in gelu
    assert f'href="{repo_url}/tree/main/examples"' in (site / "index.html").read_text()
    assert f"{repo_url}/blob/main/docs/{repo_url}" not in gelu


def test_reference_is_made_from_the_docstrings(site: Path) -> None:
    reference = (site / "api/ops/index.html").read_text()
    text = html.unescape(re.sub(r"<[^>]+>", "", reference))
    assert "Normalise the last dimension" in text
    for name in ("layer_norm", "causal_attention_qkvpacked", "linear_cross_entropy", "adamw_"):
        assert re.search(rf'id="fastgpt\.ops\.\w+\.{name}"', reference), name


def test_markers_are_not_shown(site: Path) -> None:
    for page in site.rglob("*.html"):
        shown = re.sub(r"<!--.*?-->", "", page.read_text(), flags=re.DOTALL)
        assert not re.search(r"run: no,|run with: |```", html.unescape(shown)), page


def test_mistakes_are_errors(tmp_path: Path) -> None:
    """A page, an anchor and a file that do not exist, and a page that is not in `nav`."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "there.py").touch()
    (tmp_path / "docs/index.md").write_text(
        "[a](no-page.md) [b](#no-anchor) [c](../no-file.py) [d](../there.py)\n\n"
        "```text\n`[e](../code.py)`\n```\n"
    )
    (tmp_path / "docs/alone.md").write_text("# Alone\n")
    (tmp_path / "mkdocs.yml").write_text(
        f"INHERIT: {ROOT / 'mkdocs.yml'}\nhooks: [{ROOT / 'docs/hooks.py'}]\nplugins: []\n"
        "docs_dir: docs\nnav: [index.md]\n"
    )
    done = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert done.returncode != 0
    for mistake in ("no-page.md", "#no-anchor", "../no-file.py", "alone.md"):
        assert mistake in done.stderr, done.stderr
    assert "there.py" not in done.stderr and "code.py" not in done.stderr


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


def test_links_on_github() -> None:
    """README, CONTRIBUTING and CHANGELOG are on no site; and links of docs/ lead to files there too."""
    broken = []
    for page in [*pages(), ROOT / "CHANGELOG.md"]:
        for target in LINK.findall(re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            if "://" in target:
                continue
            if not file.exists():
                broken.append(f"{name_of(page)}: {target}")
            elif anchor and file.suffix == ".md" and "/api/" not in str(file) and anchor not in anchors(file):
                broken.append(f"{name_of(page)}: {target}: no such heading")
    assert not broken
