"""Translate errors of the local disk to ours, with the path, the cause and the remedy."""

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
    """Return the error to raise for an ``OSError``.

    A disk that is full or failing is a fault of the machine, and a retry may help. A path that
    is missing, forbidden or of the wrong kind is a fault of the input.

    Args:
        fault: the error of the system.
        path: the file or folder of the operation.
        doing: ``read``, ``write`` or ``list``.
    """
    cause = fault.strerror or str(fault)
    if fault.errno == errno.ENOENT and doing == "read":
        return ArtifactMissing("file_missing", path=str(path))
    if fault.errno == errno.ENOENT:
        return SettingRefused("folder_missing", doing=doing, path=str(path), problem=cause)
    if fault.errno in _FULL:
        return StoreUnavailable("disk_full", path=str(path))
    if fault.errno == errno.EFBIG:
        return StoreUnavailable("file_size_limit", path=str(path))
    if fault.errno == errno.ENOMEM:
        return OutOfMemory("file_memory", doing=doing, path=str(path))
    if fault.errno in _BUSY:
        return StoreUnavailable("open_files_limit", doing=doing, path=str(path), problem=cause)
    if fault.errno in _FORBIDDEN:
        return SettingRefused("path_forbidden", doing=doing, path=str(path), problem=cause)
    if fault.errno in _NAME:
        return SettingRefused("path_unusable", doing=doing, path=str(path), problem=cause)
    if fault.errno in _KIND:
        return SettingRefused("path_of_wrong_kind", doing=doing, path=str(path), problem=cause)
    return StoreUnavailable("disk_failed", doing=doing, path=str(path), problem=cause)


@contextmanager
def translated(path: Path, doing: str) -> Iterator[None]:
    """Raise every ``OSError`` of the block as ``translate`` classifies it, with ``path``."""
    try:
        yield
    except Exception as fault:
        error = as_os_error(fault)
        if error is None:
            raise
        raise translate(error, path, doing) from fault


@contextmanager
def input_files(around: Path) -> Iterator[None]:
    """Translate every ``OSError`` of a block that reads a user's files.

    Args:
        around: the folder or file the user named, for errors that name no path.

    Raises:
        FileRefused: a file is missing, cannot be read, or has the wrong kind.
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
    """Return the ``OSError`` that an exception is or that its text names; else None.

    Libraries written in Rust (safetensors) raise other classes with "(os error 27)" in the
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
    """Translate an error of a file that a user named: the file, the problem, the remedy."""
    named = fault.filename2 or fault.filename
    path = Path(os.fsdecode(named)) if isinstance(named, str | bytes) else around
    if path is None:
        path = Path()
    cause = fault.strerror or str(fault)
    if fault.errno == errno.ENOENT:
        return FileRefused("file_missing", path=str(path))
    if fault.errno in _FORBIDDEN - {errno.EROFS}:
        return FileRefused("file_forbidden", path=str(path), problem=cause)
    if fault.errno in _NAME:
        return FileRefused("path_unusable", path=str(path), problem=cause)
    if fault.errno in _KIND:
        return FileRefused("file_of_wrong_kind", path=str(path), problem=cause)
    return translate(fault, path, "use")
