"""Estimate the memory this process may still use, and recognize out-of-memory errors.

Available memory is the minimum of the machine's free memory (``MemAvailable``), the rest of the
process's control group (a container's limit), and the rest of the process's limits (``ulimit -v``,
``ulimit -d``). ``RECPRESS_MEMORY_MB`` replaces all of them. Linux only; on other systems only the
setting and the limits of the process are known.
"""

import resource
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from compressors.contracts import is_out_of_memory
from infra.errors import OutOfMemory
from infra.memory_reserve import release_reserve
from infra.settings import load_settings

SETTING = "RECPRESS_MEMORY_MB"
MIB = 2**20
_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")


class Available(NamedTuple):
    """Bytes that this process may still use, and the limit that applies."""

    bytes: int
    limit: str


def available_memory() -> Available | None:
    """Return the memory this process may still use; None if it is unknown.

    Raises:
        SettingRefused: the setting is not a positive number.
    """
    stated = load_settings().memory_mb
    if stated is not None:
        return Available(int(stated * MIB) - resident(), f"{SETTING}={stated:g}")
    known = [
        Available(free, limit)
        for limit, free in (
            ("the memory of this machine", _field(_PROC / "meminfo", "MemAvailable")),
            ("the memory limit of the container (control group)", _left_in_control_groups()),
            ("the address-space limit (ulimit -v)", _left(resource.RLIMIT_AS, "VmSize")),
            ("the data-segment limit (ulimit -d)", _left(resource.RLIMIT_DATA, "VmData")),
        )
        if free is not None
    ]
    return min(known, default=None)


def require_memory(needed: int, doing: str) -> None:
    """Raise if a step needs more memory than is available, before it allocates any.

    Args:
        needed: bytes in addition to what this process has.
        doing: the work that needs them, as a noun phrase that begins a sentence.

    Raises:
        OutOfMemory: contains both figures, the limit, and the remedy.
    """
    found = available_memory()
    if found is not None and needed > found.bytes:
        raise OutOfMemory(
            "step_memory",
            doing=doing,
            needed_mib=needed // MIB,
            available_mib=max(found.bytes, 0) // MIB,
            limit=found.limit,
            setting=SETTING,
        )


def as_out_of_memory(fault: BaseException, doing: str = "The work") -> OutOfMemory | None:
    """Convert a native out-of-memory error to ``OutOfMemory``; None for any other error."""
    if isinstance(fault, OutOfMemory):
        return fault
    if not is_out_of_memory(fault):
        return None
    found = available_memory()
    if found is None:
        return OutOfMemory("memory_exhausted", doing=doing)
    left = max(found.bytes, 0) // MIB
    return OutOfMemory("memory_limit_exhausted", doing=doing, left_mib=left, limit=found.limit)


@contextmanager
def memory_errors(doing: Callable[[], str]) -> Iterator[None]:
    """Raise every out-of-memory error of the block, also of libraries, as ``OutOfMemory``.

    Args:
        doing: the work in the block, as a noun phrase that begins a sentence.
    """
    try:
        yield
    except Exception as fault:
        if not isinstance(fault, OutOfMemory) and not is_out_of_memory(fault):
            raise
        release_reserve()  # formatting the message takes memory
        traceback.clear_frames(fault.__traceback__)  # the failed allocation has been freed
        error = as_out_of_memory(fault, doing())
        if error is None or error is fault:
            raise
        raise error from fault


def resident() -> int:
    """Return the bytes of memory that this process occupies."""
    return _held("VmRSS")


def _left(limit: int, held: str) -> int | None:
    soft, _ = resource.getrlimit(limit)
    return None if soft == resource.RLIM_INFINITY else soft - _held(held)


def _held(field: str) -> int:
    """Return a field of ``/proc/self/status`` of this process, in bytes."""
    return _field(_PROC / "self" / "status", field) or 0


def _field(file: Path, name: str) -> int | None:
    """Read a field in kB from a file of ``/proc``, and return it in bytes."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    values = (line.split() for line in lines if line.startswith(f"{name}:"))
    return next((int(words[1]) * 1024 for words in values if len(words) > 1), None)


def _left_in_control_groups() -> int | None:
    """Return the least memory left in this process's control group and all its parents."""
    try:
        lines = (_PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return None
    left: list[int] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, used = _CGROUPS, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root = _CGROUPS / "memory"
            limit, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = root / path.strip("/")
        while True:  # a container's own group appears as the root
            if (free := _left_in(group, limit, used)) is not None:
                left.append(free)
            if group in (root, root.parent):
                break
            group = group.parent
    return min(left, default=None)


def _left_in(group: Path, limit: str, used: str) -> int | None:
    try:
        most, now = (group / limit).read_text().strip(), int((group / used).read_text())
        cached = (group / "memory.stat").read_text().split()
    except (OSError, ValueError):
        return None
    if not most.isdigit() or int(most) >= 2**62:
        return None
    # The kernel frees file pages before it kills a process.
    facts = dict(zip(cached[::2], cached[1::2], strict=False))
    files = int(facts.get("inactive_file", 0)) + int(facts.get("active_file", 0))
    return int(most) - max(now - files, 0)
