import json
import re
from html import unescape
from html.parser import HTMLParser

import pytest
from page_reports import HOSTILE, JUDGEMENTS, PASSED, artifact, measurement, report

from compressors.contracts import Estimate, Limit, Plan, Verdict
from compressors.contracts.reasons import Reason
from compressors.metrics.judge import Number
from compressors.quantize.dense.static_int8 import StaticInt8
from flows.order import Order
from infra.data.expectations import Finding
from tasks.report.page import page
from tasks.report.plan_section import SHOWN_LINES
from tasks.report.tables import markdown, number_rows

# Elements without an end tag. Shapes of an SVG, <rect .../>, are handled by handle_startendtag.
VOID = {"meta", "br", "link", "img", "input"}


class Tree(HTMLParser):
    """Parses HTML into tags and visible text; ``balanced`` if every tag is closed correctly."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.text, self.balanced = [], [], "", True
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        self.balanced &= bool(self.open) and self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text += data

    def attributes(self, name):
        return [attrs[name] for _, attrs in self.tags if name in attrs]


def section(html, anchor):
    """Return the HTML of one section of the page."""
    start = html.index(f'<section aria-labelledby="{anchor}">')
    # The sections "failing" and "all" are inside the section "data".
    end = re.compile(r'<section aria-labelledby="(?!failing|all)|</main>').search(html, start + 1)
    assert end is not None
    return html[start : end.start()]


@pytest.fixture(scope="module")
def html():
    return page(report(), PASSED)


def test_page_begins_with_the_verdicts_of_order_and_targets(html):
    top = html[: html.index("<nav")]
    assert "<strong>Rejected</strong>" in top
    assert 'class="verdict broken"' in top
    assert "onnxruntime: size is 250,000 bytes; the limit is &lt;= 200,000 bytes" in top
    assert f"tensorrt-rtx: {Reason('cannot_run')}" in top
    assert "2 of 2" in top


@pytest.mark.parametrize(
    ("outcome", "tone"),
    [("accepted", "held"), ("undecided", "unsure"), ("built-unmeasured", "unsure")],
)
def test_banner_has_the_colour_of_the_outcome(outcome, tone):
    assert f'<div class="verdict {tone}">' in page(report(outcome=outcome), PASSED)


def test_numbers_section_has_every_row_of_headline(html):
    text = Tree(section(html, "numbers")).text
    for row in number_rows(report()):
        assert "".join(row.values()) in text
    assert "The 20,000 test rows resolve a change of AUC of about 0.0006" in text


def test_limits_section_has_chart_number_and_reason_of_every_limit(html):
    rows = section(html, "limits").split("<tr>")[2:]
    for row, item in zip(rows, JUDGEMENTS, strict=False):
        text = Tree(row).text
        assert str(item.limit) in text
        assert item.reason in text
        assert item.outcome in text
        assert row.count("<svg") == (item.measured is not None)
    assert "-0.00090[-0.00150, -0.00030]" in Tree(rows[0]).text
    assert ["refused" in row for row in rows[:4]] == [True, True, True, False]


def test_quality_metric_without_a_limit_is_shown_as_no_limit(html):
    rows = section(html, "limits").split("<tr>")[2 + len(JUDGEMENTS) :]
    (row,) = rows  # only log loss has no limit against the baseline
    assert "log loss vs baselinelower is better" in Tree(row).text
    assert "no limit" in row


def test_limits_are_listed_as_not_measured_without_a_measurement():
    target = report().targets[1]
    verdict = Verdict(
        target="tensorrt-rtx", outcome="built-unmeasured", reasons=(Reason("cannot_run"),)
    )
    unmeasured = report(
        targets=(target.model_copy(update={"verdict": verdict}),),
        measurement=None,
        outcome="built-unmeasured",
    )
    html = page(unmeasured, PASSED)
    text = Tree(section(html, "limits")).text
    for limit in unmeasured.limits:
        assert f"{limit}" in text
    assert text.count("not measured") == len(unmeasured.limits)
    assert "Nothing was measured on this machine." in section(html, "latency")


def test_latency_chart_shows_every_latency_as_text(html):
    latency = section(html, "latency")
    measured = measurement()
    for number in (*measured.numbers.numbers, *measured.baseline.numbers):
        if "_ms@" in number.metric and number.against == "absolute":
            assert f">{number.estimate.point:.3g}</text>" in latency
    assert latency.count("<svg") == 2
    assert latency.count('class="whisker') == 12
    assert "1.30x" in latency


def test_plan_section_lists_every_plan_line_the_largest_first():
    lines = report(200).plan.lines
    html = section(page(report(200), PASSED), "plan")
    shown, folded = html.split("<details>")
    assert shown.count('class="bars"') == SHOWN_LINES
    assert "tables.t0199" in shown
    assert f"<b>{len(lines) - SHOWN_LINES} smaller ones</b>" in folded
    text = Tree(html).text
    rows = re.findall(r'<tr><th scope="row"><code>(.*?)</code>', html)
    largest_first = sorted(lines, key=lambda line: (-line.bytes_before, line.module))
    assert list(map(unescape, rows)) == [line.module for line in largest_first]
    for line in lines:
        assert line.module in text
        assert line.reason in text
        assert line.format in text


def test_short_plan_is_shown_without_a_fold(html):
    assert "<details>" not in section(html, "plan")


def test_page_of_a_thousand_tables_is_smaller_than_600_kb():
    assert len(page(report(1000), PASSED)) < 600_000  # about 400 bytes per table


def test_page_of_an_empty_plan_is_rendered():
    assert "0 bytes of weights" in page(report(plan=Plan()), PASSED)


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
    html = section(page(report(), failed), "data")
    assert "Data failed." in html
    assert "3 of 4 intended checks evaluated." in html
    assert html.index("3 of 9") < html.index("All checks by split") < html.index("all held")
    assert "<code>&lt;99&gt;</code>" in html
    assert "2 of 2 intended checks evaluated." in section(page(report(), PASSED), "data")


def test_targets_section_has_parity_and_audit_of_every_target(html):
    text = Tree(section(html, "targets")).text
    for words in (
        "differ by at most 1.2e-07 (allowed 0.12)",
        "5 int8 products, 9 packed tables (merged tables count once), 145,190 bytes of weights; "
        "no layer converted to float32",
        "Scratch bytes12,476,416",
        "Twin scratch bytesnone",
        "Layer typesfp16 27, int8 9",
        "Tables checkednone",
        "prices float32 [rows, 4]",
        "This optional target was left out: needs the package <tensorrt>",
    ):
        assert words in text


def test_page_and_markdown_show_sparsity_without_gain_and_packed_layers():
    dense = report()
    (graph,) = dense.targets[0].lowering.graphs
    audit = graph.audit.model_copy(update={"packed_layers": 4, "widened_layers": 1})
    graph = graph.model_copy(update={"sparse_layers": ("cross", "out"), "audit": audit})
    lowering = dense.targets[0].lowering.model_copy(update={"graphs": (graph,)})
    first = dense.targets[0].model_copy(update={"lowering": lowering})
    sparsity = {"sparsity": "did not pay", "sparsity_reason": "of 2 layers 2 were eligible"}
    audits = {graph.name: {**dense.targets[1].audits["model"], **sparsity}}
    second = dense.targets[1].model_copy(update={"audits": audits})
    sparse = dense.model_copy(update={"targets": (first, second)})
    packed = "4 dense layers multiplied by codes as stored; 1 dense layer converted to float32"
    text = Tree(section(page(sparse, PASSED), "targets")).text
    for words in (packed, "2 layers with 2:4 zeros", "Sparsitydid not pay", "2 were eligible"):
        assert words in text
    lines = markdown(sparse)
    assert packed in lines
    assert "2 layers with 2:4 zeros: did not pay, since ONNX Runtime stores" in lines
    assert "sparsity: did not pay" in lines
    text_of_dense = Tree(section(page(dense, PASSED), "targets")).text
    assert "parsity" not in text_of_dense
    assert "sparsity" not in markdown(dense)


def test_hashes_section_has_every_artifact_and_the_order(html):
    text = Tree(section(html, "hashes")).text
    for letter in "abcdef":  # bundle, compressed, champion, two targets, validation
        assert text.count(artifact(letter).sha256) == 2  # the hash and the URI
    assert report().order in text
    assert "Champion" not in page(report(champion=None), PASSED)


def test_again_section_has_command_and_order(html):
    text = Tree(section(html, "again")).text
    reproduction = report().reproduction
    assert reproduction.command in text
    assert json.dumps(reproduction.order, indent=1) in text


def test_order_without_equivalent_options_is_shown_as_a_file():
    order = Order(
        model="clicks@1",
        preset="custom",
        steps=(StaticInt8(rows=512),),
        limits=(Limit(metric="auc", against="baseline", at_least=-0.002),),
    )
    custom = report(reproduction=order.reproduction("clicks@1"))
    html = section(page(custom, PASSED), "again")
    assert "recpress compress --order order.json" in html
    assert "<details>" not in html
    (order_file,) = re.findall(r"<pre><code>(\{.*?)</code>", html, re.DOTALL)
    assert Order.model_validate_json(unescape(order_file)) == order
    assert '"rows": 512' in markdown(custom)


def test_names_and_texts_of_a_model_are_escaped_in_the_page():
    html = page(report(name="<b>n</b>", bundle_version="<i>1</i>"), PASSED)
    tree = Tree(html)
    assert {tag for tag, _ in tree.tags}.isdisjoint({"script", "img", "tensorrt"})
    assert not [name for _, attrs in tree.tags for name in attrs if name.startswith("on")]
    for text in (HOSTILE, "<b>n</b>", "<i>1</i>", "A <b>processor</b>", "no <dense> layer"):
        assert text in tree.text
    assert f"{HOSTILE}: 8 bytes" in tree.text  # the tooltip of its bar


def test_hostile_name_is_escaped_in_a_markdown_cell():
    lines = [line for line in markdown(report()).splitlines() if "table" in line]
    stage, module = [line for line in lines if "alert('" in line]
    for line in (stage, module):
        assert "<" not in line
        assert len(re.findall(r"(?<!\\)\|", line)) == 7  # six cells


def test_page_loads_no_external_resource_and_has_no_script(html):
    tree = Tree(html)
    assert not [attrs for _, attrs in tree.tags if {"src", "style", "srcset"} & set(attrs)]
    links = tree.attributes("href")
    assert links
    assert set(links) <= {f"#{anchor}" for anchor in tree.attributes("id")}
    assert not re.search(r"url\(|@import|https?:|<script|<use|xlink", html)
    assert "default-src 'none'" in html


def test_page_is_well_formed_and_labelled_for_screen_readers(html):
    tree = Tree(html)
    assert tree.balanced
    assert tree.open == []
    ids = tree.attributes("id")
    assert len(ids) == len(set(ids))
    assert set(tree.attributes("aria-labelledby")) <= set(ids)
    assert all("scope" in attrs for tag, attrs in tree.tags if tag == "th")
    for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        is_hidden = 'aria-hidden="true"' in svg  # its numbers are in the text next to it
        assert is_hidden or re.match(r'<svg height="\d+" role="img"><title>[^<]+</title>', svg)


def test_page_of_an_equal_report_is_equal(html):
    equal = type(report()).model_validate_json(report().model_dump_json())
    assert page(equal, PASSED) == html


def test_score_change_without_a_limit_is_shown_with_a_chart():
    unchanged = report()
    measured = unchanged.measurement
    estimate = Estimate(point=0.999, low=0.998, high=0.9995, rows=100, groups=20)
    number = Number(metric="score_correlation", against="absolute", estimate=estimate)
    numbers = measured.numbers.model_copy(
        update={"numbers": (*measured.numbers.numbers, number), "score_unit": "probability"}
    )
    changed = unchanged.model_copy(
        update={"measurement": measured.model_copy(update={"numbers": numbers})}
    )
    html = section(page(changed, PASSED), "limits")
    assert "score correlation<small>higher is better</small>" in html
    assert "score correlation is 0.999000 [0.998000, 0.999500]; no limit" in html


def test_warning_about_a_unit_is_in_the_plan_section():
    warnings = (Reason("as_written", text="one <scale>"),)
    lines = [line.model_copy(update={"warnings": warnings}) for line in report().plan.lines]
    with_warnings = report(plan=Plan(lines=tuple(lines)))
    html = section(page(with_warnings, PASSED), "plan")
    assert "Warning: one &lt;scale&gt;" in html
