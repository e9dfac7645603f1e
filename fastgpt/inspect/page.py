"""Inspected kernels as one self-contained HTML page: report, source and every stage, linked by line."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from fastgpt.inspect.build import STAGES
from fastgpt.inspect.report import Analysis, text
from fastgpt.inspect.stages import annotated

_STYLE = """
body { font: 14px system-ui, sans-serif; margin: 1.5em; color: #222; background: #fff; }
h1 { font-size: 1.3em; } pre { background: #f6f6f4; padding: .8em; overflow-x: auto; }
.bars div { display: flex; margin: 2px 0; } .bars b { width: 7em; font-weight: normal; }
.bars u { background: #4477aa; margin-right: 8px; } .bars div:first-child u { background: #aa3377; }
nav button { font: inherit; margin-right: 4px; } nav button.on { background: #4477aa; color: #fff; }
.columns { display: flex; gap: 1em; } .columns > div { flex: 1; min-width: 0; height: 75vh; overflow: auto;
  border: 1px solid #ccc; font: 12px ui-monospace, monospace; }
.columns i { display: block; font-style: normal; white-space: pre; padding: 0 6px; min-height: 1.2em; }
.columns i[data-s] { cursor: pointer; } .columns i.lit { background: #ffe9a8; }
.columns b { display: block; background: #eee; padding: 2px 6px; position: sticky; top: 0; }
"""
# A click on a line lights up every line, here and in the other column, that has the same source.
_SCRIPT = """
function show(part, name) {
  for (const one of part.querySelectorAll('.stage')) one.hidden = one.dataset.stage !== name;
  for (const one of part.querySelectorAll('nav button'))
    one.classList.toggle('on', one.dataset.stage === name);
}
document.addEventListener('click', event => {
  const button = event.target.closest('nav button'), line = event.target.closest('i[data-s]');
  if (button) show(button.closest('section'), button.dataset.stage);
  if (!line) return;
  const part = line.closest('section'), side = line.closest('.columns > div');
  for (const one of part.querySelectorAll('i.lit')) one.classList.remove('lit');
  const same = [...part.querySelectorAll('i[data-s]')].filter(one => one.dataset.s === line.dataset.s);
  for (const one of same) one.classList.add('lit');
  const other = same.find(one => one.closest('.columns > div') !== side && one.offsetParent);
  if (other) other.scrollIntoView({block: 'center'});
});
for (const part of document.querySelectorAll('section')) show(part, part.dataset.first);
"""


def page(analyses: Sequence[Analysis]) -> str:
    """The page. Source files are read from where the compiler found them, where they are still there."""
    sections = "\n".join(_section(analysis) for analysis in analyses)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>fastgpt inspect</title>'
        f"<style>{_STYLE}</style></head><body><h1>fastgpt inspect</h1>"
        "<p>Everything here is computed from the compiled kernel; nothing was run.</p>"
        f"{sections}<script>{_SCRIPT}</script></body></html>\n"
    )


def _section(analysis: Analysis) -> str:
    stages = [stage for stage in STAGES if analysis.built.stages.get(stage)]
    lines = {stage: annotated(stage, analysis.built.stages[stage]) for stage in stages}
    files = list(
        dict.fromkeys(at.source.rsplit(":", 1)[0] for rows in lines.values() for at in rows if at.source)
    )
    buttons = "".join(f'<button data-stage="{stage}">{stage.upper()}</button>' for stage in stages)
    shown = "".join(
        f'<div class="stage" data-stage="{stage}">{"".join(_line(at.text, at.source) for at in rows)}</div>'
        for stage, rows in lines.items()
    )
    return (
        f'<section data-first="{stages[-1]}"><h2>{html.escape(analysis.title)} on {analysis.chip.name}</h2>'
        f"<pre>{html.escape(text(analysis))}</pre>{_bars(analysis)}<nav>{buttons}</nav>"
        f'<div class="columns"><div>{"".join(map(_source, files))}</div><div>{shown}</div></div></section>'
    )


def _line(line: str, source: str) -> str:
    data = f' data-s="{html.escape(source)}"' if source else ""
    return f"<i{data}>{html.escape(line)}</i>"


def _source(file: str) -> str:
    """A source file; nothing where it is not there, as with what comes with a compiler."""
    path = Path(file)
    if not path.is_file():
        return ""
    rows = path.read_text(encoding="utf-8", errors="replace").splitlines()
    numbered = "".join(_line(f"{n:4} {row}", f"{file}:{n}") for n, row in enumerate(rows, 1))
    return f"<b>{html.escape(path.name)}</b>{numbered}"


def _bars(analysis: Analysis) -> str:
    """The bounds to scale, the ceiling first."""
    if analysis.bounds is None:
        return ""
    ceiling = analysis.bounds.ceiling
    bars = "".join(
        f'<div><b>{html.escape(name)}</b><u style="width:{70 * seconds / ceiling:.1f}%"></u>'
        f"{seconds * 1e6:.2f} us</div>"
        for name, seconds in analysis.bounds.seconds.items()
    )
    return f'<div class="bars">{bars}</div>'
