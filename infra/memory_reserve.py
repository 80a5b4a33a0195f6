"""A memory reserve, released when memory runs out so that a command can report the error.

At a memory limit of the process, even a failing command needs memory. If a thread of Prefect starts
without any, it never signals its start, and CPython waits for it forever
(``threading.Thread.start``).
"""

import mmap
import resource

RESERVE_BYTES = 96 * 2**20
"""A few stacks of threads, at 8 MiB each, and what their first allocations take."""

LIMITS = (resource.RLIMIT_AS, resource.RLIMIT_DATA)

_held: list[mmap.mmap] = []


def is_limited() -> bool:
    """Return whether this process has a memory limit (``ulimit -v``, ``ulimit -d``)."""
    return any(resource.getrlimit(limit)[0] != resource.RLIM_INFINITY for limit in LIMITS)


def hold_reserve() -> None:
    """Reserve memory, once, if this process has a limit. It is mapped and never written."""
    if is_limited() and not _held:
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        _held.append(mmap.mmap(-1, RESERVE_BYTES, flags=private))


def release_reserve() -> None:
    """Release the reserve, so that this process can allocate it."""
    while _held:
        _held.pop().close()
