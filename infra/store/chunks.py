"""List, hash, read and verify the files of a folder, in chunks and with a few threads.

``list_regular_files`` lists the files of a folder and ``hash_files`` hashes them.
``read_verified_chunks`` reads a file and compares each chunk with its hash. ``find_hard_links``
finds files whose hashes are known already, ``read_open_file`` reads a part of a file, and
``map_in_order`` runs a function in threads. For files of any size, only a few chunks are in memory.
"""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from infra.errors import ConcurrentChange, InfraError, StoreRefused
from infra.store.manifest import CHUNK_BYTES, FileEntry, require_portable_path

WORKERS = 4
"""Number of threads of ``map_in_order``."""

Item = TypeVar("Item")
Result = TypeVar("Result")
Value = TypeVar("Value")


def map_in_order(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Apply ``work`` to each item in threads; yield the results in order, a few in memory at once.

    At most ``WORKERS + 1`` results exist at a time: no further call starts until the caller takes
    the next result. ``Executor.map`` would submit all calls at once, and each result that is not
    yet consumed can be a chunk of 8 MiB.

    Args:
        work: called in a thread for each item. An exception that it raises is raised to the caller
            in place of the result, and calls that have not started are cancelled.
        items: consumed in the caller's thread, at most ``WORKERS`` items ahead of the results.
    """
    with ThreadPoolExecutor(WORKERS, thread_name_prefix="chunks") as pool:
        futures: deque[Future[Result]] = deque()
        try:
            for item in items:
                futures.append(pool.submit(work, item))
                if len(futures) > WORKERS:
                    yield futures.popleft().result()
            while futures:
                yield futures.popleft().result()
        finally:
            for future in futures:
                future.cancel()


def sha256(data: bytes) -> str:
    """Return the SHA-256 of a chunk's bytes as hex digits."""
    return hashlib.sha256(data).hexdigest()


def list_regular_files(folder: Path) -> list[tuple[str, int]]:
    """List every file below ``folder`` as (relative path with ``/``, bytes), sorted by path.

    Empty folders are ignored, as in git and in object stores.

    Raises:
        StoreRefused: ``folder`` is not a folder or has no file; or an entry below it is a symlink,
            is not a regular file, cannot be read, or has a name that cannot be stored: a backslash,
            a control character or a character that UTF-8 cannot encode.
    """
    files: list[tuple[str, int]] = []

    def walk(below: Path, prefix: str) -> None:
        with os.scandir(below) as entries:
            for entry in entries:
                path = prefix + entry.name
                if entry.is_symlink():
                    raise StoreRefused("file_is_link", path=str(folder / path))
                if entry.is_dir(follow_symlinks=False):
                    walk(below / entry.name, path + "/")
                elif entry.is_file(follow_symlinks=False):
                    require_portable_path(path)  # a ValueError, translated below
                    files.append((path, entry.stat(follow_symlinks=False).st_size))
                else:
                    raise StoreRefused("file_of_other_kind", path=str(folder / path))

    try:
        walk(folder, "")
    except ValueError as fault:
        raise StoreRefused("file_name_form", folder=str(folder), problem=str(fault)) from fault
    except OSError as fault:
        raise StoreRefused(
            "folder_unreadable",
            folder=str(folder),
            problem=fault.strerror,
            file=str(fault.filename),
        ) from fault
    if not files:
        raise StoreRefused("folder_empty", folder=str(folder))
    return sorted(files)


def hash_files(
    folder: Path, files: list[tuple[str, int]], chunk_bytes: int = CHUNK_BYTES
) -> tuple[FileEntry, ...]:
    """Hash every chunk of these files.

    Args:
        folder: the folder that contains the files.
        files: path relative to ``folder`` and size in bytes of each file.
        chunk_bytes: size of a chunk in bytes; the last chunk of a file may be smaller.

    Returns:
        One entry per file, in the order of ``files``.

    Raises:
        ConcurrentChange: a file is shorter than its listed size, so another process changed it
            after the listing; or it cannot be opened or read, for any reason.
    """
    chunk_starts = [(path, start) for path, size in files for start in range(0, size, chunk_bytes)]
    sizes = dict(files)

    def hash_chunk(chunk: tuple[str, int]) -> str:
        path, start = chunk
        return sha256(
            _read_exact_range(folder / path, start, min(start + chunk_bytes, sizes[path]))
        )

    chunk_hashes: dict[str, list[str]] = {path: [] for path, _ in files}
    digests = map_in_order(hash_chunk, chunk_starts)
    for (path, _), digest in zip(chunk_starts, digests, strict=True):
        chunk_hashes[path].append(digest)
    return tuple(
        FileEntry(path=path, bytes=size, chunks=tuple(chunk_hashes[path])) for path, size in files
    )


def find_hard_links(folder: Path, other: Path, values: Mapping[str, Value]) -> dict[str, Value]:
    """Find the files of ``folder`` that are hard links to files of another folder.

    Use it to reuse what is known about a file, such as its hashes, without reading the link.

    Args:
        folder: the folder that may contain links; its subfolders are not searched.
        other: the other folder, whose files must not change.
        values: what the caller knows about each file of ``other``, by relative path, such as its
            hash or its ``FileEntry``; returned unchanged for the links.

    Returns:
        For the name of each hard link in ``folder``, the value of the file that it links to. Empty
        if ``other`` does not exist.
    """
    if not other.is_dir():
        return {}
    by_inode: dict[tuple[int, int], Value] = {}
    for path, value in values.items():
        with suppress(FileNotFoundError):  # a file that does not exist has no links
            status = (other / path).lstat()
            by_inode[status.st_dev, status.st_ino] = value
    links: dict[str, Value] = {}
    for file in folder.iterdir():
        status = file.lstat()
        if (status.st_dev, status.st_ino) in by_inode:
            links[file.name] = by_inode[status.st_dev, status.st_ino]
    return links


def read_verified_chunks(folder: Path, entry: FileEntry) -> Iterator[bytes]:
    """Yield the chunks of one file, each after comparing it with its hash.

    Args:
        folder: the folder that contains the file.
        entry: path, size and hashes of the file, in chunks of ``CHUNK_BYTES``.

    Raises:
        ConcurrentChange: the file has changed since it was hashed, or cannot be read.
    """
    path = folder / entry.path

    def read_verified(index: int) -> bytes:
        start = index * CHUNK_BYTES
        data = _read_exact_range(path, start, min(start + CHUNK_BYTES, entry.bytes))
        if sha256(data) != entry.chunks[index]:
            raise _build_change_error(path)
        return data

    yield from map_in_order(read_verified, range(len(entry.chunks)))
    # Bytes that were appended to the file are in none of the verified chunks.
    try:
        has_other_size = path.lstat().st_size != entry.bytes
    except OSError as fault:
        raise _build_change_error(path) from fault
    if has_other_size:
        raise _build_change_error(path)


def read_open_file(file: int, start: int, stop: int) -> bytes:
    """Read bytes [start, stop) of the file descriptor ``file``, or fewer if the file ends earlier.

    One call of ``os.pread`` may return fewer bytes, so it is repeated until all are read.
    """
    stop = min(stop, os.fstat(file).st_size)  # os.pread allocates the requested size first
    pieces = []
    while start < stop and (piece := os.pread(file, stop - start, start)):
        pieces.append(piece)
        start += len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _read_exact_range(path: Path, start: int, stop: int) -> bytes:
    """Read exactly bytes [start, stop) of the file ``path``.

    Raises:
        ConcurrentChange: the file cannot be opened or read, has become a symlink, or ends earlier.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            data = read_open_file(file, start, stop)
        finally:
            os.close(file)
    except OSError as fault:
        raise ConcurrentChange("file_unreadable", path=str(path), problem=fault.strerror) from fault
    if len(data) != stop - start:
        raise _build_change_error(path)
    return data


def _build_change_error(path: Path) -> InfraError:
    """Return the error for a file that changed while it was stored."""
    return ConcurrentChange("file_changed", path=str(path))
