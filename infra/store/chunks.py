"""Read, hash and verify files in chunks with a few threads.

For files of any size, only a few chunks are in memory.
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
from infra.store.manifest import CHUNK_BYTES, FileEntry, plain_path

WORKERS = 4

Item = TypeVar("Item")
Result = TypeVar("Result")
Value = TypeVar("Value")


def map_in_order(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Apply ``work`` to each item with ``WORKERS`` threads and yield the results in order.

    At most ``WORKERS + 1`` results are in memory. ``Executor.map`` would submit all calls at once,
    and each result that is not yet consumed can be a chunk of 8 MiB.
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
    """Return the SHA-256 of a chunk as hex digits."""
    return hashlib.sha256(data).hexdigest()


def regular_files(folder: Path) -> list[tuple[str, int]]:
    """List every file below ``folder`` as (relative path with ``/``, bytes), sorted by path.

    Empty folders are ignored, as in git and in object stores.

    Raises:
        StoreRefused: ``folder`` is not a folder or has no file; or an entry below it is a symlink,
            is not a regular file, cannot be read, or has a name that ``plain_path`` rejects.
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
                    plain_path(path)
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
        ConcurrentChange: a file changed its size during the call, or cannot be read.
    """
    chunk_starts = [(path, start) for path, size in files for start in range(0, size, chunk_bytes)]
    sizes = dict(files)

    def hash_chunk(chunk: tuple[str, int]) -> str:
        path, start = chunk
        return sha256(_read_range(folder / path, start, min(start + chunk_bytes, sizes[path])))

    chunks: dict[str, list[str]] = {path: [] for path, _ in files}
    for (path, _), value in zip(chunk_starts, map_in_order(hash_chunk, chunk_starts), strict=True):
        chunks[path].append(value)
    return tuple(
        FileEntry(path=path, bytes=size, chunks=tuple(chunks[path])) for path, size in files
    )


def hard_links(folder: Path, other: Path, values: Mapping[str, Value]) -> dict[str, Value]:
    """Find the files of ``folder`` that are hard links to files of another folder.

    Args:
        folder: the folder that may contain links; its subfolders are not searched.
        other: the other folder, whose files must not change.
        values: a value of the caller for each file of ``other``, by relative path.

    Returns:
        For the name of each hard link in ``folder``, the value of the file that it links to.
    """
    if not other.is_dir():
        return {}
    by_inode: dict[tuple[int, int], Value] = {}
    for path, value in values.items():
        with suppress(FileNotFoundError):
            status = (other / path).lstat()
            by_inode[status.st_dev, status.st_ino] = value
    links: dict[str, Value] = {}
    for file in folder.iterdir():
        status = file.lstat()
        if (status.st_dev, status.st_ino) in by_inode:
            links[file.name] = by_inode[status.st_dev, status.st_ino]
    return links


def verified_chunks(folder: Path, entry: FileEntry) -> Iterator[bytes]:
    """Yield the chunks of one file, each after comparing it with its hash.

    Raises:
        ConcurrentChange: the file has changed since it was hashed.
    """
    path = folder / entry.path

    def read_verified(index: int) -> bytes:
        start = index * CHUNK_BYTES
        data = _read_range(path, start, min(start + CHUNK_BYTES, entry.bytes))
        if sha256(data) != entry.chunks[index]:
            raise _change_error(path)
        return data

    yield from map_in_order(read_verified, range(len(entry.chunks)))
    try:
        has_other_size = path.lstat().st_size != entry.bytes
    except OSError as fault:
        raise _change_error(path) from fault
    if has_other_size:
        raise _change_error(path)


def read_range(file: int, start: int, stop: int) -> bytes:
    """Read bytes [start, stop) of an open file, or fewer if the file ends earlier."""
    stop = min(stop, os.fstat(file).st_size)  # os.pread allocates the requested size first
    pieces = []
    while start < stop and (piece := os.pread(file, stop - start, start)):
        pieces.append(piece)
        start += len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _read_range(path: Path, start: int, stop: int) -> bytes:
    """Read exactly bytes [start, stop) of a file; raise ``ConcurrentChange`` if that fails."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            data = read_range(file, start, stop)
        finally:
            os.close(file)
    except OSError as fault:
        raise ConcurrentChange("file_unreadable", path=str(path), problem=fault.strerror) from fault
    if len(data) != stop - start:
        raise _change_error(path)
    return data


def _change_error(path: Path) -> InfraError:
    """Return the error for a file that changed while it was stored."""
    return ConcurrentChange("file_changed", path=str(path))
