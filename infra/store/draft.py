"""Write an artifact block by block, in any order, from several threads; resumable.

::

    <parent>/.<name>.part/files/...   files being written; readers ignore them
    <parent>/.<name>.journal          one line per finished block; locked by its writer
    <parent>/<name>/files/...         the same files, renamed when complete
    <parent>/<name>/manifest.json     chunk hashes and the root over them, as in the store

Every chunk is hashed from the pieces as they are written, so no file is read again. An interrupted
run continues at the next block: the blocks in its journal are read from the unfinished file,
compared with the checksums in the journal, and hashed. If the system lost some of them (a power
failure), those blocks are written again.
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
from infra.bundle.json_limits import read_bounded, validated
from infra.errors import ArtifactDamaged, ArtifactMissing, StoreRefused
from infra.store.chunks import hashed, pread, regular_files, sha256
from infra.store.disk import translate, translated
from infra.store.folder import must_be_free
from infra.store.manifest import CHUNK_BYTES, MAX_MANIFEST_BYTES, FileEntry, StoreManifest, root_of
from infra.store.temporary import is_old

MANIFEST = "manifest.json"
FILES = "files"
MAX_HEAD_BYTES = 8192

_HEAD = re.compile(rb'\["[0-9a-f]{64}", ".*", \d+\]$')
"""The first line of a journal of ours: digest of the job, path and size of the large file."""

Piece = tuple[int, memoryview]


class ChunkHashes:
    """Hashes the chunks of a file from its pieces, which may arrive in any order.

    A piece that arrives early is stored until all bytes before it have arrived. If neighbours are
    written at about the same time, that is a few pieces.

    Args:
        size: of the file, in bytes.
        chunk_bytes: size of each chunk but the last.
    """

    def __init__(self, size: int, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._size, self._chunk_bytes = size, chunk_bytes
        self._lock = threading.Lock()
        self._open: dict[int, _Chunk] = {}
        self._done: dict[int, str] = {}

    def add(self, at: int, data: memoryview) -> None:
        """Add the bytes at offset ``at``; each byte of the file once.

        Raises:
            ArtifactDamaged: they are outside the file, or were added before.
        """
        if at < 0 or at + len(data) > self._size:
            raise ArtifactDamaged(
                "draft_outside_file", start=at, stop=at + len(data), size=self._size
            )
        while len(data):
            index = at // self._chunk_bytes
            cut = min((index + 1) * self._chunk_bytes - at, len(data))
            self._add(index, at, data[:cut])
            at, data = at + cut, data[cut:]

    def _add(self, index: int, at: int, data: memoryview) -> None:
        with self._lock:
            if index in self._done:
                raise _written_twice(at)
            chunk = self._open.setdefault(index, _Chunk(index * self._chunk_bytes))
            if at < chunk.at or at in chunk.waiting:
                raise _written_twice(at)
            if chunk.busy or at != chunk.at:
                chunk.waiting[at] = bytes(data)
                return
            chunk.busy = True
        piece: memoryview | bytes | None = data
        while piece is not None:
            chunk.hasher.update(piece)  # other threads can run during the hash
            with self._lock:
                chunk.at += len(piece)
                piece = chunk.waiting.pop(chunk.at, None)
                if piece is None:
                    chunk.busy = False
                    if chunk.at == min((index + 1) * self._chunk_bytes, self._size):
                        self._done[index] = chunk.hasher.hexdigest()
                        del self._open[index]

    def all(self) -> tuple[str, ...]:
        """Return the hash of every chunk, in order.

        Raises:
            ArtifactDamaged: bytes are missing.
        """
        count = -(-self._size // self._chunk_bytes)
        if len(self._done) != count:
            missing = next(index for index in range(count) if index not in self._done)
            held = self._open.get(missing)
            at = missing * self._chunk_bytes if held is None else held.at
            raise ArtifactDamaged("draft_incomplete", start=at)
        return tuple(self._done[index] for index in range(count))


class _Chunk:
    """One chunk: the number of hashed bytes, and the pieces that arrived early."""

    def __init__(self, at: int) -> None:
        self.hasher = hashlib.sha256()
        self.at = at
        self.waiting: dict[int, bytes] = {}
        self.busy = False


class ArtifactDraft:
    """An artifact in progress: one large file and a few small ones. Created by ``draft``."""

    def __init__(self, into: Path, journal: int, path: str, size: int) -> None:
        self.into = into
        self.folder = _part(into)
        self._path, self._size, self._journal = path, size, journal
        self._small: dict[str, bytes] = {}
        self._held: set[str] = set()
        self._hashes = ChunkHashes(size)
        self.files = self.folder / FILES
        target = self.files / path
        target.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(target, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.ftruncate(self._file, size)
        except BaseException:
            os.close(self._file)
            raise

    def holds(self, block: str) -> bool:
        """Return whether a block of this name is in the file."""
        return block in self._held

    def write(self, block: str, pieces: Sequence[Piece]) -> None:
        """Write a block's bytes at their offsets, hash them, and record the block in the journal.

        Raises:
            StoreUnavailable: the disk is full or failing.
            ArtifactDamaged: a byte was written before.
        """
        noted = []
        with translated(self.folder, "write"):
            for at, data in pieces:
                _pwrite(self._file, at, data)
                self._hashes.add(at, data)
                noted.append((at, len(data), zlib.crc32(data)))
            os.write(self._journal, (json.dumps([block, noted]) + "\n").encode())
        self._held.add(block)

    def resume(self, lines: list[bytes]) -> None:
        """Restore the blocks in an interrupted run's journal whose bytes are intact."""
        for line in lines:
            try:
                block, noted = json.loads(line)
            except ValueError:
                continue  # a run was killed while it wrote the line
            pieces = [(at, pread(self._file, at, at + size)) for at, size, _ in noted]
            if block not in self._held and all(
                len(data) == size and zlib.crc32(data) == checksum
                for (_, data), (_, size, checksum) in zip(pieces, noted, strict=True)
            ):
                for at, data in pieces:
                    self._hashes.add(at, memoryview(data))
                self._held.add(block)

    def add(self, path: str, body: bytes) -> None:
        """Add a small file next to the large one."""
        self._small[path] = body

    def seal(self) -> StoreManifest:
        """Complete the files, which do not change from now on, and return their manifest.

        Raises:
            ArtifactDamaged: a part of the large file was never written.
        """
        entries = [FileEntry(path=self._path, bytes=self._size, chunks=self._hashes.all())]
        with translated(self.folder, "write"):
            for path, body in self._small.items():
                (self.files / path).write_bytes(body)
                pieces = range(0, len(body), CHUNK_BYTES)
                chunks = tuple(sha256(body[at : at + CHUNK_BYTES]) for at in pieces)
                entries.append(FileEntry(path=path, bytes=len(body), chunks=chunks))
            for entry in entries:
                (self.files / entry.path).chmod(0o444)
        return StoreManifest.of(tuple(sorted(entries, key=lambda entry: entry.path)))

    def publish(self, manifest: StoreManifest) -> None:
        """Move the complete result to its final name.

        Raises:
            StoreRefused: another result was stored there during the run.
        """
        with translated(self.folder, "write"):
            (self.folder / MANIFEST).write_text(manifest.model_dump_json())
            try:
                self.folder.rename(self.into)
            except OSError as fault:
                must_be_free(self.into)
                raise translate(fault, self.into, "write") from fault

    def drop(self) -> None:
        """Remove the remaining files after the store took the result."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Close the large file; its content is kept for the next run."""
        os.close(self._file)


