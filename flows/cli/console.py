"""Terminal output: plain lines and tables, the progress of the flow, and its result."""

import logging
import os
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from infra.printable import one_line, printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status
    from rich.table import Table

    from flows.explain import Explanation
    from flows.terms import Terms
    from tasks.orchestration.documents import Finished

EMBEDDED = {
    # The command prints errors of a run itself, so Prefect need not log them.
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "flows,tasks,infra,compressors",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
}
"""Environment variables for Prefect if the flow runs in the process of the command."""

HEADING_WIDTH = 10
"""Characters after which a heading of a table that is too wide is wrapped."""
INTERVALS_MIN_WIDTH = 100
"""Tables in narrower terminals omit confidence intervals."""

STYLE = {"accepted": "bold green", "rejected": "bold red", "undecided": "bold yellow"}
"""Style in which rich prints each outcome; any other is bold."""


def console(*, error: bool = False) -> "Console":
    """Create a rich console that prints text literally.

    It does not interpret markup, emoji codes or control sequences in lines, tables and titles.
    Styles must be passed as ``style=``; they have an effect only on a terminal.

    Args:
        error: whether it writes to standard error instead of standard output.
    """
    from rich.console import Console
    from rich.text import Text

    class LiteralConsole(Console):
        def render_str(self, text: str, **options: Any) -> Text:
            """Convert a string to a rich text; rich calls this for every string it prints."""
            if options.get("markup"):
                raise ValueError("Expected a text without markup. Pass style= instead.")
            options |= {"markup": False, "emoji": False, "highlight": False}
            return super().render_str(printable(text), **options)

        def print(self, *objects: object, **options: Any) -> None:
            if options.get("markup"):
                raise ValueError("Expected a text without markup. Pass style= instead.")
            super().print(*objects, **options)

    return LiteralConsole(
        stderr=error,
        highlight=False,
        markup=False,
        emoji=False,
        soft_wrap=not sys.stdout.isatty(),
    )


def write(text: str) -> None:
    """Print a document, such as JSON or a report, to standard output."""
    print(printable(text))  # noqa: T201 (the output of a command)


def write_line(text: str) -> None:
    """Print one line to standard output, with control characters and line breaks escaped."""
    print(one_line(text))  # noqa: T201


def write_table(columns: list[str], rows: list[list[str]]) -> None:
    """Print a table to standard output, with line breaks in cells escaped."""
    from rich.table import Table

    table = Table()
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(one_line, row))
    console().print(table)


def print_progress(text: str, *, quiet: bool = False) -> None:
    """Print one line to standard error, so that standard output contains only results."""
    if not quiet:
        console(error=True).print(one_line(text))


def run(order: "Terms", *, quiet: bool) -> "Finished":
    """Run the flow in this process, show its progress on the terminal, and return its result."""
    for name, value in EMBEDDED.items():
        os.environ.setdefault(name, value)
    with _show_progress_on_terminal(quiet=quiet):
        from flows.server.prefect_access import connect

        notify = logging.getLogger("tasks.orchestration.progress").info
        server = connect(notify)  # the server starts while the imports below run
        from flows.compress import compress
        from flows.order import Order
        from tasks.orchestration.documents import Finished
        from tasks.orchestration.task_calls import local_result

        if server is not None:  # None if a server is configured
            server.wait_until_ready(notify)
        # The command's options create ``Terms``, an order without custom steps. The parameter of
        # the flow is an ``Order``, the subclass that may have them.
        if not isinstance(order, Order):
            order = Order.model_validate(order.model_dump())
        try:
            result = local_result(compress(order, return_state=True))
        except Exception:
            if server is not None:
                server.require_running()  # reports the end of the server instead, if it ended
            raise
        return Finished.model_validate(result)


def show_result(finished: "Finished") -> None:
    """Print measurements before and after, verdicts, and the command that fetches the result."""
    from tasks.report.stages import stage_rows
    from tasks.report.tables import describe_resolution, limit_lines, list_remarks, number_rows

    report, out = finished.report, console()
    line = partial(_print_line, out)
    bundle = f"bundle {report.name}@{report.bundle_version}"
    out.print(_build_table(bundle, number_rows(report), out.width))
    if report.stages:
        out.print(_build_table("Effect of each step", stage_rows(report), out.width))
    out.print(describe_resolution(report))  # the smallest change that the test rows can detect
    for remark in (*list_remarks(report), *limit_lines(report)):
        line(remark)
    for target in report.targets:
        style = STYLE.get(target.verdict.outcome, "bold")
        title = f"{target.target}: {target.verdict.outcome}"
        out.print(title, style=style, end=" - ", soft_wrap=True)
        line(target.verdict.reason)
    for name, reason in report.skipped.items():
        line(f"{name}: left out (optional) - {reason}")
    version = f"{report.name} version {finished.version}"
    line(f"Registered: {version} in {finished.registry}")
    line(f"Report:     {finished.page_uri()}")
    line(f"Get it:     {finished.fetch_command()}")


