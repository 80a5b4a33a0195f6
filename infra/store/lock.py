"""Locks between processes of one machine; a process that is killed releases them."""

import fcntl
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def locked(path: Path, waiting: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Hold the lock file ``path``, created with its folder if missing; it is never removed.

    Args:
        path: the file.
        waiting: called if another process holds the lock.

    Raises:
        OSError: the file cannot be created.
    """
    with _opened(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed, also by a kill
        yield


@contextmanager
def locked_name(path: Path, name: str, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold one of many locks in one file: the byte that ``name`` is hashed to.

    Processes exclude each other; threads of one process do not.

    Args:
        path: the file, created with its folder if missing.
        name: the name of the lock.
        waiting: called if another process holds the lock.

    Raises:
        OSError: the file cannot be created.
    """
    byte = int(hashlib.sha256(name.encode()).hexdigest()[:15], 16)
    with _opened(path) as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
        except OSError:
            waiting()
            fcntl.lockf(file, fcntl.LOCK_EX, 1, byte)
        yield


def _opened(path: Path) -> IO[bytes]:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("ab")
