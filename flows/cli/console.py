"""Terminal output: the progress of the flow, and its result."""

import logging
import os
import sys
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
    # Faults of a run are exceptions of the command, so Prefect's log of them is redundant.
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "flows,tasks,infra,compressors",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
}
WIDE = 100
STYLE = {"accepted": "bold green", "rejected": "bold red", "undecided": "bold yellow"}


def console(*, error: bool = False) -> "Console":
    """Return a rich console that prints text literally, without styles if not on a terminal.

    Text in lines, tables and titles is never parsed for markup, emoji codes or control sequences.
    Styles are arguments (``style=``), never part of a text.
    """
    from rich.console import Console
    from rich.text import Text

    class Escaping(Console):
        def render_str(self, text: str, **options: Any) -> Text:
            """Escape a string; rich passes every string through this method."""
            if options.get("markup"):
                raise ValueError("Expected a text without markup. Pass style= instead.")
            options |= {"markup": False, "emoji": False, "highlight": False}
            return super().render_str(printable(text), **options)

        def print(self, *objects: object, **options: Any) -> None:
            if options.get("markup"):
                raise ValueError("Expected a text without markup. Pass style= instead.")
            super().print(*objects, **options)

    return Escaping(
        stderr=error,
        highlight=False,
        markup=False,
        emoji=False,
        soft_wrap=not sys.stdout.isatty(),
    )


def write(text: str) -> None:
    """Print a document, such as JSON or a report, to standard output."""
    print(printable(text))  # noqa: T201 - this is what a command line is for


def write_line(text: str) -> None:
    """Print one line to standard output, with its names escaped."""
    print(one_line(text))  # noqa: T201


def write_table(columns: list[str], rows: list[list[str]]) -> None:
    """Print a table to standard output; a cell is one line."""
    from rich.table import Table

    table = Table()
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(one_line, row))
    console().print(table)


def print_progress(text: str, *, quiet: bool = False) -> None:
    """Print one progress line to standard error, so that results can be piped."""
    if not quiet:
        console(error=True).print(one_line(text))


def run(order: "Terms", *, quiet: bool) -> "Finished":
    """Run the flow in this process, and show its progress on the terminal."""
    for name, value in EMBEDDED.items():
        os.environ.setdefault(name, value)
    with _shown(quiet=quiet):
        from flows.server.prefect_access import connect

        say_stage = logging.getLogger("tasks.orchestration.progress").info
        server = connect(say_stage)  # starts during the imports below
        from flows.compress import compress
        from flows.order import Order
        from tasks.orchestration.documents import Finished
        from tasks.orchestration.policy import local_result

        if server is not None:
            server.wait_until_ready(say_stage)
        if not isinstance(order, Order):
            order = Order.model_validate(order.model_dump())
        try:
            outcome = local_result(compress(order, return_state=True))
        except Exception:
            if server is not None:
                server.require_running()
            raise
        return Finished.model_validate(outcome)


def show(finished: "Finished") -> None:
    """Print the table of before and after, the verdicts, and how to get the result."""
    from tasks.report.stages import stage_rows
    from tasks.report.tables import headline, limit_lines, remarks, resolution

    report, out = finished.report, console()
    line = partial(_print_line, out)
    bundle = f"bundle {report.name}@{report.bundle_version}"
    out.print(_table(bundle, headline(report), out.width))
    if report.stages:
        out.print(_table("What each step was worth", stage_rows(report), out.width))
    out.print(resolution(report))
    for remark in (*remarks(report), *limit_lines(report)):
        line(remark)
    for target in report.targets:
        style = STYLE.get(target.verdict.outcome, "bold")
        title = f"{target.target}: {target.verdict.outcome}"
        out.print(title, style=style, end=" - ", soft_wrap=True)
        line(target.verdict.reason)
    for name, why in report.skipped.items():
        line(f"{name}: left out (optional) - {why}")
    version = f"{report.name} version {finished.version}"
    line(f"Registered: {version} in {finished.registry}")
    line(f"Report:     {finished.page_uri()}")
    line(f"Get it:     {finished.fetch_command()}")


