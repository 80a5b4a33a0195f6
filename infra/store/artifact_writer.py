"""Write an artifact block by block, in any order, from several threads, and resume after a kill.

The artifact has one large file and a few small ones. A block is a named set of byte ranges (pieces)
of the large file. The finished artifact is called the result. The files of a result ``name``::

    <parent>/.<name>.part/files/...   the unfinished files
    <parent>/.<name>.journal          a header line, and one line per written block: its name, and
                                      offset, length and CRC-32 of each piece; locked by the writer
    <parent>/<name>/files/...         the same files, renamed when complete
    <parent>/<name>/manifest.json     sizes and chunk hashes of the files, as in the store

Each chunk is hashed from the pieces as they are written, so the file is not read again at the end.
A run that resumes reads the blocks of the journal from the unfinished file, compares them with the
checksums in the journal, and hashes them. Blocks that differ, for instance after a power failure,
count as not written.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from compressors.contracts import digest
from infra.bundle.json_limits import read_bounded, validate_json
from infra.errors import ArtifactDamaged, ArtifactMissing, StoreRefused
from infra.store.chunks import hash_files, list_regular_files, read_open_file, sha256
from infra.store.disk import translate_os_error, translate_os_errors
from infra.store.folder import require_empty_or_missing
from infra.store.manifest import (
    CHUNK_BYTES,
    MAX_MANIFEST_BYTES,
    FileEntry,
    StoreManifest,
    compute_root,
)
from infra.store.temporary import is_old

MANIFEST = "manifest.json"
FILES = "files"
MAX_HEADER_BYTES = 8192
"""Most bytes that are read to decide whether a file is a journal of this module."""

_HEADER = re.compile(rb'\["[0-9a-f]{64}", ".*", \d+\]$')
"""The first line of a journal: a JSON list of job digest, path and size of the large file."""

Piece = tuple[int, memoryview]
"""Offset of a byte range in the file, and its bytes."""


class ChunkHashes:
    """Hashes the chunks of a file while its pieces are added in any order, from several threads.

    A copy of a piece is kept in memory until all earlier bytes of its chunk have been added. If
    adjacent pieces are added at about the same time, only a few copies exist.

    Args:
        size: size of the file in bytes.
        chunk_bytes: size of a chunk in bytes; the last chunk may be smaller.
    """

    def __init__(self, size: int, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._size, self._chunk_bytes = size, chunk_bytes
        self._lock = threading.Lock()
        self._open_chunks: dict[int, _Chunk] = {}
        self._chunk_hashes: dict[int, str] = {}

    def add(self, start: int, data: memoryview) -> None:
        """Add the bytes that begin at offset ``start``. Each byte of the file is added once.

        Raises:
            ArtifactDamaged: the bytes are outside the file, or were added before.
        """
        if start < 0 or start + len(data) > self._size:
            raise ArtifactDamaged(
                "file_overrun", start=start, stop=start + len(data), size=self._size
            )
        while len(data):
            index = start // self._chunk_bytes
            length = min((index + 1) * self._chunk_bytes - start, len(data))
            self._add_piece(index, start, data[:length])
            start, data = start + length, data[length:]

    def _add_piece(self, index: int, start: int, data: memoryview) -> None:
        """Add bytes of the chunk ``index``: hash them now, or keep a copy for later."""
        with self._lock:
            if index in self._chunk_hashes:
                raise _build_written_twice_error(start)
            chunk = self._open_chunks.setdefault(index, _Chunk(index * self._chunk_bytes))
            if start < chunk.at or start in chunk.early_pieces:
                raise _build_written_twice_error(start)
            if chunk.is_hashing or start != chunk.at:
                chunk.early_pieces[start] = bytes(data)
                return
            chunk.is_hashing = True
        piece: memoryview | bytes | None = data
        while piece is not None:
            chunk.hasher.update(piece)  # outside the lock: hashlib lets other threads run
            with self._lock:
                chunk.at += len(piece)
                piece = chunk.early_pieces.pop(chunk.at, None)
                if piece is None:
                    chunk.is_hashing = False
                    if chunk.at == min((index + 1) * self._chunk_bytes, self._size):
                        self._chunk_hashes[index] = chunk.hasher.hexdigest()
                        del self._open_chunks[index]

    def all(self) -> tuple[str, ...]:
        """Return the hash of every chunk, in order.

        Raises:
            ArtifactDamaged: not all bytes of the file have been added.
        """
        count = -(-self._size // self._chunk_bytes)
        if len(self._chunk_hashes) != count:
            missing = next(index for index in range(count) if index not in self._chunk_hashes)
            chunk = self._open_chunks.get(missing)
            start = missing * self._chunk_bytes if chunk is None else chunk.at
            raise ArtifactDamaged("file_incomplete", start=start)
        return tuple(self._chunk_hashes[index] for index in range(count))


class _Chunk:
    """An incomplete chunk.

    Attributes:
        hasher: has hashed the bytes from the start of the chunk to ``at``.
        at: offset in the file of the first byte that is not hashed.
        early_pieces: copies of pieces that begin after ``at``, by offset.
        is_hashing: whether a thread is hashing a piece now.
    """

    def __init__(self, start: int) -> None:
        self.hasher = hashlib.sha256()
        self.at = start
        self.early_pieces: dict[int, bytes] = {}
        self.is_hashing = False


class ArtifactWriter:
    """Writes an artifact of one large file and a few small ones; see ``open_writer``.

    Call ``write`` and ``add``, then ``seal``. Then call ``publish``, which renames the folder to
    ``into``, or ``Store.take`` and ``drop``, which move the files into the store.

    Args:
        into: the folder that ``publish`` creates.
        journal: file descriptor of the journal, opened for appending.
        path: path of the large file in the artifact.
        size: size of the large file in bytes.
    """

    def __init__(self, into: Path, journal: int, path: str, size: int) -> None:
        self.into = into
        self.folder = _get_unfinished_folder(into)
        self._path, self._size, self._journal = path, size, journal
        self._small_files: dict[str, bytes] = {}
        self._blocks: set[str] = set()
        self._hashes = ChunkHashes(size)
        self.files = self.folder / FILES
        large_file = self.files / path
        large_file.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(large_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.ftruncate(self._file, size)
        except BaseException:
            os.close(self._file)
            raise

    def has_block(self, block: str) -> bool:
        """Return whether a block with this name has been written, in this or an earlier run."""
        return block in self._blocks

    def write(self, block: str, pieces: Sequence[Piece]) -> None:
        """Write the pieces of a block, hash them, and record the block in the journal.

        Args:
            block: a name that is unique in the file.
            pieces: the bytes of the block with their offsets in the large file.

        Raises:
            SettingRefused, StoreUnavailable: the bytes cannot be written, or the disk is full.
            ArtifactDamaged: a byte was written before, or is outside the file.
        """
        checksums = []
        with translate_os_errors(self.folder, "write"):
            for start, data in pieces:
                _write_at(self._file, start, data)
                self._hashes.add(start, data)
                checksums.append((start, len(data), zlib.crc32(data)))
            os.write(self._journal, (json.dumps([block, checksums]) + "\n").encode())
        self._blocks.add(block)

    def resume(self, lines: list[bytes]) -> None:
        """Mark as written the blocks of an earlier run's journal whose bytes are intact.

        Args:
            lines: the lines of the journal, without the first.
        """
        for line in lines:
            try:
                block, checksums = json.loads(line)
            except ValueError:
                continue  # a run was killed while it wrote the line
            pieces = [
                (start, read_open_file(self._file, start, start + size))
                for start, size, _ in checksums
            ]
            if block not in self._blocks and all(
                len(data) == size and zlib.crc32(data) == checksum
                for (_, data), (_, size, checksum) in zip(pieces, checksums, strict=True)
            ):
                for start, data in pieces:
                    self._hashes.add(start, memoryview(data))
                self._blocks.add(block)

    def add(self, path: str, body: bytes) -> None:
        """Add a small file to the artifact; ``seal`` writes it.

        Args:
            path: path of the file in the artifact.
            body: content of the file.
        """
        self._small_files[path] = body

    def seal(self) -> StoreManifest:
        """Write the small files, make all files read-only, and return their manifest.

        Raises:
            ArtifactDamaged: a byte of the large file was never written.
            SettingRefused, StoreUnavailable: a file cannot be written.
        """
        entries = [FileEntry(path=self._path, bytes=self._size, chunks=self._hashes.all())]
        with translate_os_errors(self.folder, "write"):
            for path, body in self._small_files.items():
                (self.files / path).write_bytes(body)
                starts = range(0, len(body), CHUNK_BYTES)
                hashes = tuple(sha256(body[start : start + CHUNK_BYTES]) for start in starts)
                entries.append(FileEntry(path=path, bytes=len(body), chunks=hashes))
            for entry in entries:
                (self.files / entry.path).chmod(0o444)
        return StoreManifest.of(tuple(sorted(entries, key=lambda entry: entry.path)))

    def publish(self, manifest: StoreManifest) -> None:
        """Write the manifest and rename the unfinished folder to ``into``.

        Raises:
            StoreRefused: ``into`` is no longer empty.
            SettingRefused, StoreUnavailable: the disk cannot store the manifest.
        """
        with translate_os_errors(self.folder, "write"):
            (self.folder / MANIFEST).write_text(manifest.model_dump_json())
            try:
                self.folder.rename(self.into)
            except OSError as fault:
                require_empty_or_missing(self.into)
                raise translate_os_error(fault, self.into, "write") from fault

    def drop(self) -> None:
        """Remove the unfinished folder. Call it after ``Store.take`` has moved the files."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Close the large file; the unfinished files remain, so that a later run can resume."""
        os.close(self._file)


