"""Change every log record of this process when it is created, before any handler receives it."""

import logging
from collections.abc import Callable
from typing import Any


def change_records(change: Callable[[logging.LogRecord], None]) -> None:
    """Apply a function to every record from now on; calling it again changes nothing.

    Args:
        change: changes a record in place; a module-level function, so that a second call with it is
            recognized.
    """
    create = logging.getLogRecordFactory()
    changes = getattr(create, "changes", ())
    if change in changes:
        return

    def changed(*arguments: Any, **options: Any) -> logging.LogRecord:
        record = create(*arguments, **options)
        change(record)
        return record

    changed.changes = (*changes, change)  # type: ignore[attr-defined]
    logging.setLogRecordFactory(changed)
