"""Bytes that a step stores: the tensors that it changed and at most a megabyte more.

Unchanged tensors are in files of the source bundle, to which the result refers. A home is the
folder with everything that recpress stores (``RECPRESS_HOME``).

``write_draft`` writes a draft: the folder that becomes a bundle when it is packed.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from drafts import ALLOWED, write_draft
from error_codes import raises_code

from compressors.contracts import Artifact
from compressors.core.state.module_state import map_tensors
from compressors.core.units import stored_bytes
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8
from infra.bundle import bundle_folder
from infra.bundle.bundle_folder import FileRecord, Manifest, read
from infra.errors import AlreadyThere
from infra.store import object_store
from infra.store.manifest import FileEntry
from infra.store.s3 import Bucket
from tasks import compress as compress_task
from tasks.bundles import packing
from tasks.bundles.loading import load_bundle
from tasks.bundles.packing import pack
from tasks.compress import compress
from tasks.orchestration.workspace import local, store

MEGABYTE = 10**6
TABLE_ROWS = 320_000  # of 16 float32: 20.5 MB
SIZES = {"users": TABLE_ROWS, "items": TABLE_ROWS}
SPLIT_ROWS = {"train": 300, "calibration": 100, "validation": 100, "test": 300}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RECPRESS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RECPRESS_ALLOWED_MODULES", ALLOWED)
    return tmp_path / "home"


@pytest.fixture(params=["folder", "s3"])
def store_kind(home: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "s3":
        request.getfixturevalue("s3")
        monkeypatch.setenv("RECPRESS_STORE", f"s3://models/steps-{time.time_ns()}")
    return str(request.param)


@pytest.fixture
def draft(tmp_path: Path) -> Path:
    return write_draft(tmp_path / "draft", rows=SPLIT_ROWS, sizes=SIZES)


def quantize_table(source: Artifact, original: Artifact, table: str) -> Artifact:
    """Apply ``rowwise_int8`` to one table of a bundle, and return the resulting bundle."""
    step = RowwiseInt8(tables=(table,))
    result = compress.fn(
        source,
        step,
        splits={},
        original=original,
        teachers=(),
        seed=0,
        device="cpu",
        context_digest="c",  # only a part of a cache key; here any text
    )
    assert isinstance(result, Artifact)
    return result


def files_below(folder: Path) -> dict[int, int]:
    """Return the bytes of every file below a folder by inode, so that hard links count once."""
    stats = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return {stat.st_ino: stat.st_size for stat in stats}


def changed_bytes(source: Artifact, result: Artifact) -> int:
    """Return the bytes of a result's tensors that are new or differ from its source."""
    before, after = map_tensors(local(source)), map_tensors(local(result))
    return sum(
        tensor.nbytes
        for name, tensor in after.items()
        if name not in before or not before[name].equal(tensor)
    )


@contextmanager
def count_bytes(monkeypatch: pytest.MonkeyPatch, home: Path) -> Iterator[dict[str, int]]:
    """Count the bytes ``uploaded`` to a bucket, and those of files ``created`` in the home.

    A step writes files to a temporary folder and seals it (writes ``model.json``) before the files
    are moved to the store or deleted. They are counted when the folder is sealed.
    """
    written = {"uploaded": 0, "created": 0}
    call = Bucket._call
    seal, before = compress_task.seal, files_below(home)

    def counting_call(bucket: Bucket, method: str, name: str, **request: Any) -> Any:
        written["uploaded"] += len(request.get("Body", b""))
        return call(bucket, method, name, **request)

    def counting_seal(folder: Path, **fields: Any) -> Manifest:
        for inode, size in files_below(home).items():
            if inode not in before:
                written["created"] += size
                before[inode] = size
        return seal(folder, **fields)

    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "_call", counting_call)
        patch.setattr(compress_task, "seal", counting_seal)
        yield written
    after = files_below(home)
    written["created"] += sum(size for inode, size in after.items() if inode not in before)


