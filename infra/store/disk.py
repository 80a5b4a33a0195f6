"""Translate an ``OSError`` into an error class of this project that names path and remedy."""

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

# Error numbers by cause: no space, too many open files, no permission, an unusable path, a file of
# the wrong kind (such as a folder instead of a file).
_FULL_ERRORS = {errno.ENOSPC, errno.EDQUOT}
_OPEN_FILES_ERRORS = {errno.EMFILE, errno.ENFILE}
_FORBIDDEN_ERRORS = {errno.EROFS, errno.EACCES, errno.EPERM, errno.EOPNOTSUPP}
_PATH_ERRORS = {errno.ENAMETOOLONG, errno.ELOOP, errno.EILSEQ}
_KIND_ERRORS = {errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENXIO, errno.ENODEV, errno.ESPIPE}
MACHINE_ERRORS = _FULL_ERRORS | _OPEN_FILES_ERRORS | {errno.EFBIG, errno.EIO, errno.ENOMEM}
"""Error numbers that the machine causes, not the input: space, limits, a failing disk."""
_RUST_MODULES = {"safetensors", "safetensors_rust"}


def translate_os_error(fault: OSError, path: Path, doing: str) -> Refused | InfraError:
    """Return the project's error to raise for an ``OSError``.

    Args:
        fault: the error that the operating system raised.
        path: the file or folder of the operation, for the message.
        doing: the operation, a verb for the message: ``read``, ``write``, ``list`` or ``use``.

    Returns:
        An ``InfraError`` (a retry may help) if the disk is full or failing, or a limit is reached;
        a ``Refused`` if the path is missing, forbidden or of the wrong kind.
    """
    cause = fault.strerror or str(fault)
    if fault.errno == errno.ENOENT and doing == "read":
        return ArtifactMissing("file_missing", path=str(path))
    if fault.errno == errno.ENOENT:
        return SettingRefused("folder_missing", doing=doing, path=str(path), problem=cause)
    if fault.errno in _FULL_ERRORS:
        return StoreUnavailable("disk_full", path=str(path))
    if fault.errno == errno.EFBIG:
        return StoreUnavailable("file_size_limit", path=str(path))
    if fault.errno == errno.ENOMEM:
        return OutOfMemory("file_memory", doing=doing, path=str(path))
    if fault.errno in _OPEN_FILES_ERRORS:
        return StoreUnavailable("open_files_limit", doing=doing, path=str(path), problem=cause)
    if fault.errno in _FORBIDDEN_ERRORS:
        return SettingRefused("path_forbidden", doing=doing, path=str(path), problem=cause)
    if fault.errno in _PATH_ERRORS:
        return SettingRefused("path_unusable", doing=doing, path=str(path), problem=cause)
    if fault.errno in _KIND_ERRORS:
        return SettingRefused("path_of_wrong_kind", doing=doing, path=str(path), problem=cause)
    return StoreUnavailable("disk_failed", doing=doing, path=str(path), problem=cause)


@contextmanager
def translate_os_errors(path: Path, doing: str) -> Iterator[None]:
    """Replace every ``OSError`` that the block raises by the result of ``translate_os_error``."""
    try:
        yield
    except Exception as fault:
        error = find_os_error(fault)
        if error is None:
            raise
        raise translate_os_error(error, path, doing) from fault


@contextmanager
def translate_input_errors(named: Path) -> Iterator[None]:
    """Replace every ``OSError`` of a block that reads files that the user named.

    Args:
        named: the file or folder that the user named; reported if the ``OSError`` has no path.

    Raises:
        FileRefused: a file is missing, cannot be read, or has the wrong kind.
        StoreUnavailable: the machine lacks space or another resource, or the disk fails.
    """
    try:
        yield
    except Exception as fault:
        error = find_os_error(fault)
        if error is None:
            raise
        raise translate_input_error(error, named) from fault


def find_os_error(fault: Exception) -> OSError | None:
    """Return an exception as an ``OSError``; None if it is not an error of the operating system.

    safetensors, which is written in Rust, raises another class with "(os error 27)" in the message.
    For such an exception an ``OSError`` with this number is returned.
    """
    if isinstance(fault, OSError):
        return fault
    match = re.search(r"\(os error (\d+)\)", str(fault))
    if match is None or type(fault).__module__.partition(".")[0] not in _RUST_MODULES:
        return None
    number = int(match[1])
    return OSError(number, os.strerror(number))


def translate_input_error(fault: OSError, named: Path | None = None) -> Refused | InfraError:
    """Return the project's error to raise for an ``OSError`` of a file that the user named.

    Args:
        fault: the error that the operating system raised.
        named: the file or folder that the user named; reported if ``fault`` has no path.

    Returns:
        ``FileRefused`` if the file is missing, forbidden or of the wrong kind; else as
        ``translate_os_error``.
    """
    file_name = fault.filename2 or fault.filename
    path = Path(os.fsdecode(file_name)) if isinstance(file_name, str | bytes) else named
    if path is None:
        path = Path()
    cause = fault.strerror or str(fault)
    if fault.errno == errno.ENOENT:
        return FileRefused("file_missing", path=str(path))
    if fault.errno in _FORBIDDEN_ERRORS - {errno.EROFS}:
        return FileRefused("file_forbidden", path=str(path), problem=cause)
    if fault.errno in _PATH_ERRORS:
        return FileRefused("path_unusable", path=str(path), problem=cause)
    if fault.errno in _KIND_ERRORS:
        return FileRefused("file_of_wrong_kind", path=str(path), problem=cause)
    return translate_os_error(fault, path, "use")
