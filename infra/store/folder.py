"""The object store in a local folder: S3's guarantees from temporary files, rename and link.

It uses system calls instead of fsspec's local file system, which has no exclusive create that is
atomic with its content, and which exposes partly written files.
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
from infra.store.chunks import pread
from infra.store.disk import translated
from infra.store.temporary import EARLIER_KEYS, collect, owned_name

TEMPORARY = ".tmp"

COLLECT_SECONDS = 60.0
_collected: dict[Path, float] = {}


class Folder:
    """Keys are paths below one folder. No key is ever visible with a partly written file."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.uri = "file://" + quote(str(root))

    def in_place(self, key: str) -> Path | None:
        """Return the local path of the files of a key prefix."""
        return self._root / key

    def sizes(self, prefix: str) -> dict[str, int]:
        """Return every key that begins with ``prefix``, with its size in bytes."""
        found: dict[str, int] = {}
        top = prefix.rpartition("/")[0]
        with translated(self._root / top, "list"):
            self._walk(top, found)
        return {key: size for key, size in found.items() if key.startswith(prefix)}

    def size(self, key: str) -> int | None:
        """Return the size of a key in bytes; None if there is none, or it is no plain file."""
        with translated(self._root / key, "read"):
            try:
                found = (self._root / key).lstat()
            except (FileNotFoundError, NotADirectoryError):
                return None
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def read(self, key: str, start: int, stop: int) -> bytes:
        """Read bytes ``start`` to ``stop``; fewer if the file ends earlier."""
        with translated(self._root / key, "read"):
            # Not blocking: a pipe would wait for a writer.
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
            try:
                file = os.open(self._root / key, flags)
            except OSError as fault:
                if fault.errno in {errno.ELOOP, errno.ENXIO}:  # a link, a socket
                    raise self._no_file(key) from fault
                raise
            try:
                if not stat.S_ISREG(os.fstat(file).st_mode):
                    raise self._no_file(key)
                return pread(file, start, stop)
            finally:
                os.close(file)

    def create(self, key: str, body: bytes) -> None:
        """Write a new key; ``AlreadyThere`` if it exists."""
        self.upload_new(key, len(body), (body,))

    def write(self, key: str, body: bytes) -> None:
        """Write a key, replacing its content."""
        path = self._root / key
        with self._written(path, (body,)) as temporary:
            try:
                temporary.replace(path)
            except IsADirectoryError as fault:
                raise self._no_file(key) from fault

    def move(self, file: Path, key: str) -> bool:
        """Move a local file to a key without copying it, if it is on the same disk."""
        path = self._root / key
        with translated(path, "write"):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                file.chmod(0o444)  # readers map it in place
                file.rename(path)
            except OSError as fault:
                if fault.errno == errno.EXDEV:
                    return False
                raise
        return True

    def upload(self, key: str, size: int, chunks: Iterable[bytes]) -> None:
        """Write a large file; if ``chunks`` raises, the key is unchanged."""
        path = self._root / key
        with self._written(path, chunks) as temporary:
            temporary.replace(path)

    def upload_new(self, key: str, size: int, chunks: Iterable[bytes]) -> None:
        """Write a new large file; ``AlreadyThere`` if its key exists."""
        path = self._root / key
        with self._written(path, chunks) as temporary:
            # rename would replace; link is the one call that fails if the name is taken.
            try:
                os.link(temporary, path)
            except FileExistsError as fault:
                raise AlreadyThere("key_exists", place=str(path)) from fault

    def link(self, key: str, to: str) -> None:
        """Make ``to`` a hard link to the file of ``key``, replacing any other file.

        A file with as many links as the file system allows is copied.
        """
        source, target = self._root / key, self._root / to
        with translated(target, "write"):
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists() and target.samefile(source):
                return
            temporary = self._temporary()
            try:
                try:
                    os.link(source, temporary)
                except OSError as fault:
                    if fault.errno != errno.EMLINK:
                        raise
                    shutil.copyfile(source, temporary)
                    temporary.chmod(0o444)
                temporary.replace(target)
            finally:
                # A rename to another link of the same file leaves both names.
                temporary.unlink(missing_ok=True)

    @contextmanager
    def _written(self, path: Path, chunks: Iterable[bytes]) -> Iterator[Path]:
        """Yield a complete temporary file on the same disk as ``path``; removed at the end."""
        with translated(path, "write"):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._temporary()
            try:
                # Read-only from the start: readers map these files in place.
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                with os.fdopen(os.open(temporary, flags, 0o444), "wb") as file:
                    for chunk in chunks:
                        file.write(chunk)
                yield temporary
            finally:
                with suppress(OSError):
                    temporary.unlink(missing_ok=True)

    def _temporary(self) -> Path:
        """Return the path of a new temporary file on the disk of the keys."""
        temporary = self._root / TEMPORARY / owned_name("key", "tmp")
        temporary.parent.mkdir(exist_ok=True)
        _collect_sometimes(temporary.parent)
        return temporary

    def _no_file(self, key: str) -> RecordRefused:
        return RecordRefused("record_no_plain_file", place=str(self._root / key))

    def _walk(self, top: str, found: dict[str, int]) -> None:
        try:
            entries = list(os.scandir(self._root / top))
        except (FileNotFoundError, NotADirectoryError):
            return  # as in S3: an unused prefix has no keys
        for entry in entries:
            key = f"{top}/{entry.name}" if top else entry.name
            if key == TEMPORARY:
                continue
            if entry.is_dir(follow_symlinks=False):
                self._walk(key, found)
            else:
                with suppress(FileNotFoundError):  # deleted after the listing
                    found[key] = entry.stat(follow_symlinks=False).st_size


def _collect_sometimes(folder: Path) -> None:
    """Remove temporary files of killed runs, at most once in ``COLLECT_SECONDS``."""
    now = time.monotonic()
    if now - _collected.get(folder, -COLLECT_SECONDS) >= COLLECT_SECONDS:
        _collected[folder] = now
        collect(folder, EARLIER_KEYS)


def must_be_free(into: Path) -> None:
    """Raise if a folder is not empty.

    Raises:
        StoreRefused: it is not a folder, or not empty.
    """
    if into.is_symlink() or (into.exists() and not into.is_dir()):
        raise StoreRefused("output_no_folder", path=str(into))
    if into.is_dir() and any(into.iterdir()):
        raise StoreRefused("output_not_empty", folder=str(into))