def show_explanation(explanation: "Explanation") -> None:
    """Print the steps, bytes, plan, targets and peak memory that an order would have."""
    from tasks.report.cells import mebibytes, plan_warnings

    out = console()
    line = partial(_print_line, out)
    rows = ", ".join(f"{split} {count:,}" for split, count in explanation.rows.items())
    line(f"{explanation.model} ({explanation.task}; rows: {rows})")
    if explanation.earlier is not None:
        out.print(
            f"This order ran before and is version {explanation.earlier}. Nothing would run again.",
            soft_wrap=True,
        )
    original_bytes = explanation.steps[0].bytes
    stages = [
        {
            "step": item.step if item.left_out is None else f"{item.step} (left out)",
            "bytes of weights": f"{item.bytes:,}",
            # of the bytes of the untouched model, which is the first item
            "share": f"{item.bytes / original_bytes:.2f}x" if original_bytes else "-",
        }
        for item in explanation.steps
    ]
    out.print(
        _build_table("Steps that would run, and the bytes of weights after each", stages, out.width)
    )
    for item in explanation.steps:
        if item.left_out is not None:
            line(f"{item.step} is left out: {item.left_out}")
    lines = [
        {
            "table or layer": unit.module,
            "stored as": unit.format,
            "before": f"{unit.bytes_before:,}",
            "after": f"{unit.bytes_after:,}",
        }
        for unit in explanation.plan.lines
    ]
    out.print(_build_table("Plan", lines, out.width))
    for unit in explanation.plan.lines:
        line(f"{unit.module}: {unit.reason}")
    for warning in plan_warnings(explanation.plan):
        line(warning)
    for target in explanation.targets:
        note = "" if target.missing is None else f" - cannot be built here: {target.missing}"
        line(f"target {target.target}, {target.wanted}{note}")  # wanted: required or optional
    for limit in explanation.limits:
        line(f"limit {limit}")
    if explanation.budget is not None:
        out.print(
            f"budget {explanation.budget:g}, measured on validation rows when the order runs: "
            f"steps that would lose more are left out, with the training that follows them",
            soft_wrap=True,
        )
    if explanation.bytes_between is not None and len(set(explanation.bytes_between)) > 1:
        min_bytes, max_bytes = explanation.bytes_between
        out.print(
            f"Bytes of weights: between {min_bytes:,} and {max_bytes:,}. The budget and the lookup "
            f"counts of the training data decide. The table assumes that every step is within the "
            f"budget and that no row is pruned.",
            soft_wrap=True,
        )
    for teacher in explanation.teachers:
        line(f"teacher {teacher}, in addition to the original")
    memory = explanation.memory
    out.print(
        f"Peak memory of the flow's process: about {mebibytes(memory.peak)} MiB, reached in "
        f"{memory.moment} ({mebibytes(memory.process)} MiB of libraries, "
        f"{mebibytes(memory.weights)} of weights, {mebibytes(memory.rows)} of rows).",
        soft_wrap=True,
    )


def _print_line(out: "Console", text: str) -> None:
    out.print(one_line(text), soft_wrap=True)


def _build_table(title: str, rows: list[dict[str, str]], width: int) -> "Table":
    """Return a table with a column for each key of ``rows``.

    Args:
        title: printed above the table.
        rows: the cells of each row, by column.
        width: of the terminal, in characters.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False
    )
    # Cells contain intervals in brackets. The report has them even if the terminal does not.
    cells = [
        [
            one_line(cell.partition(" [")[0] if width < INTERVALS_MIN_WIDTH else cell)
            for cell in row.values()
        ]
        for row in rows
    ]
    # Cells are never wrapped; headings are if the table is too wide, as with several outputs.
    widths = [max(map(len, column)) for column in zip(rows[0], *cells, strict=True)]
    is_too_wide = sum(widths) + 2 * len(widths) > width
    for index, column in enumerate(rows[0]):
        heading = "\n".join(textwrap.wrap(column, HEADING_WIDTH)) if is_too_wide else column
        table.add_column(heading, justify="right" if index else "left", no_wrap=True)
    for row_cells in cells:
        table.add_row(*row_cells)
    return table


@contextmanager
def _show_progress_on_terminal(*, quiet: bool) -> Iterator[None]:
    """Print log lines on tasks, rows and waits; with a spinner if standard error is a terminal."""
    if quiet:
        yield
        return
    err = console(error=True)
    loggers = [
        logging.getLogger(name)
        for name in (
            "tasks.orchestration.progress",
            "tasks.orchestration.row_progress",
            "tasks.orchestration.outages",
        )
    ]
    with err.status("starting the flow") as status:
        handler = _ProgressHandler(err, status)
        for logger in loggers:
            logger.setLevel(logging.INFO)
            logger.addHandler(handler)
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeHandler(handler)


class _ProgressHandler(logging.Handler):
    """Prints each log line, and shows the latest one next to the spinner."""

    def __init__(self, out: "Console", status: "Status") -> None:
        super().__init__(logging.INFO)
        self._out = out
        self._status = status

    def emit(self, record: logging.LogRecord) -> None:
        from rich.text import Text

        line = one_line(record.getMessage())
        self._out.print(line)
        self._status.update(Text(line))  # a str would be parsed as markup