def verify_result(into: Path) -> StoreManifest:
    """Verify every chunk of a published result, and return its manifest.

    Args:
        into: the folder that ``ArtifactWriter.publish`` created.

    Raises:
        ArtifactMissing: there is no manifest, so no result was published.
        ArtifactDamaged: the manifest cannot be read, or a file differs from it.
        StoreRefused: the folder has no files, or has an entry that is not a regular file.
        ConcurrentChange: a file changed during the call, or cannot be read.
    """
    try:
        raw = read_bounded(into / MANIFEST, MAX_MANIFEST_BYTES)
        manifest = validate_json(StoreManifest, raw, MAX_MANIFEST_BYTES)
    except OSError as fault:
        raise ArtifactMissing("result_incomplete", folder=str(into), file=MANIFEST) from fault
    except ValueError as fault:
        raise ArtifactDamaged("result_manifest_unreadable", path=str(into / MANIFEST)) from fault
    files = into / FILES
    hashed_files = hash_files(files, list_regular_files(files), manifest.chunk_bytes)
    actual, expected = (
        {entry.path: entry for entry in entries} for entries in (hashed_files, manifest.files)
    )
    paths = sorted(actual | expected)
    differing = [path for path in paths if actual.get(path) != expected.get(path)]
    # ``root`` is a hash of the entries of all files.
    if differing or manifest.root != compute_root(manifest.files, manifest.chunk_bytes):
        raise ArtifactDamaged(
            "result_damaged", folder=str(into), file=differing[0] if differing else MANIFEST
        )
    return manifest


