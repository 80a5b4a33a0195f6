"""Records of finished orders, so that a repeated order returns its result.

``orders/<digest>.json`` in the object store names the release and the registry version of an order.
Without it the order runs again, with the cached results of its tasks. ``recpress registry restore``
finds finished orders by their records, to register them again after a registry was lost.

``requests/<digest>.json`` names the latest order of a request. The digest of a request has all
fields of an order but the version of recpress, so that a result is also found after an upgrade.

Records end with a checksum, their seal. Records of recpress 0.1.0 have none.
"""

import logging
import os

from pydantic import Field, ValidationError

from compressors.contracts import Artifact, Frozen, Sha256
from infra.errors import ArtifactMissing, RecordRefused
from infra.registry.mlflow_registry import Registry
from infra.settings import load_settings, parse_sqlite_uri, public_uri
from infra.store.records import read_record, seal_record
from tasks.orchestration.documents import Finished, Report, read_report
from tasks.orchestration.workspace import store

log = logging.getLogger(__name__)
SCHEMA_VERSION = 2
"""Version of the fields of both records."""


class FinishedRecord(Frozen):
    """The record of a finished order: references only; all other data is in the release.

    Attributes:
        order: digest of the order.
        release: the artifact with the report.
        version: number of the version in the registry.
        registry: the registry; empty for records of 0.1.0, which count as of this registry.
    """

    order: str
    release: Artifact
    version: str
    registry: str = Field(
        description="Path relative to the store's root if both are local; otherwise a URI."
    )


class RequestRecord(Frozen):
    """The record of a request: digests of the request and of its most recent order."""

    request: Sha256
    order: Sha256


def write_request(request: str, order: str) -> None:
    """Store the latest order of a request; a failed write is logged.

    Args:
        request: digest of the order without the version of recpress.
        order: digest of the order, which need not be finished.
    """
    record = RequestRecord(request=request, order=order)
    body = seal_record({"schema_version": SCHEMA_VERSION, **record.model_dump(mode="json")})
    try:
        store().write(request_key(request), body)
    except RecordRefused as fault:
        log.warning("%s After an upgrade the order runs again.", fault)


def order_of_request(request: str) -> str | None:
    """Return the digest of the most recent order of a request; None without a valid record."""
    key = request_key(request)
    damaged = _build_checksum_error(key)
    try:
        fields, is_sealed = read_record(store(), key)
        if not is_sealed or fields.pop("schema_version", None) != SCHEMA_VERSION:
            raise damaged
        record = RequestRecord.model_validate(fields)
        if record.request != request:
            raise damaged
    except ArtifactMissing:
        return None
    except ValidationError:
        log.warning("%s It counts as absent.", damaged)
        return None
    except RecordRefused as fault:
        log.warning("%s It counts as absent.", fault)
        return None
    return record.order


def write_finished(finished: Finished) -> None:
    """Store the record of a finished order; a failed write is logged.

    Without the record, the next run of this order takes longer, and ``restore`` does not find it.
    """
    record = FinishedRecord(
        order=finished.report.order,
        release=finished.release,
        version=finished.version,
        registry=_describe_registry(),
    )
    body = seal_record({"schema_version": SCHEMA_VERSION, **record.model_dump(mode="json")})
    try:
        store().write(build_finished_key(record.order), body)
    except RecordRefused as fault:
        log.warning("%s The order runs again next time.", fault)


def find_finished_order(order: str, *, registered: bool = True) -> Finished | None:
    """Return the result of a finished order, or None if the order has to run.

    The release in the record is verified by its hash, and the artifacts of its targets must be
    stored. A record that is damaged, or names the release of another order, counts as absent.

    Args:
        order: digest of the order.
        registered: if True, the version number of a record without a checksum is looked up in the
            registry. If False, because the registry may be lost, the number is used unverified.

    Raises:
        ArtifactDamaged: the record is valid and the release is damaged.
    """
    artifacts = store()
    try:
        record, is_sealed = _read_finished_record(order)
        release = artifacts.find(record.release.sha256)
        if release is None:
            raise ArtifactMissing("release_missing", uri=artifacts.uri_of(record.release))
        report = read_report(release)
        if report.order != order:
            raise RecordRefused(
                "record_damaged",
                place=f"{artifacts.root}/{build_finished_key(order)}",
                problem=f"it names the release of order {report.order[:12]}",
            )
        for target in report.targets:
            artifacts.manifest(target.artifact)
        needs_registry = registered and not is_sealed
        version = _find_registered_version(report) if needs_registry else record.version
    except ArtifactMissing:
        return None
    except RecordRefused as fault:
        log.warning("%s The order counts as not finished.", fault)
        return None
    is_this_registry = record.registry in {_describe_registry(), ""}
    registry = public_uri(load_settings().registry_uri) if is_this_registry else record.registry
    return Finished(report=report, release=release, version=version, registry=registry)


def _read_finished_record(order: str) -> tuple[FinishedRecord, bool]:
    """Read the record of an order; also returns whether a checksum has verified it.

    Raises:
        ArtifactMissing: there is no record.
        RecordRefused: the record is damaged, or belongs to another order.
    """
    key = build_finished_key(order)
    fields, is_sealed = read_record(store(), key)
    damaged = _build_checksum_error(key)
    try:
        if is_sealed:
            if fields.pop("schema_version") != SCHEMA_VERSION:
                raise damaged
            record = FinishedRecord.model_validate(fields)
        elif fields.keys() == {"report", "release", "version", "registry"}:
            # Version 0.1.0 stored the whole report, and an absolute path of the registry.
            release = Artifact.model_validate(fields["release"])
            version = f"{int(fields['version'])}"
            record = FinishedRecord(order=order, release=release, version=version, registry="")
        else:
            raise damaged
    except (ValidationError, KeyError, TypeError, ValueError) as fault:
        raise damaged from fault
    if record.order != order:
        raise RecordRefused("record_of_other_order", place=f"{store().root}/{key}")
    return record, is_sealed


def _build_checksum_error(key: str) -> RecordRefused:
    return RecordRefused(
        "record_damaged",
        place=f"{store().root}/{key}",
        problem="its checksum does not match its contents",
    )


def _find_registered_version(report: Report) -> str:
    """Return the number of an order's version in the registry of this process.

    Raises:
        ArtifactMissing: the order is not registered there.
    """
    registered = Registry(load_settings().registry_uri).find_by_order(report.order, report.name)
    if registered is None:
        raise ArtifactMissing("order_not_in_registry", order=report.order)
    return registered.version


def _describe_registry() -> str:
    """Return the registry as written in records: see ``FinishedRecord.registry``."""
    uri = load_settings().registry_uri
    file, root = parse_sqlite_uri(uri), store().folder
    return public_uri(uri) if file is None or root is None else os.path.relpath(file, root)


def request_key(request: str) -> str:
    """Return the store's key of a request's record."""
    return f"requests/{request}.json"


def build_finished_key(order: str) -> str:
    """Return the store's key of a finished order's record."""
    return f"orders/{order}.json"
