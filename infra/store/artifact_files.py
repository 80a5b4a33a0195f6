"""The files of artifacts in a place: stored once by content, read with every chunk verified.

A blob is created under its final name with all its bytes, or not at all, and is not changed
afterwards, so writers of the same content do not disturb each other. A local folder also has a
link to each blob under the path of the file, because readers open and map files in place.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from infra.errors import AlreadyThere, ArtifactDamaged
from infra.store.chunks import checked_chunks, in_order, sha256
from infra.store.disk import translate
from infra.store.manifest import CHUNK_BYTES, FileEntry, StoreManifest, blob_of
from infra.store.place import Place

BLOBS = "blobs"
SMALL_BYTES = 2**16
"""Size of files that are sent to a bucket at once, since a listing takes as long as the upload."""

Checked = TypeVar("Checked")


def files_below(root: str) -> str:
    """Return the key prefix of an artifact's files where they are opened in place."""
    return f"artifacts/{root}/files/"


def checked(place: Place, read: Callable[[], Checked]) -> Checked:
    """Read verified content; retry once if a bucket's response does not verify.

    A byte that changed in transit is not damage in the store. Content that is damaged in the
    store fails the second read too.

    Args:
        place: where the content is stored.
        read: reads and verifies; raises ``ArtifactDamaged``.
    """
    try:
        return read()
    except ArtifactDamaged:
        if place.in_place("") is not None:
            raise
    return read()


def holds(place: Place, key: str, entry: FileEntry, chunk_bytes: int) -> bool:
    """Return whether a key has exactly the bytes of this file; reads all of them."""
    return place.size(key) == entry.bytes and all(
        sha256(place.read(key, at * chunk_bytes, (at + 1) * chunk_bytes)) == expected
        for at, expected in enumerate(entry.chunks)
    )


def add_files(place: Place, folder: Path, manifest: StoreManifest, *, move: bool) -> None:
    """Store the files of a manifest of version 2 that the place does not have.

    Args:
        place: where to store them.
        folder: the folder of the files.
        manifest: their paths and hashes.
        move: whether to move them if that is possible, instead of copying them.

    Raises:
        ConcurrentChange: a file does not match its hashes.
    """
    for entry in manifest.files:
        key = f"{BLOBS}/{blob_of(entry, manifest.chunk_bytes)}"
        _add_blob(place, folder, entry, key, move=move)
    for entry, blob in zip(manifest.files, manifest.blobs, strict=True):
        place.link(f"{BLOBS}/{blob}", files_below(manifest.root) + entry.path)


def _add_blob(place: Place, folder: Path, entry: FileEntry, key: str, *, move: bool) -> None:
    is_small = place.in_place("") is None and entry.bytes <= SMALL_BYTES
    if not is_small and _is_stored(place, folder, entry, key):
        return
    if move and place.move(folder / entry.path, key):
        return
    try:
        place.upload_new(key, entry.bytes, checked_chunks(folder, entry))
    except AlreadyThere:
        if not _is_stored(place, folder, entry, key):  # damaged since it was stored
            place.upload(key, entry.bytes, checked_chunks(folder, entry))


def _is_stored(place: Place, folder: Path, entry: FileEntry, key: str) -> bool:
    """Return whether a place has a blob: by its bytes in a local folder, by its size in a bucket.

    A bucket compares checksums of its objects itself; a disk that lost power may have lost some
    bytes of a file.
    """
    size, local = place.size(key), place.in_place(key)
    if size != entry.bytes or local is None:
        return size == entry.bytes
    with suppress(OSError):  # reading it reports the problem
        if (folder / entry.path).samefile(local):
            return True
    return holds(place, key, entry, CHUNK_BYTES)


class ArtifactFiles:
    """Reads the files of one artifact.

    Args:
        place: where they are stored.
        manifest: their paths and hashes, already verified.
        in_place: read the files that a local folder has for readers that open them, instead of
            the blobs. In version 1 these are the only ones.
    """

    def __init__(self, place: Place, manifest: StoreManifest, *, in_place: bool = False) -> None:
        self._place, self._manifest = place, manifest
        self._below = files_below(manifest.root)
        self._uri = f"{place.uri}/artifacts/{manifest.root}"
        self._blobs = (
            {}
            if in_place
            else {
                entry.path: f"{BLOBS}/{blob}"
                for entry, blob in zip(manifest.files, manifest.blobs, strict=False)
            }
        )

    def key(self, entry: FileEntry) -> str:
        """Return the key of a file."""
        return self._blobs.get(entry.path, self._below + entry.path)

    def verify(self) -> None:
        """Compare every chunk with its hash; also refuses files that do not belong to the artifact.

        Raises:
            ArtifactDamaged: a file is missing, changed or unexpected.
        """
        checked(self._place, lambda: self._check_sizes(extra_refused=True))
        for _ in self.chunks(self._manifest.files):
            pass

    def copy(self, into: Path) -> None:
        """Write all files to a folder, every chunk verified.

        Raises:
            ArtifactDamaged: a file is missing or changed.
        """
        checked(self._place, self._check_sizes)
        chunks = self.chunks(self._manifest.files)
        for entry in self._manifest.files:
            path = into / entry.path
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("xb") as file:
                    for _ in entry.chunks:
                        file.write(next(chunks))
            except OSError as fault:
                raise translate(fault, path, "write") from fault

    def chunks(self, entries: tuple[FileEntry, ...]) -> Iterator[bytes]:
        """Yield all chunks of these files in order, each verified."""
        step = self._manifest.chunk_bytes

        def read(place: tuple[FileEntry, int]) -> bytes:
            entry, index = place
            start, stop = index * step, min((index + 1) * step, entry.bytes)
            data = self._place.read(self.key(entry), start, stop)
            if sha256(data) != entry.chunks[index]:
                raise ArtifactDamaged(
                    "chunk_differs",
                    uri=self._uri,
                    file=entry.path,
                    key=self.key(entry),
                    chunk=index,
                    start=start,
                    stop=stop - 1,
                )
            return data

        def one(place: tuple[FileEntry, int]) -> bytes:
            return checked(self._place, lambda: read(place))

        return in_order(one, ((entry, at) for entry in entries for at in range(len(entry.chunks))))

    def _check_sizes(self, *, extra_refused: bool = False) -> None:
        """Find files of a wrong size, or missing, before any byte is read."""
        files = self._manifest.files
        if self._blobs:
            sizes = dict(zip(map(self.key, files), in_order(self._size, files), strict=True))
        else:
            sizes = dict(self._place.sizes(self._below))
        for entry in files:
            key = self.key(entry)
            size = sizes.get(key)
            if size is None:
                raise ArtifactDamaged("file_absent", uri=self._uri, file=entry.path, key=key)
            if size != entry.bytes:
                raise ArtifactDamaged(
                    "file_size_differs",
                    uri=self._uri,
                    file=entry.path,
                    key=key,
                    got=size,
                    expected=entry.bytes,
                )
        extra = sizes.keys() - set(map(self.key, files))
        if extra_refused and extra:
            raise ArtifactDamaged(
                "file_unexpected", uri=self._uri, file=min(extra).removeprefix(self._below)
            )

    def _size(self, entry: FileEntry) -> int | None:
        return self._place.size(self.key(entry))
