"""Locks between processes of one machine. The system releases the locks of a killed process."""

import fcntl
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def hold_lock(path: Path, waiting: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Lock the file ``path`` exclusively for the duration of the block.

    Args:
        path: the lock file. It is created, with its folder, if missing, and never removed.
        waiting: called once, before waiting, if another process holds the lock.

    Raises:
        OSError: the file cannot be created.
    """
    with _open_lock_file(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed, also by a kill
        yield


@contextmanager
def hold_named_lock(path: Path, name: str, waiting: Callable[[], None]) -> Iterator[None]:
    """Lock ``name`` exclusively for the duration of the block; one file serves for many names.

    The lock is on one byte of the file, whose offset is a hash of ``name``. It excludes other
    processes, but not other threads of this process.

    Args:
        path: the lock file, created with its folder if missing.
        name: the name of the lock.
        waiting: called once, before waiting, if another process holds the lock.

    Raises:
        OSError: the file cannot be created.
    """
    offset = int(hashlib.sha256(name.encode()).hexdigest()[:15], 16)
    with _open_lock_file(path) as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, offset)
        except OSError:
            waiting()
            fcntl.lockf(file, fcntl.LOCK_EX, 1, offset)
        yield


def _open_lock_file(path: Path) -> IO[bytes]:
    """Open a lock file, created with its folder if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("ab")
