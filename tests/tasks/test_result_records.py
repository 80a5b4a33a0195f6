"""Records of task results: valid ones are read back, and every kind of invalid one is refused.

A record has the result of a task for one cache key, so that the task need not run again. The last
field of a record is a checksum, the seal.
"""

import json
import logging
import math
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compressors.contracts import Artifact, Estimate, Verdict
from compressors.contracts.reasons import Reason
from infra.errors import ArtifactMissing, RecordRefused
from infra.store.object_store import MAX_RECORD_BYTES, Store
from infra.store.records import seal_record
from tasks.orchestration.documents import NotApplicable
from tasks.orchestration.result_records import find_result, read_result, record_key, write_result

KEY = "a" * 64
SHA = "b" * 64
ARTIFACT = Artifact(uri=f"artifacts/{SHA}", sha256=SHA, bytes=7)
ARTIFACT_JSON = {"uri": f"artifacts/{SHA}", "sha256": SHA, "bytes": 7}


# Functions of tasks. Only their return annotations are used: the types of the recorded values.
def step() -> Artifact | NotApplicable: ...  # type: ignore[empty-body]


def estimate() -> Estimate: ...  # type: ignore[empty-body]


def gate() -> Verdict: ...  # type: ignore[empty-body]


def verdicts() -> tuple[Verdict, ...]: ...  # type: ignore[empty-body]


def without_annotation():  # type: ignore[no-untyped-def]
    ...


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


FIELDS = {"schema_version": 1, "task": "step", "key": KEY, "value": ARTIFACT_JSON}


def sealed_record(**changes: Any) -> bytes:
    """Return a record with ``FIELDS``, of which some are changed, and a valid checksum."""
    return seal_record(FIELDS | changes)


def record_path(store: Store, task: str = "step") -> Path:
    """Return the path of a task's record, and create its folder."""
    folder = store.folder
    assert folder is not None
    path = folder / record_key(task, KEY)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


@pytest.mark.parametrize(
    ("function", "value"),
    [
        (step, ARTIFACT),
        (step, NotApplicable(reasons=(Reason("not_applicable", fault="no layer to fold"),))),
        (estimate, Estimate(point=0.5, low=0.25, high=1.0, rows=3)),
        (estimate, Estimate(point=math.inf, low=-math.inf, high=math.inf)),
        (
            gate,
            Verdict(
                target="onnxruntime", outcome="accepted", reasons=(Reason("as_written", text="ok"),)
            ),
        ),
        (
            verdicts,
            (
                Verdict(
                    target="tensorrt",
                    outcome="rejected",
                    reasons=(Reason("as_written", text="\ud7ff <&>\0"),),
                ),
            ),
        ),
    ],
)
def test_result_is_read_back_as_it_was_written(
    store: Store, function: Callable[..., Any], value: Any
) -> None:
    write_result(store, "step", KEY, function, value)
    assert read_result(store, "step", KEY, function) == value


def test_nan_is_read_back_as_nan(store: Store) -> None:
    value = Estimate(point=math.nan, low=0.0, high=1.0)
    write_result(store, "step", KEY, estimate, value)
    assert math.isnan(read_result(store, "step", KEY, estimate).point)


INTERVAL = {"point": 0.5, "low": 0.25, "high": 1.0}


def test_optional_field_missing_in_a_record_has_its_default(store: Store) -> None:
    record_path(store, "estimate").write_bytes(sealed_record(task="estimate", value=INTERVAL))
    assert read_result(store, "estimate", KEY, estimate) == Estimate(**INTERVAL)


@pytest.mark.parametrize(
    "value", [INTERVAL | {"unknown": 1}, {"point": 0.5, "low": 0.25}], ids=["unknown", "missing"]
)
def test_unknown_or_missing_field_of_a_result_is_refused(
    store: Store, value: dict[str, Any]
) -> None:
    record_path(store, "estimate").write_bytes(sealed_record(task="estimate", value=value))
    with pytest.raises(RecordRefused):
        read_result(store, "estimate", KEY, estimate)


def test_find_result_without_a_record_raises_artifact_missing(store: Store) -> None:
    with pytest.raises(ArtifactMissing):
        find_result(store, "step", KEY, step)


def test_function_without_a_return_annotation_is_an_error(store: Store) -> None:
    with pytest.raises(TypeError, match="declares no return type"):
        write_result(store, "step", KEY, without_annotation, 1)


