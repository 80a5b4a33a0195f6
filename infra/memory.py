"""Estimate the memory that this process may still use, and convert out-of-memory errors.

The estimate is the minimum of the machine's available memory (``MemAvailable``), of what the limit
of the control group (a container's limit) leaves, and of what the limits of the process leave
(``ulimit -v``, ``ulimit -d``). The setting ``RECPRESS_MEMORY_MB`` replaces all of them. On systems
other than Linux only the setting and the limits of the process are known.
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


class AvailableMemory(NamedTuple):
    """Bytes that this process may still use, and the limit that determines them, as text."""

    bytes: int
    limit: str


def estimate_available_memory() -> AvailableMemory | None:
    """Estimate the memory that this process may still use; None if it is unknown.

    The estimate is the smallest of the values that the module docstring lists. It is negative if
    the process uses more than a limit allows.

    Raises:
        SettingRefused: the setting is not a positive number.
    """
    setting = load_settings().memory_mb
    if setting is not None:
        return AvailableMemory(int(setting * MIB) - read_resident_bytes(), f"{SETTING}={setting:g}")
    known = [
        AvailableMemory(free, limit)
        for limit, free in (
            ("the memory of this machine", _read_field(_PROC / "meminfo", "MemAvailable")),
            (
                "the memory limit of the container (control group)",
                _compute_left_in_control_groups(),
            ),
            (
                "the address-space limit (ulimit -v)",
                _compute_left_of_limit(resource.RLIMIT_AS, "VmSize"),
            ),
            (
                "the data-segment limit (ulimit -d)",
                _compute_left_of_limit(resource.RLIMIT_DATA, "VmData"),
            ),
        )
        if free is not None
    ]
    return min(known, default=None)


def require_memory(needed: int, doing: str) -> None:
    """Raise if work needs more memory than is available. Call it before allocating memory.

    Args:
        needed: bytes in addition to the memory that this process uses now.
        doing: the work that needs them, to begin a sentence: ``Building the network``.

    Raises:
        OutOfMemory: contains the needed and the available memory, and the limit.
    """
    available = estimate_available_memory()
    if available is not None and needed > available.bytes:
        raise OutOfMemory(
            "step_memory",
            doing=doing,
            needed_mib=needed // MIB,
            available_mib=max(available.bytes, 0) // MIB,
            limit=available.limit,
            setting=SETTING,
        )


def convert_to_out_of_memory(fault: BaseException, doing: str = "The work") -> OutOfMemory | None:
    """Convert an out-of-memory error of any library to ``OutOfMemory``.

    Args:
        fault: the exception.
        doing: the work that failed, to begin a sentence: ``Building the network``.

    Returns:
        The error to raise; None if ``fault`` is not an out-of-memory error.
    """
    if isinstance(fault, OutOfMemory):
        return fault
    if not is_out_of_memory(fault):
        return None
    available = estimate_available_memory()
    if available is None:
        return OutOfMemory("memory_exhausted", doing=doing)
    left = max(available.bytes, 0) // MIB
    return OutOfMemory("memory_limit_exhausted", doing=doing, left_mib=left, limit=available.limit)


@contextmanager
def memory_errors(doing: Callable[[], str]) -> Iterator[None]:
    """Replace every out-of-memory error of the block by ``OutOfMemory``.

    Args:
        doing: returns the work of the block, to begin a sentence: ``Building the network``.
    """
    try:
        yield
    except Exception as fault:
        if not isinstance(fault, OutOfMemory) and not is_out_of_memory(fault):
            raise
        release_reserve()  # formatting the message needs memory
        traceback.clear_frames(fault.__traceback__)  # frees the local variables of the block
        error = convert_to_out_of_memory(fault, doing())
        if error is None or error is fault:
            raise
        raise error from fault


def read_resident_bytes() -> int:
    """Read the resident memory of this process in bytes; 0 if it is unknown."""
    return read_status_bytes("VmRSS")


def _compute_left_of_limit(limit: int, field: str) -> int | None:
    """Compute the bytes that a limit of this process leaves; None if there is no limit.

    Args:
        limit: a constant ``RLIMIT_*`` of ``resource``.
        field: the field of ``/proc/self/status`` with the memory that counts towards the limit.
    """
    soft, _ = resource.getrlimit(limit)
    return None if soft == resource.RLIM_INFINITY else soft - read_status_bytes(field)


def read_status_bytes(field: str) -> int:
    """Read a field of ``/proc/self/status``, such as ``VmRSS``, in bytes; 0 if unknown."""
    return _read_field(_PROC / "self" / "status", field) or 0


def _read_field(file: Path, name: str) -> int | None:
    """Read a field in kB from a file of ``/proc``, and return it in bytes."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    values = (line.split() for line in lines if line.startswith(f"{name}:"))
    return next((int(words[1]) * 1024 for words in values if len(words) > 1), None)


def _compute_left_in_control_groups() -> int | None:
    """Compute the bytes that the limits of the control group and all its parents leave.

    Returns:
        None if no limit is known.
    """
    try:
        lines = (_PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return None
    free_bytes: list[int] = []
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
        while True:  # including the root, which is the container's group inside a container
            if (free := _compute_left_in_group(group, limit, used)) is not None:
                free_bytes.append(free)
            if group in (root, root.parent):
                break
            group = group.parent
    return min(free_bytes, default=None)


def _compute_left_in_group(group: Path, limit: str, used: str) -> int | None:
    """Compute the bytes that the limit of one control group leaves; None if it has none.

    ``limit`` and ``used`` are the names of the files with the limit and the used memory.
    """
    try:
        limit_text, used_bytes = (
            (group / limit).read_text().strip(),
            int((group / used).read_text()),
        )
        words = (group / "memory.stat").read_text().split()
    except (OSError, ValueError):
        return None
    if not limit_text.isdigit() or int(limit_text) >= 2**62:  # "max" or almost 2**63: unlimited
        return None
    # Pages of files do not count, because the kernel frees them before it kills a process.
    statistics = dict(zip(words[::2], words[1::2], strict=False))
    file_pages = int(statistics.get("inactive_file", 0)) + int(statistics.get("active_file", 0))
    return int(limit_text) - max(used_bytes - file_pages, 0)
