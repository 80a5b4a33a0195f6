"""The HTML page of a report: contents of its sections, escaping, and well-formed markup.

The reports are those of ``page_reports.py``, whose numbers are invented. A judgement is the outcome
for one limit.
"""

import json
import re
from html import unescape
from html.parser import HTMLParser

import pytest
from page_reports import (
    HOSTILE,
    JUDGEMENTS,
    PASSED,
    create_artifact,
    create_measurement,
    create_report,
)

from compressors.contracts import Estimate, Limit, Plan, Verdict
from compressors.contracts.reasons import Reason
from compressors.metrics.measured import Number
from compressors.quantize.dense.static_int8 import StaticInt8
from flows.order import Order
from infra.data.expectations import Finding
from tasks.report.page import page
from tasks.report.plan_section import SHOWN_LINES
from tasks.report.tables import markdown, number_rows

# HTML elements without an end tag. Elements of an SVG that end in "/>" go to handle_startendtag.
VOID_ELEMENTS = {"meta", "br", "link", "img", "input"}


class ParsedPage(HTMLParser):
    """Parses the HTML of a page or of a part of it.

    Attributes:
        tags: name and attributes of every start tag, in the order of the page.
        text: all text except style sheets.
        open_tags: names of elements that have not been closed, the outermost first.
        is_balanced: whether every end tag closes the element that was opened last.
    """

    def __init__(self, html):
        super().__init__()
        self.open_tags, self.tags, self.text, self.is_balanced = [], [], "", True
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID_ELEMENTS:
            self.open_tags.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        self.is_balanced &= bool(self.open_tags) and self.open_tags.pop() == tag

    def handle_data(self, data):
        if self.open_tags[-1:] != ["style"]:
            self.text += data

    def attribute_values(self, name):
        """Return the values of an attribute, in the order of the page."""
        return [attrs[name] for _, attrs in self.tags if name in attrs]


def text_of(html):
    return ParsedPage(html).text


def section(html, anchor):
    """Return the HTML of one section of the page.

    Args:
        html: the page.
        anchor: the ``id`` of the section's heading.
    """
    start = html.index(f'<section aria-labelledby="{anchor}">')
    # The sections "failing" and "all" are inside the section "data", so they do not end it.
    end = re.compile(r'<section aria-labelledby="(?!failing|all)|</main>').search(html, start + 1)
    assert end is not None
    return html[start : end.start()]


def limit_rows(html):
    """Return the HTML of each row of the limits table, without the heading row."""
    _before_table, _heading_row, *rows = section(html, "limits").split("<tr>")
    return rows


@pytest.fixture(scope="module")
def html():
    """The page of a rejected order with two targets, of which one was measured."""
    return page(create_report(), PASSED)


def test_page_begins_with_the_verdicts_of_order_and_targets(html):
    top = html[: html.index("<nav")]
    assert "<strong>Rejected</strong>" in top
    assert 'class="verdict broken"' in top
    assert "onnxruntime: size is 250,000 bytes; the limit is &lt;= 200,000 bytes" in top
    assert f"tensorrt-rtx: {Reason('cannot_run')}" in top
    assert "2 of 2" in top  # checks of the data that were evaluated


@pytest.mark.parametrize(
    ("outcome", "css_class"),
    [("accepted", "held"), ("undecided", "unsure"), ("built-unmeasured", "unsure")],
)
def test_banner_has_the_css_class_of_the_outcome(outcome, css_class):
    assert f'<div class="verdict {css_class}">' in page(create_report(outcome=outcome), PASSED)


def test_numbers_section_has_every_row_of_number_rows(html):
    text = text_of(section(html, "numbers"))
    for row in number_rows(create_report()):
        assert "".join(row.values()) in text
    assert "The 20,000 test rows resolve a change of AUC of about 0.0006" in text


