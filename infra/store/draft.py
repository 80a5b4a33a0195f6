"""An artifact while it is being written: in pieces, in any order, by several threads.

::

    <parent>/.<name>.part/files/...   what is written; nobody looks here
    <parent>/.<name>.journal          one line a finished block; locked by its writer
    <parent>/<name>/files/...         the same, renamed when all of it is there
    <parent>/<name>/manifest.json     chunk hashes and the root over them, as in the store

Every chunk is hashed from the pieces as they are written, so no file is read again. A run that
was interrupted goes on at the next block: what its journal names is read from the unfinished
file, compared with the checksums written beside it, and hashed. The system may have lost some of
it (a power failure); then those blocks are made again.
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
    """The hashes of a file's chunks, from its pieces in whatever order they come.

    A piece that comes before its turn is kept until the bytes before it are there: where
    neighbours are written at about the same time, that is a few pieces.

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
        """Take the bytes that lie at ``at``; each byte of the file once.

        Raises:
            ArtifactDamaged: they do not lie in the file, or were given before.
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
            chunk.hasher.update(piece)  # other threads run meanwhile
            with self._lock:
                chunk.at += len(piece)
                piece = chunk.waiting.pop(chunk.at, None)
                if piece is None:
                    chunk.busy = False
                    if chunk.at == min((index + 1) * self._chunk_bytes, self._size):
                        self._done[index] = chunk.hasher.hexdigest()
                        del self._open[index]

    def all(self) -> tuple[str, ...]:
        """The hash of every chunk, in order.

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
    """One chunk: how far it is hashed, and what came early."""

    def __init__(self, at: int) -> None:
        self.hasher = hashlib.sha256()
        self.at = at
        self.waiting: dict[int, bytes] = {}
        self.busy = False


class ArtifactDraft:
    """One large file and a few small ones that will be an artifact. Made by ``draft``."""

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
        """Whether a block of this name is in the file."""
        return block in self._held

    def write(self, block: str, pieces: Sequence[Piece]) -> None:
        """Write a block's bytes at their places, hash them, and note that they are there.

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
        """Take over what an interrupted run noted, as far as the bytes are still there."""
        for line in lines:
            try:
                block, noted = json.loads(line)
            except ValueError:
                continue  # where a run was killed while it wrote the line
            pieces = [(at, pread(self._file, at, at + size)) for at, size, _ in noted]
            if block not in self._held and all(
                len(data) == size and zlib.crc32(data) == checksum
                for (_, data), (_, size, checksum) in zip(pieces, noted, strict=True)
            ):
                for at, data in pieces:
                    self._hashes.add(at, memoryview(data))
                self._held.add(block)

    def add(self, path: str, body: bytes) -> None:
        """A small file beside the large one."""
        self._small[path] = body

    def seal(self) -> StoreManifest:
        """Complete the files, which nobody changes from now on, and say what they are.

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
        """Show the result under its name, whole.

        Raises:
            StoreRefused: something else was stored there meanwhile.
        """
        with translated(self.folder, "write"):
            (self.folder / MANIFEST).write_text(manifest.model_dump_json())
            try:
                self.folder.rename(self.into)
            except OSError as fault:
                must_be_free(self.into)
                raise translate(fault, self.into, "write") from fault

    def drop(self) -> None:
        """Remove what is left after the store took the files."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Close the large file; what was written stays for the next run."""
        os.close(self._file)


def finished(into: Path) -> StoreManifest:
    """The manifest of a result, every chunk of it compared with the files.

    Raises:
        ArtifactMissing: there is no manifest, so for us it does not exist.
        ArtifactDamaged: a file is not what was written.
    """
    try:
        raw = read_bounded(into / MANIFEST, MAX_MANIFEST_BYTES)
        manifest = validated(StoreManifest, raw, MAX_MANIFEST_BYTES)
    except OSError as fault:
        raise ArtifactMissing("result_incomplete", folder=str(into), file=MANIFEST) from fault
    except ValueError as fault:
        raise ArtifactDamaged("result_manifest_unreadable", path=str(into / MANIFEST)) from fault
    files = into / FILES
    found = hashed(files, regular_files(files), manifest.chunk_bytes)
    held, wanted = ({entry.path: entry for entry in these} for these in (found, manifest.files))
    wrong = [path for path in sorted(held | wanted) if held.get(path) != wanted.get(path)]
    if wrong or manifest.root != root_of(manifest.files, manifest.chunk_bytes):
        raise ArtifactDamaged(
            "result_damaged", folder=str(into), file=wrong[0] if wrong else MANIFEST
        )
    return manifest


@contextmanager
def draft(into: Path, job: object, path: str, size: int) -> Iterator[ArtifactDraft]:
    """Write an artifact that will lie at ``into``, or go on with one that was begun.

    Args:
        into: must not exist, or be an empty folder.
        job: what decides every byte of it; an unfinished one of another job is dropped.
        path: of the large file.
        size: of the large file, in bytes.

    Raises:
        StoreRefused: ``into`` holds something, or another process is writing there.
        SettingRefused, StoreUnavailable: the disk does not take it.
    """
    head = json.dumps([digest(job), path, size]).encode()
    noted = into.parent / f".{into.name}.journal"
    _collect_abandoned(into)
    with _journal(into, noted) as journal:
        try:
            must_be_free(into)
            with translated(noted, "write"):
                made = _begun(into, journal, head, path, size)
            try:
                yield made
            finally:
                made.close()
        finally:
            if not _part(into).exists():  # published, taken into the store, or never begun
                noted.unlink(missing_ok=True)


def _collect_abandoned(into: Path) -> None:
    """Remove old drafts next to ``into`` that no process has open or has continued lately.

    A younger one is kept, because the same command continues it.
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
    """The open journal of one result, which only one process has at a time."""
    with translated(noted, "write"):
        into.parent.mkdir(parents=True, exist_ok=True)
        journal = os.open(noted, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its last owner may have removed it between the two calls.
            free = noted.exists() and os.fstat(journal).st_ino == noted.stat().st_ino
        except BlockingIOError:
            free = False
        if not free:
            raise StoreRefused("output_in_use", folder=str(into))
        yield journal
    finally:
        os.close(journal)


def _begun(into: Path, journal: int, head: bytes, path: str, size: int) -> ArtifactDraft:
    """What an interrupted run of the same job left, or an empty draft."""
    written = pread(journal, 0, os.fstat(journal).st_size)
    first, *lines = written.split(b"\n")
    file = _part(into) / FILES / path
    resumed = first == head and file.is_file() and file.stat().st_size == size
    if not resumed:
        shutil.rmtree(_part(into), ignore_errors=True)
        os.ftruncate(journal, 0)
        os.write(journal, head + b"\n")
    else:
        file.chmod(0o644)  # a run that was killed at its very end had closed it
        if not written.endswith(b"\n"):
            os.write(journal, b"\n")  # end the line at which a killed run stopped
    made = ArtifactDraft(into, journal, path, size)
    if resumed:
        try:
            made.resume(lines)
        except BaseException:
            made.close()
            raise
    return made


def _part(into: Path) -> Path:
    return into.parent / f".{into.name}.part"


def _pwrite(file: int, at: int, data: memoryview) -> None:
    while len(data):
        done = os.pwrite(file, data, at)
        at, data = at + done, data[done:]


def _written_twice(at: int) -> ArtifactDamaged:
    return ArtifactDamaged("draft_written_twice", start=at)
