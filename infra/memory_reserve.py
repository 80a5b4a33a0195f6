"""Memory that is held back until there is none left, so that a command can still say so.

Where a limit of the process is reached, even a failing command needs memory: a thread of Prefect
that starts without any never says that it runs, and CPython waits for it for ever
(``threading.Thread.start``).
"""

import mmap
import resource

RESERVE_BYTES = 96 * 2**20
"""A few stacks of threads, at 8 MiB each, and what their first allocations take."""

LIMITS = (resource.RLIMIT_AS, resource.RLIMIT_DATA)

_held: list[mmap.mmap] = []


def is_limited() -> bool:
    """Whether this process has a limit of memory of its own (``ulimit -v``, ``ulimit -d``)."""
    return any(resource.getrlimit(limit)[0] != resource.RLIM_INFINITY for limit in LIMITS)


def hold_reserve() -> None:
    """Hold memory back, once, if this process is limited. It is mapped and never written."""
    if is_limited() and not _held:
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        _held.append(mmap.mmap(-1, RESERVE_BYTES, flags=private))


def release_reserve() -> None:
    """Give it back to this process."""
    while _held:
        _held.pop().close()
