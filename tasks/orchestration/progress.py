"""How far a run is and what its result was, on its pages in Prefect."""

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
from tasks.orchestration.outages import service_of, wait_out
from tasks.report.tables import headline, markdown

log = logging.getLogger(__name__)

LOGGERS = ("flows", "tasks", "infra", "compressors")
"""Whose lines belong into a run's log: those that PREFECT_LOGGING_EXTRA_LOGGERS names as well."""


def show_log_lines() -> None:
    """Let information through to the run's log, unless a level is set.

    Prefect sends to its API what our loggers pass on. It does not set their level, which is then
    that of the root logger: warnings.
    """
    for name in LOGGERS:
        logger = logging.getLogger(name)
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.INFO)


def publish_links(finished: Finished) -> None:
    """Put the report on the pages of this flow run in Prefect."""
    report = finished.report
    key = "recpress-" + "".join(c if c.isalnum() else "-" for c in report.name.lower())
    create_markdown_artifact(
        f"{markdown(report)}\nThe same with pictures: `{finished.page_uri()}`, or\n\n"
        f"```\n{finished.page_command()}\n{finished.fetch_command()}\n```\n",
        key=key,
        description=f"{report.name} {report.bundle_version}: {report.outcome}",
    )
    create_table_artifact(headline(report), key=f"{key}-numbers", description="before and after")


class Progress:
    """How far a flow run is: a bar on its page in Prefect, a line in the log."""

    def __init__(self, stages: int) -> None:
        self._stages = stages
        self._done = 0
        self.current = "the start"
        """The stage that runs now."""
        create = functools.partial(create_progress_artifact, 0.0, description="recpress")
        self._artifact = cast(UUID, wait_out(create))

    def stage(self, name: str) -> None:
        """Log a stage that begins now, and update the bar."""
        self.current = name
        self._stages = max(self._stages, self._done + 1)  # a recipe may be carried out again
        log.info("[%d/%d] %s", self._done + 1, self._stages, name)
        self._update(100 * self._done / self._stages, name)
        self._done += 1

    def finish(self) -> None:
        """Fill the bar."""
        self._update(100.0, "done")

    def _update(self, percent: float, text: str) -> None:
        """Move the bar; while Prefect's API is away it stays, and the next stage moves it."""
        try:
            update_progress_artifact(self._artifact, progress=percent, description=text)
        except Exception as fault:
            if service_of(fault) is None:
                raise
            log.warning("The progress bar was not updated: Prefect's API did not answer.")
