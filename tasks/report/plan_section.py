"""Render the page's section on the recipe and the bytes of each table and layer. No Prefect."""

from collections.abc import Iterator
from dataclasses import dataclass

from markupsafe import Markup

from compressors.contracts import PlanLine
from infra.pages import pictures
from infra.pages.pictures import BarSegment, Role
from tasks.orchestration.documents import Report
from tasks.report.cells import format_reason, format_value, largest_first

SHOWN_LINES = 20
"""Number of plan lines that are always shown, the largest first; a click shows the others."""
MIN_FOLDED_LINES = 4
"""Fewer lines are not folded: they take about as much space as the text to click on."""


@dataclass(frozen=True)
class RecipeLine:
    """A step of the recipe with its settings, or a remark, whose ``kind`` is None."""

    kind: str | None
    text: str


@dataclass(frozen=True)
class PlanRow:
    """A plan line as text; ``picture`` is the chart of its bytes before and after."""

    module: str
    role: str
    format: str
    picture: Markup
    bytes_before: str
    bytes_after: str
    reason: str


@dataclass(frozen=True)
class FoldedRows:
    """The rows that a click shows.

    Attributes:
        title: how many rows there are.
        note: their bytes before and after, as text.
        lines: the rows.
    """

    title: str
    note: str
    lines: tuple[PlanRow, ...]


@dataclass(frozen=True)
class PlanSection:
    """The recipe, and the stored format of each table and layer.

    Attributes:
        steps: steps of the recipe, and remarks.
        note: the calibration data of the steps.
        keys: legend of the chart: each role (table, dense or other) with its bytes as text.
        picture: chart of all bytes before and after.
        shown: rows of the largest tables and layers.
        fold: the other rows; None if all are shown.
    """

    steps: tuple[RecipeLine, ...]
    note: str
    keys: tuple[tuple[Role, str], ...]
    picture: Markup
    shown: tuple[PlanRow, ...]
    fold: FoldedRows | None


def plan_section(report: Report) -> PlanSection:
    """Return the steps of the recipe and the plan lines, the largest first."""
    lines = largest_first(report.plan.lines)
    shown, folded = lines[:SHOWN_LINES], lines[SHOWN_LINES:]
    if len(folded) < MIN_FOLDED_LINES:
        shown, folded = lines, []
    max_bytes = max((max(line.bytes_before, line.bytes_after) for line in lines), default=0)
    fold = None
    if folded:
        before = sum(line.bytes_before for line in folded)
        after = sum(line.bytes_after for line in folded)
        fold = FoldedRows(
            title=f"{len(folded):,} smaller tables and layers",
            note=f"{before:,} to {after:,} bytes",
            lines=tuple(_build_plan_row(line, max_bytes) for line in folded),
        )
    keys, picture = _draw_bytes_chart(report.plan.lines)
    return PlanSection(
        steps=tuple(_describe_recipe_lines(report)),
        note=f"Calibrated on: {report.calibrated_on}.",
        keys=keys,
        picture=picture,
        shown=tuple(_build_plan_row(line, max_bytes) for line in shown),
        fold=fold,
    )


def _describe_recipe_lines(report: Report) -> Iterator[RecipeLine]:
    """Yield a line per step of the recipe, per skipped step, and per remark."""
    for step in report.recipe:
        yield RecipeLine(str(step["kind"]), _format_settings(step))
    for kind, reason in report.idle.items():
        yield RecipeLine(kind, f"was left out: {reason}")
    for remark in report.remarks:
        yield RecipeLine(None, remark)


def _draw_bytes_chart(lines: tuple[PlanLine, ...]) -> tuple[tuple[tuple[Role, str], ...], Markup]:
    """Return the legend (bytes of each role as text) and the chart of all bytes."""
    before = [
        BarSegment(name=line.module, role=line.role, size=line.bytes_before) for line in lines
    ]
    after = [BarSegment(name=line.module, role=line.role, size=line.bytes_after) for line in lines]
    totals = [sum(part.size for part in parts) for parts in (before, after)]
    names: dict[Role, str] = {
        "table": "embedding tables",
        "dense": "dense layers",
        "other": "everything else",
    }
    keys: list[tuple[Role, str]] = []
    for role, name in names.items():
        bytes_before, bytes_after = (
            sum(part.size for part in parts if part.role == role) for parts in (before, after)
        )
        if bytes_before or bytes_after:
            keys.append((role, f"{name}: {bytes_before:,} to {bytes_after:,} bytes"))
    picture = Markup(
        pictures.draw_composition(
            [
                (f"before: {totals[0]:,} bytes of weights", before),
                (f"after: {totals[1]:,} bytes", after),
            ],
            f"Bytes of weights by table and layer: {totals[0]:,} before, {totals[1]:,} after",
        )
    )
    return tuple(keys), picture


def _build_plan_row(line: PlanLine, max_bytes: int) -> PlanRow:
    """Format a plan line; ``max_bytes`` is the scale of its chart."""
    return PlanRow(
        module=line.module,
        role=line.role,
        format=line.format,
        picture=Markup(
            pictures.draw_pair(line.bytes_before, line.bytes_after, max_bytes, line.role)
        ),
        bytes_before=f"{line.bytes_before:,}",
        bytes_after=f"{line.bytes_after:,}",
        reason=format_reason(line),
    )


def _format_settings(step: dict[str, object]) -> str:
    return ", ".join(
        f"{name} {format_value(value)}" for name, value in step.items() if name != "kind"
    )
