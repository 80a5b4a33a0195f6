"""Render the report as a table and as Markdown. No Prefect.

The command line and Prefect's pages show the table; the Markdown is stored with the report.
"""

import json

from compressors.contracts import Estimate, Plan
from compressors.contracts.metrics.families import find_metric
from compressors.contracts.metrics.serving import BYTES, MEDIAN
from infra.pages.html import format_count
from infra.printable import printable
from tasks.orchestration.documents import ORDER_FILE, Measurement, Report, TargetReport
from tasks.orchestration.graph_documents import LoweredGraph
from tasks.report.cells import (
    audit_heading,
    cell,
    describe_dense_layers,
    describe_matmuls,
    describe_packed_tables,
    format_audit_value,
    format_change,
    format_reason,
    format_score_change,
    is_kind,
    metric_label,
    plan_warnings,
    target_label,
)
from tasks.report.stages import stage_lines

SLOWER_RATIO = 1.02
"""A remark mentions a batch size if its ratio of median latencies, after to before, is above this.

The lower end of the ratio's interval is compared, so that noise is not mentioned.
"""


def number_rows(report: Report) -> list[dict[str, str]]:
    """Return the table of numbers before and after compression, as rows by column.

    The columns are ``what``, ``before``, one column per target, and ``change``. ``before`` and
    ``change`` are of the first measured target; each other measured target has further columns
    ``before, <target>`` and ``change, <target>``.
    """
    measured = report.measured
    rows = [_build_bytes_row(report), _build_weights_row(report)]
    if not measured:
        return rows
    numbers = next(iter(measured.values()))
    rows += [
        _build_metric_row(report, number.metric)
        for number in numbers.baseline.numbers
        if not is_kind(number.metric, "bytes")
    ]
    rows += [
        _build_metric_row(report, number.metric)
        for number in numbers.numbers.numbers
        if is_kind(number.metric, "score_change")
    ]
    return rows


def markdown(report: Report) -> str:
    """Render the whole report as Markdown."""
    rows = number_rows(report)
    columns = list(rows[0])
    lines = [
        f"# {report.name} {report.bundle_version}: {report.outcome}",
        "",
        f"Order `{report.order}`",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(row.get(column, "") for column in columns) + " |" for row in rows),
        "",
        describe_resolution(report),
        "",
        *(f"- {cell(remark)}" for remark in list_remarks(report)),
        "",
        "## Verdicts",
        "",
        "| target | verdict | why |",
        "|---|---|---|",
        *(
            f"| {t.target} | {t.verdict.outcome} | {cell(t.verdict.reason)} |"
            for t in report.targets
        ),
        *(
            f"| {name} | left out (optional) | {cell(why)} |"
            for name, why in report.skipped.items()
        ),
        "",
        "## Limits",
        "",
        *limit_lines(report),
        *stage_lines(report),
        "",
        "## Plan",
        "",
        "| table or layer | role | stored as | bytes before | after | why |",
        "|---|---|---|---|---|---|",
        *(
            f"| {cell(line.module)} | {line.role} | {line.format} | {line.bytes_before:,} | "
            f"{line.bytes_after:,} | {cell(format_reason(line))} |"
            for line in report.plan.lines
        ),
        "",
        "## Checks of each graph",
        "",
        *_list_graph_checks(report),
        "",
        "## Artifacts",
        "",
        "URIs are relative to the root of the object store.",
        "",
        f"- bundle `{report.source.uri}`",
        f"- compressed bundle `{report.compressed.uri}`",
        f"- validation `{report.validation.uri}` (open validation.html)",
        *(f"- {t.target} `{t.artifact.uri}`" for t in report.targets),
        f"- calibrated on: {report.calibrated_on}",
    ]
    for measurement in report.measured.values():
        machine = measurement.machine
        lines.append(
            f"- measured on {machine.processor}, {machine.cores} cores, {machine.system}, "
            f"{machine.runtime} {machine.version} with {machine.threads} thread(s)"
        )
    reproduction = report.reproduction
    lines += ["", "## Run the order again", "", f"```bash\n{reproduction.command}\n```"]
    if ORDER_FILE in reproduction.command:
        lines += ["", f"```json\n{json.dumps(reproduction.order, indent=1)}\n```"]
    return printable("\n".join(lines) + "\n")


def list_remarks(report: Report) -> list[str]:
    """List remarks on the table of ``number_rows``, one or two sentences each."""
    texts = []
    for target, measurement in report.measured.items():
        runtime = measurement.machine.runtime
        if slower := _list_slower_batches(measurement):
            where = f" in {runtime}" if len(report.measured) > 1 else ""
            texts.append(
                f"Slower than before at batch {', '.join(slower)}{where}: put a limit on p50_ms or "
                f"p99_ms where that matters."
            )
        texts.append(
            f"'{change_column(report, target)}' compares {runtime} with the untouched model in the "
            f"same run."
        )
    if report.measured:
        texts += latency_remarks(report)
    if any(not measurement.machine.int8_dot for measurement in report.measured.values()):
        texts.append(
            "This processor has no int8 dot product instruction, so int8 layers are slower than "
            "on processors with one."
        )
    texts += [
        f"{_describe_engine_contents(target)} {target.lowering.served_packed_bytes:,} bytes of "
        f"weights; the other bytes of the {target.bytes:,} are code, which does not grow with a "
        "table's rows."
        for target in report.targets
        if target.audits
    ]
    texts += shared_weight_remarks(report)
    texts += plan_warnings(report.plan)
    texts += report.remarks
    texts += [f"Step {kind} was left out: {reason}" for kind, reason in report.idle.items()]
    return texts


