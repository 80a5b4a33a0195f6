"""Store each file of an artifact once by content, and verify every chunk when it is read.

A blob is a file whose key is a hash of its content. It is created with all its bytes or not at
all, and never changes, so concurrent writers of the same content do not affect each other. If the
store is a local folder, it also contains a hard link to each blob under the path of the file, so
that readers can open and memory-map the files of an artifact directly.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from infra.errors import AlreadyThere, ArtifactDamaged
from infra.store.backend import Backend
from infra.store.chunks import map_in_order, read_verified_chunks, sha256
from infra.store.disk import translate_os_error
from infra.store.manifest import CHUNK_BYTES, FileEntry, StoreManifest, compute_blob_name

BLOBS = "blobs"
SMALL_BYTES = 2**16
"""Files up to this size are uploaded to a bucket without a check whether it has them already.

The check is a listing, which takes as long as such an upload.
"""

Content = TypeVar("Content")


def build_files_prefix(root: str) -> str:
    """Build the key prefix of an artifact's files by path.

    For a manifest of version 2 they are hard links to blobs; for version 1, the files themselves.

    Args:
        root: the root hash, which names the artifact.
    """
    return f"artifacts/{root}/files/"


def read_with_retry(backend: Backend, read: Callable[[], Content]) -> Content:
    """Read verified content; for a bucket, retry once if the verification fails.

    A byte that changed in transit is correct in the second response. Content that is damaged in
    the store fails the second verification too.

    Args:
        backend: where the content is stored.
        read: reads and verifies the content; raises ``ArtifactDamaged``.
    """
    try:
        return read()
    except ArtifactDamaged:
        if not _is_bucket(backend):
            raise
    return read()


def has_content(backend: Backend, key: str, entry: FileEntry, chunk_bytes: int) -> bool:
    """Return whether the value of a key is exactly this file; reads and hashes all its bytes."""
    return backend.size(key) == entry.bytes and all(
        sha256(backend.read(key, index * chunk_bytes, (index + 1) * chunk_bytes)) == expected
        for index, expected in enumerate(entry.chunks)
    )


def add_files(backend: Backend, folder: Path, manifest: StoreManifest, *, move: bool) -> None:
    """Store the files of a version 2 manifest that the backend does not have yet.

    Args:
        backend: where to store the files.
        folder: the folder that contains the files.
        manifest: paths and hashes of the files. Its ``chunk_bytes`` is ``CHUNK_BYTES``, as in each
            manifest that ``StoreManifest.of`` builds.
        move: whether to move the files, if that is possible, instead of copying them. A moved file
            is not compared with its hashes.

    Raises:
        ConcurrentChange: a file that is copied cannot be read or does not match its hashes.
    """
    for entry in manifest.files:
        key = f"{BLOBS}/{compute_blob_name(entry, manifest.chunk_bytes)}"
        _add_blob(backend, folder, entry, key, move=move)
    for entry, blob in zip(manifest.files, manifest.blobs, strict=True):
        backend.link(f"{BLOBS}/{blob}", build_files_prefix(manifest.root) + entry.path)


def _add_blob(backend: Backend, folder: Path, entry: FileEntry, key: str, *, move: bool) -> None:
    """Store one file as the blob ``key``, unless the backend has an intact one."""
    is_upload_faster = _is_bucket(backend) and entry.bytes <= SMALL_BYTES  # than the check
    if not is_upload_faster and _is_stored(backend, folder, entry, key):
        return
    # Moved without comparing hashes, to read the file only once: the caller, who computed them, no
    # longer uses the file, and readers verify every chunk. A damaged blob of this key is replaced.
    if move and backend.move(folder / entry.path, key):
        return
    try:
        backend.upload_new(key, entry.bytes, read_verified_chunks(folder, entry))
    except AlreadyThere:
        if not _is_stored(backend, folder, entry, key):  # damaged since it was stored
            backend.upload(key, entry.bytes, read_verified_chunks(folder, entry))


def _is_stored(backend: Backend, folder: Path, entry: FileEntry, key: str) -> bool:
    """Return whether the backend has an intact blob for this file.

    In a bucket only the size is compared, because the bucket verifies checksums itself. In a local
    folder all bytes are compared, because a power failure may have lost some of them; except if the
    file is a hard link to the blob, so that the hashes in ``entry`` are known to match.
    """
    size, local = backend.size(key), backend.local_path(key)
    if size != entry.bytes or local is None:
        return size == entry.bytes
    # The hashes of a hard link to the blob were computed from the blob's bytes (``Store.put``), or
    # copied from the manifest of an artifact that was just verified (``Store.take_derived``).
    with suppress(OSError):  # the read below reports the problem
        if (folder / entry.path).samefile(local):
            return True
    return has_content(backend, key, entry, CHUNK_BYTES)


def _is_bucket(backend: Backend) -> bool:
    """Return whether the backend is a bucket, whose keys are not local files."""
    return backend.local_path("") is None


class ArtifactFiles:
    """Reads the files of one artifact.

    Args:
        backend: where the files are stored.
        manifest: paths and hashes of the files, already verified.
        use_links: whether to read the files at their paths, which are hard links to the blobs,
            instead of the blobs. Set it if other programs open the files at these paths, so that
            what they read is verified. An artifact of manifest version 1 has no blobs, so it is
            always read from these paths.
    """

    def __init__(
        self, backend: Backend, manifest: StoreManifest, *, use_links: bool = False
    ) -> None:
        self._backend, self._manifest = backend, manifest
        self._files_prefix = build_files_prefix(manifest.root)
        self._uri = f"{backend.uri}/artifacts/{manifest.root}"
        self._blobs = (
            {}
            if use_links
            else {
                entry.path: f"{BLOBS}/{blob}"
                # not strict, because a manifest of version 1 has no blobs
                for entry, blob in zip(manifest.files, manifest.blobs, strict=False)
            }
        )

    def key(self, entry: FileEntry) -> str:
        """Return the key to read this file from."""
        return self._blobs.get(entry.path, self._files_prefix + entry.path)

    def verify(self) -> None:
        """Compare the size of every file and the hash of every chunk with the manifest.

        If the files are read at their paths, a file that is not in the manifest is an error too.
        Blobs cannot be checked for other files, because all artifacts share them.

        Raises:
            ArtifactDamaged: a file is missing, is changed, or does not belong to the artifact.
        """
        read_with_retry(self._backend, lambda: self._check_sizes(refuse_extra=True))
        for _ in self.read_chunks(self._manifest.files):
            pass  # ``read_chunks`` verifies each chunk

    def copy(self, into: Path) -> None:
        """Write all files to the folder ``into``; each chunk is verified before it is written.

        Raises:
            ArtifactDamaged: a file is missing or changed.
            SettingRefused, StoreUnavailable: ``into`` cannot be written, or has a file already.
        """
        read_with_retry(self._backend, self._check_sizes)
        chunks = self.read_chunks(self._manifest.files)
        for entry in self._manifest.files:
            path = into / entry.path
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("xb") as file:
                    for _ in entry.chunks:
                        file.write(next(chunks))
            except OSError as fault:
                raise translate_os_error(fault, path, "write") from fault

    def read_chunks(self, entries: tuple[FileEntry, ...]) -> Iterator[bytes]:
        """Yield all chunks of these files in order, each verified.

        Raises:
            ArtifactMissing: a file does not exist.
            ArtifactDamaged: a chunk differs from its hash, in a bucket twice in a row.
        """
        chunk_bytes = self._manifest.chunk_bytes

        def read(chunk: tuple[FileEntry, int]) -> bytes:
            entry, index = chunk
            start, stop = index * chunk_bytes, min((index + 1) * chunk_bytes, entry.bytes)
            data = self._backend.read(self.key(entry), start, stop)
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

        def read_chunk(chunk: tuple[FileEntry, int]) -> bytes:
            return read_with_retry(self._backend, lambda: read(chunk))

        return map_in_order(
            read_chunk, ((entry, index) for entry in entries for index in range(len(entry.chunks)))
        )

    def _check_sizes(self, *, refuse_extra: bool = False) -> None:
        """Raise ``ArtifactDamaged`` if a file is missing or has the wrong size; read no content.

        Args:
            refuse_extra: whether a file that is not in the manifest is an error too.
        """
        files = self._manifest.files
        if self._blobs:
            sizes = dict(
                zip(map(self.key, files), map_in_order(self._read_size, files), strict=True)
            )
        else:
            sizes = dict(self._backend.sizes(self._files_prefix))
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
        if refuse_extra and extra:
            raise ArtifactDamaged(
                "file_unexpected", uri=self._uri, file=min(extra).removeprefix(self._files_prefix)
            )

    def _read_size(self, entry: FileEntry) -> int | None:
        return self._backend.size(self.key(entry))
