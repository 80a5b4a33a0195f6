"""Format metrics and changes for reports, and order them. No Prefect."""

import json
from collections.abc import Iterable
from html import escape

from compressors.contracts import TARGETS, Estimate, Plan, PlanLine, ScoreUnit, metric
from compressors.contracts.metrics.families import find_metric
from compressors.contracts.metrics.metric import MetricKind
from compressors.lower.findings import GraphAudit
from infra.pages.html import many
from infra.printable import one_line


def label(name: str) -> str:
    """Format the name of a metric for a table; a metric without a declaration as it is."""
    found = find_metric(name)
    return name.replace("_", " ") if found is None else found.heading or found.label


def label_of(target: str) -> str:
    """Return a target's name in sentences; a target without a declaration as it is."""
    found = TARGETS.get(target)
    return target if found is None else found.label


def is_ratio(name: str) -> bool:
    """Whether two models are compared by the ratio of this metric."""
    found = find_metric(name)
    return found is not None and found.compared == "ratio"


def is_kind(name: str, *kinds: MetricKind) -> bool:
    """Whether a metric is of one of these kinds."""
    found = find_metric(name)
    return found is not None and found.kind in kinds


def change_of(estimate: Estimate, *, ratio: bool) -> str:
    """Format a change and its interval, if any: a ratio, or a signed difference for quality."""
    if estimate.low == estimate.high:  # exact, such as bytes
        return f"{estimate.point:.2f}x" if ratio else f"{estimate.point:+.5f}"
    if ratio:
        return f"{estimate.point:.2f}x [{estimate.low:.2f}, {estimate.high:.2f}]"
    return f"{estimate.point:+.5f} [{estimate.low:+.5f}, {estimate.high:+.5f}]"


def score_change_of(name: str, estimate: Estimate, unit: ScoreUnit | None) -> str:
    """Format a score change and its interval, if any; ``sd`` means standard deviations."""
    declared = metric(name)
    if declared.is_share:
        return f"{estimate.point:.2%} [{estimate.low:.2%}, {estimate.high:.2%}]"
    after = " sd" if declared.in_score_units and unit == "spread" else ""
    style = ".3g" if declared.in_score_units else ".6f"
    point, low, high = (f"{value:{style}}" for value in _ends(estimate))
    if estimate.low == estimate.high:
        return f"{point}{after}"
    return f"{point}{after} [{low}, {high}]"


def _ends(estimate: Estimate) -> tuple[float, float, float]:
    return estimate.point, estimate.low, estimate.high


def reason_and_warning(line: PlanLine) -> str:
    """Format why a unit is stored in its format, and its warning if there is one."""
    return line.reason if line.warning is None else f"{line.reason}. Warning: {line.warning}"


def plan_warnings(plan: Plan) -> list[str]:
    """List the warnings of a plan, one sentence for each table or layer that has one."""
    return [
        f"Warning about {line.module} ({line.format}): {line.warning}."
        for line in plan.lines
        if line.warning is not None
    ]


def cell(text: str) -> str:
    """Escape text for a table cell, so that it cannot end the cell or become HTML or markup.

    Links, pictures and code are written as HTML entities, which Markdown shows as the characters.
    """
    plain = escape(one_line(" ".join(text.split())), quote=False)
    return plain.replace("|", "\\|").replace("`", "&#96;").replace("](", "]&#40;")


def packed(audit: GraphAudit) -> str:
    """Count packed tables of an optimized graph; tables in one lookup count as one."""
    tables = many(audit.packed_tables, "packed table")
    return f"{tables} (alike ones count once)" if audit.packed_tables else tables


def widened(audit: GraphAudit) -> str:
    """Describe the packed dense layers of an optimized graph."""
    kept, wide = audit.packed_layers, audit.widened_layers
    parts = [f"{many(kept, 'dense layer')} multiplied by codes as stored"] if kept else []
    floats = f"{many(wide, 'dense layer')} float32 once a session starts"
    parts.append(floats if wide else "nothing widened")
    return "; ".join(parts)


def mebibytes(size: int) -> str:
    """Format a size in mebibytes."""
    return f"{size / 2**20:,.0f}"


def largest_first(lines: Iterable[PlanLine]) -> list[PlanLine]:
    """Sort lines by original bytes, each followed by the tables that now compose it."""
    listed = tuple(lines)
    before = {line.module: line.bytes_before for line in listed}

    def place(line: PlanLine) -> tuple[int, str, str]:
        owners = [name for name in before if line.module.startswith(f"{name}.")]
        whole = min(owners, key=len) if owners and not line.bytes_before else line.module
        return -before[whole], whole, line.module

    return sorted(listed, key=place)


def as_text(value: object) -> str:
    """Format a value of an order or an audit for people."""
    match value:
        case None:
            return "none"
        case str():
            return value
        case int() if not isinstance(value, bool):
            return f"{value:,}"
        case list():
            return ", ".join(map(as_text, value)) or "none"
        case dict():
            return (
                ", ".join(f"{name} {as_text(item)}" for name, item in sorted(value.items()))
                or "none"
            )
    return json.dumps(value)
