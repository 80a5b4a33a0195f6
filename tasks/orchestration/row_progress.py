"""Show how many rows of a long task are done, as log lines of its run. No Prefect."""

import logging
import time

log = logging.getLogger(__name__)

SECONDS_PER_LINE = 5.0
"""Shortest time between two lines; a shorter task logs none."""


class RowProgress:
    """Logs the number of rows that are done, at most one line every ``SECONDS_PER_LINE``.

    Args:
        text: what is done with the rows, such as "encode items".
        rows: number of all rows.
    """

    def __init__(self, text: str, rows: int) -> None:
        self._text, self._rows = text, rows
        self._last = time.monotonic()

    def show(self, done: int) -> None:
        """Log the number of rows that are done, unless the last line was logged just before."""
        now = time.monotonic()
        if now - self._last < SECONDS_PER_LINE:
            return
        self._last = now
        log.info("%s: %s of %s", self._text, f"{done:,}", f"{self._rows:,}")
