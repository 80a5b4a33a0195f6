"""The manifest of an artifact: paths, sizes, chunk hashes and the root over them.

A hash per chunk instead of one per file lets several threads hash, send and verify a large file
at once, and locates damage to one chunk instead of a file of many gigabytes.

In version 2 a file is a blob named by its content, which all artifacts with this file share. In
version 1 the files are next to the manifest; results of ``recpress tables quantize`` still are.
The root is the same in both versions, so an artifact keeps its name.
"""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from compressors.contracts import Frozen, Sha256, digest
from compressors.contracts.value_errors import value_error

CHUNK_BYTES = 8 * 2**20
MAX_CHUNK_BYTES = 2**30
MAX_MANIFEST_BYTES = 64 * 2**20  # 8 MiB chunks at 67 bytes a hash: 8 TB of model


def plain_path(path: str) -> str:
    """Return ``path`` if it is a relative posix path inside its folder.

    Raises:
        ValueError: it is empty or absolute, has a ``.``, ``..`` or empty part, a backslash, or a
            character that is not printable text.
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
    """One file of an artifact: its path, its size, and the hash of each chunk in order."""

    path: Annotated[str, AfterValidator(plain_path)]
    bytes: int = Field(ge=0)
    chunks: tuple[Sha256, ...]


class StoreManifest(Frozen):
    """The files of an artifact, sorted by path. ``root``, its name, is a digest over the files.

    ``blobs`` names the blob of each file, in the order of ``files``; it is empty in version 1.
    """

    schema_version: Literal[1, 2] = 1
    chunk_bytes: int = Field(CHUNK_BYTES, ge=1, le=MAX_CHUNK_BYTES)
    files: tuple[FileEntry, ...] = Field(min_length=1)
    blobs: tuple[Sha256, ...] = ()
    root: Sha256

    @classmethod
    def of(cls, files: tuple[FileEntry, ...]) -> Self:
        """Build the manifest, version 1, of these files, split into chunks of ``CHUNK_BYTES``."""
        return cls(files=files, chunk_bytes=CHUNK_BYTES, root=root_of(files, CHUNK_BYTES))

    def with_blobs(self) -> Self:
        """Return version 2 of this manifest, which references the files' blobs."""
        blobs = tuple(blob_of(entry, self.chunk_bytes) for entry in self.files)
        return self.model_copy(update={"schema_version": 2, "blobs": blobs})

    @property
    def bytes(self) -> int:
        """Size of all files together."""
        return sum(entry.bytes for entry in self.files)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        paths = [entry.path for entry in self.files]
        if paths != sorted(set(paths)):
            raise value_error("files_not_sorted")
        folders = {path[:cut] for path in paths for cut in _slashes(path)}
        if both := sorted(folders.intersection(paths)):
            raise value_error("file_and_folder", path=both[0])
        for entry in self.files:
            wanted = -(-entry.bytes // self.chunk_bytes)
            if len(entry.chunks) != wanted:
                raise value_error(
                    "chunk_count_differs",
                    path=entry.path,
                    bytes=entry.bytes,
                    expected=wanted,
                    got=len(entry.chunks),
                )
        blobs = tuple(blob_of(entry, self.chunk_bytes) for entry in self.files)
        if self.blobs != (blobs if self.schema_version > 1 else ()):
            raise value_error("blobs_differ", version=self.schema_version)
        return self


def root_of(files: tuple[FileEntry, ...], chunk_bytes: int) -> str:
    """Compute an artifact's name: SHA-256 over its files, their chunk hashes and the chunk size."""
    return digest({"chunk_bytes": chunk_bytes, "files": files})


def blob_of(entry: FileEntry, chunk_bytes: int) -> str:
    """Compute the name of a file's blob: SHA-256 over its chunk hashes and the chunk size."""
    return digest({"chunk_bytes": chunk_bytes, "chunks": entry.chunks})


def _slashes(path: str) -> list[int]:
    return [at for at, letter in enumerate(path) if letter == "/"]