def finished(into: Path) -> StoreManifest:
    """Read the manifest of a result and compare every chunk with the files.

    Raises:
        ArtifactMissing: there is no manifest, so the result does not exist.
        ArtifactDamaged: a file differs from the manifest.
    """
    try:
        raw = read_bounded(into / MANIFEST, MAX_MANIFEST_BYTES)
        manifest = validated(StoreManifest, raw, MAX_MANIFEST_BYTES)
    except OSError as fault:
        raise ArtifactMissing("result_incomplete", folder=str(into), file=MANIFEST) from fault
    except ValueError as fault:
        raise ArtifactDamaged("result_manifest_unreadable", path=str(into / MANIFEST)) from fault
    files = into / FILES
    hashed_files = hashed(files, regular_files(files), manifest.chunk_bytes)
    actual, expected = (
        {entry.path: entry for entry in these} for these in (hashed_files, manifest.files)
    )
    wrong = [path for path in sorted(actual | expected) if actual.get(path) != expected.get(path)]
    if wrong or manifest.root != root_of(manifest.files, manifest.chunk_bytes):
        raise ArtifactDamaged(
            "result_damaged", folder=str(into), file=wrong[0] if wrong else MANIFEST
        )
    return manifest


@contextmanager
def draft(into: Path, job: object, path: str, size: int) -> Iterator[ArtifactDraft]:
    """Start or resume an artifact that will be stored at ``into``.

    Args:
        into: must not exist, or be an empty folder.
        job: everything that decides its bytes; an unfinished result of another job is removed.
        path: path of the large file.
        size: size of the large file, in bytes.

    Raises:
        StoreRefused: ``into`` is not empty, or another process is writing there.
        SettingRefused, StoreUnavailable: the disk cannot store it.
    """
    head = json.dumps([digest(job), path, size]).encode()
    noted = into.parent / f".{into.name}.journal"
    _collect_abandoned(into)
    with _journal(into, noted) as journal:
        try:
            must_be_free(into)
            with translated(noted, "write"):
                result = _begun(into, journal, head, path, size)
            try:
                yield result
            finally:
                result.close()
        finally:
            if not _part(into).exists():  # published, moved into the store, or never started
                noted.unlink(missing_ok=True)


