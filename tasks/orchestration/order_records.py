"""Records of finished orders, so that a repeated order returns its result. No Prefect.

``orders/<digest>.json`` names the release and the registry version of an order. It saves time only:
without it the order runs again and uses the cached results of its tasks. ``requests/<digest>.json``
names the latest order of a request. A request is an order without the version of recpress, so that
a result is also found after an upgrade.
"""

import logging
import os

from pydantic import Field, ValidationError

from compressors.contracts import Artifact, Frozen, Sha256
from infra.errors import ArtifactMissing, RecordRefused
from infra.registry.mlflow_registry import Registry
from infra.settings import load_settings, shown, sqlite_file
from infra.store.records import read_record, seal_record
from tasks.orchestration.documents import Finished, Report, report_of
from tasks.orchestration.workspace import store

log = logging.getLogger(__name__)
SCHEMA_VERSION = 2


class FinishedRecord(Frozen):
    """The record of a finished order: references only; all other data is in the release."""

    order: str
    release: Artifact
    version: str
    registry: str = Field(description="Relative to the root of the store, where both are folders.")


class RequestRecord(Frozen):
    """The record of a request: its most recent order."""

    request: Sha256
    order: Sha256


def write_request(request: str, order: str) -> None:
    """Store the order of a request, before that order is finished.

    Args:
        request: digest of the order without the version of recpress.
        order: digest of the order.
    """
    record = RequestRecord(request=request, order=order)
    body = seal_record({"schema_version": SCHEMA_VERSION, **record.model_dump(mode="json")})
    try:
        store().write(request_key(request), body)
    except RecordRefused as fault:
        log.warning("%s After an upgrade the order runs again.", fault)


def order_of_request(request: str) -> str | None:
    """Return the most recent order of a request; None without a valid record."""
    key = request_key(request)
    wrong = _unsealed(key)
    try:
        fields, is_sealed = read_record(store(), key)
        if not is_sealed or fields.pop("schema_version", None) != SCHEMA_VERSION:
            raise wrong
        record = RequestRecord.model_validate(fields)
        if record.request != request:
            raise wrong
    except ArtifactMissing:
        return None
    except ValidationError:
        log.warning("%s It counts as absent.", wrong)
        return None
    except RecordRefused as fault:
        log.warning("%s It counts as absent.", fault)
        return None
    return record.order


def write_finished(done: Finished) -> None:
    """Store the record of a finished order.

    If the record cannot be written, the next run of this order takes longer, without other effects;
    the failure is logged.
    """
    record = FinishedRecord(
        order=done.report.order,
        release=done.release,
        version=done.version,
        registry=_registry_reference(),
    )
    body = seal_record({"schema_version": SCHEMA_VERSION, **record.model_dump(mode="json")})
    try:
        store().write(finished_key(record.order), body)
    except RecordRefused as fault:
        log.warning("%s The order runs again next time.", fault)


def finished(order: str, *, registered: bool = True) -> Finished | None:
    """Return the report of a finished order if its record, report and results are valid.

    The record contains only the release and the version; all other data is read from the release,
    verified by its hash. A record that is damaged, or that names the release of another order,
    counts as absent: the order runs again and uses the cached results of its tasks.

    Args:
        order: the digest.
        registered: whether the registry must confirm the version in a record of version 0.1.0,
            which has no checksum. If False, that version may be wrong.

    Raises:
        ArtifactDamaged: the record is valid and the release is damaged.
    """
    held = store()
    try:
        record, is_sealed = _finished_record(order)
        release = held.find(record.release.sha256)
        if release is None:
            raise ArtifactMissing("release_missing", uri=held.uri_of(record.release))
        report = report_of(release)
        if report.order != order:
            raise RecordRefused(
                "record_damaged",
                place=f"{held.root}/{finished_key(order)}",
                problem=f"it names the release of order {report.order[:12]}",
            )
        for target in report.targets:
            held.manifest(target.artifact)
        trusted = is_sealed or not registered
        version = record.version if trusted else _registered_version(report)
    except ArtifactMissing:
        return None
    except RecordRefused as fault:
        log.warning("%s The order counts as not finished.", fault)
        return None
    here = record.registry in {_registry_reference(), ""}
    registry = shown(load_settings().registry_uri) if here else record.registry
    return Finished(report=report, release=release, version=version, registry=registry)


def _finished_record(order: str) -> tuple[FinishedRecord, bool]:
    """Read the record of an order, and whether it is sealed, so that its version is reliable.

    Raises:
        ArtifactMissing: there is none.
        RecordRefused: it is damaged, or belongs to another order.
    """
    key = finished_key(order)
    fields, sealed = read_record(store(), key)
    wrong = _unsealed(key)
    try:
        if sealed:
            if fields.pop("schema_version") != SCHEMA_VERSION:
                raise wrong
            record = FinishedRecord.model_validate(fields)
        elif fields.keys() == {"report", "release", "version", "registry"}:
            # Version 0.1.0 stored the whole report, and an absolute path of the registry.
            release = Artifact.model_validate(fields["release"])
            version = f"{int(fields['version'])}"
            record = FinishedRecord(order=order, release=release, version=version, registry="")
        else:
            raise wrong
    except (ValidationError, KeyError, TypeError, ValueError) as fault:
        raise wrong from fault
    if record.order != order:
        raise RecordRefused("record_of_other_order", place=f"{store().root}/{key}")
    return record, sealed


def _unsealed(key: str) -> RecordRefused:
    return RecordRefused(
        "record_damaged",
        place=f"{store().root}/{key}",
        problem="its seal does not fit the rest",
    )


def _registered_version(report: Report) -> str:
    """Return the version of an order in the registry of this process.

    Raises:
        ArtifactMissing: it is not registered there.
    """
    found = Registry(load_settings().registry_uri).by_order(report.order, report.name)
    if found is None:
        raise ArtifactMissing("order_not_in_registry", order=report.order)
    return found.version


def _registry_reference() -> str:
    """Return this process's registry, relative to the store if both are on this machine."""
    uri = load_settings().registry_uri
    file, root = sqlite_file(uri), store().folder
    return shown(uri) if file is None or root is None else os.path.relpath(file, root)


def request_key(request: str) -> str:
    """Return the store's key of a request's record."""
    return f"requests/{request}.json"


def finished_key(order: str) -> str:
    """Return the store's key of a finished order's record."""
    return f"orders/{order}.json"
