"""The manifest of an artifact: paths, sizes and chunk hashes of its files, and its root hash.

The root hash is a SHA-256 over paths, sizes and chunk hashes; it is the name of the artifact. With
one hash per chunk instead of one per file, several threads can hash, send and verify a large file
at once, and damage is located in a chunk of 8 MiB instead of a file of many gigabytes.

In version 2 each file is stored as a blob, named by a hash of its content and shared by all
artifacts that contain the file. In version 1 the files are stored next to the manifest, as
``recpress tables quantize`` still writes its results. The root is the same in both versions.
"""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from compressors.contracts import Frozen, Sha256, digest
from compressors.contracts.value_errors import value_error

CHUNK_BYTES = 8 * 2**20
"""Size of a chunk in every new manifest; only the last chunk of a file may be smaller."""
MAX_CHUNK_BYTES = 2**30
"""Most bytes of a chunk in a manifest that is read: a chunk is read into memory as a whole."""
MAX_MANIFEST_BYTES = 64 * 2**20  # enough for files of 8 TB: 67 bytes of JSON per chunk of 8 MiB


def require_portable_path(path: str) -> str:
    """Return ``path`` if it is a relative path that can be a file in any folder and an S3 key.

    The parts of the path are separated by forward slashes, and it stays in its folder.

    Raises:
        ValueError: the path is empty or absolute; or it contains a ``.``, ``..`` or empty part, a
            backslash, a control character or a character that UTF-8 cannot encode.
    """
    parts = path.split("/")
    if not path or any(part in {"", ".", ".."} for part in parts):
        raise value_error("path_not_relative", path=path)
    if "\\" in path or any(ord(letter) < 32 or ord(letter) == 127 for letter in path):
        raise value_error("path_characters", path=path)
    try:
        path.encode()
    except UnicodeEncodeError:
        raise value_error("path_not_unicode", path=path) from None
    return path


class FileEntry(Frozen):
    """One file of an artifact: its path, its size in bytes, and the hash of each chunk in order."""

    path: Annotated[str, AfterValidator(require_portable_path)]
    bytes: int = Field(ge=0)
    chunks: tuple[Sha256, ...]


class StoreManifest(Frozen):
    """The files of an artifact, sorted by path.

    ``root`` is the hash that names the artifact (``compute_root``). ``blobs`` contains the name of
    each file's blob (``compute_blob_name``), in the order of ``files``; it is empty in version 1.
    Files are hashed in chunks of ``chunk_bytes``.
    """

    schema_version: Literal[1, 2] = 1
    chunk_bytes: int = Field(CHUNK_BYTES, ge=1, le=MAX_CHUNK_BYTES)
    files: tuple[FileEntry, ...] = Field(min_length=1)
    blobs: tuple[Sha256, ...] = ()
    root: Sha256

    @classmethod
    def of(cls, files: tuple[FileEntry, ...]) -> Self:
        """Build the version 1 manifest of these files, hashed in chunks of ``CHUNK_BYTES``."""
        return cls(files=files, chunk_bytes=CHUNK_BYTES, root=compute_root(files, CHUNK_BYTES))

    def add_blobs(self) -> Self:
        """Return this manifest in version 2, with the names of the files' blobs."""
        blobs = tuple(compute_blob_name(entry, self.chunk_bytes) for entry in self.files)
        return self.model_copy(update={"schema_version": 2, "blobs": blobs})

    @property
    def bytes(self) -> int:
        """Return the total size of all files in bytes."""
        return sum(entry.bytes for entry in self.files)

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        """Check that paths are sorted and distinct, and that chunk counts and blobs are right.

        No path is both a file and a folder of another file. The root is not checked here, but when
        a manifest is read.
        """
        paths = [entry.path for entry in self.files]
        if paths != sorted(set(paths)):
            raise value_error("files_not_sorted")
        folders = {path[:cut] for path in paths for cut in _find_slashes(path)}
        if conflicts := sorted(folders.intersection(paths)):
            raise value_error("file_and_folder", path=conflicts[0])
        for entry in self.files:
            expected = -(-entry.bytes // self.chunk_bytes)  # rounded up
            if len(entry.chunks) != expected:
                raise value_error(
                    "chunk_count_differs",
                    path=entry.path,
                    bytes=entry.bytes,
                    expected=expected,
                    got=len(entry.chunks),
                )
        blobs = tuple(compute_blob_name(entry, self.chunk_bytes) for entry in self.files)
        if self.blobs != (blobs if self.schema_version > 1 else ()):
            raise value_error("blobs_differ", version=self.schema_version)
        return self


def compute_root(files: tuple[FileEntry, ...], chunk_bytes: int) -> str:
    """Compute an artifact's name: SHA-256 over its files, their chunk hashes and the chunk size."""
    return digest({"chunk_bytes": chunk_bytes, "files": files})


def compute_blob_name(entry: FileEntry, chunk_bytes: int) -> str:
    """Compute the name of a file's blob: SHA-256 over its chunk hashes and the chunk size."""
    return digest({"chunk_bytes": chunk_bytes, "chunks": entry.chunks})


def _find_slashes(path: str) -> list[int]:
    """Return the index of each slash in a path."""
    return [index for index, letter in enumerate(path) if letter == "/"]