def explained(found: "Explanation") -> None:
    """Print the steps of an order, with its bytes and its peak memory."""
    from tasks.report.cells import mebibytes, plan_warnings

    out = console()
    line = partial(_print_line, out)
    rows = ", ".join(f"{split} {count:,}" for split, count in found.rows.items())
    line(f"{found.model} ({found.task}; rows: {rows})")
    if found.earlier is not None:
        out.print(
            f"Carried out before: version {found.earlier}. Nothing would run again.",
            soft_wrap=True,
        )
    first = found.steps[0].bytes
    stages = [
        {
            "step": item.step if item.left_out is None else f"{item.step} (left out)",
            "bytes of weights": f"{item.bytes:,}",
            "share": f"{item.bytes / first:.2f}x" if first else "-",
        }
        for item in found.steps
    ]
    out.print(_table("What would run, and what would be left after it", stages, out.width))
    for item in found.steps:
        if item.left_out is not None:
            line(f"{item.step} is left out: {item.left_out}")
    lines = [
        {
            "table or layer": unit.module,
            "stored as": unit.format,
            "before": f"{unit.bytes_before:,}",
            "after": f"{unit.bytes_after:,}",
        }
        for unit in found.plan.lines
    ]
    out.print(_table("Plan", lines, out.width))
    for unit in found.plan.lines:
        line(f"{unit.module}: {unit.reason}")
    for warning in plan_warnings(found.plan):
        line(warning)
    for target in found.targets:
        note = "" if target.missing is None else f" - cannot be built here: {target.missing}"
        line(f"target {target.target}, {target.wanted}{note}")
    for limit in found.limits:
        line(f"limit {limit}")
    if found.budget is not None:
        out.print(
            f"budget {found.budget:g}, measured on validation rows when it runs: cuts that would "
            f"lose more are left out, with the training that follows them",
            soft_wrap=True,
        )
    if found.bytes_between is not None and len(set(found.bytes_between)) > 1:
        least, most = found.bytes_between
        out.print(
            f"Bytes of weights: between {least:,} and {most:,}, as the budget and the lookups of "
            f"the training rows decide; the table shows every first choice within the budget and "
            f"no row pruned.",
            soft_wrap=True,
        )
    for teacher in found.teachers:
        line(f"teacher {teacher}, in addition to the original")
    memory = found.memory
    out.print(
        f"Peak memory of the flow's process: about {mebibytes(memory.peak)} MiB, reached in "
        f"{memory.moment} ({mebibytes(memory.process)} MiB of libraries, "
        f"{mebibytes(memory.weights)} of weights, {mebibytes(memory.rows)} of rows).",
        soft_wrap=True,
    )


def _print_line(out: "Console", text: str) -> None:
    out.print(one_line(text), soft_wrap=True)


def _table(title: str, rows: list[dict[str, str]], width: int) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False
    )
    for place, column in enumerate(rows[0]):
        table.add_column(column, justify="right" if place else "left", no_wrap=True)
    for row in rows:
        # Intervals need a wide window; the report contains them in any case.
        cells = (cell.partition(" [")[0] if width < WIDE else cell for cell in row.values())
        table.add_row(*map(one_line, cells))
    return table


@contextmanager
def _shown(*, quiet: bool) -> Iterator[None]:
    """Show each stage that the flow logs: a spinner on a terminal, plain lines otherwise."""
    if quiet:
        yield
        return
    err = console(error=True)
    shown = [
        logging.getLogger(name)
        for name in ("tasks.orchestration.progress", "tasks.orchestration.outages")
    ]
    with err.status("starting the flow") as status:
        handler = _Stages(err, status)
        for logger in shown:
            logger.setLevel(logging.INFO)
            logger.addHandler(handler)
        try:
            yield
        finally:
            for logger in shown:
                logger.removeHandler(handler)


class _Stages(logging.Handler):
    """Shows log lines of the flow's progress and waiting, one at a time on the terminal."""

    def __init__(self, out: "Console", status: "Status") -> None:
        super().__init__(logging.INFO)
        self._out = out
        self._status = status

    def emit(self, record: logging.LogRecord) -> None:
        from rich.text import Text

        line = one_line(record.getMessage())
        self._out.print(line)
        self._status.update(Text(line))  # a str would be parsed as markup
