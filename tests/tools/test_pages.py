"""Pages in a real browser: the chart is there, names are text, and nothing else runs."""

import base64
import dataclasses
import hashlib
import math

import pytest
from support import spiky_run
from support.browser import require_browser, visit
from support.spiky_run import BOLD, MARKUP, SCRIPT

from gradclip import ClipByNorm
from gradclip.config import as_config
from gradclip.tools.replay import replay
from gradclip.tools.report import summarize
from gradclip.tools.run import open_run
from gradclip.tools.show_replay import draw_replay
from gradclip.tools.show_report import write_report
from gradclip.tools.trace import Trace, TraceHeader, write_trace

DRIVER = """
setTimeout(() => {
  document.querySelector("[data-scale=linear]").click();
  const marked = chart.data.findIndex((trace) => trace.name === "in the table");
  Plotly.Fx.hover("chart", [{curveNumber: marked, pointNumber: 0}]);
  document.body.dataset.scale = chart.layout.yaxis.type;
}, 1000);
"""


@pytest.fixture(autouse=True)
def browser():
    require_browser()


@pytest.fixture
def report(tmp_path):
    trace = spiky_run.write(tmp_path / "run.trace.jsonl")
    write_report(summarize(open_run(trace)), tmp_path / "report.html")
    return tmp_path / "report.html"


def test_a_report(report):
    page = visit(report)
    assert page.console == []
    assert page.count("svg", "main-svg") > 0
    assert page.count("g", "scatter") >= 7  # norm, limit, clipped, loss, rate, two of events
    assert page.count("img") == page.count("b") == 0
    assert page.count("script") == 3
    for text in (MARKUP, SCRIPT, "log scale", "not finite", "withheld", "max_norm: 2.0"):
        assert text in page.text
    assert "64.0% " + MARKUP in page.text


def test_a_report_in_use(report):
    """Linear scale, a pointer on the spike; and markup that got into the page all the same."""
    code = base64.b64encode(hashlib.sha256(DRIVER.encode()).digest()).decode()
    html = report.read_text(encoding="utf-8").replace("script-src", f"script-src 'sha256-{code}'")
    html = html.replace("</body>", f"{MARKUP}<script>console.error(2)</script></body>")
    html = html.replace("</body>", f"<script>{DRIVER}</script></body>")
    report.write_text(html, encoding="utf-8")
    page = visit(report)
    assert len(page.console) == 3  # the handler, the script, and the picture
    assert all("Content Security Policy" in line for line in page.console)
    (body,) = (attributes for tag, attributes in page.tags if tag == "body")
    assert body["data-scale"] == "linear"
    assert page.count("g", "hoverlayer") == 1
    assert "step 40: norm 10, scaled by 0.2" in page.text
    for text in (f"64.0% {MARKUP}", f"36.0% {BOLD}"):
        assert page.text.count(text) == 2  # the table, and beside the pointer
    assert page.count("b") == 0


def test_a_replay(tmp_path):
    rows = ({"step": i, "grad_norm": math.nan if i < 3 else i % 7 + 1.0} for i in range(200))
    write_trace(tmp_path / "run.jsonl", TraceHeader(), rows)
    names = (MARKUP, SCRIPT, BOLD)
    configs = dict.fromkeys(names, as_config(ClipByNorm(max_norm=5.0)))
    found = replay(Trace.open(tmp_path / "run.jsonl"), configs)
    found = dataclasses.replace(found, notes=(f"A note on {BOLD}",))
    draw_replay(found, f"Replay of {MARKUP}", png=None, html=tmp_path / "replay.html")
    page = visit(tmp_path / "replay.html")
    assert page.console == []
    assert page.count("g", "scatter") >= 10
    assert page.count("img") == page.count("b") == 0
    assert page.count("script") == 3
    for name in names:
        assert f"limit, {name}" in page.text
    assert page.text.count(MARKUP) >= 4  # title, heading, table, legend
    assert f"A note on {BOLD}" in page.text
