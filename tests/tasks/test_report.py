"""The report of an order as rows of numbers and as Markdown.

The column ``before`` is the untouched model, the columns named like targets are the results, and
``change`` is the first result compared with ``before``: a difference, or a ratio such as 0.80x.
The reports are those of ``reports.py``, whose numbers are invented. A stage is the model after a
step of the recipe. Test rows "resolve" a change that is large enough to be detected with them.
"""

from pathlib import Path

import pytest
from reports import create_report

from compressors.contracts import Estimate, Outcome, Plan, TargetName
from compressors.contracts.reasons import Reason
from compressors.metrics.measured import Number
from tasks.orchestration.documents import Finished, Report, Stage, StageQuality, read_report
from tasks.orchestration.order_records import build_finished_key
from tasks.orchestration.workspace import store
from tasks.report.stages import stage_rows
from tasks.report.tables import describe_resolution, list_remarks, markdown, number_rows

OUTCOMES: dict[TargetName, Outcome] = {
    "onnxruntime": "accepted",
    "tensorrt-rtx": "built-unmeasured",
}


@pytest.fixture
def order_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Report:
    """A report with one measured and one unmeasured target."""
    monkeypatch.setenv("RECPRESS_HOME", str(tmp_path / "recpress"))
    return create_report(tmp_path, "a" * 64, OUTCOMES)


def find_row(order_report: Report, what: str) -> dict[str, str]:
    """Return the row of ``number_rows`` with this text in its first column."""
    return next(line for line in number_rows(order_report) if line["what"] == what)


def test_number_rows_have_measurements_and_a_dash_for_unmeasured_targets(
    order_report: Report,
) -> None:
    assert find_row(order_report, "AUC") == {
        "what": "AUC",
        "before": "0.75050",
        "onnxruntime": "0.75000",
        "tensorrt-rtx": "-",
        "change": "-0.00050 [-0.00170, +0.00070]",
    }
    assert find_row(order_report, "p99 ms, batch 64") == {
        "what": "p99 ms, batch 64",
        "before": "0.625",
        "onnxruntime": "0.500",
        "tensorrt-rtx": "-",
        "change": "0.80x [0.70, 0.90]",
    }


def test_number_rows_have_served_bytes_and_bytes_of_weights(order_report: Report) -> None:
    served = find_row(order_report, "bytes served")
    assert (served["before"], served["onnxruntime"], served["change"]) == ("1,000", "400", "0.40x")
    assert find_row(order_report, "bytes of weights")["change"] == "0.30x"


def test_number_rows_have_the_same_columns(order_report: Report) -> None:
    assert len({tuple(line) for line in number_rows(order_report)}) == 1


def test_resolution_states_the_smallest_detectable_change(order_report: Report) -> None:
    assert "1,234 test rows resolve a change of AUC of about 0.0012" in describe_resolution(
        order_report
    )


def test_report_without_a_measurement_has_no_quality_numbers(order_report: Report) -> None:
    unmeasured = order_report.model_copy(update={"measurement": None})
    assert describe_resolution(unmeasured) == "Nothing was measured on this machine."
    headings = {line["what"] for line in number_rows(unmeasured)}
    assert headings == {"bytes served", "bytes of weights"}
    assert "AUC" not in markdown(unmeasured)


def test_markdown_has_verdicts_limits_plan_and_artifacts(order_report: Report) -> None:
    skipped = order_report.model_copy(update={"skipped": {"tensorrt": "not installed"}})
    page = markdown(skipped)
    for text in (
        "# m 1: accepted",
        "a" * 64,
        "| onnxruntime | accepted | the gate said accepted |",
        "| tensorrt-rtx | built-unmeasured |",
        "| tensorrt | left out (optional) | not installed |",
        "- `auc vs baseline >= -0.002`",
        "| user | table | rowwise_int8 | 1,000 | 300 | rowwise_int8 as ordered |",
        order_report.source.uri,
        "calibrated on: train (10 rows)",
        "measured on a processor, 2 cores",
    ):
        assert text in page, text


def test_reason_with_pipes_and_line_ends_stays_in_one_markdown_cell(order_report: Report) -> None:
    """Messages of engine builders can contain pipes and line ends."""
    page = markdown(order_report.model_copy(update={"skipped": {"tensorrt": "a | b\nc"}}))
    line = next(line for line in page.splitlines() if line.startswith("| tensorrt |"))
    # Without the escaped pipe, three cells have four separators, which give five parts.
    parts = line.replace("\\|", "").split("|")
    assert len(parts) == 5, line
    assert "c" in line


def test_effect_of_a_step_is_the_change_from_the_previous_stage(order_report: Report) -> None:
    assert "Effect of each step" not in markdown(order_report)
    change_of_quality = Estimate(point=-0.002, low=-0.003, high=-0.001, rows=9)
    stages = tuple(
        Stage(
            step=step,
            bundle=order_report.source,
            bytes=size,
            quality=Estimate(point=quality, low=quality, high=quality),
            change=change,
        )
        for step, size, quality, change in (
            ("as trained", 1000, 0.75, None),
            ("channels", 400, 0.748, change_of_quality),
        )
    )
    page = markdown(order_report.model_copy(update={"stages": stages}))
    assert "| as trained | 1,000 | 1.00x | 0.75000 |  |  |" in page
    assert ("| channels | 400 | 0.40x | 0.74800 | -600 | -0.00200 [-0.00300, -0.00100] |") in page


