"""Blobs that artifacts share, both versions of manifests, and hard links in a folder store.

A blob is a stored file whose key is a hash of its content. A manifest lists the files of an
artifact, and the hash of each chunk of a file.
"""

import errno
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from error_codes import raises_code
from stored_places import (
    BIG,
    Stored,
    artifact_key,
    blob_key,
    bucket_store,
    contents,
    folder_store,
    make_folder,
)

from compressors.contracts import Artifact
from infra.errors import AlreadyThere, ArtifactDamaged, StoreRefused
from infra.store.artifact_files import SMALL_BYTES
from infra.store.chunks import hash_files, list_regular_files
from infra.store.object_store import CHUNK_BYTES, Store, StoreManifest

LARGE = "shards/tables/big.safetensors"


@pytest.fixture(params=["folder", "s3"])
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> Stored:
    """An empty store, in a folder and in a bucket."""
    if request.param == "folder":
        return folder_store(tmp_path / "store")
    request.getfixturevalue("s3")
    return bucket_store(f"{tmp_path.name}-{time.time_ns()}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder to store with a file of three chunks."""
    return make_folder(tmp_path / "model", largest=BIG)


def with_another_json(folder: Path, into: Path, text: str = "[1]") -> Path:
    """Copy a folder to ``into`` and change the content of ``model.json``; return the copy."""
    shutil.copytree(folder, into)
    (into / "model.json").write_text(text)
    return into


def take_with_manifest(stored: Stored, folder: Path) -> Artifact:
    """Move the files of a folder to a store."""
    return stored.store.take(
        folder, StoreManifest.of(hash_files(folder, list_regular_files(folder)))
    )


def count_written(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that receives the size of each file that is written to the store from now on.

    Manifests are not counted.
    """
    sizes: list[int] = []
    backend = stored.store._backend

    def counting(write: Any) -> Any:
        def write_and_count(key: str, size: int, chunks: Any) -> None:
            sizes.append(size)
            write(key, size, chunks)

        return write_and_count

    monkeypatch.setattr(backend, "upload", counting(backend.upload))
    monkeypatch.setattr(backend, "upload_new", counting(backend.upload_new))
    return sizes


def store_as_version_1(stored: Stored, folder: Path) -> Artifact:
    """Write an artifact with a manifest of version 1, as recpress 0.1.0 did."""
    manifest = StoreManifest.of(hash_files(folder, list_regular_files(folder)))
    for path, body in contents(folder).items():
        stored.overwrite(f"artifacts/{manifest.root}/files/{path}", body)
    text = manifest.model_dump_json(exclude={"blobs"}).encode()
    stored.overwrite(f"artifacts/{manifest.root}/manifest.json", text)
    uri = f"artifacts/{manifest.root}"
    return Artifact(uri=uri, sha256=manifest.root, bytes=manifest.bytes)


def test_second_artifact_with_the_same_large_file_stores_only_its_other_files(
    stored, folder, tmp_path, monkeypatch
):
    first = stored.store.put(folder)
    before = sum(stored.store.sizes("blobs/").values())
    sizes = count_written(stored, monkeypatch)
    second = stored.store.put(with_another_json(folder, tmp_path / "second"))
    assert sum(stored.store.sizes("blobs/").values()) - before == len("[1]")
    assert BIG not in sizes
    assert blob_key(stored, second, LARGE) == blob_key(stored, first, LARGE)
    folder_copy = stored.store.get(second, tmp_path / "out")
    assert contents(folder_copy) == contents(tmp_path / "second")


def test_file_that_a_bucket_has_is_not_sent_again(s3, tmp_path, monkeypatch):
    """Files of at most ``SMALL_BYTES`` are sent without a check whether the bucket has them."""
    stored = bucket_store(f"medium-{time.time_ns()}")
    source = make_folder(tmp_path / "model", largest=SMALL_BYTES + 1)
    stored.store.put(source)
    sizes = count_written(stored, monkeypatch)
    stored.store.put(with_another_json(source, tmp_path / "second"))
    assert max(sizes) <= SMALL_BYTES


def test_folder_store_uses_the_disk_space_of_a_shared_file_once(folder, tmp_path):
    stored = folder_store(tmp_path / "store")
    artifacts = [
        stored.store.put(with_another_json(folder, tmp_path / str(number), f"[{number}]"))
        for number in range(3)
    ]
    files = [path.stat() for path in (tmp_path / "store").rglob("*") if path.is_file()]
    used_bytes = sum({status.st_ino: status.st_size for status in files}.values())
    assert used_bytes < BIG + 20_000  # the small files and the manifests
    paths = [stored.store.local(item, tmp_path / "cache") / LARGE for item in artifacts]
    assert paths[0].samefile(paths[1])
    assert paths[0].stat().st_mode & 0o222 == 0, "readers memory-map the file"


def test_artifact_of_manifest_version_1_is_read_and_keeps_its_name(
    stored, folder, tmp_path, monkeypatch
):
    artifact = store_as_version_1(stored, folder)
    assert stored.store.manifest(artifact).schema_version == 1
    assert contents(stored.store.get(artifact, tmp_path / "out")) == contents(folder)
    assert contents(stored.store.local(artifact, tmp_path / "cache")) == contents(folder)
    assert stored.store.file(artifact, "model.json") == b"{}"
    assert b"".join(stored.store.chunks(artifact, LARGE)) == (folder / LARGE).read_bytes()
    uri = stored.store.file_uri(artifact, "model.json")
    assert uri == f"{stored.store.root}/{artifact_key(artifact)}/files/model.json"
    sizes = count_written(stored, monkeypatch)
    assert stored.store.put(folder) == artifact
    assert sizes == [], "the artifact is not stored again"
    stored.overwrite(f"{artifact_key(artifact)}/files/{LARGE}", bytes(BIG))
    for read in (
        lambda: stored.store.get(artifact, tmp_path / "again"),
        lambda: stored.store.local(artifact, tmp_path / "other cache"),
        lambda: list(stored.store.chunks(artifact, LARGE)),
    ):
        with raises_code(ArtifactDamaged, "chunk_differs", file=LARGE, chunk=0):
            read()


def test_artifact_has_the_same_name_in_both_versions(stored, folder, tmp_path):
    artifact = stored.store.put(folder)
    assert stored.store.manifest(artifact).schema_version == 2
    (tmp_path / "old").mkdir()
    assert store_as_version_1(folder_store(tmp_path / "old"), folder) == artifact


def test_manifest_that_references_a_blob_of_another_file_is_damage(stored, folder):
    artifact = stored.store.put(folder)
    key = f"{artifact_key(artifact)}/manifest.json"
    blobs = stored.store.manifest(artifact).blobs
    first, second = blobs[0].encode(), blobs[1].encode()
    stored.overwrite(key, stored.raw(key).replace(first, second))
    with raises_code(ArtifactDamaged, "manifest_unusable"):
        stored.store.manifest(artifact)
    stored.overwrite(key, stored.raw(key).replace(b'"schema_version":2', b'"schema_version":1'))
    with raises_code(ArtifactDamaged, "manifest_unusable"):
        stored.store.manifest(artifact)


def test_blob_is_written_before_the_manifest_that_references_it(stored, folder, monkeypatch):
    created: list[str] = []
    backend = stored.store._backend
    create, upload = backend.create, backend.upload_new
    monkeypatch.setattr(
        backend, "create", lambda key, body: (created.append(key), create(key, body))
    )
    monkeypatch.setattr(
        backend,
        "upload_new",
        lambda key, size, chunks: (created.append(key), upload(key, size, chunks)),
    )
    artifact = stored.store.put(folder)
    assert created[-1] == f"{artifact_key(artifact)}/manifest.json"
    blobs = {f"blobs/{blob}" for blob in stored.store.manifest(artifact).blobs}
    assert blobs <= set(created[:-1])


def test_large_file_is_created_only_if_its_key_is_new(stored):
    pieces = [bytes([number]) * CHUNK_BYTES for number in range(3)]
    backend = stored.store._backend
    backend.upload_new("large", 3 * CHUNK_BYTES, iter(pieces))
    with pytest.raises(AlreadyThere):
        backend.upload_new("large", 3 * CHUNK_BYTES, iter(reversed(pieces)))
    assert stored.raw("large") == b"".join(pieces)
    assert backend.size("large") == 3 * CHUNK_BYTES
    assert backend.size("larg") is None


def test_artifacts_stored_concurrently_share_their_large_file(stored, folder, tmp_path):
    folders = [
        with_another_json(folder, tmp_path / str(number), f"[{number}]") for number in range(3)
    ]
    barrier = threading.Barrier(3)

    def put(source: Path) -> Artifact:
        barrier.wait()
        return stored.store.put(source)

    with ThreadPoolExecutor(3) as pool:
        artifacts = list(pool.map(put, folders))
    assert list(stored.store.sizes("blobs/").values()).count(BIG) == 1
    for number, (source, artifact) in enumerate(zip(folders, artifacts, strict=True)):
        folder_copy = stored.store.get(artifact, tmp_path / f"out {number}")
        assert contents(folder_copy) == contents(source)


def test_truncated_blob_is_replaced_when_another_artifact_with_its_file_is_stored(
    stored, folder, tmp_path
):
    first = stored.store.put(folder)
    key = blob_key(stored, first, LARGE)
    stored.overwrite(key, stored.raw(key)[:-1])  # as after a power failure
    second = stored.store.put(with_another_json(folder, tmp_path / "second"))
    assert stored.raw(key) == (folder / LARGE).read_bytes()
    assert contents(stored.store.get(second, tmp_path / "out")) == contents(tmp_path / "second")


@pytest.mark.parametrize("move", [False, True])
def test_changed_blob_in_a_folder_is_replaced_when_its_file_is_stored_again(folder, tmp_path, move):
    stored = folder_store(tmp_path / "store")
    key = blob_key(stored, stored.store.put(folder), LARGE)
    body = (folder / LARGE).read_bytes()
    stored.overwrite(key, bytes([body[0] ^ 1]) + body[1:])
    source = with_another_json(folder, tmp_path / "second")
    second = take_with_manifest(stored, source) if move else stored.store.put(source)
    assert stored.raw(key) == body
    assert (stored.store.local(second, tmp_path / "cache") / LARGE).read_bytes() == body


def test_take_moves_new_files_and_leaves_existing_blobs(folder, tmp_path):
    stored = folder_store(tmp_path / "store")
    first = stored.store.put(folder)
    path = tmp_path / "store" / blob_key(stored, first, LARGE)
    source = with_another_json(folder, tmp_path / "second")
    inodes = path.stat().st_ino, (source / "model.json").stat().st_ino
    second = take_with_manifest(stored, source)
    moved = tmp_path / "store" / blob_key(stored, second, "model.json")
    assert (path.stat().st_ino, moved.stat().st_ino) == inodes
    assert moved.stat().st_mode & 0o222 == 0, "readers memory-map the file"
    assert not (source / "model.json").exists()
    copy = stored.store.get(second, tmp_path / "out")
    assert contents(copy)["model.json"] == b"[1]"


def test_file_that_is_a_link_to_its_blob_is_not_read_again(folder, tmp_path, monkeypatch):
    stored = folder_store(tmp_path / "store")
    first = stored.store.put(folder)
    source = tmp_path / "second"
    source.mkdir()
    (source / "table").hardlink_to(tmp_path / "store" / blob_key(stored, first, LARGE))
    (source / "model.json").write_text("[1]")
    manifest = StoreManifest.of(hash_files(source, list_regular_files(source)))
    # None: comparing the bytes of a file with its blob would fail.
    monkeypatch.setattr("infra.store.artifact_files.has_content", None)
    second = stored.store.take(source, manifest)
    assert contents(stored.store.get(second, tmp_path / "out"))["model.json"] == b"[1]"


def test_folder_store_without_links_is_read_through_the_cache(s3, folder, tmp_path):
    """``local`` returns a folder with the files: the artifact's links, or a copy in the cache."""
    stored = bucket_store(f"copied-{time.time_ns()}")
    artifact = stored.store.put(folder)
    copied_store = folder_store(tmp_path / "copied")
    for key in stored.store.keys(""):
        copied_store.overwrite(key, stored.raw(key))
    assert contents(copied_store.store.local(artifact, tmp_path / "cache")) == contents(folder)
    assert not (tmp_path / "copied" / artifact_key(artifact) / "files").exists()
    path = "model.json"
    uri = copied_store.store.file_uri(artifact, path)
    assert uri == f"{copied_store.store.root}/{blob_key(copied_store, artifact, path)}"
    assert contents(copied_store.store.get(artifact, tmp_path / "out")) == contents(folder)


def test_blob_with_as_many_links_as_possible_is_copied(folder, tmp_path, monkeypatch):
    stored = folder_store(tmp_path / "store")
    link = os.link

    def limited_link(source: Path, target: Path) -> None:
        if "blobs" in Path(source).parts:
            raise OSError(errno.EMLINK, os.strerror(errno.EMLINK))
        link(source, target)

    monkeypatch.setattr(os, "link", limited_link)
    artifact = stored.store.put(folder)
    links_folder = stored.store.local(artifact, tmp_path / "cache")
    assert contents(links_folder) == contents(folder)
    assert (links_folder / LARGE).stat().st_mode & 0o222 == 0
    assert not list((tmp_path / "store" / ".tmp").iterdir())


def test_uri_of_a_file_is_where_its_bytes_are(stored, folder):
    artifact = stored.store.put(folder)
    uri = stored.store.file_uri(artifact, "model.json")
    assert stored.raw(uri.removeprefix(f"{stored.store.root}/")) == b"{}"


def test_records_cannot_be_written_among_the_blobs(tmp_path):
    """A record is a small value with a key, which ``write`` stores."""
    with raises_code(StoreRefused, "key_reserved", key="blobs/x"):
        Store(str(tmp_path)).write("blobs/x", b"")
