"""Find a bundle in the store by its name, name and version, or URI.

``bundles/<name>/<version>.json`` in the store is the record of a packed bundle: it names the
bundle's artifact and has a checksum (it is "sealed"). The command line uses this file too.
"""

import math
from pathlib import Path

from pydantic import ValidationError

from compressors.contracts import (
    Architecture,
    Artifact,
    Frozen,
    JaggedBag,
    Limit,
    Output,
    artifact_name,
    limits_of_outputs,
    measured_metrics,
    metric_problem,
)
from compressors.contracts.metrics.families import can_be_measured
from compressors.contracts.signature import judged_metrics
from compressors.errors.metrics import LimitRefused
from infra.bundle.architecture import source_digest
from infra.bundle.bundle_folder import MANIFEST, Manifest, SplitName, parse_manifest
from infra.errors import ArtifactMissing, BundleRefused, RecordRefused
from infra.settings import load_settings
from infra.store.disk import translate_input_errors
from infra.store.records import read_record, seal_record
from tasks.orchestration.workspace import store


class BundleRef(Frozen):
    """The bundle that an order refers to, with the properties that flows need.

    Attributes:
        artifact: the bundle's artifact.
        name: name of the bundle.
        version: version of the bundle.
        outputs: the outputs in the signature.
        rows: number of rows of each split.
        longest: maximum list length of each jagged input (a list of ids per row).
        architecture: digest of the source of the model's class.
        grouped: whether the signature names a column that groups rows, which some metrics need.
        weight_bytes: bytes of the weight files.
        data_bytes: bytes of the parquet files of the largest split.
    """

    artifact: Artifact
    name: str
    version: str
    outputs: tuple[Output, ...]
    rows: dict[str, int]
    longest: dict[str, int]
    architecture: str
    grouped: bool
    weight_bytes: int = 0
    data_bytes: int = 0

    @property
    def metrics(self) -> tuple[str, ...]:
        """The name of the metric by which each output is judged, such as ``auc``."""
        return judged_metrics(self.outputs)

    @property
    def task(self) -> str:
        """The kinds of the outputs, such as ``ctr``, each once and separated by commas."""
        return ", ".join(dict.fromkeys(output.kind for output in self.outputs))

    @property
    def scores_rows(self) -> bool:
        """Whether each output is one score per row, so that rows have a loss and a metric."""
        return all(output.task_kind.scores_rows for output in self.outputs)

    def limits(self, limits: tuple[Limit, ...]) -> tuple[Limit, ...]:
        """Return the limits per output; a limit that names no output applies to every output."""
        return limits_of_outputs(limits, self.outputs, grouped=self.grouped)

    def calibration(self) -> SplitName:
        """Return the name of the calibration split; the training split if the bundle has none."""
        return "calibration" if "calibration" in self.rows else "train"


SCHEMA_VERSION = 2
"""Version of the fields of a bundle record."""


def require_measurable(bundle: BundleRef, limits: tuple[Limit, ...]) -> None:
    """Raise if a metric of the signature, or the metric of a limit, cannot be measured.

    Called before a long run, which measures at its end.

    Args:
        bundle: the bundle.
        limits: the order's limits.

    Raises:
        LimitRefused: a metric cannot be measured for this bundle; lists the metrics that can.
    """
    for output in bundle.outputs:
        if problem := metric_problem(output.kind, output.metric, grouped=bundle.grouped):
            raise LimitRefused(
                "bundle_metric_unusable", name=bundle.name, version=bundle.version, problem=problem
            )
    for limit in bundle.limits(limits):
        _require_measured(limit, bundle)


def _require_measured(limit: Limit, bundle: BundleRef) -> None:
    """Raise if a limit's metric cannot be measured: for the output that it names, or for none.

    Raises:
        LimitRefused: lists the outputs, or the metrics that can be measured.
    """
    # ``declared`` is the limit's metric; its ``output`` is the output that the limit names, if any.
    of_output = limit.declared.output
    names = tuple(output.name for output in bundle.outputs)
    if of_output is not None and of_output not in names:
        raise LimitRefused(
            "limit_output_unknown", limit=str(limit), output=of_output, outputs=names
        )
    rows, grouped = bundle.rows["test"], bundle.grouped
    outputs = [item for item in bundle.outputs if of_output in (None, item.name)]
    if any(
        can_be_measured(limit.declared, output.kind, grouped=grouped, test_rows=rows)
        for output in outputs
    ):
        return
    task = outputs[0].kind
    metrics = measured_metrics(task, grouped=grouped, test_rows=rows)
    raise (
        LimitRefused("limit_not_measured", limit=str(limit), task=task, rows=rows, metrics=metrics)
        if grouped
        else LimitRefused(
            "limit_not_measured_without_groups",
            limit=str(limit),
            task=task,
            rows=rows,
            metrics=metrics,
        )
    )


def find_bundle(reference: str) -> BundleRef:
    """Find a bundle and read the properties that flows need from its ``model.json``.

    This function is not a Prefect task, because its result is not cached: a name may refer to a
    newer bundle later. The other files are verified by the task ``pull``.

    Args:
        reference: the artifact's URI, ``name@version``, or ``name`` for the latest version.
    """
    artifact = resolve(reference)
    manifest = parse_manifest(store().file(artifact, MANIFEST), Path(store().uri_of(artifact)))
    signature = manifest.signature
    return BundleRef(
        artifact=artifact,
        name=manifest.name,
        version=manifest.version,
        outputs=signature.outputs,
        rows={split: data.rows for split, data in manifest.data.items()},
        longest={
            item.name: item.shape[0] for item in signature.inputs if isinstance(item, JaggedBag)
        },
        grouped=signature.group is not None,
        weight_bytes=sum(record.bytes for record in manifest.files.values()),
        data_bytes=max((data.artifact.bytes for data in manifest.data.values()), default=0),
        architecture=architecture_digest(manifest.network.architecture),
    )