def test_limits_section_has_chart_number_and_reason_of_every_limit(html):
    rows = limit_rows(html)[: len(JUDGEMENTS)]
    for row, judgement in zip(rows, JUDGEMENTS, strict=True):
        text = text_of(row)
        assert str(judgement.limit) in text
        assert judgement.reason in text
        assert judgement.outcome in text
        is_measured = judgement.measured is not None
        assert row.count("<svg") == is_measured
        # A rectangle of this CSS class marks the side of the scale that violates the limit.
        assert row.count('<rect class="refused"') == is_measured
    assert "-0.00090[-0.00150, -0.00030]" in text_of(rows[0])  # AUC and its interval


def test_quality_metric_without_a_limit_is_shown_as_no_limit(html):
    # Of the two quality metrics of the report, only log loss has no limit.
    (row,) = limit_rows(html)[len(JUDGEMENTS) :]
    assert "log loss vs baseline<small>lower is better</small>" in row
    assert "no limit" in row


def test_limits_are_listed_as_not_measured_without_a_measurement():
    target = create_report().targets[1]
    verdict = Verdict(
        target="tensorrt-rtx", outcome="built-unmeasured", reasons=(Reason("cannot_run"),)
    )
    unmeasured = create_report(
        targets=(target.model_copy(update={"verdict": verdict}),),
        measurement=None,
        outcome="built-unmeasured",
    )
    html = page(unmeasured, PASSED)
    text = text_of(section(html, "limits"))
    for limit in unmeasured.limits:
        assert str(limit) in text
    assert text.count("not measured") == len(unmeasured.limits)
    assert "Nothing was measured on this machine." in section(html, "latency")


def test_latency_chart_shows_every_latency_as_text(html):
    latency = section(html, "latency")
    measured = create_measurement()
    for number in (*measured.numbers.numbers, *measured.baseline.numbers):
        if "_ms@" in number.metric and number.against == "absolute":
            assert f">{number.estimate.point:.3g}</text>" in latency
    assert latency.count("<svg") == 2  # p50 and p99
    # Each chart has an interval at three batch sizes, before and after.
    assert latency.count('class="whisker') == 2 * 3 * 2
    assert "1.30x" in latency  # the ratio of the median latencies at batch 1


def test_plan_section_lists_every_plan_line_the_largest_first():
    with_many_tables = create_report(tables=200)
    lines = with_many_tables.plan.lines
    html = section(page(with_many_tables, PASSED), "plan")
    shown, folded = html.split("<details>")
    assert shown.count('class="bars"') == SHOWN_LINES
    assert "tables.t0199" in shown  # the largest table
    assert f"<b>{len(lines) - SHOWN_LINES} smaller tables and layers</b>" in folded
    text = text_of(html)
    rows = re.findall(r'<tr><th scope="row"><code>(.*?)</code>', html)
    largest_first = sorted(lines, key=lambda line: (-line.bytes_before, line.module))
    assert list(map(unescape, rows)) == [line.module for line in largest_first]
    for line in lines:
        assert line.module in text
        assert line.reason in text
        assert line.format in text


def test_plan_with_few_lines_is_shown_completely(html):
    assert "<details>" not in section(html, "plan")


def test_page_of_a_thousand_tables_is_smaller_than_600_kb():
    # Each table takes about 400 bytes, everything else less than 100 kB.
    assert len(page(create_report(tables=1000), PASSED)) < 600_000


def test_page_of_an_empty_plan_is_rendered():
    assert "0 bytes of weights" in page(create_report(plan=Plan()), PASSED)


def test_data_section_shows_evaluated_checks_and_failures_before_all_checks():
    failure = Finding(
        split="test",
        column="user",
        rule="id in table",
        success=False,
        observed="3 of 9",
        failing_rows=(4,),
        failing_count=1,
        failing_values=("<99>",),
    )
    failed = PASSED.model_copy(
        update={
            "success": False,
            "evaluated": 3,
            "intended": 4,
            "findings": (*PASSED.findings, failure),
        }
    )
    html = section(page(create_report(), failed), "data")
    assert "Data failed." in html
    assert "3 of 4 intended checks evaluated." in html
    failed_check, all_checks = html.index("3 of 9"), html.index("All checks by split")
    assert failed_check < all_checks < html.index(PASSED.findings[0].observed)
    assert "<code>&lt;99&gt;</code>" in html
    assert "2 of 2 intended checks evaluated." in section(page(create_report(), PASSED), "data")


