"""Apply a function to every log record of this process before any handler receives it."""

import logging
from collections.abc import Callable
from typing import Any


def change_records(change: Callable[[logging.LogRecord], None]) -> None:
    """Apply a function to every log record that is created from now on.

    A second call with the same function has no effect.

    Args:
        change: changes a record in place. It is a module-level function, so that a second call
            with it can be recognized.
    """
    create = logging.getLogRecordFactory()
    changes = getattr(create, "changes", ())
    if change in changes:
        return

    def create_and_change(*arguments: Any, **options: Any) -> logging.LogRecord:
        record = create(*arguments, **options)
        change(record)
        return record

    create_and_change.changes = (*changes, change)  # type: ignore[attr-defined]
    logging.setLogRecordFactory(create_and_change)