@contextmanager
def open_writer(into: Path, job: object, path: str, size: int) -> Iterator[ArtifactWriter]:
    """Start to write an artifact, or resume an earlier run that was interrupted.

    Args:
        into: folder of the finished artifact; must be empty or not exist.
        job: everything that determines the content. Unfinished files of an earlier run are used
            only if its ``job``, ``path`` and ``size`` were the same, and removed otherwise.
        path: path of the large file in the artifact.
        size: size of the large file in bytes.

    Raises:
        StoreRefused: ``into`` is not empty, or another process is writing it.
        SettingRefused, StoreUnavailable: the disk cannot store the files.
    """
    header = json.dumps([digest(job), path, size]).encode()
    journal_path = into.parent / f".{into.name}.journal"
    _remove_abandoned(into)
    with _open_journal(into, journal_path) as journal:
        try:
            require_empty_or_missing(into)
            with translate_os_errors(journal_path, "write"):
                writer = _start_or_resume(into, journal, header, path, size)
            try:
                yield writer
            finally:
                writer.close()
        finally:
            # There is no unfinished folder after publish(), after drop(), or if the start failed.
            if not _get_unfinished_folder(into).exists():
                journal_path.unlink(missing_ok=True)


def _remove_abandoned(into: Path) -> None:
    """Remove unfinished files in the parent folder of ``into`` that no run will resume.

    These are files that no process writes and that have not changed for a week
    (``temporary.MAX_AGE_SECONDS``). Newer ones are kept, because a repeated command resumes them.
    """
    with suppress(OSError):  # the caller does not depend on the removal
        for journal_path in into.parent.glob(".*.journal"):
            name = journal_path.name.removeprefix(".").removesuffix(".journal")
            unfinished = _get_unfinished_folder(journal_path.with_name(name))
            is_recent = not is_old(journal_path) or (unfinished.exists() and not is_old(unfinished))
            if name == into.name or is_recent:
                continue
            # Suppressed: a process holds the lock, or another one removed the journal.
            with suppress(OSError), journal_path.open("rb") as journal:
                fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _HEADER.match(journal.readline(MAX_HEADER_BYTES)):
                    shutil.rmtree(unfinished, ignore_errors=True)
                    journal_path.unlink(missing_ok=True)