def _list_slower_batches(measurement: Measurement) -> list[str]:
    """List the batch sizes with a higher median latency than before (``SLOWER_RATIO``)."""
    ratios = [
        (find_metric(number.metric), number.estimate)
        for number in measurement.numbers.numbers
        if number.against == "baseline"
    ]
    return [
        f"{declared.batch} ({ratio.point:.2f}x)"
        for declared, ratio in ratios
        if declared is not None and declared.quantile == MEDIAN and ratio.low > SLOWER_RATIO
    ]


def _describe_engine_contents(target: TargetReport) -> str:
    """Return the beginning of a sentence on the contents of a target's engine or engines."""
    if len(target.lowering.graphs) == 1:
        return f"The {target.target} engine contains"
    return f"The {len(target.lowering.graphs)} {target.target} engines contain"


def shared_weight_remarks(report: Report) -> list[str]:
    """Explain how weights in several graphs are counted; empty if no graphs share weights."""
    first = report.targets[0].lowering
    if not first.repeated_bytes:
        return []
    names = " and ".join(graph.name for graph in first.graphs)
    return [
        f"The graphs {names} share {first.repeated_bytes:,} bytes of weights. Both before and "
        f"after, 'bytes of weights' counts them once, and 'bytes served' counts them in every "
        f"graph."
    ]


def latency_remarks(report: Report) -> list[str]:
    """Explain which of several graphs was timed, and which latencies were not measured."""
    remarks = [
        f"{metric_label(name)} was not measured for {measurement.machine.runtime}: it would have "
        f"taken about {seconds:,.0f} s. It is measured if a limit names it."
        for measurement in report.measured.values()
        for name, seconds in measurement.not_timed.items()
    ]
    names = [graph.name for target in report.targets[:1] for graph in target.lowering.graphs]
    if len(names) == 1:
        return remarks
    return [
        *remarks,
        f"Bytes are of all graphs ({', '.join(names)}). Latency is of the {names[0]} graph alone: "
        f"a request waits for it, while the items' vectors are computed in advance.",
    ]


def limit_lines(report: Report) -> list[str]:
    """List every limit with its outcome, one Markdown line each."""
    judged = [
        (f"{target.target}, " if len(report.measured) > 1 else "", item)
        for target in report.targets
        for item in target.verdict.judgements
    ]
    if not judged:
        return [f"- `{limit}`: not measured here" for limit in report.limits]
    return [f"- {where}`{item.limit}`: {item.outcome}. {item.reason}" for where, item in judged]


def describe_resolution(report: Report) -> str:
    """Return a sentence on the smallest change of the metric that the test rows can detect."""
    if not report.measured:
        return "Nothing was measured on this machine."
    if len(report.measured) == 1:
        return _describe_resolution_of_target(report, *report.measured.values())
    return " ".join(
        f"{measurement.machine.runtime}: {_describe_resolution_of_target(report, measurement)}"
        for measurement in report.measured.values()
    )


def _describe_resolution_of_target(report: Report, measurement: Measurement) -> str:
    """Return the sentences of ``describe_resolution`` for one measured target, one per output."""
    sentences = (_describe_resolution_of_metric(metric, measurement) for metric in report.metrics)
    return " ".join(sentences)


def _describe_resolution_of_metric(metric: str, measurement: Measurement) -> str:
    change = measurement.numbers.of(metric, "baseline")
    # With several outputs, a metric is measured on the rows that have a label for its output.
    count = measurement.rows if change is None or change.rows is None else change.rows
    rows = f"{count:,} test rows"
    if change is not None and change.unresolved is not None:  # why there is no interval
        return f"The {rows} resolve no change of {metric_label(metric)}: {change.unresolved}."
    if change is not None and change.groups is not None:
        rows += f" of {change.groups:,} groups"
    return (
        f"The {rows} resolve a change of {metric_label(metric)} of about "
        f"{measurement.resolves[metric]:.2g} (half the width of its 95 % interval)."
    )


def _list_graph_checks(report: Report) -> list[str]:
    """List the checks of every graph of every target, one line each."""
    lines = []
    for t in report.targets:
        for graph in t.lowering.graphs:
            where = t.target if len(t.lowering.graphs) == 1 else f"{t.target}, {graph.name}"
            audit = t.audits.get(graph.name, {})
            lines += _list_checks_of_graph(where, graph, audit, target_label(t.target))
    return lines


