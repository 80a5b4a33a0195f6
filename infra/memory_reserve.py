"""Reserve memory, and release it when memory is exhausted, so that a command can report the error.

A command calls ``hold_reserve`` at its start. Code that catches an out-of-memory error calls
``release_reserve`` first, because reporting the error needs memory too. In particular, a thread of
Prefect that starts when no memory is left never signals its start, and CPython waits for it forever
(``threading.Thread.start``).
"""

import mmap
import resource

RESERVE_BYTES = 96 * 2**20
"""Enough for a few thread stacks of 8 MiB each and the first allocations of these threads."""

LIMITS = (resource.RLIMIT_AS, resource.RLIMIT_DATA)

_reserve: list[mmap.mmap] = []
"""The reserved mapping; empty without a reserve."""


def is_limited() -> bool:
    """Return whether this process has a memory limit (``ulimit -v``, ``ulimit -d``)."""
    return any(resource.getrlimit(limit)[0] != resource.RLIM_INFINITY for limit in LIMITS)


def hold_reserve() -> None:
    """Reserve memory if this process has a memory limit and has no reserve yet.

    The memory is mapped but never written, so it only counts towards the limit.
    """
    if is_limited() and not _reserve:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        _reserve.append(mmap.mmap(-1, RESERVE_BYTES, flags=flags))


def release_reserve() -> None:
    """Release the reserve, so that this process can allocate its memory."""
    while _reserve:
        _reserve.pop().close()
