"""Read, hash and verify files in chunks, in order, with a few threads and flat memory."""

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
Known = TypeVar("Known")


def in_order(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Map with ``WORKERS`` threads; yields in order, at most ``WORKERS + 1`` results in memory.

    ``Executor.map`` would submit all calls at once, and every unconsumed result is a chunk in
    memory.
    """
    with ThreadPoolExecutor(WORKERS, thread_name_prefix="chunks") as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > WORKERS:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def sha256(data: bytes) -> str:
    """Return the chunk hash, as hex."""
    return hashlib.sha256(data).hexdigest()


def regular_files(folder: Path) -> list[tuple[str, int]]:
    """List every file below ``folder`` as (relative posix path, bytes), sorted by path.

    Empty folders are ignored, as in git and in object stores.

    Raises:
        StoreRefused: ``folder`` is not a folder or has no file; an entry below it is a symlink, not
            a regular file, cannot be read, or has a name that no store can use.
    """
    found: list[tuple[str, int]] = []

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
                    found.append((path, entry.stat(follow_symlinks=False).st_size))
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
    if not found:
        raise StoreRefused("folder_empty", folder=str(folder))
    return sorted(found)


def hashed(
    folder: Path, files: list[tuple[str, int]], chunk_bytes: int = CHUNK_BYTES
) -> tuple[FileEntry, ...]:
    """Hash every chunk of these files.

    Raises:
        ConcurrentChange: a file changed its size during the call, or cannot be read.
    """
    places = [(path, start) for path, size in files for start in range(0, size, chunk_bytes)]
    sizes = dict(files)

    def one(place: tuple[str, int]) -> str:
        path, start = place
        return sha256(_read(folder / path, start, min(start + chunk_bytes, sizes[path])))

    chunks: dict[str, list[str]] = {path: [] for path, _ in files}
    for (path, _), value in zip(places, in_order(one, places), strict=True):
        chunks[path].append(value)
    return tuple(
        FileEntry(path=path, bytes=size, chunks=tuple(chunks[path])) for path, size in files
    )


def hard_links(folder: Path, other: Path, known: Mapping[str, Known]) -> dict[str, Known]:
    """Return what is known of each file of a folder that is a hard link to a file of another.

    Args:
        folder: the folder of the links; its files are considered, not its subfolders.
        other: the other folder, whose files do not change.
        known: a value for each path in the other folder.
    """
    if not other.is_dir():
        return {}
    by_inode: dict[tuple[int, int], Known] = {}
    for path, value in known.items():
        with suppress(FileNotFoundError):
            found = (other / path).lstat()
            by_inode[found.st_dev, found.st_ino] = value
    links: dict[str, Known] = {}
    for file in folder.iterdir():
        found = file.lstat()
        if (found.st_dev, found.st_ino) in by_inode:
            links[file.name] = by_inode[found.st_dev, found.st_ino]
    return links


def checked_chunks(folder: Path, entry: FileEntry) -> Iterator[bytes]:
    """Yield the chunks of one file, each compared with its hash first.

    Raises:
        ConcurrentChange: the file is no longer the one that was hashed.
    """
    path = folder / entry.path

    def one(index: int) -> bytes:
        start = index * CHUNK_BYTES
        data = _read(path, start, min(start + CHUNK_BYTES, entry.bytes))
        if sha256(data) != entry.chunks[index]:
            raise _changed(path)
        return data

    yield from in_order(one, range(len(entry.chunks)))
    try:
        grown = path.lstat().st_size != entry.bytes
    except OSError as fault:
        raise _changed(path) from fault
    if grown:
        raise _changed(path)


def pread(file: int, start: int, stop: int) -> bytes:
    """Read bytes ``start`` to ``stop`` of an open file; fewer if it ends earlier."""
    stop = min(stop, os.fstat(file).st_size)  # pread allocates the requested size
    pieces = []
    while start < stop and (piece := os.pread(file, stop - start, start)):
        pieces.append(piece)
        start += len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _read(path: Path, start: int, stop: int) -> bytes:
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            data = pread(file, start, stop)
        finally:
            os.close(file)
    except OSError as fault:
        raise ConcurrentChange("file_unreadable", path=str(path), problem=fault.strerror) from fault
    if len(data) != stop - start:
        raise _changed(path)
    return data


def _changed(path: Path) -> InfraError:
    return ConcurrentChange("file_changed", path=str(path))
