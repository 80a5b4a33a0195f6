"""A home (the folder with store and registry) can be moved: stored URIs are relative to the store.

recpress 0.1.0 stored absolute URIs. Homes that it wrote can be moved too, so most tests also run
with such a home.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from drafts import ALLOWED, write_draft
from error_codes import raises_code
from reports import create_report

from compressors.contracts import Artifact, Outcome, TargetName
from infra.bundle import bundle_folder
from infra.errors import ArtifactMissing, StoreRefused
from infra.registry.mlflow_registry import Registry
from infra.settings import load_settings, public_uri
from tasks import publish as publishing
from tasks.bundles.bundle_ref import bundle_key, find_bundle, resolve
from tasks.bundles.packing import check, pack, show
from tasks.orchestration.documents import Finished, Report
from tasks.orchestration.order_records import build_finished_key, find_finished_order
from tasks.orchestration.workspace import store
from tasks.promotion.promotions import champion_graph, fetch, promote, rollback, version_report
from tasks.promotion.registry_listing import list_versions

GOOD: dict[TargetName, Outcome] = {"onnxruntime": "accepted", "tensorrt-rtx": "built-unmeasured"}
# Names of the folder to which a home is moved. The second has characters with a meaning in URIs.
NEW_NAMES = (
    pytest.param("moved", marks=pytest.mark.nightly),
    "a?b#c%41 d&e=f;g:h'i~@ü",
)


def publish_version(work_folder: Path, order_digit: str) -> Finished:
    """Publish an order whose digest is one repeated hexadecimal digit, with relative references."""
    return publishing.publish.fn(create_report(work_folder, order_digit * 64, GOOD))


def publish_as_0_1_0(work_folder: Path, order_digit: str) -> Finished:
    """Publish an order like recpress 0.1.0, with absolute URIs.

    They are in the report, in the registered version, and in the order's record of its result. The
    arguments are those of ``publish_version``.
    """
    order_report = create_report(work_folder, order_digit * 64, GOOD)
    root = store().root

    def make_uris_absolute(text: str) -> str:
        return text.replace('"artifacts/', f'"{root}/artifacts/')

    folder = work_folder / f"release {order_digit}"
    folder.mkdir()
    (folder / "report.json").write_text(make_uris_absolute(order_report.model_dump_json(indent=1)))
    (folder / "report.html").write_text("<p>")
    release = store().put(folder)
    tags = publishing._build_version_tags(order_report, release)
    for name, value in tags.items():
        if value.startswith("artifacts/"):
            tags[name] = f"{root}/{value}"
    registry = Registry(load_settings().registry_uri)
    source = f"{root}/{release.uri}"
    version = registry.publish("m", order_report.order, source, tags, description="").version
    finished = Finished(
        report=order_report, release=release, version=version, registry=load_settings().registry_uri
    )
    record = make_uris_absolute(finished.model_dump_json())
    store().write(build_finished_key(order_report.order), record.encode())
    return finished


def move_home(work_folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy the home to a new folder, and set RECPRESS_HOME to it.

    All files of the old folder are damaged, so that a test fails if one of them is still read.

    Args:
        work_folder: the fixture ``work_folder``, which is the parent of the home.
        name: name of the new folder.
        monkeypatch: the fixture.

    Returns:
        The new folder.
    """
    old, new = work_folder / "recpress", work_folder / name
    shutil.copytree(old, new)
    for path in old.rglob("*"):
        if path.is_file():
            path.chmod(0o644)
            path.write_bytes(b"damaged")
    monkeypatch.setenv("RECPRESS_HOME", str(new))
    return new


