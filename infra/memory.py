"""How much memory this process may still use, and what an out-of-memory error is.

Available is the least of: what the machine has free (``MemAvailable``), what the control group
of the process has left (a container's limit), and what the limits of the process leave
(``ulimit -v``, ``ulimit -d``). ``RECPRESS_MEMORY_MB`` replaces all of them. Linux only; elsewhere
only the setting and the limits of the process are known.
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
    """Bytes that this process may still use, and what limits them."""

    bytes: int
    limit: str


def available_memory() -> Available | None:
    """What this process may still use; None if nothing is known.

    Raises:
        SettingRefused: the setting is no positive number.
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
    """Raise if a step needs more memory than there is, before it allocates any.

    Args:
        needed: bytes beyond what this process has.
        doing: what needs them, as a noun phrase that begins a sentence.

    Raises:
        OutOfMemory: names both figures, what limits them, and what to do.
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
    """The error to raise for a native out-of-memory error; None if it is another error."""
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
    """Raise every out-of-memory error of the block, also a library's own, as ``OutOfMemory``.

    Args:
        doing: what ran when it happened, as a noun phrase that begins a sentence.
    """
    try:
        yield
    except Exception as fault:
        if not isinstance(fault, OutOfMemory) and not is_out_of_memory(fault):
            raise
        release_reserve()  # the sentence itself takes memory
        traceback.clear_frames(fault.__traceback__)  # what did not fit is given back
        error = as_out_of_memory(fault, doing())
        if error is None or error is fault:
            raise
        raise error from fault


def resident() -> int:
    """Bytes of memory that this process occupies."""
    return _held("VmRSS")


def _left(limit: int, held: str) -> int | None:
    soft, _ = resource.getrlimit(limit)
    return None if soft == resource.RLIM_INFINITY else soft - _held(held)


def _held(field: str) -> int:
    """Bytes of this process, as ``/proc/self/status`` names them."""
    return _field(_PROC / "self" / "status", field) or 0


def _field(file: Path, name: str) -> int | None:
    """A number of kB in a file of ``/proc``, in bytes."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    values = (line.split() for line in lines if line.startswith(f"{name}:"))
    return next((int(words[1]) * 1024 for words in values if len(words) > 1), None)


def _left_in_control_groups() -> int | None:
    """The least that a control group of this process, or one above it, has left."""
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
        while True:  # a container sees its own group as the root
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
    # Pages of files are given back before a process is killed.
    facts = dict(zip(cached[::2], cached[1::2], strict=False))
    files = int(facts.get("inactive_file", 0)) + int(facts.get("active_file", 0))
    return int(most) - max(now - files, 0)
