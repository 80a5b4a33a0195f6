"""How far a run is and what it came to, on its pages in Prefect."""

import logging
from typing import cast
from uuid import UUID

from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from tasks.documents import Finished
from tasks.report import headline, markdown

log = logging.getLogger(__name__)


def announce(finished: Finished) -> None:
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
        self._artifact = cast(UUID, create_progress_artifact(0.0, description="recpress"))

    def stage(self, name: str) -> None:
        """Log a stage that begins now, and update the bar."""
        self.current = name
        self._stages = max(self._stages, self._done + 1)  # a recipe may be carried out again
        log.info("[%d/%d] %s", self._done + 1, self._stages, name)
        update_progress_artifact(
            self._artifact, progress=100 * self._done / self._stages, description=name
        )
        self._done += 1

    def finish(self) -> None:
        """Fill the bar."""
        update_progress_artifact(self._artifact, progress=100.0, description="done")
