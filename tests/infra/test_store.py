"""The object store in a local folder and on a real S3 server: the same tests for both.

An artifact is a stored folder, whose manifest has the hash of each chunk of its files. The root of
a manifest is the hash over all files, which is the artifact's name; the root of a store is its
address. A record is a small value with a key.
"""

import contextlib
import errno
import json
import os
import re
import socket
import threading
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from error_codes import TextMatching, raises_code, raises_value_error
from hypothesis import given
from hypothesis import strategies as st
from stored_places import (
    BIG,
    Stored,
    artifact_key,
    blob_key,
    bucket_store,
    contents,
    folder_store,
    make_folder,
    s3_client,
)

from compressors.contracts import Artifact
from infra.errors import (
    AlreadyThere,
    ArtifactDamaged,
    ArtifactMissing,
    ConcurrentChange,
    RecordRefused,
    SettingRefused,
    StoreOutage,
    StoreRefused,
    StoreUnavailable,
)
from infra.store import chunks as store_chunks
from infra.store.manifest import compute_root, require_portable_path
from infra.store.object_store import CHUNK_BYTES, FileEntry, Store, StoreManifest


@pytest.fixture(params=["folder", "s3"])
def stored(request, tmp_path) -> Stored:
    """An empty store, in a folder and in a bucket."""
    if request.param == "folder":
        return folder_store(tmp_path / "store")
    request.getfixturevalue("s3")
    return bucket_store(f"{tmp_path.name}-{time.time_ns()}/deep")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder of small files to store."""
    return make_folder(tmp_path / "model", largest=1000)


@pytest.fixture
def big_folder(tmp_path) -> Path:
    """A folder to store with a file of three chunks."""
    return make_folder(tmp_path / "model", largest=BIG)


# --- Artifacts: put, get, local, file --------------------------------------------------------


def test_get_returns_the_files_that_put_stored(stored, big_folder, tmp_path):
    artifact = stored.store.put(big_folder)
    into = stored.store.get(artifact, tmp_path / "new" / "out")
    assert contents(into) == contents(big_folder)
    assert artifact.bytes == sum(len(body) for body in contents(big_folder).values())
    assert artifact.uri == f"artifacts/{artifact.sha256}"
    assert stored.store.uri_of(artifact) == f"{stored.store.root}/artifacts/{artifact.sha256}"


def test_store_file_reads_an_intact_file_of_an_artifact_with_a_damaged_one(stored, big_folder):
    artifact = stored.store.put(big_folder)
    stored.overwrite(blob_key(stored, artifact, "shards/tables/big.safetensors"), b"damaged")
    assert stored.store.file(artifact, "model.json") == b"{}"
    with raises_code(ArtifactMissing, "artifact_file_missing", path="absent.json"):
        stored.store.file(artifact, "absent.json")
    stored.overwrite(blob_key(stored, artifact, "model.json"), b"[]")
    with raises_code(ArtifactDamaged, "chunk_differs", chunk=0):
        stored.store.file(artifact, "model.json")


def test_has_content_compares_every_byte_of_a_key_with_a_file_of_an_artifact(stored, big_folder):
    artifact = stored.store.put(big_folder)
    path = "shards/tables/big.safetensors"
    entry = next(e for e in stored.store.manifest(artifact).files if e.path == path)
    assert not stored.store.has_content("copies/1/big", entry)
    stored.store.upload("copies/1/big", entry.bytes, stored.store.chunks(artifact, path))
    body = (big_folder / path).read_bytes()
    assert stored.raw("copies/1/big") == body
    assert stored.store.sizes("copies/") == {"copies/1/big": len(body)}
    assert stored.store.has_content("copies/1/big", entry)
    with_last_bit_flipped = body[:-1] + bytes([body[-1] ^ 1])
    for changed in (with_last_bit_flipped, body[:-1], body + b"x"):
        stored.overwrite("copies/1/big", changed)
        assert not stored.store.has_content("copies/1/big", entry)


def test_upload_of_a_damaged_file_leaves_no_key(stored, big_folder):
    artifact = stored.store.put(big_folder)
    path = "shards/tables/big.safetensors"
    entry = next(e for e in stored.store.manifest(artifact).files if e.path == path)
    stored.overwrite(blob_key(stored, artifact, path), bytes(entry.bytes))
    with raises_code(ArtifactDamaged, "chunk_differs", chunk=0):
        stored.store.upload("copy", entry.bytes, stored.store.chunks(artifact, path))
    assert stored.store.keys("copy") == ()


def test_put_of_the_same_content_returns_the_same_artifact_without_an_upload(
    stored, folder, tmp_path, monkeypatch
):
    first = stored.store.put(folder)
    for name in ("upload", "upload_new"):  # storing a file again would fail
        monkeypatch.setattr(stored.store._backend, name, None)
    again = stored.store.put(copy_folder(folder, tmp_path / "copy"))
    assert again == first
    assert stored.store.find(first.sha256) == first
    assert stored.store.artifact(first.uri) == first
    assert stored.store.artifact(first.uri + "/") == first


def copy_folder(folder: Path, into: Path) -> Path:
    """Copy all files of a folder; return the copy."""
    for path, body in contents(folder).items():
        (into / path).parent.mkdir(parents=True, exist_ok=True)
        (into / path).write_bytes(body)
    return into


def test_folders_that_differ_in_a_path_or_a_byte_are_different_artifacts(tmp_path):
    store = Store(str(tmp_path / "store"))
    names = set()
    for path, body in (("a", b"1"), ("b", b"1"), ("a", b"2"), ("a/b", b"1")):
        source = tmp_path / f"{len(names)}"
        (source / path).parent.mkdir(parents=True)
        (source / path).write_bytes(body)
        names.add(store.put(source).sha256)
    assert len(names) == 4


def test_local_copies_an_artifact_only_from_a_bucket(stored, folder, tmp_path):
    artifact = stored.store.put(folder)
    path = stored.store.local(artifact, tmp_path / "cache")
    assert contents(path) == contents(folder)
    is_in_cache = path == tmp_path / "cache" / artifact.sha256
    assert is_in_cache == stored.store.root.startswith("s3://")
    assert stored.store.local(artifact, tmp_path / "cache") == path


def test_local_fetches_a_damaged_cached_copy_again(s3, folder, tmp_path):
    store = bucket_store(f"cache-{time.time_ns()}").store
    artifact = store.put(folder)
    path = store.local(artifact, tmp_path / "cache")
    inode = (path / "model.json").stat().st_ino
    store.local(artifact, tmp_path / "cache")
    assert (path / "model.json").stat().st_ino == inode, "an intact copy is not fetched again"
    (path / "model.json").write_text("[]")
    (path / "extra").write_text("x")
    assert contents(store.local(artifact, tmp_path / "cache")) == contents(folder)
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == [artifact.sha256]


@pytest.mark.parametrize("kind", ["folder", pytest.param("s3", marks=pytest.mark.slow)])
def test_put_and_get_of_a_200_mib_file_use_less_than_150_mib(kind, tmp_path, request):
    if kind == "s3":
        request.getfixturevalue("s3")
    root = str(tmp_path / "store") if kind == "folder" else f"s3://models/flat-{time.time_ns()}"
    source = tmp_path / "large"
    source.mkdir()
    with (source / "table").open("wb") as file:
        file.truncate(200 * 2**20)
    store = Store(root)
    tracemalloc.start()
    try:
        artifact = store.put(source)
        put_peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        store.get(artifact, tmp_path / "out")
        get_peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # Any file needs 80 MiB: 5 chunks of 8 MiB are read ahead and, for S3, 5 parts are being sent.
    # The HTTP client may have one more copy of each part. The file itself has 200 MiB.
    assert put_peak < 150 * 2**20
    assert get_peak < 150 * 2**20


# --- Damaged artifacts -----------------------------------------------------------------------


def test_flipped_byte_is_an_error_with_the_chunk(stored, big_folder, tmp_path):
    artifact = stored.store.put(big_folder)
    key = blob_key(stored, artifact, "shards/tables/big.safetensors")
    body = bytearray(stored.raw(key))
    body[CHUNK_BYTES + 5] ^= 1
    stored.overwrite(key, bytes(body))
    with raises_code(ArtifactDamaged, "chunk_differs", chunk=1, start=CHUNK_BYTES):
        stored.store.get(artifact, tmp_path / "deep" / "out")
    assert not (tmp_path / "deep").exists(), "a failed get leaves no files"
    with raises_code(ArtifactDamaged, "chunk_differs", file="shards/tables/big.safetensors"):
        stored.store.local(artifact, tmp_path / "cache")


@pytest.mark.parametrize("change", [lambda body: body[:-1], lambda body: body + b"\0"])
def test_blob_of_another_size_is_damage(stored, folder, tmp_path, change):
    artifact = stored.store.put(folder)
    key = blob_key(stored, artifact, "model.json")
    stored.overwrite(key, change(stored.raw(key)))
    # The file contains "{}", which are 2 bytes.
    with raises_code(ArtifactDamaged, "file_size_differs", file="model.json", expected=2):
        stored.store.get(artifact, tmp_path / "out")


def test_missing_blob_is_damage_and_missing_manifest_means_no_artifact(stored, folder, tmp_path):
    artifact = stored.store.put(folder)
    stored.remove(blob_key(stored, artifact, "model.json"))
    with raises_code(ArtifactDamaged, "file_absent", file="model.json"):
        stored.store.get(artifact, tmp_path / "out")
    stored.remove(f"{artifact_key(artifact)}/manifest.json")
    assert stored.store.find(artifact.sha256) is None
    for read in (
        lambda: stored.store.get(artifact, tmp_path / "out"),
        lambda: stored.store.manifest(artifact),
        lambda: stored.store.artifact(artifact.uri),
        lambda: stored.store.local(artifact, tmp_path / "cache"),
    ):
        with raises_code(ArtifactMissing, "artifact_missing"):
            read()
    assert not (tmp_path / "out").exists()


def test_local_refuses_a_folder_with_a_file_that_is_not_in_the_manifest(tmp_path, folder):
    stored = folder_store(tmp_path / "store")
    artifact = stored.store.put(folder)
    stored.overwrite(f"{artifact_key(artifact)}/files/evil.pkl", b"")
    with raises_code(ArtifactDamaged, "file_unexpected", file="evil.pkl"):
        stored.store.local(artifact, tmp_path / "cache")
    assert contents(stored.store.get(artifact, tmp_path / "out")) == contents(folder)


def test_manifest_with_a_changed_hash_is_damage(stored, folder):
    artifact = stored.store.put(folder)
    key = f"{artifact_key(artifact)}/manifest.json"
    manifest = json.loads(stored.raw(key))
    changed_entry = next(entry for entry in manifest["files"] if entry["path"] == "model.json")
    changed_entry["chunks"] = ["0" * 64]
    entries = tuple(FileEntry(**entry) for entry in manifest["files"])
    manifest["blobs"] = list(StoreManifest.of(entries).add_blobs().blobs)
    stored.overwrite(key, json.dumps(manifest).encode())
    with raises_code(ArtifactDamaged, "manifest_changed"):
        stored.store.manifest(artifact)
    # A root that matches the changed files is refused too, because it is not the artifact's name.
    forged = StoreManifest.of(tuple(FileEntry(**entry) for entry in manifest["files"]))
    forged = forged.add_blobs()
    stored.overwrite(key, forged.model_dump_json().encode())
    with raises_code(ArtifactDamaged, "manifest_changed"):
        stored.store.manifest(artifact)
    stored.overwrite(key, b"not json")
    with raises_code(ArtifactDamaged, "manifest_unusable"):
        stored.store.find(artifact.sha256)


@pytest.mark.parametrize("path", ["../up", "/etc/passwd", "a/../../b", "a\\..\\b", "", "a//b", "."])
def test_manifest_path_outside_the_artifact_is_refused(stored, tmp_path, path):
    entry = {"path": path, "bytes": 0, "chunks": ()}
    files = (FileEntry.model_construct(**entry),)
    root = compute_root(files, CHUNK_BYTES)
    body = {"schema_version": 1, "chunk_bytes": CHUNK_BYTES, "files": [entry], "root": root}
    stored.overwrite(f"artifacts/{root}/manifest.json", json.dumps(body).encode())
    artifact = Artifact(uri=f"{stored.store.root}/artifacts/{root}", sha256=root, bytes=0)
    with raises_code(ArtifactDamaged, "manifest_unusable") as caught:
        stored.store.get(artifact, tmp_path / "out")
    assert caught.value.fields["problem"].startswith("files.0.path")


@pytest.mark.parametrize(
    ("files", "code", "fields"),
    [
        ([("b", 0, 0), ("a", 0, 0)], "files_not_sorted", {}),
        ([("a", 0, 0), ("a", 0, 0)], "files_not_sorted", {}),
        ([("a", 0, 0), ("a/b", 0, 0)], "file_and_folder", {"path": "a"}),
        ([("a", 1, 0)], "chunk_count_differs", {"path": "a", "expected": 1, "got": 0}),
        ([("a", CHUNK_BYTES, 2)], "chunk_count_differs", {"path": "a", "expected": 1, "got": 2}),
        ([], "too_short", {"min_length": 1}),
    ],
)
def test_inconsistent_manifest_is_refused(files, code, fields):
    entries = tuple(
        FileEntry(path=path, bytes=size, chunks=("0" * 64,) * chunks)
        for path, size, chunks in files
    )
    with raises_value_error(code, **fields):
        StoreManifest.of(entries)


@given(st.text(alphabet="ab./\\\0é", max_size=8))
def test_every_path_that_require_portable_path_accepts_is_inside_its_folder(path):
    try:
        require_portable_path(path)
    except ValueError:
        return
    normalized = os.path.normpath(f"/folder/{path}")
    assert normalized == f"/folder/{path}"


# --- Refused, interrupted and concurrent puts ------------------------------------------------


def test_put_refuses_symlinks_special_files_and_empty_folders(tmp_path):
    store = Store(str(tmp_path / "store"))
    source = tmp_path / "source"
    with raises_code(StoreRefused, "folder_unreadable", problem="No such file or directory"):
        store.put(source)
    (source / "below").mkdir(parents=True)
    with raises_code(StoreRefused, "folder_empty", folder=str(source)):
        store.put(source)
    for target in ("/etc/hostname", "/etc", "nowhere"):
        link = source / "below" / "link"
        link.symlink_to(target)
        with raises_code(StoreRefused, "file_is_link", path=str(link)):
            store.put(source)
        link.unlink()
    os.mkfifo(source / "pipe")
    with raises_code(StoreRefused, "file_of_other_kind", path=str(source / "pipe")):
        store.put(source)
    (source / "pipe").unlink()
    (source / "a\\b").write_text("x")
    with raises_code(StoreRefused, "file_name_form", problem=TextMatching("backslash")):
        store.put(source)
    assert not (tmp_path / "store").exists()


def test_interrupted_put_leaves_no_artifact_and_a_second_put_completes_it(
    stored, big_folder, tmp_path, monkeypatch
):
    uploaded = []
    upload = stored.store._backend.upload_new

    def upload_half(key, size, chunks):
        def first_chunk():
            yield next(chunks)
            raise KeyboardInterrupt

        upload(key, size, first_chunk() if size == BIG else chunks)
        uploaded.append(key)

    with monkeypatch.context() as patch:
        patch.setattr(stored.store._backend, "upload_new", upload_half)
        with pytest.raises(KeyboardInterrupt):
            stored.store.put(big_folder)
    name = artifact_name_of(big_folder)
    assert uploaded, "some files were stored before the interruption"
    assert set(stored.store.keys("")) == set(uploaded), "no partial file is visible"
    assert stored.store.find(name) is None
    artifact = stored.store.put(big_folder)
    assert artifact.sha256 == name
    assert contents(stored.store.get(artifact, tmp_path / "out")) == contents(big_folder)
    if stored.store.root.startswith("s3://"):
        open_uploads = s3_client().list_multipart_uploads(Bucket="models").get("Uploads", [])
        prefix = stored.store.root.removeprefix("s3://models/")
        assert not [entry for entry in open_uploads if entry["Key"].startswith(prefix)]
    else:
        assert not list((tmp_path / "store" / ".tmp").iterdir())


def artifact_name_of(folder: Path) -> str:
    """Return the name of the artifact with the files of a folder."""
    return StoreManifest.of(
        store_chunks.hash_files(folder, store_chunks.list_regular_files(folder))
    ).root


@pytest.mark.parametrize("change", ["rewritten", "grown", "cut", "gone"])
def test_put_of_a_file_that_changes_meanwhile_stores_no_artifact(
    stored, big_folder, monkeypatch, change
):
    file = big_folder / "shards" / "tables" / "big.safetensors"

    def hash_and_change(*args):
        entries = store_chunks.hash_files(*args)
        if change == "gone":
            file.unlink()
        else:
            body = bytearray(file.read_bytes())
            if change == "rewritten":
                body[0] ^= 1
            elif change == "grown":
                body += b"!"
            else:
                del body[-1]
            file.write_bytes(body)
        return entries

    monkeypatch.setattr("infra.store.object_store.hash_files", hash_and_change)
    # Any code: it depends on how the file has changed.
    with raises_code(ConcurrentChange, None, path=TextMatching(r"big\.safetensors$")):
        stored.store.put(big_folder)
    assert stored.store.keys("artifacts/") == ()
    stored_bytes = sum(stored.store.sizes("blobs/").values())
    assert stored_bytes < BIG, "the file that changed is not stored"


def test_concurrent_puts_of_the_same_content_all_succeed(stored, big_folder, tmp_path):
    with ThreadPoolExecutor(3) as pool:
        names = {artifact.sha256 for artifact in pool.map(stored.store.put, [big_folder] * 3)}
    assert len(names) == 1
    artifact = stored.store.find(names.pop())
    assert contents(stored.store.get(artifact, tmp_path / "out")) == contents(big_folder)


def test_get_into_a_folder_with_files_is_refused_and_changes_nothing(tmp_path, folder):
    store = Store(str(tmp_path / "store"))
    artifact = store.put(folder)
    nonempty = tmp_path / "taken"
    nonempty.mkdir()
    assert store.get(artifact, nonempty) == nonempty, "an empty folder may be filled"
    (nonempty / "model.json").write_text("mine")
    with raises_code(StoreRefused, "output_not_empty", folder=str(nonempty)):
        store.get(artifact, nonempty)
    assert (nonempty / "model.json").read_text() == "mine"
    with raises_code(StoreRefused, "output_no_folder", path=str(nonempty / "model.json")):
        store.get(artifact, nonempty / "model.json")


# --- Small records ---------------------------------------------------------------------------


def test_exactly_one_of_eight_concurrent_creates_succeeds(stored):
    barrier = threading.Barrier(8)

    def create(number: int) -> bool:
        barrier.wait()
        try:
            stored.store.create("ledger/m/1.json", str(number).encode() * 1000)
        except AlreadyThere:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        is_created = list(pool.map(create, range(8)))
    assert is_created.count(True) == 1
    assert stored.store.read("ledger/m/1.json") == str(is_created.index(True)).encode() * 1000


def test_records_can_be_replaced_and_listed_and_a_missing_one_is_an_error(stored):
    store = stored.store
    assert store.keys("") == ()
    for key in ("b/2", "b/10", "a/x/y", "bb"):
        store.write(key, key.encode())
    store.write("b/2", b"")
    assert store.read("b/2") == b""
    assert store.read("a/x/y") == b"a/x/y"
    assert store.keys("") == ("a/x/y", "b/10", "b/2", "bb")
    assert store.keys("b/") == ("b/10", "b/2")
    assert store.keys("b") == ("b/10", "b/2", "bb")
    assert store.keys("none/") == ()
    with raises_code(ArtifactMissing, "file_missing"):
        store.read("b/3")


def test_records_with_reserved_or_invalid_keys_or_too_many_bytes_are_refused(tmp_path):
    store = Store(str(tmp_path))
    for key in ("artifacts/x", ".tmp/x"):
        with raises_code(StoreRefused, "key_reserved", key=key):
            store.write(key, b"")
    for key in ("../x", "/x", "a//b", "a\\b", ""):
        for call in (store.read, lambda key: store.create(key, b"")):
            with raises_code(StoreRefused, "key_form"):
                call(key)
    with raises_code(StoreRefused, "record_too_large", key="x", most_bytes=2**24):
        store.write("x", b"\0" * (16 * 2**20 + 1))
    (tmp_path / "large").write_bytes(b"\0" * (16 * 2**20 + 1))
    with raises_code(RecordRefused, "record_too_large", most_bytes=2**24):
        store.read("large")


# --- Roots and URIs --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("root", "code"),
    [
        ("", "root_empty"),
        (" ", "root_empty"),
        ("gs://bucket", "root_scheme_unknown"),
        ("http://u:secret@host/x", "root_scheme_unknown"),
        ("memory://", "root_scheme_unknown"),
        ("file://host/x", "root_file_uri_form"),
        ("s3://", "root_bucket_invalid"),
        ("s3://b", "root_bucket_invalid"),
        ("s3://bu/../x", "root_bucket_invalid"),
        ("s3://bucket//x/..", "root_prefix_invalid"),
        ("s3:/bucket/x", "root_scheme_unknown"),
        ("S3://bucket/x", "root_scheme_unknown"),
    ],
)
def test_store_with_an_invalid_root_is_refused(root, code):
    with raises_code(SettingRefused, code, setting="RECPRESS_STORE") as refused:
        Store(root)
    assert "secret" not in str(refused.value)


def test_root_is_normalized_to_one_uri(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    unusual = tmp_path / "my store %20#"
    assert Store("x/../store").root == f"file://{tmp_path}/store"
    assert Store(Store(str(unusual)).root).root == Store(str(unusual)).root
    assert Store(Store(str(unusual)).root)._backend.local_path("k") == unusual / "k"
    assert Store("s3://bucket/a/b/").root == "s3://bucket/a/b"
    assert Store("s3://bucket/").root == "s3://bucket"


def test_uri_of_another_store_or_of_another_form_is_refused(tmp_path, folder):
    store = Store(str(tmp_path / "store"))
    artifact = store.put(folder)
    with raises_code(ArtifactMissing, "artifact_in_other_store", store=store.root):
        store.artifact(f"file:///elsewhere/artifacts/{'0' * 64}")
    for uri in (f"{store.root}/artifacts/../x", "file:///etc", "/etc", "", "s3://a/b"):
        with raises_code(StoreRefused, "artifact_uri_form"):
            store.artifact(uri)
    with raises_code(StoreRefused, "artifact_name_form", got="'../../etc'"):
        store.find("../../etc")
    with raises_code(ArtifactDamaged, "artifact_names_differ", sha256="0" * 64):
        store.manifest(artifact.model_copy(update={"sha256": "0" * 64}))
    with raises_code(ArtifactDamaged, "artifact_size_differs", expected=1, got=artifact.bytes):
        store.manifest(artifact.model_copy(update={"bytes": 1}))


def test_artifact_ignores_the_root_in_a_uri(stored, folder, tmp_path):
    artifact = stored.store.put(folder)
    name = artifact.sha256
    for root in ("file:///old/home/store/", "s3://old/prefix/", f"{stored.store.root}/", "", "/"):
        uri = f"{root}artifacts/{name}"
        assert stored.store.artifact(uri) == artifact
        assert Artifact(uri=uri, sha256=name, bytes=artifact.bytes) == artifact
    # The folder in a hostile URI is not read.
    with pytest.raises(ArtifactMissing):
        stored.store.artifact(f"file:///etc/artifacts/{'0' * 64}")


def test_artifacts_of_a_moved_folder_can_be_read(tmp_path, folder):
    artifact = Store(str(tmp_path / "store")).put(folder)
    (tmp_path / "store").rename(tmp_path / "moved")
    moved = Store(str(tmp_path / "moved"))
    assert contents(moved.local(artifact, tmp_path / "cache")) == contents(folder)
    assert contents(moved.get(artifact, tmp_path / "out")) == contents(folder)


@pytest.mark.parametrize("kind", ["folder", "link", "pipe", "socket"])
def test_record_key_that_is_not_a_plain_file_is_refused_without_blocking(kind, tmp_path):
    store = Store(str(tmp_path / "s"))
    store.write("orders/1.json", b"{}")
    path = tmp_path / "s" / "orders" / "1.json"
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(tmp_path / "s")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        # The name of a socket has at most 108 bytes.
        with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as unix_socket:
            unix_socket.bind(path.name)
    with raises_code(RecordRefused, "record_no_plain_file"):
        store.read("orders/1.json")
    if kind == "folder":
        with raises_code(RecordRefused, "record_no_plain_file"):
            store.write("orders/1.json", b"{}")
    else:
        store.write("orders/1.json", b"{}")
        assert store.read("orders/1.json") == b"{}"


# --- Errors of the server and of the disk ----------------------------------------------------


def test_error_for_wrong_credentials_does_not_contain_them(s3, monkeypatch):
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"):
        monkeypatch.setenv(name, "wrong-value-0123456789")
        with raises_code(SettingRefused, "store_credentials_refused", bucket="models") as refused:
            Store("s3://models/x").read("key")
        assert "wrong-value" not in str(refused.value)
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"):
        monkeypatch.delenv(name)
    with raises_code(SettingRefused, "store_credentials_refused", problem="none found"):
        Store("s3://models/x").read("key")


def test_missing_bucket_is_a_setting_error(s3, folder):
    store = Store("s3://no-such-bucket/x")
    for call in (lambda: store.find("0" * 64), lambda: store.put(folder), lambda: store.keys("")):
        with raises_code(SettingRefused, "bucket_missing", bucket="no-such-bucket"):
            call()


def test_unreachable_server_is_an_outage_within_20_seconds(s3, folder, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # no server listens on port 9
    store = Store("s3://models/x")
    start = time.monotonic()
    with raises_code(StoreOutage, "store_no_answer"):
        store.put(folder)
    assert time.monotonic() - start < 20


@contextlib.contextmanager
def serving_responses(
    monkeypatch, status: int, *bodies: str, header: str = "Server"
) -> Iterator[None]:
    """Make ``AWS_ENDPOINT_URL`` a server that responds to GET requests with these bodies.

    The bodies are sent in turn; the last one is repeated. ``header`` is the name of a header in
    each response.
    """
    remaining = list(bodies)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = remaining.pop(0) if len(remaining) > 1 else remaining[0]
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header(header, "1")
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        try:
            yield
        finally:
            server.shutdown()


def error_document(code: str) -> str:
    """Return the body of an S3 error response."""
    return f"<Error><Code>{code}</Code><Message>m</Message></Error>"


@pytest.mark.parametrize(
    ("status", "code", "kind", "expected"),
    [
        (503, "SlowDown", StoreOutage, "store_failed"),
        (500, "InternalError", StoreOutage, "store_failed"),
        (400, "RequestTimeout", StoreOutage, "store_failed"),
        (403, "AccessDenied", SettingRefused, "store_credentials_refused"),
        (301, "PermanentRedirect", SettingRefused, "store_unusable"),
        (404, "", SettingRefused, "store_unusable"),  # not an S3 error document
    ],
)
def test_error_response_gives_an_error_class_by_whether_a_retry_helps(
    s3, monkeypatch, status, code, kind, expected
):
    body = error_document(code) if code else "?"
    problem = TextMatching(code)
    with serving_responses(monkeypatch, status, body), raises_code(kind, expected, problem=problem):
        Store("s3://models/x").read("key")


@pytest.mark.parametrize("damaged", ["<Error><Code>NoSu", error_document("NnSuchKey")])
def test_request_is_repeated_if_its_error_response_was_damaged_in_transit(s3, monkeypatch, damaged):
    server = serving_responses(monkeypatch, 404, damaged, error_document("NoSuchKey"))
    with server, pytest.raises(ArtifactMissing):
        Store("s3://models/x").read("key")


def test_404_of_s3_with_an_unknown_code_is_retryable(s3, monkeypatch):
    """The request ID in the response shows that the server is S3, so its text was damaged."""
    server = serving_responses(monkeypatch, 404, "<Error", header="x-amz-request-id")
    with server, raises_code(StoreUnavailable, "store_answer_unreadable"):
        Store("s3://models/x").read("key")


def test_error_for_an_unwritable_root_contains_its_path(tmp_path, folder):
    (tmp_path / "file").write_text("x")
    store = Store(str(tmp_path / "file" / "store"))
    path = TextMatching(re.escape(str(tmp_path / "file")))
    with raises_code(SettingRefused, None, path=path):  # any code
        store.put(folder)


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, StoreUnavailable),
        (errno.EROFS, SettingRefused),
        (errno.EIO, StoreUnavailable),
    ],
)
def test_disk_error_gives_an_error_class_by_whether_a_retry_helps(
    tmp_path, monkeypatch, number, expected
):
    def raise_os_error(*args):
        raise OSError(number, os.strerror(number))

    store = Store(str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", raise_os_error)
        with pytest.raises(expected, match=f"{tmp_path}/ledger/1"):
            store.create("ledger/1", b"x")
    assert store.keys("") == ()
    assert not list((tmp_path / ".tmp").iterdir())
