"""`fastgpt bench report`: what it says of made-up rows, and that its page works in a real browser.

Every time in this file is made up, and none is kept anywhere.
"""

from __future__ import annotations

import dataclasses
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fastgpt.benchmarks import comparison
from fastgpt.benchmarks.report import command
from fastgpt.benchmarks.report.drawing import LIGHT
from fastgpt.benchmarks.report.regression import percentage, regression, text
from fastgpt.benchmarks.results import Row, append
from fastgpt.errors import InputError

GPU = {
    "machine": "made-up",
    "device": "cuda",
    "device_name": "NVIDIA H100 80GB HBM3",  # whose roof is known
    "driver": "<made-up driver>",
    "run": "20261124-120000",
    "time": "2026-11-24T12:00:00+00:00",
}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def row(suite: Any, operation: str, contender: str, median_us: float | None = None, **values: Any) -> Row:
    """A measured row whose rounds spread by 2% to either side."""
    given: dict[str, Any] = {"direction": "forward", "dtype": "bfloat16", "shape": "B=8 T=1024 C=768"}
    given |= {"shape_class": "small", "kind": "measured", "status": "ok", "note": "", **GPU}
    if median_us:
        given |= {"median_us": median_us, "p20_us": 0.98 * median_us, "p80_us": 1.02 * median_us}
    return Row(suite=suite, operation=operation, contender=contender, **{**given, **values})


def case(operation: str, times: dict[str, float], **values: Any) -> list[Row]:
    """The contenders of one case, with their ratios to eager."""
    work: dict[str, Any] = {"flops": 50_000_000, "bytes": 25_000_000, "limit_us": 7.5, "baseline": "eager"}
    rows = []
    for contender, time in times.items():
        ratio = times["eager"] / time
        spread = {"ratio": ratio, "ratio_p20": 0.97 * ratio, "ratio_p80": 1.03 * ratio}
        rows.append(row("ops", operation, contender, time, **{**work, **spread, **values}))
    return rows


def made_up() -> list[Row]:
    """Something of everything that a file of results can hold."""
    rows = []
    for scale, shape in ((1, "B=8 T=1024 C=768"), (10, "B=64 T=1024 C=768")):
        for operation, ours in (("gelu", 10), ("layer_norm", 30), ("rms_norm", 12)):
            times = {
                "eager": 20.0 * scale,
                "compile": 15 * scale,
                "triton": ours * scale,
                "native": 21 * scale,
            }
            rows += case(operation, times, shape=shape)
    rows += case("gelu", {"eager": 16.0, "triton": 9.0}, kind="computed")
    rows.append(row("ops", "gelu", "apex", status="missing", note="apex is not installed"))
    rows.append(row("ops", "gelu", "liger", status="wrong", note="differs by 3e-2 <from the reference>"))
    for contender, speed in (("eager-autocast", 2e5), ("triton-bf16", 3e5)):
        for batch in (4, 16):
            step = {"direction": "step", "shape": f"B={batch} T=1024", "dtype": contender.split("-")[1]}
            step |= {"tokens_per_s": speed, "peak_memory_bytes": batch << 30, "loss": 6.5}
            rows.append(row("train", "gpt2", contender, batch * 1024 / speed * 1e6, **step))
    large = {"direction": "step", "dtype": "autocast", "shape": "B=64 T=1024"}
    rows.append(row("train", "gpt2", "eager-autocast", status="oom", note="out of memory", **large))
    for rung, milliseconds in (("fp32", 1000), ("TF32", 330), ("compile", 130), ("a step back", 140)):
        rows.append(row("ladder", rung, rung, 1e3 * milliseconds, direction="step", shape="B=16 T=1024"))
    for contender, speed in (("native", 900), ("native, no cache", 100)):
        for direction, factor in (("prefill", 100), ("decode", 1)):
            rate = {"direction": direction, "tokens_per_s": speed * factor, "shape": "B=1 P=64 N=64"}
            rows.append(row("generate", "gpt2", contender, 1e6 / speed, **rate))
    return rows


def saved(rows: list[Row], path: Path) -> Path:
    append(rows, path)
    return path


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    command([str(saved(made_up(), folder / "rows.csv")), "--out", str(folder / "out")])
    return folder / "out"


# -- what rows say -------------------------------------------------------------------------------------------


