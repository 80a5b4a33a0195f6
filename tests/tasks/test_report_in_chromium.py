"""The report's page in Chromium: no errors, and charts and texts that are visible."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from page_reports import PASSED, create_report

from infra.pages.pictures import STYLE
from tasks.report.page import page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="needs a browser: no 'chromium' or 'chromium-browser' on PATH"
)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--v=0",
    "--virtual-time-budget=5000",
)
# A page that shows the report in a frame of a given width, measures its contents, and writes the
# result as JSON into its title, which is read from the document that Chromium prints. ``left`` and
# ``right`` are the distances in pixels of an element from the left and right side of its chart.
FRAME = """<!doctype html><iframe id="f" style="border:0;width:{width}px;height:9000px"></iframe>
<script>
const frame = document.getElementById("f");
frame.onload = () => {{
  const inside = frame.contentDocument;
  const measure = selector => [...inside.querySelectorAll(selector)].map(item => {{
    const box = item.getBoundingClientRect();
    const chart = (item.ownerSVGElement || item).getBoundingClientRect();
    const style = frame.contentWindow.getComputedStyle(item);
    return {{tag: item.tagName, name: item.getAttribute("class"), width: box.width,
      height: box.height, left: box.left - chart.left, right: chart.right - box.right,
      fill: style.fill, stroke: style.stroke, text: item.textContent}};
  }});
  document.title = JSON.stringify({{
    page_width: inside.documentElement.scrollWidth, charts: measure("svg"),
    shapes: measure("svg rect, svg circle, svg line.interval, svg line.curve, svg line.limit"),
    texts: measure("svg text"),
    text_colour: frame.contentWindow.getComputedStyle(inside.body).color,
  }});
}};
frame.srcdoc = {page};
</script>"""


def run_chromium(path: Path, profile: Path, *flags: str) -> tuple[str, str]:
    """Open a page in Chromium and return its standard output and standard error."""
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", *flags, path.as_uri()]
    process = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return process.stdout, process.stderr


def problems(log: str) -> list[str]:
    """Return the lines of a log that report errors of the page."""
    return [line for line in log.splitlines() if "CONSOLE" in line or "Refused to" in line]


def measure_page(folder: Path, width: int, *flags: str) -> dict:
    """Return sizes and colours of the charts, their shapes and texts, as measured by ``FRAME``.

    The page's security policy forbids scripts, so it is removed from the copy that is measured.

    Args:
        folder: folder for the copy and Chromium's profile.
        width: width of the page in pixels.
        flags: further options of Chromium.
    """
    html = re.sub(r"<meta http-equiv[^>]*>", "", page(create_report(40), PASSED))
    path = folder / "frame.html"
    escaped = json.dumps(html).replace("</", "<\\/")
    path.write_text(FRAME.format(width=width, page=escaped))
    dumped, _ = run_chromium(
        path, folder / "profile", "--window-size=1400,1000", "--dump-dom", *flags
    )
    title = re.search(r"<title>(.*?)</title>", dumped, re.DOTALL)
    assert title is not None, "the page did not load"
    return json.loads(title[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> dict:
    """Measurements of a page that is 1200 pixels wide."""
    return measure_page(tmp_path_factory.mktemp("wide"), 1200)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory) -> dict:
    """Measurements of a page that is 360 pixels wide, as on a phone."""
    return measure_page(tmp_path_factory.mktemp("narrow"), 360)


def test_browser_reports_no_problem_with_the_page(tmp_path):
    path = tmp_path / "report.html"
    path.write_text(page(create_report(), PASSED))
    dumped, log = run_chromium(path, tmp_path / "profile", "--dump-dom")
    assert problems(log) == []
    assert "<title>clicks 1: rejected</title>" in dumped
    assert dumped.count("<section") == page(create_report(), PASSED).count("<section")
    # Check that problems are detected: the page's security policy forbids this script.
    with_script = tmp_path / "with_script.html"
    with_script.write_text(
        page(create_report(), PASSED).replace("</main>", "<script>1</script></main>")
    )
    _, log = run_chromium(with_script, tmp_path / "profile", "--dump-dom")
    assert problems(log)


@pytest.mark.parametrize("size", ["wide", "narrow"])
def test_charts_and_their_shapes_are_visible(size, request):
    measured = request.getfixturevalue(size)
    assert len(measured["charts"]) > 10
    for chart in measured["charts"]:
        assert chart["width"] > 100, chart
        assert chart["height"] > 15, chart
    assert len(measured["shapes"]) > 100
    for shape in measured["shapes"]:
        # The box of a horizontal or vertical line has a width or a height of 0.
        assert shape["width"] + shape["height"] > 0.3, shape
        colour = shape["stroke"] if shape["tag"] == "line" else shape["fill"]
        # The style has no pure black, so a black shape has no colour of the style.
        assert colour not in {"none", "rgba(0, 0, 0, 0)", "rgb(0, 0, 0)"}, shape


@pytest.mark.parametrize("size", ["wide", "narrow"])
def test_text_in_charts_is_inside_and_of_readable_size(size, request):
    texts = request.getfixturevalue(size)["texts"]
    assert len(texts) > 20
    for text in texts:
        # A text may extend a little beyond its chart: the cell around it has a padding of 11 px.
        assert text["left"] > -6, text
        assert text["right"] > -6, text
        assert 12 < text["height"] < 24, text


def test_page_is_not_wider_than_the_window(narrow, wide):
    assert narrow["page_width"] <= 360
    assert wide["page_width"] <= 1200


def test_charts_have_other_colours_in_dark_mode(wide, tmp_path):
    # 0 is dark in Chromium's setting.
    dark = measure_page(tmp_path, 1200, "--blink-settings=preferredColorScheme=0")
    assert dark["text_colour"] != wide["text_colour"]
    colours = [{shape["fill"] for shape in measured["shapes"]} for measured in (dark, wide)]
    assert len(colours[0]) >= 5
    # Shapes without a fill in the style, such as lines, have the default, black, or none.
    assert not (colours[0] & colours[1]) - {"rgb(0, 0, 0)", "none"}
    assert "prefers-color-scheme: dark" in STYLE