def test_targets_section_has_parity_and_audit_of_every_target(html):
    targets = section(html, "targets")
    text = text_of(targets)
    for expected in (
        "differ by at most 1.2e-07 (allowed 0.12)",
        "5 int8 matrix products, 9 compressed tables (tables merged into one count once), "
        "145,190 bytes of weights; no layer converted to float32",
        "prices float32 [rows, 4]",
        "This optional target was left out: needs the package <tensorrt>",
    ):
        assert expected in text
    audit_rows = dict(re.findall(r'<th scope="row">(.*?)</th><td>(.*?)</td>', targets))
    expected_rows = {
        "Scratch memory": "not checkable",
        "Scratch memory, bytes": "12,476,416",
        "Scratch memory with half the rows, bytes": "none",
        "Layer outputs by type": "fp16 27, int8 9",
        "Tables proven not to be dequantized as a whole": "none",
    }
    assert expected_rows.items() <= audit_rows.items()


def test_page_and_markdown_show_quantized_layers_and_sparsity_without_effect():
    dense = create_report()
    served, engine = dense.targets
    (graph,) = served.lowering.graphs
    audit = graph.audit.model_copy(update={"packed_layers": 4, "widened_layers": 1})
    graph = graph.model_copy(update={"sparse_layers": ("cross", "out"), "audit": audit})
    lowering = served.lowering.model_copy(update={"graphs": (graph,)})
    sparsity = {"sparsity": "not used", "sparsity_reason": "of 2 layers 2 were eligible"}
    audits = {graph.name: {**engine.audits["model"], **sparsity}}
    targets = (
        served.model_copy(update={"lowering": lowering}),
        engine.model_copy(update={"audits": audits}),
    )
    sparse = dense.model_copy(update={"targets": targets})
    layers = "4 dense layers computed with quantized weights; 1 dense layer converted to float32"
    html = section(page(sparse, PASSED), "targets")
    text = text_of(html)
    for expected in (layers, "2 layers with 2:4 zeros", "2 were eligible"):
        assert expected in text
    assert '<th scope="row">Sparse kernels</th><td>not used' in html
    report_markdown = markdown(sparse)
    for expected in (
        layers,
        "2 layers with 2:4 zeros: no effect, since ONNX Runtime stores",
        "sparse kernels: not used",
    ):
        assert expected in report_markdown
    for rendered in (text_of(section(page(dense, PASSED), "targets")), markdown(dense)):
        assert "2:4 zeros" not in rendered
        assert "sparse kernels" not in rendered.lower()


def test_hashes_section_has_every_artifact_and_the_order(html):
    text = text_of(section(html, "hashes"))
    for letter in "abcdef":  # bundle, compressed, champion, two targets, validation
        assert text.count(create_artifact(letter).sha256) == 2  # the hash and the URI
    assert create_report().order in text
    assert "Champion" not in page(create_report(champion=None), PASSED)


def test_again_section_has_command_and_order(html):
    """The section "again" has what reproduces the report."""
    text = text_of(section(html, "again"))
    reproduction = create_report().reproduction
    assert reproduction.command in text
    assert json.dumps(reproduction.order, indent=1) in text


def test_order_without_equivalent_options_is_shown_as_a_file():
    order = Order(
        model="clicks@1",
        preset="custom",
        steps=(StaticInt8(rows=512),),
        limits=(Limit(metric="auc", against="baseline", at_least=-0.002),),
    )
    custom = create_report(reproduction=order.reproduction("clicks@1"))
    html = section(page(custom, PASSED), "again")
    assert "recpress compress --order order.json" in html
    assert "<details>" not in html
    (order_file,) = re.findall(r"<pre><code>(\{.*?)</code>", html, re.DOTALL)
    assert Order.model_validate_json(unescape(order_file)) == order
    assert '"rows": 512' in markdown(custom)