def test_step_stores_its_changed_tensors_and_at_most_a_megabyte_more(
    store_kind, home, draft, monkeypatch
):
    original = pack(draft).artifact
    source = original
    for table in ("user", "item"):
        local(source)  # downloads the source now, so that its files are not counted
        with count_bytes(monkeypatch, home) as written:
            before = sum(store().sizes("").values())
            result = quantize_table(source, original, table)
            growth = sum(store().sizes("").values()) - before
        if store_kind == "folder":
            # sizes() lists a hard link with the size of its file, which is stored once.
            growth = written["created"]
        changed = changed_bytes(source, result)
        # One table has 320,000 rows of 16 codes and a float16 scale: 5.8 MB.
        assert 5 * MEGABYTE < changed < 7 * MEGABYTE
        assert written["created"] <= changed + MEGABYTE
        assert written["uploaded"] <= changed + MEGABYTE
        assert growth <= changed + MEGABYTE
        source = result
    module = load_bundle(source).model.module
    assert stored_bytes(module) < 15 * MEGABYTE


def test_result_shares_the_file_of_an_unchanged_table_with_its_source(home, draft):
    source = pack(draft).artifact
    result = quantize_table(source, source, "user")
    blobs = [
        {
            blob
            for entry, blob in zip(manifest.files, manifest.blobs, strict=True)
            if entry.path.startswith("item.weight")
        }
        for manifest in (store().manifest(source), store().manifest(result))
    ]
    assert blobs[0] == blobs[1]
    assert len(blobs[0]) == 1


def test_unchanged_table_is_loaded_from_the_file_of_the_source_to_check_the_result(
    home, draft, monkeypatch
):
    source = pack(draft).artifact
    folder = local(source)
    (file,) = folder.glob("item.weight*")
    files_of_result: list[Path] = []
    run_step = compress_task.run_step

    def run_and_compare(work: Any, into: Path) -> Any:
        result = run_step(work, into)
        files_of_result.extend(into.glob("item.weight*"))
        assert files_of_result[0].samefile(file)
        return result

    monkeypatch.setattr(compress_task, "run_step", run_and_compare)
    quantize_table(source, source, "user")
    assert len(files_of_result) == 1


def test_unchanged_file_is_not_hashed_again(home, draft, monkeypatch):
    source = pack(draft).artifact
    records = read(local(source)).files
    (name,) = (name for name in records if name.startswith("item.weight"))
    hashed_files: list[str] = []
    hash_file, hash_files = bundle_folder.hash_file, object_store.hash_files

    def log_and_record(path: Path) -> FileRecord:
        hashed_files.append(path.name)
        return hash_file(path)

    def log_and_hash(folder: Path, files: list[tuple[str, int]]) -> tuple[FileEntry, ...]:
        hashed_files.extend(path for path, _ in files)
        return hash_files(folder, files)

    seal = compress_task.seal

    def clear_and_seal(folder: Path, **fields: Any) -> Manifest:
        hashed_files.clear()  # removes the files of the source, which was verified before
        return seal(folder, **fields)

    monkeypatch.setattr(bundle_folder, "hash_file", log_and_record)
    monkeypatch.setattr(object_store, "hash_files", log_and_hash)
    monkeypatch.setattr(compress_task, "seal", clear_and_seal)
    result = quantize_table(source, source, "user")
    assert name not in hashed_files
    # The changed file is hashed for the manifest of the bundle and for the manifest of the store.
    assert hashed_files.count("model.safetensors") == 2, "a changed file is hashed"
    assert read(local(result)).files[name] == records[name]


def test_packed_bundle_has_a_file_for_each_large_table(home, draft):
    packed = pack(draft)
    names = read(local(packed.artifact)).files.keys()
    assert sorted(name.rpartition("-")[0] for name in names if "weight" in name) == [
        "item.weight",
        "user.weight",
    ]
    tensors = map_tensors(local(packed.artifact))
    expected = map_tensors(draft)
    assert tensors.keys() == expected.keys()
    assert all(tensors[name].equal(tensor) for name, tensor in expected.items())
    assert pack(draft) == packed


def test_version_packed_with_the_files_of_its_draft_is_returned_unchanged(home, draft, monkeypatch):
    # Like earlier versions, store no table in a file of its own.
    with monkeypatch.context() as patch:
        patch.setattr(packing, "LARGE_BYTES", 2**62)
        packed = pack(draft)
    assert "model.safetensors.index.json" not in read(local(packed.artifact)).files
    assert pack(draft).artifact == packed.artifact
    write_draft(draft, rows=SPLIT_ROWS, sizes=SIZES, seed=1)
    with raises_code(AlreadyThere, "version_packed", name="clicks"):
        pack(draft)