def test_effect_of_a_step_is_shown_for_each_of_several_outputs(order_report: Report) -> None:
    def estimate(point: float) -> Estimate:
        return Estimate(point=point, low=point, high=point)

    stages = tuple(
        Stage(
            step=step,
            bundle=order_report.source,
            bytes=1000,
            quality=estimate(0.75),
            change=change and estimate(-0.001),
            other_outputs={
                "auc[buy]": StageQuality(
                    quality=estimate(0.625), change=change and estimate(-0.002)
                )
            },
        )
        for step, change in (("as trained", None), ("channels", True))
    )
    changes = {"stages": stages, "metric": "auc[click]", "other_metrics": ("auc[buy]",)}
    rows = stage_rows(order_report.model_copy(update=changes))
    assert rows[1] == {
        "after": "channels",
        "bytes": "1,000",
        "share": "1.00x",
        "AUC of click": "0.75000",
        "AUC of buy": "0.62500",
        "change in AUC of click": "-0.00100",
        "change in AUC of buy": "-0.00200",
    }


def test_report_of_a_stored_release_equals_the_report(order_report: Report, tmp_path: Path) -> None:
    folder = tmp_path / "release"
    folder.mkdir()
    (folder / "report.json").write_text(order_report.model_dump_json())
    release = store().put(folder)
    assert read_report(release) == order_report
    finished = Finished(
        report=order_report, release=release, version="3", registry="sqlite:///r.db"
    )
    assert build_finished_key(order_report.order) == f"orders/{'a' * 64}.json"
    assert finished.fetch_command() == (
        "recpress registry fetch m --version 3 --target onnxruntime --into ./m"
    )


def with_score_changes(order_report: Report) -> Report:
    """Add score changes, as of a ranking order, to a report."""
    assert order_report.measurement is not None

    def number(metric: str, point: float, half_width: float) -> Number:
        low, high = point - half_width, point + half_width
        estimate = Estimate(point=point, low=low, high=high, rows=1234, groups=120)
        return Number(metric=metric, against="absolute", estimate=estimate)

    numbers = order_report.measurement.numbers
    changed = numbers.model_copy(
        update={
            "score_unit": "spread",  # score changes are in standard deviations of the scores
            "numbers": (
                *numbers.numbers,
                number("score_correlation", 0.9995, 0.0001),
                number("mean_score_change", 0.01, 0.002),
                number("max_score_change", 0.2, 0),
                number("changed_top1", 0.05, 0.02),
            ),
        }
    )
    measurement = order_report.measurement.model_copy(update={"numbers": changed})
    return order_report.model_copy(update={"measurement": measurement})


def test_number_rows_have_score_changes_with_intervals(order_report: Report) -> None:
    changed = with_score_changes(order_report)
    assert {line["what"]: line["change"] for line in number_rows(changed)[-4:]} == {
        "score correlation": "0.999500 [0.999400, 0.999600]",
        "mean score change": "0.01 sd [0.008, 0.012]",
        "largest score change": "0.2 sd",
        "changed top-1": "5.00% [3.00%, 7.00%]",
    }
    assert len({tuple(line) for line in number_rows(changed)}) == 1
    assert "| changed top-1 |" in markdown(changed)


def test_plan_warning_is_a_remark_and_in_the_plan_table(order_report: Report) -> None:
    warning = Reason("as_written", text="inputs | of <different> range")
    line = order_report.plan.lines[0].model_copy(update={"warnings": (warning,)})
    warned = order_report.model_copy(update={"plan": Plan(lines=(line,))})
    assert "Warning about user (rowwise_int8): inputs | of <different> range." in list_remarks(
        warned
    )
    assert "as ordered. Warning: inputs \\| of &lt;different&gt; range |" in markdown(warned)


def test_resolution_names_the_groups_or_the_reason_why_no_change_is_detected(
    order_report: Report,
) -> None:
    assert order_report.measurement is not None

    def resolution_with(**fields: object) -> str:
        assert order_report.measurement is not None
        numbers = tuple(
            number.model_copy(update={"estimate": number.estimate.model_copy(update=fields)})
            for number in order_report.measurement.numbers.numbers
        )
        changed = order_report.measurement.numbers.model_copy(update={"numbers": numbers})
        measurement = order_report.measurement.model_copy(update={"numbers": changed})
        return describe_resolution(order_report.model_copy(update={"measurement": measurement}))

    assert "1,234 test rows of 1,200 groups resolve a change" in resolution_with(groups=1200)
    few = resolution_with(
        groups=3, unresolved="3 groups in the data; an interval needs at least 10"
    )
    assert few == (
        "The 1,234 test rows resolve no change of AUC: 3 groups in the data; an interval needs at "
        "least 10."
    )
