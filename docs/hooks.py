"""What mkdocs.yml asks of mkdocs besides its plugins: links to files of the repository that are no pages.

Sources link to `../kernels/gelu.py`, so that the link works on GitHub and in an editor. The site has pages
alone: there it becomes REPO_URL/blob/main/kernels/gelu.py, once it is sure that there is such a file.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

log = logging.getLogger("mkdocs.hooks.links")  # a warning here is an error under --strict
FENCED = re.compile(r"^( *)(```+).*?^\1\2 *$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """The page with its links out of docs/ made absolute; code stays as it is."""
    docs, repo_url = Path(config.docs_dir), config.repo_url.rstrip("/")
    here = Path(page.file.abs_src_path).parent

    def link(match: re.Match[str]) -> str:
        target = match[2]
        if "://" in target or not (path := (here / target).resolve()).is_relative_to(docs.parent):
            return match[0]
        if path.is_relative_to(docs):
            return match[0]  # mkdocs looks after those
        if not path.exists():
            log.warning("%s links to %s: there is no such file in the repository", page.file.src_uri, target)
        kind = "tree" if path.is_dir() else "blob"
        return f"{match[1]}{repo_url}/{kind}/main/{path.relative_to(docs.parent)}{match[3]}"

    parts, end = [], 0
    for fence in FENCED.finditer(markdown):
        parts += [LINK.sub(link, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, LINK.sub(link, markdown[end:])])
