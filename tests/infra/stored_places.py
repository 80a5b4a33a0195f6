"""Object stores in a folder and in a bucket, for tests that read and change the stored bytes.

An artifact is a stored folder. Its manifest, written last, lists the files. The content of each
file is a blob, whose key is a hash of it.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressors.contracts import Artifact
from infra.store.object_store import CHUNK_BYTES, Store

BIG = 2 * CHUNK_BYTES + 17
"""Bytes of a file with three chunks, the parts that are hashed separately."""


@dataclass
class Stored:
    """A store, and functions that access its keys directly, without the store's code.

    Attributes:
        store: the store under test.
        raw: returns the stored bytes of a key.
        overwrite: writes the bytes of a key, also if it exists.
        remove: deletes a key.
    """

    store: Store
    raw: Callable[[str], bytes]
    overwrite: Callable[[str, bytes], None]
    remove: Callable[[str], None]


def folder_store(root: Path) -> Stored:
    """Return a store in a local folder."""

    def overwrite(key: str, body: bytes) -> None:
        path = root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            path.chmod(0o644)
        path.write_bytes(body)  # in place: like damage of a disk, the change affects all hard links

    return Stored(
        store=Store(str(root)),
        raw=lambda key: (root / key).read_bytes(),
        overwrite=overwrite,
        remove=lambda key: (root / key).unlink(),
    )


def bucket_store(prefix: str) -> Stored:
    """Return a store below a prefix of the bucket ``models`` on the S3 server of the tests."""
    client = s3_client()
    return Stored(
        store=Store(f"s3://models/{prefix}"),
        raw=lambda key: client.get_object(Bucket="models", Key=f"{prefix}/{key}")["Body"].read(),
        overwrite=lambda key, body: client.put_object(
            Bucket="models", Key=f"{prefix}/{key}", Body=body
        ),
        remove=lambda key: client.delete_object(Bucket="models", Key=f"{prefix}/{key}"),
    )


def s3_client() -> Any:
    """Return a client of the S3 server that the environment variables name."""
    import boto3

    return boto3.client("s3")


def make_folder(path: Path, largest: int) -> Path:
    """Create a folder to store: files with unusual names, and one of ``largest`` random bytes."""
    (path / "shards" / "tables").mkdir(parents=True)
    (path / "model.json").write_text("{}")
    (path / "empty.bin").write_bytes(b"")
    (path / "manifest.json").write_text("a file with the name of the store's manifest")
    (path / "shards" / "tables" / "big.safetensors").write_bytes(os.urandom(largest))
    (path / "shards" / "für [1] ?versionId=3 #%20.txt").write_text("an awkward name")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Return the content of every file below a folder by relative path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def artifact_key(artifact: Artifact) -> str:
    """Return the key prefix of an artifact's manifest and of the links to its files.

    A link is a hard link to the blob of a file; only a store in a folder has links.
    """
    return f"artifacts/{artifact.sha256}"


def blob_key(stored: Stored, artifact: Artifact, path: str) -> str:
    """Return the key of the blob with the content of one file of an artifact."""
    manifest = stored.store.manifest(artifact)
    paths = [entry.path for entry in manifest.files]
    return f"blobs/{manifest.blobs[paths.index(path)]}"
