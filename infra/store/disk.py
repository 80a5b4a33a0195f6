"""What an error of the local disk means, in one place: the path, the cause and the remedy."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from infra.errors import (
    ArtifactMissing,
    FileRefused,
    InfraError,
    OutOfMemory,
    Refused,
    SettingRefused,
    StoreUnavailable,
)

_FULL = {errno.ENOSPC, errno.EDQUOT}
_BUSY = {errno.EMFILE, errno.ENFILE}
_FORBIDDEN = {errno.EROFS, errno.EACCES, errno.EPERM, errno.EOPNOTSUPP}
_NAME = {errno.ENAMETOOLONG, errno.ELOOP, errno.EILSEQ}
_RUST = {"safetensors", "safetensors_rust"}
OF_THE_MACHINE = _FULL | _BUSY | {errno.EFBIG, errno.EIO, errno.ENOMEM}
"""Errors that no input causes: space, limits, a failing disk."""
_KIND = {errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENXIO, errno.ENODEV, errno.ESPIPE}


def translate(fault: OSError, path: Path, doing: str) -> Refused | InfraError:
    """The error to raise for an ``OSError``.

    A disk that is full or failing is a fault of the machine, and a retry may help. A path that
    is missing, forbidden or of the wrong kind is a fault of the input.

    Args:
        fault: what the system raised.
        path: what was worked on.
        doing: ``read``, ``write`` or ``list``.
    """
    cause = fault.strerror or str(fault)
    if fault.errno == errno.ENOENT and doing == "read":
        return ArtifactMissing("file_missing", path=str(path))
    if fault.errno == errno.ENOENT:
        return SettingRefused(
            f"Could not {doing} {path}: {cause}. Create the folder, or name another one."
        )
    if fault.errno in _FULL:
        return StoreUnavailable(f"The disk of {path} is full. Free some space, then run again.")
    if fault.errno == errno.EFBIG:
        return StoreUnavailable(
            f"{path} would become larger than this process or file system allows. Raise the "
            "file-size limit (ulimit -f), or choose another file system, then run again."
        )
    if fault.errno == errno.ENOMEM:
        return OutOfMemory(
            f"There is not enough memory to {doing} {path}. Raise the limit of this process "
            "(ulimit -v) or end other processes, then run again."
        )
    if fault.errno in _BUSY:
        return StoreUnavailable(
            f"Could not {doing} {path}: {cause}. Raise the limits of this process (ulimit -n) "
            "or end other processes, then run again."
        )
    if fault.errno in _FORBIDDEN:
        return SettingRefused(
            f"Could not {doing} {path}: {cause}. Choose a folder where you may "
            f"{doing} (RECPRESS_STORE, RECPRESS_HOME), or change its permissions."
        )
    if fault.errno in _NAME:
        return SettingRefused(
            f"Could not {doing} {path}: {cause}. Use a shorter path without links that form a loop."
        )
    if fault.errno in _KIND:
        return SettingRefused(
            f"Could not {doing} {path}: {cause}. A file is where a folder is needed, "
            "or the other way round; move it away."
        )
    return StoreUnavailable(f"Could not {doing} {path}: {cause}. Check the disk.")


@contextmanager
def translated(path: Path, doing: str) -> Iterator[None]:
    """Raise every ``OSError`` of the block as ``translate`` sorts it, with ``path``."""
    try:
        yield
    except Exception as fault:
        error = as_os_error(fault)
        if error is None:
            raise
        raise translate(error, path, doing) from fault


@contextmanager
def input_files(around: Path) -> Iterator[None]:
    """Raise every ``OSError`` of a block that reads a user's files as one of ours.

    Args:
        around: the folder or file the user named, for errors that name no path.

    Raises:
        FileRefused: a file is missing, cannot be read, or is not of the kind that is needed.
        StoreUnavailable: the machine lacks space or another resource, or the disk fails.
    """
    try:
        yield
    except Exception as fault:
        error = as_os_error(fault)
        if error is None:
            raise
        raise of_input(error, around) from fault


def as_os_error(fault: Exception) -> OSError | None:
    """The error of the system that an exception is, or that its text names; else None.

    Libraries written in Rust (safetensors) raise classes of their own with "(os error 27)" in the
    text.
    """
    if isinstance(fault, OSError):
        return fault
    found = re.search(r"\(os error (\d+)\)", str(fault))
    if found is None or type(fault).__module__.partition(".")[0] not in _RUST:
        return None
    number = int(found[1])
    return OSError(number, os.strerror(number))


def of_input(fault: OSError, around: Path | None = None) -> Refused | InfraError:
    """The same sorting for a file that a user named: which file, what is wrong, what to do."""
    named = fault.filename2 or fault.filename
    path = Path(os.fsdecode(named)) if isinstance(named, str | bytes) else around
    if path is None:
        path = Path()
    cause = fault.strerror or str(fault)
    if fault.errno == errno.ENOENT:
        return FileRefused(f"{path} does not exist. Correct the path, or put the file there.")
    if fault.errno in _FORBIDDEN - {errno.EROFS}:
        return FileRefused(f"{path} may not be used: {cause}. Change its permissions.")
    if fault.errno in _NAME:
        return FileRefused(
            f"{path} cannot be opened: {cause}. Use a shorter path without links that form a loop."
        )
    if fault.errno in _KIND:
        return FileRefused(
            f"{path} is not of the kind that is needed: {cause}. Put a plain file (or a folder "
            "where one is asked for) in its place."
        )
    return translate(fault, path, "use")
