"""What a person at a terminal sees: the flow running, and what it came to."""

import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from infra.lock import locked

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status
    from rich.table import Table

    from flows.explain import Explanation
    from flows.terms import Terms
    from infra.ledger import Entry
    from tasks.documents import Finished

EMBEDDED = {
    # A loaded machine needs more than the default 20 s to start the embedded server.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    # The embedded server tells of its own shutdown as errors; faults of a run reach us anyhow.
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "flows,tasks,infra,compressors",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
}
WIDE = 100
_CONTROL = re.compile(
    "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u061c\\u200e\\u200f\\u2028-\\u202e\\u2066-\\u2069"
    "\\ud800-\\udfff]"
)
STYLE = {"accepted": "bold green", "rejected": "bold red", "undecided": "bold yellow"}


def console(*, error: bool = False) -> "Console":
    """A rich console; plain text where there is no terminal, and text never controls it."""
    from rich.console import Console

    class Escaping(Console):
        def print(self, *objects: object, **options: Any) -> None:
            texts = (printable(item) if isinstance(item, str) else item for item in objects)
            super().print(*texts, **options)

    return Escaping(stderr=error, highlight=False, soft_wrap=not sys.stdout.isatty())


def printable(text: str) -> str:
    """Text that cannot control a terminal or reorder what is shown on it.

    Names in a bundle, tags of a registry and reasons in a report may be anybody's. Control
    characters other than line ends and tabs, and those that change the direction of writing, are
    written as JSON escapes, so JSON stays the same JSON.
    """
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def say(text: str, *, quiet: bool = False) -> None:
    """One line for a person, on standard error so that results can be piped."""
    if not quiet:
        console(error=True).print(text)


def run(order: "Terms", *, quiet: bool) -> "Finished":
    """Run the flow in this process, with what it does shown on a terminal."""
    for name, value in EMBEDDED.items():
        os.environ.setdefault(name, value)
    with _shown(quiet=quiet):
        from prefect.client.schemas.objects import State

        from flows.compress import compress
        from flows.order import Order
        from tasks.documents import Finished

        _start_server()
        if not isinstance(order, Order):
            order = Order.model_validate(order.model_dump())
        outcome = compress(order, return_state=True).result()
        while isinstance(outcome, State):
            outcome = outcome.result()
        return Finished.model_validate(outcome)


def _start_server() -> None:
    """Start the embedded Prefect server, if no other is set: one process of a home at a time.

    Each server migrates the database of Prefect's home when it starts, and several at once
    fail. Prefect uses the server that is started here.
    """
    from prefect.server.api.server import SubprocessASGIServer
    from prefect.settings import get_current_settings

    settings = get_current_settings()
    if settings.api.url is None and settings.server.ephemeral.enabled:
        with locked(settings.home / "recpress-server.lock"):
            SubprocessASGIServer().start()


def show(finished: "Finished") -> None:
    """The table of before and after, the verdicts, and how to get the result."""
    from tasks.report import headline, limit_lines, remarks, resolution
    from tasks.report_stages import stage_rows

    report, out = finished.report, console()
    bundle = f"bundle {report.name}@{report.bundle_version}"
    out.print(_table(bundle, headline(report), out.width))
    if report.stages:
        out.print(_table("What each step was worth", stage_rows(report), out.width))
    out.print(resolution(report))
    for line in (*remarks(report), *limit_lines(report)):
        out.print(line, markup=False, soft_wrap=True)
    for target in report.targets:
        style = STYLE.get(target.verdict.outcome, "bold")
        out.print(
            f"[{style}]{target.target}: {target.verdict.outcome}[/] - ", end="", soft_wrap=True
        )
        out.print(target.verdict.reason, markup=False, soft_wrap=True)
    for name, why in report.skipped.items():
        out.print(f"{name}: left out (optional) - {why}", markup=False, soft_wrap=True)
    version = f"{report.name} version {finished.version}"
    out.print(f"Registered: {version} in {finished.registry}", markup=False, soft_wrap=True)
    out.print(f"Report:     {finished.page_uri()}", markup=False, soft_wrap=True)
    out.print(f"Get it:     {finished.fetch_command()}", markup=False, soft_wrap=True)