# Contents of a record's file that must not be used as a result.
INVALID_RECORDS = {
    "empty": b"",
    "a pickle": b"\x80\x04K\x01.",
    "not an object": b"[]",
    "no seal": json.dumps(
        {"schema_version": 1, "task": "step", "key": KEY, "value": ARTIFACT_JSON}
    ).encode(),
    "wrong seal": sealed_record().replace(b'"bytes": 7', b'"bytes": 8'),
    "cut": sealed_record()[:-20],
    "record of another task": sealed_record(task="gate"),
    "record of another key": sealed_record(key="c" * 64),
    "key that is no digest": sealed_record(key="../../x"),
    "later schema version": sealed_record(schema_version=2),
    "schema version as text": sealed_record(schema_version="1"),
    "schema version as true": sealed_record(schema_version=True),
    "extra field": sealed_record(serializer={"type": "pickle"}),
    "no field value": seal_record({"schema_version": 1, "task": "step", "key": KEY}),
    "value null": sealed_record(value=None),
    "value of another type": sealed_record(value={"target": "onnxruntime"}),
    "list": sealed_record(value=[ARTIFACT_JSON]),
    "class to import": sealed_record(value={"__class__": "os.system", "data": "id"}),
    "class next to a valid value": sealed_record(value=ARTIFACT_JSON | {"__class__": "os.system"}),
    "exception to import": sealed_record(value={"__exc_type__": "os.system", "message": "id"}),
    "bytes as text": sealed_record(value=ARTIFACT_JSON | {"bytes": "7"}),
    "bytes below zero": sealed_record(value=ARTIFACT_JSON | {"bytes": -1}),
    "artifact elsewhere": sealed_record(
        value=ARTIFACT_JSON | {"uri": f"file:///etc/artifacts/{SHA}"}
    ),
    "artifact on a server": sealed_record(
        value=ARTIFACT_JSON | {"uri": f"https://example.org/artifacts/{SHA}"}
    ),
    "artifact outside": sealed_record(value=ARTIFACT_JSON | {"uri": "../../../etc/passwd"}),
    "artifact with another hash in its URI": sealed_record(
        value=ARTIFACT_JSON | {"uri": f"artifacts/{'c' * 64}"}
    ),
    "artifact without a hash": sealed_record(value=ARTIFACT_JSON | {"sha256": "../" * 20}),
    "deeply nested": b'{"schema_version": 1, "value": ' + b"[" * 5_000 + b"]" * 5_000 + b"}",
    "64 MB": sealed_record(value="x" * (64 << 20)),
}


@pytest.mark.parametrize("kind", list(INVALID_RECORDS))
def test_invalid_record_is_refused_and_replaced(
    store: Store, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    record_path(store).write_bytes(INVALID_RECORDS[kind])
    with pytest.raises(RecordRefused):
        read_result(store, "step", KEY, step)
    with pytest.raises(ArtifactMissing), caplog.at_level(logging.WARNING):
        find_result(store, "step", KEY, step)
    assert "The task step runs again." in caplog.text
    assert len(caplog.text) < 2_000  # the log does not contain the record
    write_result(store, "step", KEY, step, ARTIFACT)
    assert read_result(store, "step", KEY, step) == ARTIFACT


@pytest.mark.parametrize("kind", ["symlink", "broken symlink", "fifo", "socket"])
def test_record_that_is_not_a_plain_file_is_refused_and_replaced(
    store: Store, tmp_path: Path, kind: str
) -> None:
    path = record_path(store)
    elsewhere = tmp_path / "elsewhere.json"
    if kind == "symlink":
        elsewhere.write_bytes(sealed_record())
        path.symlink_to(elsewhere)
    elif kind == "broken symlink":
        path.symlink_to(tmp_path / "nothing")
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        os.mknod(path, stat.S_IFSOCK | 0o600)
    with pytest.raises(ArtifactMissing):
        find_result(store, "step", KEY, step)
    write_result(store, "step", KEY, step, ARTIFACT)
    assert read_result(store, "step", KEY, step) == ARTIFACT
    assert not elsewhere.exists() or elsewhere.read_bytes() == sealed_record()


@pytest.mark.parametrize("blocked", ["record file", "task folder", "results folder"])
def test_result_is_not_recorded_if_a_folder_or_file_blocks_its_path(
    store: Store, blocked: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = record_path(store)
    if blocked == "record file":
        (path / "x").mkdir(parents=True)
    elif blocked == "task folder":
        path.parent.rmdir()
        path.parent.write_bytes(b"a file")
    else:
        path.parent.rmdir()
        path.parent.parent.rmdir()
        path.parent.parent.write_bytes(b"a file")
    with pytest.raises(ArtifactMissing):
        find_result(store, "step", KEY, step)
    write_result(store, "step", KEY, step, ARTIFACT)
    assert "The result of step is not recorded" in caplog.text
    assert "runs again next time" in caplog.text


def test_result_larger_than_the_record_limit_is_not_recorded(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    reason = Reason("not_applicable", fault="x" * MAX_RECORD_BYTES)
    write_result(store, "step", KEY, step, NotApplicable(reasons=(reason,)))
    assert "is not recorded" in caplog.text
    with pytest.raises(ArtifactMissing):
        find_result(store, "step", KEY, step)


def test_artifact_with_an_unexpected_uri_is_not_recorded(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    artifact = ARTIFACT.model_copy(update={"uri": "../x"})
    write_result(store, "step", KEY, step, artifact)
    assert "is not recorded" in caplog.text
    assert store.keys("results/") == ()


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.binary(max_size=200) | JSON_VALUES.map(lambda value: sealed_record(value=value)))
def test_arbitrary_bytes_are_a_valid_result_or_refused(store: Store, body: bytes) -> None:
    record_path(store).parent.mkdir(parents=True, exist_ok=True)
    store.write(record_key("step", KEY), body)
    try:
        value = read_result(store, "step", KEY, step)
    except RecordRefused:
        return
    assert isinstance(value, Artifact | NotApplicable)
