"""Temporary files and folders named after their process, so those of killed runs are removed.

A name ends in ``.<machine>-<pid>-<start>-<random>.<ending>``. ``machine`` identifies one boot of
one host and one PID namespace, so a process of another container or host on a shared file system is
never mistaken for a dead one of this host. ``start`` is the start time of the process, so a later
process with the same PID is not mistaken for the owner.

``collect`` removes files of a dead process of this machine immediately, and files of another
machine or an earlier version after ``MAX_AGE_SECONDS``.
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
from infra.store.disk import translate

log = logging.getLogger(__name__)

MAX_AGE_SECONDS = 7 * 86_400
"""After this time without a change a file of another machine counts as left by a killed run."""

MAX_STEM_BYTES = 120

_OWNED = re.compile(r".*\.(?P<machine>[0-9a-f]{12})-(?P<pid>\d+)-(?P<start>\d+)-[0-9a-f]{8}\.\w+")

# Names of version 0.1.0, which do not contain their owner.
EARLIER_SIBLINGS = re.compile(r"\..+\.[0-9a-f]{32}\.(part|damaged)")
EARLIER_KEYS = re.compile(r"[0-9a-f]{32}")
_EARLIER_SCRATCH = re.compile(r"recpress-(pack|items|demo)-[a-z0-9_]{8}")


def owned_name(stem: str, ending: str) -> str:
    """Return a unique file name that identifies this process as the owner.

    Args:
        stem: the beginning of the name; shortened to what every file system can store.
        ending: the kind of file, such as ``part``; letters only.
    """
    short = stem.encode()[:MAX_STEM_BYTES].decode(errors="ignore")
    owner = f"{_machine()}-{os.getpid()}-{_start(os.getpid())}"
    return f"{short}.{owner}-{uuid.uuid4().hex[:8]}.{ending}"


def collect(folder: Path, earlier: re.Pattern[str]) -> int:
    """Remove temporary files and folders of killed runs directly in ``folder``.

    Files with other names are never removed. A file that cannot be removed is skipped, since the
    caller's work does not depend on it.

    Args:
        folder: the folder to search, without its subfolders.
        earlier: names of an earlier version's temporary files.

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
    """Yield an empty folder for intermediate files, removed at the end or by a later run.

    Args:
        purpose: part of the name, for people.
        within: the folder to create it in; by default the one for temporary files.

    Raises:
        SettingRefused, StoreUnavailable: there is no usable temporary folder.
    """
    try:
        base = Path(tempfile.gettempdir()) if within is None else within
    except FileNotFoundError as fault:
        raise StoreUnavailable("temporary_folder_missing", problem=fault.strerror) from fault
    collect(base, _EARLIER_SCRATCH)
    folder = base / owned_name(f"recpress-{purpose}", "tmp")
    try:
        folder.mkdir(mode=0o700, parents=within is not None)
    except OSError as fault:
        raise translate(fault, folder, "write") from fault
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def folder_next_to(into: Path) -> Iterator[Path]:
    """Yield a temporary folder on the disk of ``into``, to be renamed to it; else removed.

    Raises:
        SettingRefused, StoreUnavailable: it cannot be created.
    """
    into = into.absolute()
    missing = [parent for parent in into.parents if not parent.exists()]
    collect(into.parent, EARLIER_SIBLINGS)
    partial = into.parent / owned_name(f".{into.name}", "part")
    try:
        try:
            partial.mkdir(parents=True)
        except OSError as fault:
            raise translate(fault, partial, "write") from fault
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in missing:  # innermost first
            with suppress(OSError):
                parent.rmdir()
        raise


def drop_folder(folder: Path) -> None:
    """Remove a folder, renamed first so that no reader finds it partly removed.

    Raises:
        SettingRefused, StoreUnavailable: it cannot be renamed.
    """
    aside = folder.with_name(owned_name(f".{folder.name}", "damaged"))
    try:
        folder.rename(aside)
    except FileNotFoundError:
        return
    except OSError as fault:
        raise translate(fault, folder, "write") from fault
    shutil.rmtree(aside, ignore_errors=True)


def last_change(path: Path) -> float:
    """Return the last change of a file, or of any file in a folder, in seconds of the epoch.

    Raises:
        OSError: it cannot be read.
    """
    newest = path.lstat().st_mtime
    if path.is_dir() and not path.is_symlink():
        for below, folders, files in os.walk(path):
            for name in (*folders, *files):
                with suppress(FileNotFoundError):
                    newest = max(newest, (Path(below) / name).lstat().st_mtime)
    return newest


def is_old(path: Path) -> bool:
    """Return whether a path is unchanged for ``MAX_AGE_SECONDS``; False if unknown."""
    try:
        return last_change(path) < time.time() - MAX_AGE_SECONDS
    except OSError:
        return False


def _is_abandoned(entry: os.DirEntry[str], earlier: re.Pattern[str]) -> bool:
    owned = _OWNED.fullmatch(entry.name)
    if owned is not None and owned["machine"] == _machine():
        return not _is_running(int(owned["pid"]), int(owned["start"]))
    known = owned is not None or earlier.fullmatch(entry.name) is not None
    return known and is_old(Path(entry.path))


def _is_running(pid: int, start: int) -> bool:
    if pid == os.getpid():
        return start == _start(pid)
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # the process belongs to another user
    # 0: unknown, because /proc hides it or does not exist. It counts as running.
    return _start(pid) in {0, start}


def _start(pid: int) -> int:
    """Return a process's start in clock ticks since boot; -1 for a zombie, 0 if unknown."""
    try:
        # The name in brackets may contain spaces and brackets.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return 0
    return -1 if fields[0] in {b"Z", b"X"} else int(fields[19])


@cache
def _machine() -> str:
    """Return twelve hex digits that identify this boot, host and PID namespace."""
    parts = [os.uname().nodename]
    with suppress(OSError):
        parts = [Path("/proc/sys/kernel/random/boot_id").read_text().strip()]
    with suppress(OSError):
        parts.append(str(Path("/proc/self/ns/pid").stat().st_ino))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]