def promoted(entry: "Entry") -> str:
    """A sentence about the version that an entry made champion, and the champion before it."""
    was = "there was none" if entry.previous is None else f"was version {entry.previous}"
    return f"version {entry.version} is champion ({was})."


def explained(found: "Explanation") -> None:
    """What an order would run, with its bytes and its peak memory."""
    from tasks.report_cells import mebibytes, plan_warnings

    out = console()
    rows = ", ".join(f"{split} {count:,}" for split, count in found.rows.items())
    out.print(f"{found.model} ({found.task}; rows: {rows})", markup=False, soft_wrap=True)
    if found.earlier is not None:
        out.print(
            f"Carried out before: version {found.earlier}. Nothing would run again.",
            soft_wrap=True,
        )
    first = found.steps[0].bytes
    stages = [
        {
            "step": item.step if item.idle is None else f"{item.step} (left out)",
            "bytes of weights": f"{item.bytes:,}",
            "share": f"{item.bytes / first:.2f}x" if first else "-",
        }
        for item in found.steps
    ]
    out.print(_table("What would run, and what would be left after it", stages, out.width))
    for item in found.steps:
        if item.idle is not None:
            out.print(f"{item.step} is left out: {item.idle}", markup=False, soft_wrap=True)
    lines = [
        {
            "table or layer": line.module,
            "stored as": line.format,
            "before": f"{line.bytes_before:,}",
            "after": f"{line.bytes_after:,}",
        }
        for line in found.plan.lines
    ]
    out.print(_table("Plan", lines, out.width))
    for line in found.plan.lines:
        out.print(f"{line.module}: {line.reason}", markup=False, soft_wrap=True)
    for warning in plan_warnings(found.plan):
        out.print(warning, markup=False, soft_wrap=True)
    for target in found.targets:
        note = "" if target.missing is None else f" - cannot be built here: {target.missing}"
        out.print(f"target {target.target}, {target.wanted}{note}", markup=False, soft_wrap=True)
    for limit in found.limits:
        out.print(f"limit {limit}", markup=False, soft_wrap=True)
    if found.budget is not None:
        out.print(
            f"budget {found.budget:g}, measured on validation rows when it runs: cuts that would "
            f"lose more are left out, with the training that follows them",
            markup=False,
            soft_wrap=True,
        )
    if found.bytes_between is not None and len(set(found.bytes_between)) > 1:
        least, most = found.bytes_between
        out.print(
            f"Bytes of weights: between {least:,} and {most:,}, as the budget and the lookups of "
            f"the training rows decide; the table shows every first choice within the budget and "
            f"no row pruned.",
            markup=False,
            soft_wrap=True,
        )
    for teacher in found.teachers:
        out.print(f"teacher {teacher}, beside the original", markup=False, soft_wrap=True)
    memory = found.memory
    out.print(
        f"Peak memory of the flow's process: about {mebibytes(memory.peak)} MiB, reached in "
        f"{memory.moment} ({mebibytes(memory.process)} MiB of libraries, "
        f"{mebibytes(memory.weights)} of weights, {mebibytes(memory.rows)} of rows).",
        soft_wrap=True,
    )


def _table(title: str, rows: list[dict[str, str]], width: int) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False
    )
    for place, column in enumerate(rows[0]):
        table.add_column(column, justify="right" if place else "left", no_wrap=True)
    for row in rows:
        # Intervals need a wide window; they stand in the report in any case.
        cells = (cell.partition(" [")[0] if width < WIDE else cell for cell in row.values())
        table.add_row(*(printable(cell) for cell in cells))
    return table


@contextmanager
def _shown(*, quiet: bool) -> Iterator[None]:
    """Show each stage the flow logs: a spinner on a terminal, plain lines elsewhere."""
    if quiet:
        yield
        return
    err = console(error=True)
    shown = [logging.getLogger(name) for name in ("tasks.announce", "tasks.outages")]
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
    """Log lines of the flow's progress and waiting, one at a time on the terminal."""

    def __init__(self, out: "Console", status: "Status") -> None:
        super().__init__(logging.INFO)
        self._out = out
        self._status = status

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        self._out.print(line, markup=False)
        self._status.update(line)
