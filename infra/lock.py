"""A lock between processes of one machine; a process that is killed releases it."""

import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)


@contextmanager
def locked(path: Path, waiting: str | None = None) -> Iterator[None]:
    """Hold the lock file ``path``, created with its folder if missing.

    Args:
        path: the lock file; it stays where it is.
        waiting: logged at level INFO if another process holds the lock.

    Raises:
        OSError: the file cannot be created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is not None:
                log.info(waiting)
            fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed, also by a kill
        yield