@contextmanager
def _open_journal(into: Path, journal_path: Path) -> Iterator[int]:
    """Open the journal, lock it for this process, and yield its file descriptor.

    Raises:
        StoreRefused: another process has locked it.
        SettingRefused, StoreUnavailable: the journal cannot be created.
    """
    with translate_os_errors(journal_path, "write"):
        into.parent.mkdir(parents=True, exist_ok=True)
        journal = os.open(journal_path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between open() and flock(), the previous owner may have removed the file.
            inode = os.fstat(journal).st_ino
            is_owner = journal_path.exists() and journal_path.stat().st_ino == inode
        except BlockingIOError:
            is_owner = False
        if not is_owner:
            raise StoreRefused("output_in_use", folder=str(into))
        yield journal
    finally:
        os.close(journal)


def _start_or_resume(
    into: Path, journal: int, header: bytes, path: str, size: int
) -> ArtifactWriter:
    """Continue an interrupted run whose journal has this header, or start with no blocks."""
    content = read_open_file(journal, 0, os.fstat(journal).st_size)
    first_line, *lines = content.split(b"\n")
    file = _get_unfinished_folder(into) / FILES / path
    is_resumed = first_line == header and file.is_file() and file.stat().st_size == size
    if not is_resumed:
        shutil.rmtree(_get_unfinished_folder(into), ignore_errors=True)
        os.ftruncate(journal, 0)
        os.write(journal, header + b"\n")
    else:
        file.chmod(0o644)  # seal() of the earlier run may have made it read-only
        if not content.endswith(b"\n"):
            os.write(journal, b"\n")  # the kill left an incomplete line
    writer = ArtifactWriter(into, journal, path, size)
    if is_resumed:
        try:
            writer.resume(lines)
        except BaseException:
            writer.close()
            raise
    return writer


def _get_unfinished_folder(into: Path) -> Path:
    """Return the folder of the unfinished files of the result ``into``."""
    return into.parent / f".{into.name}.part"


def _write_at(file: int, start: int, data: memoryview) -> None:
    """Write all of ``data`` at an offset; one call of ``os.pwrite`` may write only a part."""
    while len(data):
        written = os.pwrite(file, data, start)
        start, data = start + written, data[written:]


def _build_written_twice_error(start: int) -> ArtifactDamaged:
    """Return the error for a byte that was already written."""
    return ArtifactDamaged("file_written_twice", start=start)