def _list_checks_of_graph(
    where: str, graph: LoweredGraph, audit: dict[str, object], runtime: str
) -> list[str]:
    """List the differences from torch and the results of the audits of one graph.

    Args:
        where: name of the target, with the graph's name if there are several.
        graph: the graph.
        audit: the audit of its engine; empty if it is served without building an engine.
        runtime: name of the runtime.
    """
    parity = graph.rows_parity
    of_output = f" of {parity.output}, the output closest to its limit," if parity.output else ""
    lines = [
        f"- {where}: {graph.output}s{of_output} differ from torch by at most {parity.largest:.2g} "
        f"(root mean square {parity.root_mean_square:.2g}) on {parity.rows} rows"
    ]
    if graph.audit is not None:
        lines.append(
            f"- {where}: optimized graph has {describe_matmuls(graph.audit)} and "
            f"{describe_packed_tables(graph.audit)}; {describe_dense_layers(graph.audit)}"
        )
        if graph.sparse_layers:
            lines.append(
                f"- {where}: {format_count(len(graph.sparse_layers), 'layer')} with 2:4 zeros: no "
                f"effect, since {runtime} stores and multiplies zeros like other weights"
            )
    lines += [
        f"- {where}: {audit_heading(field)}: {format_audit_value(field, audit[field])}"
        for field in (
            "scratch",
            "scratch_reason",
            "weights_bytes",
            "packed_bytes",
            "sparsity",
            "sparsity_reason",
        )
        if audit.get(field) is not None
    ]
    return lines


def change_column(report: Report, target: str) -> str:
    """Return the name of the column with a measured target's change from the untouched model."""
    return "change" if target == next(iter(report.measured), None) else f"change, {target}"


def _build_metric_row(report: Report, metric: str) -> dict[str, str]:
    """Return the row of one metric, by column; a dash means that a target was not measured."""
    cells = {
        target: _format_metric_cells(metric, measurement)
        for target, measurement in report.measured.items()
    }
    has_only_change = is_kind(metric, "score_change")
    row = {"what": metric_label(metric), "before": "", "change": ""}
    after_cells = {t.target: "" if has_only_change else "-" for t in report.targets}
    further: dict[str, str] = {}
    for target, (before, after, change) in cells.items():
        after_cells[target] = after
        if change_column(report, target) in row:
            row |= {"before": before, "change": change}
        else:
            further |= {f"before, {target}": before, f"change, {target}": change}
    return {
        "what": row["what"],
        "before": row["before"],
        **after_cells,
        "change": row["change"],
        **further,
    }


def _format_metric_cells(metric: str, measurement: Measurement) -> tuple[str, str, str]:
    """Return the cells of a metric: before, after and change."""
    numbers = measurement.numbers
    # "absolute" is the value of a model, "baseline" its change from the untouched model.
    after = numbers.of(metric, "absolute")
    if is_kind(metric, "score_change"):
        unit = numbers.find_unit(metric)
        return "", "", "" if after is None else format_score_change(metric, after, unit)
    is_latency = is_kind(metric, "latency")
    before = measurement.baseline.of(metric, "absolute")
    change = numbers.of(metric, "baseline")
    return (
        "-" if before is None else _format_value(before, is_latency),
        "-" if after is None else _format_value(after, is_latency),
        "" if change is None else format_change(change, ratio=is_latency),
    )


def _build_bytes_row(report: Report) -> dict[str, str]:
    """Return the row of the bytes of the served files, by column."""
    first = report.first_measured
    row = {"what": "bytes served", "before": f"{report.baseline_bytes:,}"}
    row |= {t.target: f"{t.bytes:,}" for t in report.targets}
    row["change"] = "" if first is None else f"{first.bytes / report.baseline_bytes:.2f}x"
    for target, measurement in report.other_measurements.items():
        before = measurement.baseline.of(BYTES.name, "absolute")
        change = measurement.numbers.of(BYTES.name, "baseline")
        row[f"before, {target}"] = "-" if before is None else f"{before.point:,.0f}"
        row[f"change, {target}"] = "-" if change is None else f"{change.point:.2f}x"
    return row


def _build_weights_row(report: Report) -> dict[str, str]:
    """Return the row of the bytes of the plan, which are the same for all targets, by column."""
    before, change = report.plan.bytes_before, _compute_ratio(report.plan)
    row = {"what": "bytes of weights", "before": f"{before:,}"}
    row |= {t.target: f"{report.plan.bytes_after:,}" for t in report.targets}
    row["change"] = f"{change:.2f}x"
    for target in report.other_measurements:
        row |= {f"before, {target}": f"{before:,}", f"change, {target}": f"{change:.2f}x"}
    return row


def _compute_ratio(plan: Plan) -> float:
    """Return the bytes of the weights after the recipe as a share of those before."""
    return plan.bytes_after / plan.bytes_before if plan.bytes_before else 1.0


def _format_value(estimate: Estimate, is_latency: bool) -> str:
    return f"{estimate.point:.3f}" if is_latency else f"{estimate.point:.5f}"
