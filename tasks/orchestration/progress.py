"""Show the progress and the result of a run on its pages in Prefect."""

import functools
import logging
from typing import cast
from uuid import UUID

from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from tasks.orchestration.documents import Finished
from tasks.orchestration.outages import find_service, wait_out
from tasks.report.tables import markdown, number_rows

log = logging.getLogger(__name__)

LOGGERS = ("flows", "tasks", "infra", "compressors")
"""Loggers whose messages are part of a run's log; also listed in PREFECT_LOGGING_EXTRA_LOGGERS."""


def show_log_lines() -> None:
    """Enable info messages of recpress in the run's log, unless a level is set.

    Prefect sends messages of these loggers to its API, but does not set their level. They would
    inherit the root logger's level, which is warning.
    """
    for name in LOGGERS:
        logger = logging.getLogger(name)
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.INFO)


def create_report_artifacts(finished: Finished) -> None:
    """Create the report's Markdown and table artifacts of this flow run."""
    report = finished.report
    key = "recpress-" + "".join(c if c.isalnum() else "-" for c in report.name.lower())
    create_markdown_artifact(
        f"{markdown(report)}\nThe same report with charts: `{finished.page_uri()}`, or\n\n"
        f"```\n{finished.page_command()}\n{finished.fetch_command()}\n```\n",
        key=key,
        description=f"{report.name} {report.bundle_version}: {report.outcome}",
    )
    create_table_artifact(number_rows(report), key=f"{key}-numbers", description="before and after")


class Progress:
    """Shows the progress of a flow run: a progress bar on its page in Prefect, and log lines.

    A phase is a part of the flow, such as "measure". (A stage is the model after a step.)

    Args:
        phases: expected number of phases; it grows if the run has more.
    """

    def __init__(self, phases: int) -> None:
        self._phases = phases
        self._done = 0
        self.current = "the start"
        """Name of the current phase."""
        create = functools.partial(create_progress_artifact, 0.0, description="recpress")
        self._artifact = cast(UUID, wait_out(create))

    def start_phase(self, name: str) -> None:
        """Log the start of a phase, and update the progress bar."""
        self.current = name
        self._phases = max(self._phases, self._done + 1)  # a repeated recipe adds phases
        log.info("[%d/%d] %s", self._done + 1, self._phases, name)
        self._update(100 * self._done / self._phases, name)
        self._done += 1

    def finish(self) -> None:
        """Set the progress to 100 %."""
        self._update(100.0, "done")

    def _update(self, percent: float, text: str) -> None:
        """Update the progress bar; if Prefect's API is down, only log a warning."""
        try:
            update_progress_artifact(self._artifact, progress=percent, description=text)
        except Exception as fault:
            if find_service(fault) is None:
                raise
            log.warning("The progress bar was not updated: Prefect's API did not respond.")
