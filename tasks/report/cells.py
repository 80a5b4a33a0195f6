"""Format metrics, changes and reasons as text for reports, and sort plan lines. No Prefect."""

import json
from collections.abc import Iterable
from html import escape

from compressors.contracts import TARGETS, Estimate, Plan, PlanLine, ScoreUnit, metric
from compressors.contracts.metrics.families import find_metric
from compressors.contracts.metrics.metric import MetricKind
from compressors.lower.findings import GraphAudit
from infra.pages.html import format_count
from infra.printable import one_line
from infra.tensorrt.engines import EARLIER_SPARSITY

_AUDIT_LABELS = {
    "scratch": "scratch memory",
    "scratch_reason": "scratch memory, details",
    "scratch_bytes": "scratch memory, bytes",
    "twin_scratch_bytes": "scratch memory with half the rows, bytes",
    "tables_checked": "tables proven not to be dequantized as a whole",
    "weights_bytes": "weights in the engine, bytes",
    "packed_bytes": "weights as compressed, bytes",
    "layer_types": "layer outputs by type",
    "constant_bytes": "bytes of constants by type",
    "sparsity": "sparse kernels",
    "sparsity_reason": "sparse kernels, details",
}
"""Headings of the fields of ``EngineAudit`` (``infra/tensorrt/engines.py``).

Scratch memory is the temporary memory of a call; the twin is an engine for half the rows.
"""
_AUDIT_OUTCOMES = {
    "flat": "does not depend on the number of rows",
    "grows": "grows with the number of rows",
    **EARLIER_SPARSITY,
}
"""Texts for the outcomes in ``scratch`` and ``sparsity``; others are shown as they are."""


def metric_label(name: str) -> str:
    """Return the heading of a metric in a table; for a metric that is not declared its name."""
    declared = find_metric(name)
    return name.replace("_", " ") if declared is None else declared.heading or declared.label


def target_label(target: str) -> str:
    """Return the name of a target in sentences; for a target that is not declared its name."""
    declared = TARGETS.get(target)
    return target if declared is None else declared.label


def is_ratio(name: str) -> bool:
    """Return whether two models are compared by the ratio of this metric."""
    declared = find_metric(name)
    return declared is not None and declared.compared == "ratio"


def is_kind(name: str, *kinds: MetricKind) -> bool:
    """Return whether a metric is of one of these kinds, such as "quality" or "latency"."""
    declared = find_metric(name)
    return declared is not None and declared.kind in kinds


def format_change(estimate: Estimate, *, ratio: bool) -> str:
    """Format a change and its interval, if any.

    Args:
        estimate: the change.
        ratio: whether the change is a ratio (bytes, latency) or a difference (quality).
    """
    if estimate.low == estimate.high:  # exact numbers, such as bytes, have no interval
        return f"{estimate.point:.2f}x" if ratio else f"{estimate.point:+.5f}"
    if ratio:
        return f"{estimate.point:.2f}x [{estimate.low:.2f}, {estimate.high:.2f}]"
    return f"{estimate.point:+.5f} [{estimate.low:+.5f}, {estimate.high:+.5f}]"


def format_score_change(name: str, estimate: Estimate, unit: ScoreUnit | None) -> str:
    """Format a score change (how much scores differ between two models) and its interval, if any.

    Args:
        name: the metric, such as ``mean_score_change``.
        estimate: its value.
        unit: unit of the scores; ``spread`` is shown as "sd", standard deviations.
    """
    declared = metric(name)
    if declared.is_share:
        return f"{estimate.point:.2%} [{estimate.low:.2%}, {estimate.high:.2%}]"
    suffix = " sd" if declared.in_score_units and unit == "spread" else ""
    style = ".3g" if declared.in_score_units else ".6f"
    values = (estimate.point, estimate.low, estimate.high)
    point, low, high = (f"{value:{style}}" for value in values)
    if estimate.low == estimate.high:
        return f"{point}{suffix}"
    return f"{point}{suffix} [{low}, {high}]"


def format_reason(line: PlanLine) -> str:
    """Format why a unit has its format, with its warning if there is one."""
    return line.reason if line.warning is None else f"{line.reason}. Warning: {line.warning}"


def plan_warnings(plan: Plan) -> list[str]:
    """Return a sentence for each table or layer of a plan that has a warning."""
    return [
        f"Warning about {line.module} ({line.format}): {line.warning}."
        for line in plan.lines
        if line.warning is not None
    ]


def cell(text: str) -> str:
    """Escape text for a cell of a Markdown table, so that it cannot end the cell or become markup.

    Characters that begin HTML, links, images and code are escaped; Markdown shows them unchanged.
    """
    plain = escape(one_line(" ".join(text.split())), quote=False)
    return plain.replace("|", "\\|").replace("`", "&#96;").replace("](", "]&#40;")


def describe_matmuls(audit: GraphAudit) -> str:
    """Describe how many matrix products of an optimized graph are computed in int8."""
    return format_count(audit.int8_products, "int8 matrix product")


def describe_packed_tables(audit: GraphAudit) -> str:
    """Describe how many tables of an optimized graph are smaller than float32.

    Lowering can merge tables of the same format into one, which then counts once
    (``compressors/lower/lookups/merged_tables.py``).
    """
    tables = format_count(audit.packed_tables, "compressed table")
    return f"{tables} (tables merged into one count once)" if audit.packed_tables else tables


def describe_dense_layers(audit: GraphAudit) -> str:
    """Describe how an optimized graph computes dense layers whose stored weights are quantized.

    The kernel reads the quantized weights in every MatMul, or the runtime converts them to float32
    when a session starts, which takes more memory.
    """
    packed, converted = audit.packed_layers, audit.widened_layers
    parts = (
        [f"{format_count(packed, 'dense layer')} computed with quantized weights"] if packed else []
    )
    layers = f"{format_count(converted, 'dense layer')} converted to float32 when a session starts"
    parts.append(layers if converted else "no layer converted to float32")
    return "; ".join(parts)


def audit_heading(field: str) -> str:
    """Return the heading of a field of an engine's audit."""
    return _AUDIT_LABELS.get(field, field.replace("_", " "))


def format_audit_value(field: str, value: object) -> str:
    """Format the value of a field of an engine's audit as readable text."""
    if field in ("scratch", "sparsity") and isinstance(value, str):
        return _AUDIT_OUTCOMES.get(value, value)
    return format_value(value)


def mebibytes(size: int) -> str:
    """Format a number of bytes as whole mebibytes, without the unit."""
    return f"{size / 2**20:,.0f}"


def largest_first(lines: Iterable[PlanLine]) -> list[PlanLine]:
    """Sort plan lines by original bytes, the largest first.

    A table that a step composed of smaller tables is followed by the lines of these tables, which
    have no original bytes.
    """
    all_lines = tuple(lines)
    before = {line.module: line.bytes_before for line in all_lines}

    def sort_key(line: PlanLine) -> tuple[int, str, str]:
        parents = [name for name in before if line.module.startswith(f"{name}.")]
        unit = min(parents, key=len) if parents and not line.bytes_before else line.module
        return -before[unit], unit, line.module

    return sorted(all_lines, key=sort_key)


def format_value(value: object) -> str:
    """Format a JSON value of an order or an audit as readable text."""
    match value:
        case None:
            return "none"
        case str():
            return value
        case int() if not isinstance(value, bool):
            return f"{value:,}"
        case list():
            return ", ".join(map(format_value, value)) or "none"
        case dict():
            return (
                ", ".join(f"{name} {format_value(item)}" for name, item in sorted(value.items()))
                or "none"
            )
    return json.dumps(value)
