"""Temporary files and folders whose names contain the process that created them.

A later run can therefore remove what a killed run left. A name ends in
``.<machine>-<pid>-<start>-<random>.<ending>``:

- ``machine`` identifies a boot of a host and a PID namespace. Two containers or hosts that share a
  file system differ in it, so neither removes files of the other's running processes.
- ``start`` is the process's start time, so a later process with the same PID is not the owner.

``remove_leftovers`` removes files of a process of this machine that has ended, and files of another
machine or of version 0.1.0 that have not changed for ``MAX_AGE_SECONDS``.
"""

import hashlib
import logging
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from infra.errors import StoreUnavailable
from infra.store.disk import translate_os_error

log = logging.getLogger(__name__)

MAX_AGE_SECONDS = 7 * 86_400
"""``remove_leftovers`` removes a file of another machine after this time without a change."""

MAX_STEM_BYTES = 120
"""The stem is truncated to this length, because file systems allow 255 bytes in a name."""

_OWNED = re.compile(r".*\.(?P<machine>[0-9a-f]{12})-(?P<pid>\d+)-(?P<start>\d+)-[0-9a-f]{8}\.\w+")

# Names that version 0.1.0 gave to temporary files. They do not contain the process. The files are
# next to a result (``folder_next_to``), below the store's root, and in the system's folder.
EARLIER_SIBLINGS = re.compile(r"\..+\.[0-9a-f]{32}\.(part|damaged)")
EARLIER_KEYS = re.compile(r"[0-9a-f]{32}")
_EARLIER_SCRATCH = re.compile(r"recpress-(pack|items|demo)-[a-z0-9_]{8}")


def generate_owned_name(stem: str, ending: str) -> str:
    """Return a unique file name that identifies this process as the owner.

    Args:
        stem: the beginning of the name, truncated to ``MAX_STEM_BYTES``.
        ending: the file extension without the dot, such as ``part``; letters only.
    """
    short = stem.encode()[:MAX_STEM_BYTES].decode(errors="ignore")
    owner = f"{_compute_machine_id()}-{os.getpid()}-{_read_start_time(os.getpid())}"
    return f"{short}.{owner}-{uuid.uuid4().hex[:8]}.{ending}"


def remove_leftovers(folder: Path, earlier: re.Pattern[str]) -> int:
    """Remove the temporary files and folders of killed runs from ``folder``.

    Only files with a name of ``generate_owned_name``, or a name that matches ``earlier``, are
    removed. A file that cannot be removed is skipped, since the caller does not depend on it.

    Args:
        folder: the folder to search, without its subfolders.
        earlier: pattern of the names that version 0.1.0 gave to temporary files in this folder.

    Returns:
        Number of removed files and folders.
    """
    try:
        with os.scandir(folder) as entries:
            abandoned = [Path(entry.path) for entry in entries if _is_abandoned(entry, earlier)]
    except OSError:
        return 0
    for path in abandoned:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()
    removed = [path for path in abandoned if not os.path.lexists(path)]
    if removed:
        log.info("Removed %d temporary file(s) of killed runs from %s", len(removed), folder)
    return len(removed)


