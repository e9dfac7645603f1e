"""From a matplotlib figure to a PNG, and to SVG inside a page: its theme's colours, tooltips, real text."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"

TIMES, TO = "\u00d7", "\u2013"  # multiplication sign and en dash

# Name of a CSS variable: its colour on light and on dark ground. Figures are drawn in the light ones, which
# all differ, so that they can be found again in the SVG.
THEME = {
    "ink": ("#1c2024", "#e6e8ea"),
    "muted": ("#60676f", "#9aa2ab"),
    "line": ("#d5d9de", "#363c43"),
    "loss": ("#b42318", "#ff8a7a"),
    "loss-tint": ("#fbeeec", "#2b1a1a"),
    "c1": ("#2563c9", "#74a9ff"),
    "c2": ("#c25708", "#f59a4c"),
    "c3": ("#6b7178", "#a5acb4"),
    "c4": ("#0d8577", "#45c7b5"),
    "c5": ("#7a4bc0", "#bb9df5"),
    "c6": ("#8b7500", "#d6c04a"),
    "c7": ("#b03a78", "#ee86b7"),
}
LIGHT = {name: colors[0] for name, colors in THEME.items()}
STYLE: Any = {  # keys of matplotlib's rcParams
    "font.size": 8,
    "svg.fonttype": "none",  # text stays text: it can be searched, read aloud, and takes the page's font
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "text.color": LIGHT["ink"],
    "axes.labelcolor": LIGHT["muted"],
    "axes.edgecolor": LIGHT["line"],
    "xtick.color": LIGHT["line"],
    "xtick.labelcolor": LIGHT["muted"],
    "ytick.color": LIGHT["line"],
    "ytick.labelcolor": LIGHT["ink"],
    "grid.color": LIGHT["line"],
    "grid.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


@dataclass
class Drawing:
    """A figure, and what to say over its marks: by the gid of a collection, one text for each point."""

    figure: Any
    tooltips: dict[str, Sequence[str]] = field(default_factory=dict)

    def png(self, path: Path) -> None:
        import matplotlib

        with matplotlib.rc_context(STYLE):
            self.figure.savefig(path, dpi=160, facecolor="white")

    def svg(self, name: str, label: str) -> str:
        """As an element to put into a page that has no other of that name. `label` is read aloud for it."""
        import matplotlib

        buffer, style = io.BytesIO(), dict(STYLE)
        style["svg.hashsalt"] = name
        with matplotlib.rc_context(style):
            self.figure.savefig(buffer, format="svg", metadata={"Date": None})
        root = ET.fromstring(buffer.getvalue())
        for group, texts in self.tooltips.items():
            _add_titles(root, group, texts)
        _clean(root)
        for attribute in ("width", "height", "version"):
            root.attrib.pop(attribute, None)
        root.attrib.update({"role": "img", "aria-label": label})
        ET.register_namespace("", SVG)
        ET.register_namespace("xlink", XLINK)
        text = ET.tostring(root, encoding="unicode")
        for variable, color in LIGHT.items():
            text = text.replace(color, f"var(--{variable})")
        return text


def _add_titles(root: ET.Element, group: str, texts: Sequence[str]) -> None:
    """A <title> for each mark of a collection: browsers show it over the mark."""
    element = root.find(f".//{{{SVG}}}g[@id='{group}']")
    assert element is not None, group
    marks = list(element.iter(f"{{{SVG}}}use"))
    assert len(marks) == len(texts), (group, len(marks), len(texts))
    for mark, text in zip(marks, texts, strict=True):
        ET.SubElement(mark, f"{{{SVG}}}title").text = text


def _clean(root: ET.Element) -> None:
    """Leave out what could collide with the page: matplotlib's style sheet, and ids nothing refers to."""
    whole = ET.tostring(root, encoding="unicode")
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style"):
                parent.remove(child)
        if f"#{parent.get('id')}" not in whole:
            parent.attrib.pop("id", None)


def theme() -> str:
    """The variables as CSS, for light and for dark ground."""
    light, dark = (
        "".join(f"--{name}:{colors[index]};" for name, colors in THEME.items()) for index in range(2)
    )
    return f":root{{{light}}}\n@media (prefers-color-scheme: dark){{:root{{{dark}}}}}"
