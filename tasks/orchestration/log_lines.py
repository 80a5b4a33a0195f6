"""Escape recpress's log messages so that they cannot forge lines or control a terminal.

Messages contain names from bundles, which may contain line ends or control characters. A message is
escaped when its record is created, before any handler (Prefect's run log, a terminal) receives it.
"""

import logging

from infra.log_records import change_records
from infra.printable import one_line, printable

OUR_PACKAGES = ("flows", "tasks", "infra", "compressors")
RUN_LOGGERS = ("prefect.flow_runs", "prefect.task_runs")
"""Prefect's loggers whose messages contain names of runs, and so names of models."""


def install() -> None:
    """Escape all later messages of the loggers above; calling it again changes nothing."""
    change_records(_escape)


def _escape(record: logging.LogRecord) -> None:
    name = record.name or ""  # a record from another process has no name yet
    if name.partition(".")[0] in OUR_PACKAGES:
        lines = record.getMessage().split("\n- ")  # lists of problems remain lists
        record.msg, record.args = "\n- ".join(map(one_line, lines)), ()
    elif name.startswith(RUN_LOGGERS):
        record.msg, record.args = printable(record.getMessage()), ()