@contextmanager
def scratch_folder(purpose: str, within: Path | None = None) -> Iterator[Path]:
    """Yield an empty folder for intermediate files and remove it at the end of the block.

    If this process is killed, a later run removes the folder.

    Args:
        purpose: a word for the folder's name, so that people recognize it.
        within: the parent folder; None for the system's folder for temporary files.

    Raises:
        SettingRefused, StoreUnavailable: the folder cannot be created.
    """
    try:
        base = Path(tempfile.gettempdir()) if within is None else within
    except FileNotFoundError as fault:
        raise StoreUnavailable("temporary_folder_missing", problem=fault.strerror) from fault
    remove_leftovers(base, _EARLIER_SCRATCH)
    folder = base / generate_owned_name(f"recpress-{purpose}", "tmp")
    try:
        folder.mkdir(mode=0o700, parents=within is not None)
    except OSError as fault:
        raise translate_os_error(fault, folder, "write") from fault
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def folder_next_to(into: Path) -> Iterator[Path]:
    """Yield a temporary folder on the disk of ``into``, which the block renames to ``into``.

    If the block raises, the temporary folder is removed, with each parent folder created for it.

    Raises:
        SettingRefused, StoreUnavailable: the temporary folder cannot be created.
    """
    into = into.absolute()
    missing_parents = [parent for parent in into.parents if not parent.exists()]
    remove_leftovers(into.parent, EARLIER_SIBLINGS)
    partial = into.parent / generate_owned_name(f".{into.name}", "part")
    try:
        try:
            partial.mkdir(parents=True)
        except OSError as fault:
            raise translate_os_error(fault, partial, "write") from fault
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in missing_parents:  # innermost first
            with suppress(OSError):  # another process uses the folder, or it was not created
                parent.rmdir()
        raise


def drop_folder(folder: Path) -> None:
    """Remove a folder if it exists; rename it first, so that no reader finds it incomplete.

    Files that cannot be removed remain below the new name; ``folder_next_to`` removes them later.

    Raises:
        SettingRefused, StoreUnavailable: the folder cannot be renamed.
    """
    renamed = folder.with_name(generate_owned_name(f".{folder.name}", "damaged"))
    try:
        folder.rename(renamed)
    except FileNotFoundError:
        return
    except OSError as fault:
        raise translate_os_error(fault, folder, "write") from fault
    shutil.rmtree(renamed, ignore_errors=True)


def read_last_change(path: Path) -> float:
    """Return the last modification time of a file, or of the newest file below a folder.

    Returns:
        Seconds since 1970.

    Raises:
        OSError: the path cannot be read.
    """
    newest = path.lstat().st_mtime
    if path.is_dir() and not path.is_symlink():
        for parent, folders, files in os.walk(path):
            for name in (*folders, *files):
                with suppress(FileNotFoundError):  # removed after the listing
                    newest = max(newest, (Path(parent) / name).lstat().st_mtime)
    return newest


def is_old(path: Path) -> bool:
    """Return whether a path has not changed for ``MAX_AGE_SECONDS``; False if unreadable."""
    try:
        return read_last_change(path) < time.time() - MAX_AGE_SECONDS
    except OSError:
        return False


def _is_abandoned(entry: os.DirEntry[str], earlier: re.Pattern[str]) -> bool:
    """Return whether an entry is a temporary file that no running process owns."""
    owner = _OWNED.fullmatch(entry.name)
    if owner is not None and owner["machine"] == _compute_machine_id():
        return not _is_running(int(owner["pid"]), int(owner["start"]))
    is_temporary = owner is not None or earlier.fullmatch(entry.name) is not None
    return is_temporary and is_old(Path(entry.path))


def _is_running(pid: int, start: int) -> bool:
    """Return whether the process with this PID and start time runs on this machine."""
    if pid == os.getpid():
        return start == _read_start_time(pid)
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # the process belongs to another user
    # A process with an unknown start time (0) counts as running, so its files are kept.
    return _read_start_time(pid) in {0, start}


def _read_start_time(pid: int) -> int:
    """Return a process's start in clock ticks since boot.

    Returns:
        -1 for a process that has ended (a zombie); 0 if unknown, because ``/proc`` is missing or
        does not show the process.
    """
    try:
        # Split after the last bracket: the process name, in brackets, may contain spaces. The rest
        # begins with the state (field 3 in proc(5)); the start time is field 22.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return 0
    return -1 if fields[0] in {b"Z", b"X"} else int(fields[19])


@cache
def _compute_machine_id() -> str:
    """Return twelve hex digits that identify this boot, host and PID namespace."""
    parts = [os.uname().nodename]
    # Systems without /proc have only the host name.
    with suppress(OSError):
        parts = [Path("/proc/sys/kernel/random/boot_id").read_text().strip()]
    with suppress(OSError):
        parts.append(str(Path("/proc/self/ns/pid").stat().st_ino))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]
