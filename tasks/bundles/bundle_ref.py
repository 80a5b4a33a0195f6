"""Find the bundle that an order refers to. No Prefect or torch: the command line uses it."""

import math
from pathlib import Path

from pydantic import ValidationError

from compressors.contracts import (
    Artifact,
    Frozen,
    JaggedBag,
    Limit,
    artifact_name,
    measured_metrics,
    metric_problem,
)
from compressors.contracts.metrics.families import can_be_measured
from compressors.errors.metrics import LimitRefused
from infra.bundle.architecture import source_digest
from infra.bundle.bundle_folder import MANIFEST, Manifest, SplitName, manifest_of
from infra.errors import ArtifactMissing, BundleRefused, RecordRefused
from infra.settings import load_settings
from infra.store.disk import input_files
from infra.store.records import read_record, seal_record
from tasks.orchestration.workspace import store


class BundleRef(Frozen):
    """The bundle that an order refers to, with the facts that flows need."""

    artifact: Artifact
    name: str
    version: str
    metric: str
    rows: dict[str, int]
    longest: dict[str, int]
    architecture: str
    task: str
    grouped: bool
    weight_bytes: int = 0
    data_bytes: int = 0
    """Of the weights' files, and of the largest split's parquet files."""

    def calibration(self) -> SplitName:
        """Return the calibration split; the training split if the bundle has none."""
        return "calibration" if "calibration" in self.rows else "train"


SCHEMA_VERSION = 2


def require_measurable(subject: BundleRef, limits: tuple[Limit, ...]) -> None:
    """Raise before a long run if a metric cannot be measured at its end.

    Args:
        subject: the bundle.
        limits: the order's limits.

    Raises:
        CompressionError: the signature's metric, or one of a limit, is not measured for this
            bundle; lists those that are.
    """
    task, grouped = subject.task, subject.grouped
    if problem := metric_problem(task, subject.metric, grouped=grouped):
        raise LimitRefused(
            "bundle_metric_unusable", name=subject.name, version=subject.version, problem=problem
        )
    measured = measured_metrics(task, grouped=grouped, test_rows=subject.rows["test"])
    for limit in limits:
        if not can_be_measured(
            limit.declared, task, grouped=grouped, test_rows=subject.rows["test"]
        ):
            raise (
                LimitRefused(
                    "limit_not_measured",
                    limit=str(limit),
                    task=task,
                    rows=subject.rows["test"],
                    metrics=measured,
                )
                if grouped
                else LimitRefused(
                    "limit_not_measured_without_groups",
                    limit=str(limit),
                    task=task,
                    rows=subject.rows["test"],
                    metrics=measured,
                )
            )


def find(reference: str) -> BundleRef:
    """Find the bundle of a reference, and a digest of its architecture's source.

    Not a task: a name may refer to another bundle later, so it is looked up every time. Only
    ``model.json`` is read; ``pull`` verifies the rest.
    """
    artifact = resolve(reference)
    manifest = manifest_of(store().file(artifact, MANIFEST), Path(store().uri_of(artifact)))
    path, output = manifest.network.architecture.path, manifest.signature.single_output
    return BundleRef(
        artifact=artifact,
        name=manifest.name,
        version=manifest.version,
        metric=output.metric,
        rows={split: held.rows for split, held in manifest.data.items()},
        longest={
            item.name: item.shape[0]
            for item in manifest.signature.inputs
            if isinstance(item, JaggedBag)
        },
        task=output.kind,
        grouped=manifest.signature.group is not None,
        weight_bytes=sum(record.bytes for record in manifest.files.values()),
        data_bytes=max((held.artifact.bytes for held in manifest.data.values()), default=0),
        architecture=source_digest(path, load_settings().allowed_modules),
    )


def resolve(reference: str) -> Artifact:
    """Resolve a bundle's artifact: by URI, by ``name@version``, or the newest of ``name``.

    Raises:
        ArtifactMissing: no such bundle; lists the existing ones.
        RecordRefused: a record that is needed is damaged.
    """
    held = store()
    if artifact_name(reference) is not None:
        return held.artifact(reference)
    with input_files(Path(reference)):
        is_folder = Path(reference).is_dir()
    if is_folder:
        raise ArtifactMissing("bundle_not_packed", folder=reference)
    if "/" in reference or ":" in reference:
        return held.artifact(reference)
    name, _, version = reference.partition("@")
    known = _known()
    versions = (version,) if version else tuple(v for n, v in known if n == name)
    records = [record for v in versions if (record := bundle_record(name, v)) is not None]
    if not records:
        raise ArtifactMissing(
            "bundle_missing",
            reference=reference,
            store=held.root,
            known=tuple(f"{name}@{version}" for name, version in known) or ("none yet",),
        )
    newest = max(records, key=lambda record: record.packed_at)
    bundle_manifest(newest)
    return newest.artifact