def _collect_abandoned(into: Path) -> None:
    """Remove old drafts next to ``into`` that no process has open or has continued recently.

    A recent one is kept, because the same command resumes it.
    """
    with suppress(OSError):
        for noted in into.parent.glob(".*.journal"):
            place = noted.with_name(noted.name.removeprefix(".").removesuffix(".journal"))
            part = _part(place)
            if place.name == into.name or not is_old(noted) or (part.exists() and not is_old(part)):
                continue
            with suppress(OSError), noted.open("rb") as journal:
                fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _HEAD.match(journal.readline(MAX_HEAD_BYTES)):
                    shutil.rmtree(part, ignore_errors=True)
                    noted.unlink(missing_ok=True)


@contextmanager
def _journal(into: Path, noted: Path) -> Iterator[int]:
    """Open the journal of one result, locked for this process."""
    with translated(noted, "write"):
        into.parent.mkdir(parents=True, exist_ok=True)
        journal = os.open(noted, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The previous owner may have removed it between the two calls.
            free = noted.exists() and os.fstat(journal).st_ino == noted.stat().st_ino
        except BlockingIOError:
            free = False
        if not free:
            raise StoreRefused("output_in_use", folder=str(into))
        yield journal
    finally:
        os.close(journal)


def _begun(into: Path, journal: int, head: bytes, path: str, size: int) -> ArtifactDraft:
    """Return the draft of an interrupted run of the same job, or an empty one."""
    written = pread(journal, 0, os.fstat(journal).st_size)
    first, *lines = written.split(b"\n")
    file = _part(into) / FILES / path
    resumed = first == head and file.is_file() and file.stat().st_size == size
    if not resumed:
        shutil.rmtree(_part(into), ignore_errors=True)
        os.ftruncate(journal, 0)
        os.write(journal, head + b"\n")
    else:
        file.chmod(0o644)  # a run that was killed at its end had closed it
        if not written.endswith(b"\n"):
            os.write(journal, b"\n")  # end the incomplete line of a killed run
    result = ArtifactDraft(into, journal, path, size)
    if resumed:
        try:
            result.resume(lines)
        except BaseException:
            result.close()
            raise
    return result


def _part(into: Path) -> Path:
    return into.parent / f".{into.name}.part"


def _pwrite(file: int, at: int, data: memoryview) -> None:
    while len(data):
        done = os.pwrite(file, data, at)
        at, data = at + done, data[done:]


def _written_twice(at: int) -> ArtifactDamaged:
    return ArtifactDamaged("draft_written_twice", start=at)
