"""Records of task results, so that a repeated task returns its cached result. No Prefect.

``results/<task>/<key>.json`` in the object store contains the result of one task for one set of
arguments, as JSON. A record is untrusted input, so it is used only if

- it has a valid checksum (it is "sealed"), and names this task and key;
- its value is exactly what pydantic writes for the task's declared return type;
- every artifact in it has the URI ``artifacts/<sha256>``.

No part of a record selects a class, an import or a decoder. Read this file when a task
unexpectedly runs again.
"""

import functools
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, get_type_hints

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from compressors.contracts import Artifact, Frozen, Sha256
from infra.bundle.json_reader import escape_message
from infra.errors import ArtifactMissing, InfraError, RecordRefused, Refused, StoreOutage
from infra.store.object_store import Store
from infra.store.records import read_record, seal_record

log = logging.getLogger(__name__)
SCHEMA_VERSION = 1
FOLDER = "results"


class ResultRecord(Frozen):
    """The stored form of one result; ``value`` is JSON that is not validated yet."""

    schema_version: int
    task: str
    key: Sha256
    value: Any = Field(description="The result, as pydantic writes its declared type to JSON.")


def record_key(task: str, key: str) -> str:
    """Return the store's key of the record of a task's result."""
    return f"{FOLDER}/{task}/{key}.json"


def read_result(store: Store, task: str, key: str, function: Callable[..., Any]) -> Any:
    """Read and validate the recorded result of a task.

    Args:
        store: the store of the records.
        task: the task's name.
        key: the digest of its arguments.
        function: the task's function; its return annotation is the type of the value.

    Raises:
        ArtifactMissing: there is no record.
        RecordRefused: the record is damaged or of another task or key, or its value does not have
            the declared type.
    """
    place = record_key(task, key)
    fields, is_sealed = read_record(store, place)
    if not is_sealed:
        raise _build_damaged_record(store, place, "its checksum does not match its contents")
    try:
        record = ResultRecord.model_validate(fields, strict=True)
    except ValidationError as fault:
        raise _build_damaged_record(store, place, _format_first_problem(fault)) from None
    if record.schema_version != SCHEMA_VERSION:
        raise _build_damaged_record(store, place, f"its schema version is {record.schema_version}")
    if (record.task, record.key) != (task, key):
        raise _build_damaged_record(
            store, place, "it is the record of another task or other arguments"
        )
    try:
        return _validate_value(record.value, function)
    except ValueError as fault:
        reason = _format_first_problem(fault) if isinstance(fault, ValidationError) else str(fault)
        raise _build_damaged_record(store, place, reason) from None


def write_result(
    store: Store, task: str, key: str, function: Callable[..., Any], value: Any
) -> None:
    """Record the result of a task; a failed write is logged.

    Without the record, the task runs again next time; there is no other effect.

    Args:
        store: the store of the records.
        task: the task's name.
        key: the digest of its arguments.
        function: the task's function; its return annotation is the type of the value.
        value: the result.

    Raises:
        StoreOutage: the store is down, so the caller may wait and call again.
    """
    place = record_key(task, key)
    try:
        plain = json.loads(_get_return_type(function).dump_json(value))
        _validate_value(plain, function)
        record = ResultRecord(schema_version=SCHEMA_VERSION, task=task, key=key, value=plain)
        store.write(place, seal_record(record.model_dump(mode="json")))
    except StoreOutage:
        raise
    except (Refused, InfraError, ValueError) as fault:
        log.warning(
            "The result of %s is not recorded (%s). The task runs again next time.",
            task,
            escape_message(fault),
        )


def find_result(store: Store, task: str, key: str, function: Callable[..., Any]) -> Any:
    """Call ``read_result``, but treat a record that cannot be used as missing, and log the reason.

    Raises:
        ArtifactMissing: there is no usable record, so the task has to run.
        StoreOutage: the store is down, so the caller may wait and call again.
    """
    try:
        return read_result(store, task, key, function)
    except (ArtifactMissing, StoreOutage):
        raise
    except (Refused, InfraError) as fault:
        log.warning("%s The task %s runs again.", fault, task)
        raise ArtifactMissing("result_unusable", place=record_key(task, key)) from None


@functools.cache
def _get_return_type(function: Callable[..., Any]) -> TypeAdapter[Any]:
    """Return the declared return type of a task's function.

    Raises:
        TypeError: the function has no return annotation.
    """
    hints = get_type_hints(function)
    if "return" not in hints:
        raise TypeError(f"{function.__qualname__} declares no return type. Annotate it.")
    return TypeAdapter(hints["return"])


def _validate_value(plain: Any, function: Callable[..., Any]) -> Any:
    """Validate plain JSON as the declared return type of a function, and return the value.

    Raises:
        ValueError: the JSON differs from what pydantic writes for the value, except that fields
            with a default may be absent; or an artifact in it has an unexpected URI.
    """
    declared = _get_return_type(function)
    value = declared.validate_python(plain)
    # Records of earlier versions lack newer fields, which then have their defaults.
    if json.loads(declared.dump_json(value, exclude_unset=True)) != plain:
        raise ValueError("its value is not what recpress writes for this type")
    for artifact in _find_artifacts(value):
        if artifact.uri != f"artifacts/{artifact.sha256}":
            raise ValueError(
                f"expected artifacts/{artifact.sha256}, got {escape_message(artifact.uri)}"
            )
    return value


def _find_artifacts(value: Any) -> Iterator[Artifact]:
    """Yield every artifact in a value, at any depth."""
    if isinstance(value, Artifact):
        yield value
    elif isinstance(value, BaseModel):
        yield from _find_artifacts([getattr(value, name) for name in type(value).model_fields])
    elif isinstance(value, Mapping):
        yield from _find_artifacts(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _find_artifacts(item)


def _build_damaged_record(store: Store, place: str, reason: str) -> RecordRefused:
    return RecordRefused("record_damaged", place=f"{store.root}/{place}", problem=reason)


def _format_first_problem(fault: ValidationError) -> str:
    """Format the first problem of a record, without its values, which are untrusted."""
    problem = fault.errors(include_input=False, include_url=False)[0]
    where = ".".join(str(part) for part in problem["loc"]) or "the value"
    return escape_message(f"{where}: {problem['msg']}")
