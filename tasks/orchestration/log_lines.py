"""Escape our log messages so that they cannot forge lines or control a terminal.

Messages contain names from bundles. Prefect sends them to its run log, and services write them to
terminals, so they are escaped when the record is created, before any handler receives it.
"""

import logging

from infra.log_records import change_records
from infra.printable import one_line, printable

OURS = ("flows", "tasks", "infra", "compressors")
RUNS = ("prefect.flow_runs", "prefect.task_runs")
"""Prefect's loggers whose lines contain the names of runs, which contain names of models."""


def install() -> None:
    """Escape the messages of this project's loggers; calling it again changes nothing."""
    change_records(_escape)


def _escape(record: logging.LogRecord) -> None:
    name = record.name or ""  # a record that was sent from another process has none yet
    if name.partition(".")[0] in OURS:
        lines = record.getMessage().split("\n- ")  # our lists of problems keep their lines
        record.msg, record.args = "\n- ".join(map(one_line, lines)), ()
    elif name.startswith(RUNS):
        record.msg, record.args = printable(record.getMessage()), ()
