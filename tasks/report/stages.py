"""The report's section on the effect of each step of the recipe. No Prefect."""

from dataclasses import dataclass

from tasks.orchestration.documents import Report
from tasks.report.cells import cell, change_of, label

NOTE = (
    "Bytes are those of all weights, the share is of the untouched model's. Quality is the torch "
    "module's on the test rows, and each change is against the line above, paired on the same "
    "rows, with its 95 % interval; the verdict is about what is served, above."
)


@dataclass(frozen=True)
class NumberTable:
    """A table of text for the page: all columns after the first are numbers.

    Attributes:
        heads: column headings.
        rows: rows with one cell per heading.
        note: text below the table.
    """

    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str


def stage_rows(report: Report) -> list[dict[str, str]]:
    """Return one row per stage: its bytes, its quality, and the change from the previous stage."""
    rows = []
    before = None
    first = report.stages[0].bytes if report.stages else 0
    for stage in report.stages:
        rows.append(
            {
                "after": stage.step,
                "bytes": f"{stage.bytes:,}",
                "share": f"{stage.bytes / first:.2f}x" if first else "-",
                label(report.metric): f"{stage.quality.point:.5f}",
                "worth in bytes": f"{stage.bytes - before.bytes:+,}" if before else "",
                f"worth in {label(report.metric)}": ""
                if stage.change is None
                else change_of(stage.change, ratio=False),
            }
        )
        before = stage
    return rows


def stage_lines(report: Report) -> list[str]:
    """Format the stages as a section of Markdown; empty for a report without stages."""
    rows = stage_rows(report)
    if not rows:
        return []
    columns = list(rows[0])
    return [
        "",
        "## What each step was worth",
        "",
        NOTE,
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(map(cell, row.values())) + " |" for row in rows),
    ]


def stage_section(report: Report) -> NumberTable:
    """Return the stages as a table of the page; without rows for a report without stages."""
    rows = stage_rows(report)
    columns = list(rows[0]) if rows else []
    return NumberTable(
        heads=tuple(column[0].upper() + column[1:] for column in columns),
        rows=tuple(tuple(row.values()) for row in rows),
        note=NOTE,
    )