def test_names_and_texts_of_a_model_are_escaped_in_the_page():
    html = page(create_report(name="<b>n</b>", bundle_version="<i>1</i>"), PASSED)
    parsed = ParsedPage(html)
    # The texts of the report contain these three as tags, and an attribute "onerror".
    assert {tag for tag, _ in parsed.tags}.isdisjoint({"script", "img", "tensorrt"})
    assert not [name for _, attrs in parsed.tags for name in attrs if name.startswith("on")]
    for text in (HOSTILE, "<b>n</b>", "<i>1</i>", "A <b>processor</b>", "no <dense> layer"):
        assert text in parsed.text
    assert f"{HOSTILE}: 8 bytes" in parsed.text  # the tooltip of its bar


def test_hostile_name_is_escaped_in_a_markdown_cell():
    # HOSTILE is the name of a step, whose row has the model after it, and of a module. Both tables
    # have six columns.
    stage, module = [line for line in markdown(create_report()).splitlines() if "alert('" in line]
    for line in (stage, module):
        assert "<" not in line
        assert len(re.findall(r"(?<!\\)\|", line)) == 6 + 1  # separators that are not escaped


def test_page_loads_no_external_resource_and_has_no_script(html):
    parsed = ParsedPage(html)
    assert not [attrs for _, attrs in parsed.tags if {"src", "style", "srcset"} & set(attrs)]
    links = parsed.attribute_values("href")
    assert links
    assert set(links) <= {f"#{anchor}" for anchor in parsed.attribute_values("id")}
    assert not re.search(r"url\(|@import|https?:|<script|<use|xlink", html)
    assert "default-src 'none'" in html


def test_page_is_well_formed_and_labelled_for_screen_readers(html):
    parsed = ParsedPage(html)
    assert parsed.is_balanced
    assert parsed.open_tags == []
    ids = parsed.attribute_values("id")
    assert len(ids) == len(set(ids))
    assert set(parsed.attribute_values("aria-labelledby")) <= set(ids)
    assert all("scope" in attrs for tag, attrs in parsed.tags if tag == "th")
    for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        is_hidden = 'aria-hidden="true"' in svg  # its numbers are in the text next to it
        assert is_hidden or re.match(r'<svg height="\d+" role="img"><title>[^<]+</title>', svg)


def test_page_of_an_equal_report_is_equal(html):
    original = create_report()
    read_back = type(original).model_validate_json(original.model_dump_json())
    assert page(read_back, PASSED) == html


def test_score_change_without_a_limit_is_shown_with_a_chart():
    original = create_report()
    measured = original.measurement
    estimate = Estimate(point=0.999, low=0.998, high=0.9995, rows=100, groups=20)
    number = Number(metric="score_correlation", against="absolute", estimate=estimate)
    numbers = measured.numbers.model_copy(
        update={"numbers": (*measured.numbers.numbers, number), "score_unit": "probability"}
    )
    with_score_change = original.model_copy(
        update={"measurement": measured.model_copy(update={"numbers": numbers})}
    )
    html = section(page(with_score_change, PASSED), "limits")
    assert "score correlation<small>higher is better</small>" in html
    assert "score correlation is 0.999000 [0.998000, 0.999500]; no limit" in html


def test_warning_about_a_unit_is_in_the_plan_section():
    warnings = (Reason("as_written", text="one <scale>"),)
    lines = [line.model_copy(update={"warnings": warnings}) for line in create_report().plan.lines]
    with_warnings = create_report(plan=Plan(lines=tuple(lines)))
    html = section(page(with_warnings, PASSED), "plan")
    assert "Warning: one &lt;scale&gt;" in html
