"""Render the report's section on the effect of each step of the recipe. No Prefect.

A stage is the model after one step; the first stage is the untouched model.
"""

from dataclasses import dataclass

from tasks.orchestration.documents import Report
from tasks.report.cells import cell, format_change, metric_label

NOTE = (
    "Bytes are those of all weights; the share is relative to the untouched model. Quality is "
    "measured in torch on the test rows. Each change is from the line above, paired on the same "
    "rows, with its 95 % interval. The verdict does not depend on this table: it is based on the "
    "served graphs or engines."
)


@dataclass(frozen=True)
class NumberTable:
    """A table of the page: text in the first column, numbers in the others.

    Attributes:
        heads: column headings.
        rows: rows with one cell per heading.
        note: text below the table.
    """

    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str


def stage_rows(report: Report) -> list[dict[str, str]]:
    """Return one row per stage, by column: bytes, quality, and changes from the previous stage.

    With several outputs there is a quality and a change for each, and no change in bytes.
    """
    rows = []
    previous = None
    original_bytes = report.stages[0].bytes if report.stages else 0
    for stage in report.stages:
        change_in_bytes = {
            "change in bytes": f"{stage.bytes - previous.bytes:+,}" if previous else ""
        }
        if report.other_metrics:  # the columns of several outputs need its place
            change_in_bytes = {}
        qualities = {metric_label(name): stage.of(name) for name in report.metrics}
        rows.append(
            {
                "after": stage.step,
                "bytes": f"{stage.bytes:,}",
                "share": f"{stage.bytes / original_bytes:.2f}x" if original_bytes else "-",
                **{label: f"{item.quality.point:.5f}" for label, item in qualities.items()},
                **change_in_bytes,
                **{
                    f"change in {label}": ""
                    if item.change is None
                    else format_change(item.change, ratio=False)
                    for label, item in qualities.items()
                },
            }
        )
        previous = stage
    return rows


def stage_lines(report: Report) -> list[str]:
    """Return the lines of the Markdown section; no lines for a report without stages."""
    rows = stage_rows(report)
    if not rows:
        return []
    columns = list(rows[0])
    return [
        "",
        "## Effect of each step",
        "",
        NOTE,
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(map(cell, row.values())) + " |" for row in rows),
    ]


def stage_section(report: Report) -> NumberTable:
    """Return the table of the page; it has no rows for a report without stages."""
    rows = stage_rows(report)
    columns = list(rows[0]) if rows else []
    return NumberTable(
        heads=tuple(column[0].upper() + column[1:] for column in columns),
        rows=tuple(tuple(row.values()) for row in rows),
        note=NOTE,
    )
