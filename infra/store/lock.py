"""Locks between processes of one machine. The system releases the locks of a killed process."""

import fcntl
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def hold_lock(path: Path, on_wait: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Lock the file ``path`` exclusively for the duration of the block.

    Args:
        path: the lock file. It is created, with its folder, if missing, and never removed.
        on_wait: called once if another process holds the lock, before this call waits for it.

    Raises:
        OSError: the file cannot be created.
    """
    with _open_lock_file(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file releases the lock; the system closes it if the process is killed


@contextmanager
def hold_named_lock(path: Path, name: str, on_wait: Callable[[], None]) -> Iterator[None]:
    """Lock ``name`` exclusively for the duration of the block; one file serves for many names.

    The lock is on one byte of the file, whose offset is a hash of ``name``. It excludes other
    processes only: POSIX record locks belong to the process, so two threads can hold the same one.

    Args:
        path: the lock file, created with its folder if missing.
        name: the name of the lock.
        on_wait: called once if another process holds the lock, before this call waits for it.

    Raises:
        OSError: the file cannot be created.
    """
    # 60 bits of the hash, because an offset is a signed integer of 64 bits
    offset = int(hashlib.sha256(name.encode()).hexdigest()[:15], 16)
    with _open_lock_file(path) as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, offset)
        except OSError:
            on_wait()
            fcntl.lockf(file, fcntl.LOCK_EX, 1, offset)
        yield


def _open_lock_file(path: Path) -> IO[bytes]:
    """Open a lock file, created with its folder if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("ab")
