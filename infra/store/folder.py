"""The storage backend for a local folder.

It gives the guarantees of S3: a reader receives the old or the new value of a key, never a part,
and of several processes that create the same key exactly one succeeds. For this, a value is written
to a temporary file, which is then renamed or hard-linked to its key. fsspec's local file system is
not used: it exposes partly written files, and it has no operation that creates a complete file and
fails if the name is taken.
"""

import errno
import os
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

from infra.errors import AlreadyThere, RecordRefused, StoreRefused
from infra.store.chunks import read_open_file
from infra.store.disk import translate_os_errors
from infra.store.temporary import EARLIER_KEYS, generate_owned_name, remove_leftovers

TEMPORARY = ".tmp"
"""Folder below the root that contains temporary files."""

CLEANUP_INTERVAL_SECONDS = 60.0
"""Least time between two removals of killed runs' temporary files from one folder."""

_last_cleanups: dict[Path, float] = {}
"""Time of the last removal from each folder, by the monotonic clock."""


class Folder:
    """Stores keys as files below one folder; implements ``backend.Backend``.

    Args:
        root: the folder; created by the first write.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self.uri = "file://" + quote(str(root))

    def local_path(self, key: str) -> Path | None:
        """Return the local path of a key or key prefix."""
        return self._root / key

    def sizes(self, prefix: str) -> dict[str, int]:
        """Return every key that begins with ``prefix``, with its size in bytes."""
        sizes: dict[str, int] = {}
        subfolder = prefix.rpartition("/")[0]
        with translate_os_errors(self._root / subfolder, "list"):
            self._add_sizes(subfolder, sizes)
        return {key: size for key, size in sizes.items() if key.startswith(prefix)}

    def size(self, key: str) -> int | None:
        """Return the size of a key in bytes; None if it does not exist or is not a plain file."""
        with translate_os_errors(self._root / key, "read"):
            try:
                status = (self._root / key).lstat()
            except (FileNotFoundError, NotADirectoryError):
                return None
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def read(self, key: str, start: int, stop: int) -> bytes:
        """Read bytes [start, stop) of a key, or fewer if the file ends earlier.

        Raises:
            ArtifactMissing: the key does not exist.
            RecordRefused: the path is not a plain file.
        """
        with translate_os_errors(self._root / key, "read"):
            # O_NONBLOCK: opening a pipe would otherwise wait for a writer.
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
            try:
                file = os.open(self._root / key, flags)
            except OSError as fault:
                if fault.errno in {errno.ELOOP, errno.ENXIO}:  # a symlink or a socket
                    raise self._build_not_a_file_error(key) from fault
                raise
            try:
                if not stat.S_ISREG(os.fstat(file).st_mode):
                    raise self._build_not_a_file_error(key)
                return read_open_file(file, start, stop)
            finally:
                os.close(file)

    def create(self, key: str, body: bytes) -> None:
        """Write a new key; raises ``AlreadyThere`` if it exists."""
        self.upload_new(key, len(body), (body,))

    def write(self, key: str, body: bytes) -> None:
        """Write a key; an existing value is replaced."""
        path = self._root / key
        with self._write_temporary(path, (body,)) as temporary:
            try:
                temporary.replace(path)
            except IsADirectoryError as fault:
                raise self._build_not_a_file_error(key) from fault

    def move(self, file: Path, key: str) -> bool:
        """Move a local file to a key; returns False if it is on another disk.

        An existing value is replaced.
        """
        path = self._root / key
        with translate_os_errors(path, "write"):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                file.chmod(0o444)  # readers memory-map stored files, so they must not change
                file.rename(path)
            except OSError as fault:
                if fault.errno == errno.EXDEV:
                    return False
                raise
        return True

    def upload(self, key: str, size: int, chunks: Iterable[bytes]) -> None:
        """Write or replace a key; if ``chunks`` raises, the key is unchanged.

        ``size`` is not needed here and not checked.
        """
        path = self._root / key
        with self._write_temporary(path, chunks) as temporary:
            temporary.replace(path)

    def upload_new(self, key: str, size: int, chunks: Iterable[bytes]) -> None:
        """Write a new key; raises ``AlreadyThere`` if it exists."""
        path = self._root / key
        with self._write_temporary(path, chunks) as temporary:
            # A rename would replace an existing file; os.link fails if the name is taken.
            try:
                os.link(temporary, path)
            except FileExistsError as fault:
                raise AlreadyThere("key_exists", place=str(path)) from fault

    def link(self, key: str, to: str) -> None:
        """Make the key ``to`` a hard link to the file of ``key``; replaces an existing file.

        The file is copied instead if it already has as many links as the file system allows.
        """
        source, link_path = self._root / key, self._root / to
        with translate_os_errors(link_path, "write"):
            link_path.parent.mkdir(parents=True, exist_ok=True)
            if link_path.exists() and link_path.samefile(source):
                return
            temporary = self._choose_temporary_path()
            try:
                try:
                    os.link(source, temporary)
                except OSError as fault:
                    if fault.errno != errno.EMLINK:
                        raise
                    shutil.copyfile(source, temporary)
                    temporary.chmod(0o444)
                temporary.replace(link_path)
            finally:
                # Needed after a rename too: if both names link to one file, rename does nothing.
                temporary.unlink(missing_ok=True)

    @contextmanager
    def _write_temporary(self, path: Path, chunks: Iterable[bytes]) -> Iterator[Path]:
        """Write the chunks to a temporary file, yield its path, and remove it after the block.

        The file is on the same disk as ``path``, so the block can rename or link it to ``path``.
        """
        with translate_os_errors(path, "write"):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._choose_temporary_path()
            try:
                # Created read-only, because readers memory-map stored files.
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                with os.fdopen(os.open(temporary, flags, 0o444), "wb") as file:
                    for chunk in chunks:
                        file.write(chunk)
                yield temporary
            finally:
                # An error of the block is more important, and a later run removes the file.
                with suppress(OSError):
                    temporary.unlink(missing_ok=True)

    def _choose_temporary_path(self) -> Path:
        """Return an unused path for a temporary file on the same disk as the keys."""
        temporary = self._root / TEMPORARY / generate_owned_name("key", "tmp")
        temporary.parent.mkdir(exist_ok=True)
        _remove_leftovers_if_due(temporary.parent)
        return temporary

    def _build_not_a_file_error(self, key: str) -> RecordRefused:
        """Return the error for a key whose path is not a plain file."""
        return RecordRefused("record_no_plain_file", place=str(self._root / key))

    def _add_sizes(self, subfolder: str, sizes: dict[str, int]) -> None:
        """Add the size of every key below a folder, relative to the root, to ``sizes``."""
        try:
            entries = list(os.scandir(self._root / subfolder))
        except (FileNotFoundError, NotADirectoryError):
            return  # as in S3, it is not an error to list an unused prefix
        for entry in entries:
            key = f"{subfolder}/{entry.name}" if subfolder else entry.name
            if key == TEMPORARY:
                continue
            if entry.is_dir(follow_symlinks=False):
                self._add_sizes(key, sizes)
            else:
                with suppress(FileNotFoundError):  # deleted after the listing
                    sizes[key] = entry.stat(follow_symlinks=False).st_size


def _remove_leftovers_if_due(folder: Path) -> None:
    """Remove temporary files of killed runs, at most once per ``CLEANUP_INTERVAL_SECONDS``."""
    now = time.monotonic()
    if now - _last_cleanups.get(folder, -CLEANUP_INTERVAL_SECONDS) >= CLEANUP_INTERVAL_SECONDS:
        _last_cleanups[folder] = now
        # EARLIER_KEYS: names of the temporary files of version 0.1.0, which do not name a process.
        remove_leftovers(folder, EARLIER_KEYS)


def require_empty_or_missing(into: Path) -> None:
    """Raise unless ``into`` is an empty folder or does not exist.

    Raises:
        StoreRefused: ``into`` is a symlink or a file, or is not empty.
    """
    if into.is_symlink() or (into.exists() and not into.is_dir()):
        raise StoreRefused("output_no_folder", path=str(into))
    if into.is_dir() and any(into.iterdir()):
        raise StoreRefused("output_not_empty", folder=str(into))
