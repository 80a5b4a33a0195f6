"""Damaged records of orders and bundles: they count as absent or are refused, never used.

A record of an order refers to its result, a record of a bundle to its artifact. An order with a
damaged record runs again. A bundle with a damaged record is refused. A record with a checksum is
"sealed"; those of recpress 0.1.0 are not. A home is the folder with everything that recpress stores
(``RECPRESS_HOME``). A draft is the folder of a bundle before it is packed.
"""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from drafts import ALLOWED, write_draft
from error_codes import raises_code
from triton_versions import Fill, publish_version

from compressors.contracts import Artifact
from infra.errors import AlreadyThere, ArtifactMissing, RecordRefused
from infra.settings import load_settings, public_uri
from infra.store.records import is_sealed, seal_record
from tasks.bundles.bundle_ref import bundle_key, resolve
from tasks.bundles.packing import Packed, pack
from tasks.orchestration.documents import Finished
from tasks.orchestration.order_records import (
    build_finished_key,
    find_finished_order,
    write_finished,
)
from tasks.orchestration.workspace import store

ORDER = "a" * 64


def flipped_bits(body: bytes, count: int | None = None) -> Iterator[bytes]:
    """Yield copies of a body with one flipped bit: every bit, or a fixed sample of ``count``."""
    bits = range(8 * len(body))
    for bit in bits if count is None else sorted(random.Random(7).sample(bits, count)):
        changed = bytearray(body)
        changed[bit // 8] ^= 1 << bit % 8
        yield bytes(changed)


# Functions that replace the bytes of a record by something that is no valid record.
INVALID_RECORDS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda body: b"",
    "cut to one byte": lambda body: body[:1],
    "cut in the middle": lambda body: body[: len(body) // 2],
    "without its last byte": lambda body: body[:-1],
    "with a byte more": lambda body: body + b" ",
    "without its checksum": lambda body: body[: body.rindex(b",")] + b"\n}\n",
    "twice": lambda body: body + body,
    "not UTF-8": lambda body: b"\xff\xfe" + body,
    "UTF-16": lambda body: body.decode().encode("utf-16"),
    "zeros": lambda body: bytes(len(body)),
    "deep": lambda body: b"[" * 100_000,
    "deep object": lambda body: b'{"release":' * 5_000 + b"1" + b"}" * 5_000,
    "not a number": lambda body: b'{"artifact": NaN, "packed_at": NaN}',
    "a huge number": lambda body: b'{"packed_at": ' + b"9" * 5_000 + b"}",
    "a list": lambda body: b"[]",
    "null": lambda body: b"null",
    "another object": lambda body: b'{"a": 1}',
    "only a checksum": lambda body: seal_record({"schema_version": 2}),
    "of a later version": lambda body: seal_record({"schema_version": 3, "x": 1}),
    "too large": lambda body: body + b" " * (17 * 2**20),
    "fields of wrong types": lambda body: b'{"artifact": "x", "packed_at": "y"}',
}


def replace_by_folder(key: str, work_folder: Path) -> Path:
    """Replace the file of a record by an empty folder, and return its path."""
    path = work_folder / "recpress" / "store" / key
    path.unlink()
    path.mkdir()
    return path


# --- orders ----------------------------------------------------------------------------------


@pytest.fixture
def finished(fill: Fill) -> Finished:
    """An order that was published."""
    fill("a", "")
    result = find_finished_order(ORDER)
    assert result is not None
    return result


def order_record_of_0_1_0(finished: Finished, work_folder: Path) -> bytes:
    """Return an order record like recpress 0.1.0 wrote it: the whole report, with absolute URIs."""
    text = finished.model_dump_json().replace('"artifacts/', f'"{store().root}/artifacts/')
    assert f"file://{work_folder}" in text
    return text.encode()


def test_order_record_has_references_only_and_no_local_path(
    work_folder: Path,
) -> None:
    finished = publish_version(work_folder, "a")
    body = store().read(build_finished_key(ORDER))
    assert is_sealed(body)
    assert str(work_folder).encode() not in body
    assert json.loads(body).keys() == {
        "schema_version",
        "order",
        "release",
        "version",
        "registry",
        "seal",
    }
    assert find_finished_order(ORDER) == finished


@pytest.mark.parametrize("count", [200, pytest.param(None, marks=pytest.mark.slow)])
def test_order_record_with_a_flipped_bit_counts_as_absent(
    count: int | None, finished: Finished, work_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key = build_finished_key(ORDER)
    body = store().read(key)
    path = work_folder / "recpress" / "store" / key
    path.chmod(0o644)
    for changed in flipped_bits(body, count):
        path.write_bytes(changed)
        assert find_finished_order(ORDER) is None
    assert "damaged" in caplog.text
    path.write_bytes(body)
    assert find_finished_order(ORDER) == finished


# All bits of this record take more than the 300 s of other tests: each one is a lookup of an order.
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("count", [75, pytest.param(None, marks=pytest.mark.slow)])
def test_unsealed_order_record_with_a_flipped_bit_gives_the_same_result_or_none(
    finished: Finished, work_folder: Path, count: int | None
) -> None:
    body = order_record_of_0_1_0(finished, work_folder)
    store().write(build_finished_key(ORDER), body)
    assert find_finished_order(ORDER) == finished
    path = work_folder / "recpress" / "store" / build_finished_key(ORDER)
    path.chmod(0o644)
    for changed in flipped_bits(body, count):
        path.write_bytes(changed)
        assert find_finished_order(ORDER) in (None, finished)


@pytest.mark.parametrize("kind", [*INVALID_RECORDS, "a folder"])
def test_invalid_order_record_counts_as_absent_and_is_replaced(
    kind: str, finished: Finished, work_folder: Path
) -> None:
    key = build_finished_key(ORDER)
    if kind == "a folder":
        path = replace_by_folder(key, work_folder)
        assert find_finished_order(ORDER) is None
        write_finished(finished)  # fails, which is only logged
        path.rmdir()
    else:
        path = work_folder / "recpress" / "store" / key
        path.chmod(0o644)
        path.write_bytes(INVALID_RECORDS[kind](path.read_bytes()))
        assert find_finished_order(ORDER) is None
    write_finished(finished)
    assert find_finished_order(ORDER) == finished


def test_order_record_with_the_release_of_another_order_counts_as_absent(work_folder: Path) -> None:
    first, second = publish_version(work_folder, "a"), publish_version(work_folder, "b")
    record, other_record = (
        store().read(build_finished_key(order_digit * 64)) for order_digit in "ab"
    )
    store().write(build_finished_key("a" * 64), other_record)
    assert find_finished_order("a" * 64) is None
    fields = {name: value for name, value in json.loads(record).items() if name != "seal"}
    fields["release"] = json.loads(other_record)["release"]
    store().write(build_finished_key("a" * 64), seal_record(fields))
    assert find_finished_order("a" * 64) is None, "valid checksum, release of another order"
    earlier = order_record_of_0_1_0(first, work_folder).replace(
        first.release.sha256.encode(), second.release.sha256.encode()
    )
    store().write(build_finished_key("a" * 64), earlier)
    assert find_finished_order("a" * 64) is None
    fields["release"] = {
        "uri": f"artifacts/{first.report.compressed.sha256}",
        "sha256": first.report.compressed.sha256,
        "bytes": 1,
    }
    store().write(build_finished_key("a" * 64), seal_record(fields))
    assert find_finished_order("a" * 64) is None, "an artifact that is no release"


def test_finished_result_names_the_registry_of_its_version(
    work_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_version(work_folder, "a")
    result = find_finished_order(ORDER)
    assert result is not None
    assert result.registry == public_uri(load_settings().registry_uri)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{work_folder / 'other.db'}")
    result_with_other_registry = find_finished_order(ORDER)
    assert result_with_other_registry is not None
    assert result_with_other_registry.registry != public_uri(load_settings().registry_uri)


# --- bundles ---------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def packed_home(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Packed]:
    """A home with one packed bundle and its draft, and the result of ``pack``."""
    work_folder = tmp_path_factory.mktemp("packed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECPRESS_HOME", str(work_folder / "recpress"))
        patch.setenv("RECPRESS_ALLOWED_MODULES", ALLOWED)
        return work_folder, pack(write_draft(work_folder / "draft"))


@pytest.fixture
def packed(
    packed_home: tuple[Path, Packed], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Packed:
    """The result of ``pack``, in a copy of ``packed_home``."""
    folder, result = packed_home
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("RECPRESS_HOME", str(tmp_path / "recpress"))
    monkeypatch.setenv("RECPRESS_ALLOWED_MODULES", ALLOWED)
    return result


BUNDLE_KEY = bundle_key("clicks", "1")


def bundle_record_of_0_1_0(packed: Packed) -> bytes:
    """Return a bundle record like recpress 0.1.0 wrote it: absolute URI, no checksum."""
    artifact = packed.artifact.model_dump() | {"uri": store().uri_of(packed.artifact)}
    packed_at = 1764000000.25  # seconds since 1970: November 2025
    return json.dumps({"artifact": artifact, "packed_at": packed_at}).encode()


def resolve_or_none() -> Artifact | None:
    """Resolve the bundle; None if it is refused with its name and the remedy."""
    try:
        return resolve("clicks@1")
    except RecordRefused as fault:
        message = str(fault)
    assert "clicks@1" in message
    assert "recpress bundle pack" in message
    return None


@pytest.mark.parametrize("count", [200, pytest.param(None, marks=pytest.mark.slow)])
def test_bundle_record_with_a_flipped_bit_is_refused_with_the_remedy(
    count: int | None, packed: Packed, tmp_path: Path
) -> None:
    path = tmp_path / "recpress" / "store" / BUNDLE_KEY
    body = path.read_bytes()
    assert is_sealed(body)
    assert str(tmp_path).encode() not in body
    path.chmod(0o644)
    for changed in flipped_bits(body, count):
        path.write_bytes(changed)
        assert resolve_or_none() is None
    path.write_bytes(body)
    assert resolve("clicks@1") == packed.artifact


@pytest.mark.parametrize("count", [200, pytest.param(None, marks=pytest.mark.slow)])
def test_unsealed_bundle_record_with_a_flipped_bit_is_refused_or_unchanged(
    count: int | None, packed: Packed, tmp_path: Path
) -> None:
    body = bundle_record_of_0_1_0(packed)
    store().write(BUNDLE_KEY, body)
    assert resolve("clicks") == packed.artifact
    path = tmp_path / "recpress" / "store" / BUNDLE_KEY
    path.chmod(0o644)
    for changed in flipped_bits(body, count):
        path.write_bytes(changed)
        assert resolve_or_none() in (None, packed.artifact)


@pytest.mark.parametrize("kind", INVALID_RECORDS)
def test_packing_again_replaces_a_damaged_bundle_record(
    kind: str, packed: Packed, tmp_path: Path
) -> None:
    path = tmp_path / "recpress" / "store" / BUNDLE_KEY
    body = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(INVALID_RECORDS[kind](body))
    assert resolve_or_none() is None
    with raises_code(RecordRefused, "bundle_record_damaged", name="clicks", version="1"):
        resolve("clicks")
    if kind not in {"empty", "deep"}:
        return  # packing takes a second or two, and replaces every damaged record in the same way
    assert pack(tmp_path / "draft") == packed
    assert resolve("clicks@1") == packed.artifact


def test_folder_in_place_of_a_bundle_record_is_refused_with_its_path(
    packed: Packed, tmp_path: Path
) -> None:
    path = replace_by_folder(BUNDLE_KEY, tmp_path)
    assert resolve_or_none() is None
    (path / "x").touch()
    assert resolve_or_none() is None
    with raises_code(RecordRefused, "record_no_plain_file", place=str(path)):
        pack(tmp_path / "draft")


def test_damaged_record_of_the_newest_version_is_refused(packed: Packed, tmp_path: Path) -> None:
    pack(write_draft(tmp_path / "second", version="2", seed=1))
    store().write(bundle_key("clicks", "2"), b"")
    assert resolve("clicks@1") == packed.artifact
    with raises_code(RecordRefused, "bundle_record_damaged", name="clicks", version="2"):
        resolve("clicks")


def test_bundle_record_of_another_bundle_is_refused(packed: Packed, tmp_path: Path) -> None:
    other = pack(write_draft(tmp_path / "second", version="2", seed=1))
    record, other_record = store().read(BUNDLE_KEY), store().read(bundle_key("clicks", "2"))
    store().write(BUNDLE_KEY, other_record)
    assert resolve_or_none() is None
    fields = {name: value for name, value in json.loads(record).items() if name != "seal"}
    for artifact in (other.artifact, data_artifact(packed)):
        sealed = seal_record(fields | {"artifact": artifact.model_dump()})
        store().write(BUNDLE_KEY, sealed)
        assert resolve_or_none() is None
    earlier = json.dumps({"artifact": other.artifact.model_dump(), "packed_at": 1.0})
    store().write(BUNDLE_KEY, earlier.encode())
    assert resolve_or_none() is None


def data_artifact(packed: Packed) -> Artifact:
    """Return the artifact of a bundle's test data, which is no bundle."""
    body = json.loads(store().file(packed.artifact, "model.json"))
    return Artifact.model_validate(body["data"]["test"]["artifact"])


def test_other_bundle_cannot_replace_a_damaged_record_of_its_version(
    packed: Packed, tmp_path: Path
) -> None:
    body = store().read(BUNDLE_KEY)
    # With a changed field name, the record still contains the hash of its bundle.
    store().write(BUNDLE_KEY, body.replace(b"packed_at", b"packed_ct"))
    other = write_draft(tmp_path / "other", seed=1)
    with raises_code(AlreadyThere, "version_packed", name="clicks", version="1"):
        pack(other)
    assert pack(tmp_path / "draft") == packed


def test_bundle_with_missing_files_is_packed_again(packed: Packed, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "recpress" / "store" / "artifacts" / packed.artifact.sha256)
    with raises_code(ArtifactMissing, "bundle_artifact_missing", name="clicks", version="1"):
        resolve("clicks@1")
    assert pack(tmp_path / "draft") == packed
    assert resolve("clicks@1") == packed.artifact