def test_the_last_row_of_a_contender_counts() -> None:
    old, new = (
        case("gelu", {"eager": 20, "triton": 10}),
        case("gelu", {"eager": 20, "triton": 5}, time="2027"),
    )
    assert comparison.latest([*new, *old]) == new
    elsewhere = [dataclasses.replace(r, machine="another") for r in old]
    assert comparison.latest([*new, *elsewhere]) == [*new, *elsewhere]
    computed = [dataclasses.replace(r, kind="computed") for r in old]
    assert comparison.latest([*new, *computed]) == [*new, *computed]


def test_ours_are_compared_with_eager_and_the_fastest_peer() -> None:
    rows = case("gelu", {"eager": 20.0, "compile": 8.0, "liger": 9.0, "triton": 10.0, "native": 25.0})
    native, triton = comparison.compare(rows)
    assert (native.row.contender, triton.row.contender) == ("native", "triton")  # the worst first
    assert triton.over_baseline is not None and triton.over_peer is not None and triton.peer is not None
    assert triton.over_baseline.median == 2.0 and triton.over_baseline.verdict == "faster"
    assert triton.peer.contender == "compile"
    assert triton.over_peer.median == pytest.approx(0.8) and triton.over_peer.verdict == "slower"
    assert triton.loses and native.loses
    level = comparison.compare(case("gelu", {"eager": 20.0, "triton": 20.2}))[0]
    assert level.intervals[0].verdict == "level" and not level.loses


def test_peers_of_another_run_are_compared_by_their_ratios() -> None:
    ours = case("gelu", {"eager": 20.0, "triton": 10.0})
    peer = case("gelu", {"eager": 40.0, "compile-max-autotune": 16.0}, run="later", time="2027")[1]
    found = comparison.compare([*ours, peer])[0]
    assert found.over_peer is not None
    assert found.over_peer.median == pytest.approx(2.0 / 2.5)  # 10 against 16 us would say the opposite
    unrelated = dataclasses.replace(peer, baseline=None, ratio=None)
    assert comparison.compare([*ours, unrelated])[0].peer is None


def test_steps_of_other_precisions_are_peers() -> None:
    found = [c for c in comparison.compare(made_up()) if c.row.suite == "train"]
    assert {c.row.contender for c in found} == {"triton-bf16"}
    rows = [r for r in made_up() if r.suite == "train"]
    rows = [dataclasses.replace(r, baseline="eager-autocast") for r in rows]
    assert [c.over_baseline.median for c in comparison.compare(rows) if c.over_baseline] == [
        pytest.approx(1.5)
    ] * 2


# -- the regression view -------------------------------------------------------------------------------------


def changed(factor: float, spread: float = 0.01, **values: Any) -> tuple[list[Row], list[Row]]:
    """Rows before and after `triton` became slower by `factor`, with rounds that spread so much."""
    old = case("gelu", {"eager": 20.0, "triton": 10.0})
    time = 10.0 * factor
    new_times = {"median_us": time, "p20_us": time * (1 - spread), "p80_us": time * (1 + spread)}
    return old, [old[0], dataclasses.replace(old[1], **{**new_times, **values})]


@pytest.mark.parametrize(
    ("factor", "spread", "outcome"),
    [
        (1.10, 0.01, "slower"),
        (1.04, 0.001, "level"),  # within the threshold
        (1.10, 0.09, "level"),  # 10.01 to 11.99 overlaps 9.8 to 10.2
        (0.90, 0.01, "faster"),
    ],
)
def test_a_change_counts_beyond_the_threshold_and_the_spread(
    factor: float, spread: float, outcome: str
) -> None:
    old, new = changed(factor, spread)
    found = regression(new, old, 0.05)
    assert [(c.new.contender, c.outcome) for c in found.of("slower", "faster")] == (
        [] if outcome == "level" else [("triton", outcome)]
    )
    assert found.changes[0].new.contender == "triton" or outcome != "slower"  # the worst first


def test_what_is_no_longer_timed_is_lost() -> None:
    old, new = changed(1.0, median_us=None, p20_us=None, p80_us=None, status="failed", note="illegal address")
    found = regression(new, old, 0.05)
    assert [c.outcome for c in found.changes] == ["lost", "level"]
    assert (
        "lost    ops gelu forward bfloat16 [B=8 T=1024 C=768] triton: ok -> failed (illegal address)"
        in text(found, 0.05)
    )
    assert [c.outcome for c in regression(old, new, 0.05).changes] == ["level", "gained"]


def test_rows_without_a_counterpart_are_counted() -> None:
    old, new = changed(1.0)
    found = regression([*new, row("ops", "dropout_add", "native", 5.0)], old[:1], 0.05)
    assert (len(found.changes), found.only_old, found.only_new) == (1, 0, 2)