def architecture_digest(architecture: Architecture) -> str:
    """Hash the source code of a network's class and of the classes that its arguments name.

    Raises:
        BundleRefused: a class is not in an allowed module, or has no source file.
    """
    allowed = load_settings().allowed_modules
    return source_digest(architecture.path, allowed, architecture.argument_classes)


def resolve(reference: str) -> Artifact:
    """Return the artifact of a bundle.

    Args:
        reference: the artifact's URI, ``name@version``, or ``name`` for the bundle of this name
            that was packed last.

    Raises:
        ArtifactMissing: there is no such bundle; lists the existing ones.
        RecordRefused: the record of the bundle is damaged.
    """
    bundle_store = store()
    if artifact_name(reference) is not None:  # the URI of an artifact
        return bundle_store.artifact(reference)
    with translate_input_errors(Path(reference)):
        is_folder = Path(reference).is_dir()
    if is_folder:
        raise ArtifactMissing("bundle_not_packed", folder=reference)
    if "/" in reference or ":" in reference:  # no name; ``artifact`` raises
        return bundle_store.artifact(reference)
    name, _, version = reference.partition("@")
    packed = _list_packed_versions()
    versions = (version,) if version else tuple(v for n, v in packed if n == name)
    records = [record for v in versions if (record := bundle_record(name, v)) is not None]
    if not records:
        raise ArtifactMissing(
            "bundle_missing",
            reference=reference,
            store=bundle_store.root,
            known=tuple(f"{name}@{version}" for name, version in packed) or ("none yet",),
        )
    newest = max(records, key=lambda record: record.packed_at)
    bundle_manifest(newest)  # raises if the recorded artifact is missing, or is another bundle
    return newest.artifact


def _list_packed_versions() -> tuple[tuple[str, str], ...]:
    """List the name and version of every packed bundle, sorted."""
    keys = [key.split("/") for key in store().keys("bundles/")]
    return tuple(
        (parts[1], parts[2].removesuffix(".json"))
        for parts in keys
        if len(parts) == 3 and parts[2].endswith(".json")
    )


class BundleRecord(Frozen):
    """The record of a packed bundle; ``packed_at`` is in seconds since 1970."""

    name: str
    version: str
    artifact: Artifact
    packed_at: float


def bundle_key(name: str, version: str) -> str:
    """Return the store's key of a bundle record."""
    return f"bundles/{name}/{version}.json"


def write_bundle_record(record: BundleRecord, *, replace: bool = False) -> None:
    """Store a bundle record with its checksum.

    Args:
        record: the record to store.
        replace: whether to overwrite an existing record; only for a damaged one.

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
    """Read and verify a bundle record; None if there is none.

    Records of recpress 0.1.0 have no checksum. Of these only the artifact's hash is used; its size
    is read from the artifact.

    Raises:
        RecordRefused: the record is damaged, or is another bundle's record.
    """
    key = bundle_key(name, version)
    try:
        fields, is_sealed = read_record(store(), key)
    except ArtifactMissing:
        return None
    except RecordRefused as fault:
        raise _build_damaged_record(name, version, str(fault)) from fault
    try:
        if is_sealed:
            if fields.pop("schema_version") != SCHEMA_VERSION:
                raise _build_damaged_record(name, version, "another version of recpress wrote it")
            record = BundleRecord.model_validate(fields)
        elif fields.keys() == {"artifact", "packed_at"}:  # version 0.1.0
            record = BundleRecord.model_validate({"name": name, "version": version, **fields})
        else:
            raise _build_damaged_record(name, version, "its checksum does not match its contents")
    except (ValidationError, KeyError) as fault:
        raise _build_damaged_record(
            name, version, "its fields are not those of a bundle's record"
        ) from fault
    if (record.name, record.version) != (name, version):
        raise _build_damaged_record(
            name, version, f"it is the record of {record.name}@{record.version}"
        )
    if not is_sealed:
        artifact = store().find(record.artifact.sha256)
        if artifact is not None and math.isfinite(record.packed_at):
            return record.model_copy(update={"artifact": artifact})
        raise _build_damaged_record(name, version, "it names an artifact that is not in the store")
    return record


def bundle_manifest(record: BundleRecord) -> Manifest:
    """Read the manifest (``model.json``) of a recorded bundle, and check its name and version.

    Raises:
        ArtifactMissing: the artifact is not in the store.
        RecordRefused: the artifact is another bundle, or not a bundle.
    """
    name, version, bundle_store = record.name, record.version, store()
    uri = bundle_store.uri_of(record.artifact)
    artifact = bundle_store.find(record.artifact.sha256)
    if artifact is None:
        raise ArtifactMissing("bundle_artifact_missing", name=name, version=version, uri=uri)
    try:
        body = bundle_store.file(artifact, MANIFEST)
    except ArtifactMissing as fault:
        raise _build_damaged_record(name, version, f"{uri} is no bundle") from fault
    try:
        manifest = parse_manifest(body, Path(uri))
    except BundleRefused as fault:
        raise _build_damaged_record(name, version, f"{uri} is no bundle ({fault})") from fault
    if (manifest.name, manifest.version) != (name, version):
        other = f"{manifest.name}@{manifest.version}"
        raise _build_damaged_record(name, version, f"{uri} is the bundle {other}")
    return manifest


def _build_damaged_record(name: str, version: str, problem: str) -> RecordRefused:
    return RecordRefused(
        "bundle_record_damaged",
        name=name,
        version=version,
        place=f"{store().root}/{bundle_key(name, version)}",
        problem=problem.rstrip("."),
    )
