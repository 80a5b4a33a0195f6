"""The report page's section on the recipe and the bytes of its plan. No Prefect."""

from collections.abc import Iterator
from dataclasses import dataclass

from markupsafe import Markup

from compressors.contracts import PlanLine
from infra.pages import pictures
from infra.pages.html import many
from infra.pages.pictures import BarSegment, Role
from tasks.orchestration.documents import Report
from tasks.report.cells import as_text, largest_first, reason_and_warning

LARGEST = 20
"""Lines of a plan that are always shown; more are folded away, the largest first."""


@dataclass(frozen=True)
class RecipeLine:
    """A step of the recipe, or a remark about the recipe, which has no kind."""

    kind: str | None
    text: str


@dataclass(frozen=True)
class PlanRow:
    """A table or layer of the plan as text, with the chart of its bytes."""

    module: str
    role: str
    format: str
    picture: Markup
    bytes_before: str
    bytes_after: str
    reason: str


@dataclass(frozen=True)
class Fold:
    """Rows of the plan that a click shows; ``note`` is their bytes as text."""

    title: str
    note: str
    lines: tuple[PlanRow, ...]


@dataclass(frozen=True)
class PlanSection:
    """The recipe, and the stored format of each table and layer.

    Attributes:
        steps: steps of the recipe, and remarks.
        note: the calibration data of the steps.
        keys: the roles in the chart, with their bytes as text.
        picture: chart of all bytes before and after.
        shown: the largest tables and layers.
        fold: the others; None if all are shown.
    """

    steps: tuple[RecipeLine, ...]
    note: str
    keys: tuple[tuple[Role, str], ...]
    picture: Markup
    shown: tuple[PlanRow, ...]
    fold: Fold | None


def plan_section(report: Report) -> PlanSection:
    """Return the steps of the recipe and the plan, its largest tables and layers first."""
    ordered = largest_first(report.plan.lines)
    shown, folded = ordered[:LARGEST], ordered[LARGEST:]
    if len(folded) < 4:  # so few rows are read faster than a fold is opened
        shown, folded = ordered, []
    most = max((max(line.bytes_before, line.bytes_after) for line in ordered), default=0)
    fold = None
    if folded:
        before = sum(line.bytes_before for line in folded)
        after = sum(line.bytes_after for line in folded)
        fold = Fold(
            title=many(len(folded), "smaller one"),
            note=f"{before:,} to {after:,} bytes",
            lines=tuple(_plan_row(line, most) for line in folded),
        )
    keys, picture = _composition(report.plan.lines)
    return PlanSection(
        steps=tuple(_recipe_lines(report)),
        note=f"Calibrated on: {report.calibrated_on}.",
        keys=keys,
        picture=picture,
        shown=tuple(_plan_row(line, most) for line in shown),
        fold=fold,
    )


def _recipe_lines(report: Report) -> Iterator[RecipeLine]:
    for step in report.recipe:
        yield RecipeLine(str(step["kind"]), _settings(step))
    for kind, reason in report.idle.items():
        yield RecipeLine(kind, f"was left out: {reason}")
    for remark in report.remarks:
        yield RecipeLine(None, remark)


def _composition(lines: tuple[PlanLine, ...]) -> tuple[tuple[tuple[Role, str], ...], Markup]:
    """Return the bytes of each role as text, and the chart of all bytes."""
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
        old, new = (sum(p.size for p in parts if p.role == role) for parts in (before, after))
        if old or new:
            keys.append((role, f"{name}: {old:,} to {new:,} bytes"))
    picture = Markup(
        pictures.composition(
            [
                (f"before: {totals[0]:,} bytes of weights", before),
                (f"after: {totals[1]:,} bytes", after),
            ],
            f"Bytes of weights by table and layer: {totals[0]:,} before, {totals[1]:,} after",
        )
    )
    return tuple(keys), picture


def _plan_row(line: PlanLine, most: int) -> PlanRow:
    return PlanRow(
        module=line.module,
        role=line.role,
        format=line.format,
        picture=Markup(pictures.pair(line.bytes_before, line.bytes_after, most, line.role)),
        bytes_before=f"{line.bytes_before:,}",
        bytes_after=f"{line.bytes_after:,}",
        reason=reason_and_warning(line),
    )


def _settings(step: dict[str, object]) -> str:
    return ", ".join(f"{name} {as_text(value)}" for name, value in step.items() if name != "kind")