@pytest.mark.parametrize("name", NEW_NAMES)
@pytest.mark.parametrize("publish_order", [publish_version, publish_as_0_1_0])
def test_moved_home_is_listed_fetched_promoted_and_found_again(
    publish_order: Any, name: str, work_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = publish_order(work_folder, "a"), publish_order(work_folder, "b")
    promote("m", first.version, reason="")
    new = move_home(work_folder, name, monkeypatch)
    assert [item.version for item in list_versions(None)] == [second.version, first.version]
    for item in list_versions("m"):
        assert item.note == ""  # a note would name a problem of the version
        assert item.source.startswith(f"{store().root}/artifacts/")
        assert item.tags["recpress.report"].startswith(f"{store().root}/artifacts/")
    registered, stored_report = version_report("m", first.version)
    assert (registered.version, stored_report) == (first.version, first.report)
    fetch("m", "@champion", "onnxruntime", work_folder / "out")
    assert (work_folder / "out" / "model.onnx").read_text() == f"onnxruntime {'a' * 64}"
    assert champion_graph("m", "onnxruntime") == first.report.targets[0].artifact
    assert promote("m", second.version, reason="").version == second.version
    assert rollback("m", reason="").version == first.version
    result = find_finished_order("a" * 64)
    assert result is not None
    assert (result.report, result.release, result.version) == (
        first.report,
        first.release,
        first.version,
    )
    # Results name the registry as printed for users, without credentials.
    assert result.registry == public_uri(load_settings().registry_uri)
    # The page is ``report.html``.
    assert result.page_uri().startswith(f"{store().root}/artifacts/")
    assert {path.name for path in new.iterdir()} <= {"registry.db", "registry.db.lock", "store"}


def test_files_of_a_home_do_not_contain_its_path(work_folder: Path) -> None:
    finished = publish_version(work_folder, "a")
    promote("m", finished.version, reason="")
    for path in (work_folder / "recpress").rglob("*"):
        if path.is_file():
            assert str(work_folder).encode() not in path.read_bytes(), path


def test_order_published_again_after_the_move_is_the_same_version(
    work_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = publish_as_0_1_0(work_folder, "a")
    move_home(work_folder, "moved", monkeypatch)
    repeated = publish_version(work_folder, "a")
    assert (repeated.version, repeated.release, repeated.report) == (
        original.version,
        original.release,
        original.report,
    )


@pytest.mark.parametrize(
    "source", ["file:///etc", "file:///etc/artifacts", "artifacts/../../etc", "s3://a/b", "/etc"]
)
def test_version_whose_source_is_outside_the_store_is_refused(
    source: str, work_folder: Path
) -> None:
    registered = Registry(load_settings().registry_uri).publish(
        "m", "c" * 64, source, {}, description=""
    )
    with raises_code(StoreRefused, "artifact_uri_form"):
        version_report("m", registered.version)


def test_absolute_uri_of_an_artifact_that_only_another_store_has_is_refused(
    work_folder: Path,
) -> None:
    finished = publish_version(work_folder, "a")
    outside = work_folder / "outside" / "artifacts" / ("0" * 64)
    outside.mkdir(parents=True)
    uri = f"file://{outside}"
    registered = Registry(load_settings().registry_uri).publish(
        "m", "c" * 64, uri, {}, description=""
    )
    with raises_code(ArtifactMissing, "artifact_in_other_store"):
        version_report("m", registered.version)
    assert Report.model_validate(finished.report.model_dump()) == finished.report


def pack_as_0_1_0(work_folder: Path) -> Artifact:
    """Pack a bundle like recpress 0.1.0, with absolute URIs in its manifest and record.

    The bundle is packed by this version first. Then its manifest and record are replaced, and the
    artifact of this version is removed.

    Args:
        work_folder: the fixture ``work_folder``; the draft is written to its folder ``draft``.
    """
    packed = pack(write_draft(work_folder / "draft"))
    root = store().root
    folder = work_folder / "bundle of 0.1.0"
    store().get(packed.artifact, folder)
    # The last field of a manifest is the checksum (its "seal") of the bytes before.
    body, seal_key, _ = (folder / "model.json").read_bytes().partition(b'  "seal"')
    assert seal_key
    body = body.replace(b'"artifacts/', f'"{root}/artifacts/'.encode())
    (folder / "model.json").unlink()
    (folder / "model.json").write_bytes(body + bundle_folder._seal_line(body))
    artifact = store().put(folder)
    absolute = artifact.model_dump() | {"uri": f"{root}/{artifact.uri}"}
    record = {"artifact": absolute, "packed_at": 1.0}  # records of 0.1.0 have no checksum
    store().write(bundle_key("clicks", "1"), json.dumps(record).encode())
    shutil.rmtree(work_folder / "recpress" / "store" / "artifacts" / packed.artifact.sha256)
    return artifact


def test_bundle_of_a_moved_home_is_found_checked_and_not_packed_twice(
    work_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECPRESS_ALLOWED_MODULES", ALLOWED)
    artifact = pack_as_0_1_0(work_folder)
    old_uri = store().uri_of(artifact)
    assert resolve("clicks") == artifact
    move_home(work_folder, "moved", monkeypatch)
    for reference in ("clicks", "clicks@1", old_uri, artifact.uri):
        assert resolve(reference) == artifact
    assert find_bundle("clicks").artifact == artifact
    manifest, _ = check("clicks@1")
    assert show(old_uri) == manifest
    assert pack(work_folder / "draft").artifact == artifact
    # Without the record, the draft is packed as a new artifact with an equal manifest.
    (work_folder / "moved" / "store" / bundle_key("clicks", "1")).unlink()
    new_artifact = pack(work_folder / "draft").artifact
    assert show("clicks@1") == manifest
    assert resolve("clicks@1") == new_artifact


def test_relative_artifact_uri_is_not_read_from_the_working_folder(
    work_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECPRESS_ALLOWED_MODULES", ALLOWED)
    packed = pack(write_draft(work_folder / "draft"))
    monkeypatch.chdir(work_folder / "recpress" / "store")
    assert Path(packed.artifact.uri).is_dir()
    assert resolve(packed.artifact.uri) == packed.artifact
    assert check(packed.artifact.uri)[0].name == "clicks"