def _known() -> tuple[tuple[str, str], ...]:
    """List name and version of every bundle record, sorted."""
    parts = [key.split("/") for key in store().keys("bundles/")]
    return tuple(
        (place[1], place[2].removesuffix(".json"))
        for place in parts
        if len(place) == 3 and place[2].endswith(".json")
    )


class BundleRecord(Frozen):
    """The artifact of a bundle's name and version."""

    name: str
    version: str
    artifact: Artifact
    packed_at: float


def bundle_key(name: str, version: str) -> str:
    """Return the key of the record of a packed bundle."""
    return f"bundles/{name}/{version}.json"


def write_bundle_record(record: BundleRecord, *, replace: bool = False) -> None:
    """Store the record of a packed bundle.

    Args:
        record: the record to store.
        replace: whether an existing, damaged record is replaced.

    Raises:
        AlreadyThere: there is a record, and ``replace`` is not set.
    """
    body = seal_record({"schema_version": SCHEMA_VERSION, **record.model_dump(mode="json")})
    key = bundle_key(record.name, record.version)
    if replace:
        store().write(key, body)
    else:
        store().create(key, body)


def bundle_record(name: str, version: str) -> BundleRecord | None:
    """Read the record of a packed bundle; None if there is none.

    Raises:
        RecordRefused: it is damaged.
    """
    key = bundle_key(name, version)
    try:
        fields, sealed = read_record(store(), key)
    except ArtifactMissing:
        return None
    except RecordRefused as fault:
        raise _damaged(name, version, str(fault)) from fault
    try:
        if sealed:
            if fields.pop("schema_version") != SCHEMA_VERSION:
                raise _damaged(name, version, "another version of recpress wrote it")
            record = BundleRecord.model_validate(fields)
        elif fields.keys() == {"artifact", "packed_at"}:  # version 0.1.0
            record = BundleRecord.model_validate({"name": name, "version": version, **fields})
        else:
            raise _damaged(name, version, "its seal does not fit the rest")
    except (ValidationError, KeyError) as fault:
        raise _damaged(name, version, "its fields are not those of a bundle's record") from fault
    if (record.name, record.version) != (name, version):
        raise _damaged(name, version, f"it is the record of {record.name}@{record.version}")
    if not sealed:
        # Its size and time are not verified; the artifact verifies its size.
        found = store().find(record.artifact.sha256)
        if found is not None and math.isfinite(record.packed_at):
            return record.model_copy(update={"artifact": found})
        raise _damaged(name, version, "it names an artifact that is not in the store")
    return record


def bundle_manifest(record: BundleRecord) -> Manifest:
    """Read the manifest of a recorded bundle, which must have the record's name and version.

    Raises:
        ArtifactMissing: the artifact is not in the store.
        RecordRefused: the artifact is another bundle, or not a bundle.
    """
    name, version, held = record.name, record.version, store()
    where = held.uri_of(record.artifact)
    found = held.find(record.artifact.sha256)
    if found is None:
        raise ArtifactMissing("bundle_artifact_missing", name=name, version=version, uri=where)
    try:
        body = held.file(found, MANIFEST)
    except ArtifactMissing as fault:
        raise _damaged(name, version, f"{where} is no bundle") from fault
    try:
        manifest = manifest_of(body, Path(where))
    except BundleRefused as fault:
        raise _damaged(name, version, f"{where} is no bundle ({fault})") from fault
    if (manifest.name, manifest.version) != (name, version):
        raise _damaged(name, version, f"{where} is the bundle {manifest.name}@{manifest.version}")
    return manifest


def _damaged(name: str, version: str, why: str) -> RecordRefused:
    return RecordRefused(
        "bundle_record_damaged",
        name=name,
        version=version,
        place=f"{store().root}/{bundle_key(name, version)}",
        problem=why.rstrip("."),
    )