def test_unusable_comparisons_are_refused() -> None:
    old, new = changed(1.2)
    with pytest.raises(InputError, match="no row in common"):
        regression([dataclasses.replace(r, operation="rms_norm") for r in new], old, 0.05)
    with pytest.raises(InputError, match="no row in common"):  # measured beside computed
        regression([dataclasses.replace(r, kind="computed") for r in new], old, 0.05)
    elsewhere = [dataclasses.replace(r, machine="other", device_name="NVIDIA L4") for r in new]
    with pytest.raises(
        InputError, match=r"different machines, other .* and made-up .*--allow-different-machines"
    ):
        regression(elsewhere, old, 0.05)
    assert regression(elsewhere, old, 0.05, different_machines=True).of("slower")
    with pytest.raises(InputError, match="several machines in one set of results"):
        regression([*elsewhere, *new], old, 0.05, different_machines=True)
    assert percentage("2.5%") == 0.025
    for wrong in ("5", "0.05", "-5%", "five%"):
        with pytest.raises(
            InputError, match=re.escape(f"--fail-if-slower {wrong!r}: it must be a percentage")
        ):
            percentage(wrong)


def test_exit_status_for_ci(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = changed(1.2)
    old, new = saved(before, tmp_path / "old.csv"), saved(after, tmp_path / "new.csv")
    options = ["--out", str(tmp_path / "out"), "--against"]
    with pytest.raises(SystemExit) as stopped:
        command([str(new), *options, str(old), "--fail-if-slower", "5%"])
    assert stopped.value.code == 1
    out = capsys.readouterr().out
    assert "slower  ops gelu forward bfloat16 [B=8 T=1024 C=768] triton: 10.0 -> 12.0 us (+20.0%)" in out
    assert "What changed" in (tmp_path / "out/index.html").read_text()
    command([str(new), *options, str(old), "--fail-if-slower", "25%"])
    command([str(new), *options, str(old)])  # shows, and does not fail


def test_bad_options(tmp_path: Path) -> None:
    rows = str(saved(made_up()[:1], tmp_path / "rows.csv"))
    with pytest.raises(InputError, match="--fail-if-slower needs --against"):
        command([rows, "--fail-if-slower", "5%"])
    with pytest.raises(InputError, match="no such file"):
        command([str(tmp_path / "absent.csv")])
    with pytest.raises(InputError, match="holds no rows"):
        command([str(saved([], tmp_path / "empty.csv"))])


# -- the page ------------------------------------------------------------------------------------------------


class Outline(HTMLParser):
    """Figures with their badges, ids, and whatever would be fetched."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.fetched: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.ids.append(value)
            reference = name in ("src", "href", "xlink:href", "srcset") and not (value or "").startswith("#")
            if reference or tag in ("link", "iframe"):
                self.fetched.append(f"{tag} {name}={value}")


def test_the_page_stands_alone(report: Path) -> None:
    page = (report / "index.html").read_text()
    outline = Outline(page)
    assert outline.fetched == []
    assert not re.search(r"@import|url\((?!#)", page)
    assert len(outline.ids) == len(set(outline.ids))
    assert not set(LIGHT.values()) & set(re.findall(r"#[0-9a-f]{6}", page.split("</style>", 1)[1]))  # themed
    assert "&lt;made-up driver&gt;" in page and "<made-up driver>" not in page
    assert "differs by 3e-2 &lt;from the reference&gt;" in page and "apex is not installed" in page


def test_every_chart_is_labelled_and_has_its_png(report: Path) -> None:
    page = (report / "index.html").read_text()
    figures = dict(re.findall(r'<figure class="chart" id="([^"]+)">\n<figcaption>(.*?)</figcaption>', page))
    assert {f"{name}.png" for name in figures} == {path.name for path in report.glob("*.png")}
    for name, caption in figures.items():
        badges = re.findall(r'<span class="kind [^"]*">([^<]*)</span>', caption)
        assert badges[0] == ("computed" if "-computed-" in name else "measured"), name
        assert ("limit computed" in badges) == ("measured-limit" in name or "measured-roofline" in name), name
    parts = ("speedup", "limit", "roofline", "train", "ladder", "generate", "computed-speedup")
    assert all(any(part in name for name in figures) for part in parts), figures


def test_losers_come_first(report: Path) -> None:
    page = (report / "index.html").read_text()
    headings = re.findall(r"<h3>(.*?)</h3>", page)
    assert headings[0] == "Where our kernels lose"
    losing = page.split('id="made-up-cuda-losing"')[1].split("</table>")[0]
    first = re.findall(r"<td[^>]*>(.*?)</td>", losing.split("<tbody>")[1].split("</tr>")[0])
    assert first[0] == "layer_norm" and first[4] == "triton"
    chart = page.split('id="made-up-cuda-measured-speedup-forward-eager"')[1].split("</figure>")[0]
    places = [chart.index(f">{operation}<") for operation in ("layer_norm", "gelu", "rms_norm")]
    assert places[0] == min(places)


BROWSE = """
<script>
const block = document.querySelector("#made-up-cuda-operations .table");
const table = block.querySelector("table");
const header = (name) => [...table.tHead.rows[0].cells].find((cell) => cell.textContent === name);
const shown = () => [...table.tBodies[0].rows].filter((row) => !row.hidden);
const column = (cell) => shown().map((row) => row.cells[cell.cellIndex]);
const seen = {sorts: {}, charts: {}};
for (const name of ["contender", "shape", "of limit"].map(header)) {
  const found = [];
  for (let click = 0; click < 2; click++) {
    name.querySelector("button").click();
    found.push([name.getAttribute("aria-sort"), column(name).map((cell) => cell.textContent)]);
  }
  seen.sorts[name.textContent] = found;
}
seen.sorted = table.querySelectorAll("th:not([aria-sort=none])").length;
const filter = block.querySelector("input");
filter.value = "GELU native";
filter.dispatchEvent(new Event("input"));
seen.filtered = column(header("contender")).map((cell) => cell.textContent);
seen.count = block.querySelector(".count").textContent;
for (const figure of document.querySelectorAll("figure")) {
  const box = figure.querySelector("svg").getBoundingClientRect();
  const all = [...figure.querySelectorAll("svg use")];
  const marks = all.filter((mark) => mark.getBoundingClientRect().width > 0);
  seen.charts[figure.id] = [box.width, box.height, marks.length];
}
seen.overflow = document.documentElement.scrollWidth - window.innerWidth;
document.body.innerHTML = document.querySelector("figure").outerHTML;
const result = document.createElement("pre");
result.id = "seen";
result.textContent = JSON.stringify(seen);
document.body.append(result);
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to open the page in (Debian: apt install chromium)")
def test_in_a_browser_charts_are_drawn_and_tables_sort(report: Path, tmp_path: Path) -> None:
    from matplotlib.image import imread

    page = tmp_path / "page.html"
    page.write_text((report / "index.html").read_text().replace("</body>", f"{BROWSE}</body>"))
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--no-first-run",
    ]
    options += [
        f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=600,900",
        "--virtual-time-budget=2000",
    ]
    options += ["--dump-dom", f"--screenshot={tmp_path / 'seen.png'}", page.as_uri()]
    done = subprocess.run([str(CHROMIUM), *options], capture_output=True, text=True, timeout=180)
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    seen = json.loads(html.unescape(found[1]))

    contenders = seen["sorts"]["contender"]
    assert [direction for direction, _ in contenders] == ["ascending", "descending"]
    assert contenders[0][1] == sorted(contenders[0][1]) and len(set(contenders[0][1])) == 4
    assert contenders[1][1] == sorted(contenders[1][1], reverse=True)
    shapes = seen["sorts"]["shape"][0][1]
    assert shapes[0].startswith("B=8 ") and shapes[-1].startswith("B=64 ")  # by number, not by letter
    shares = [float(share.rstrip("%")) for share in seen["sorts"]["of limit"][1][1]]
    assert shares == sorted(shares, reverse=True) and shares[0] > 9 * shares[-1]
    assert seen["sorted"] == 1
    assert seen["filtered"] == ["native"] * 2 and seen["count"] == "2 of 26 rows"

    assert len(seen["charts"]) == len(list(report.glob("*.png")))
    for name, (width, height, _) in seen["charts"].items():
        assert width > 300 and height > 60, name
    assert (
        seen["charts"]["made-up-cuda-measured-speedup-forward-eager"][2] >= 12
    )  # 3 operations, 2 shapes, 2 of ours
    assert seen["overflow"] <= 0  # nothing but tables scrolls sideways

    pixels = imread(tmp_path / "seen.png")[..., :3]
    color = [int(LIGHT["c1"][place : place + 2], 16) / 255 for place in (1, 3, 5)]
    assert (
        abs(pixels - color).max(-1) < 0.1
    ).sum() > 20  # the dots of triton, in the colour of the page's theme
