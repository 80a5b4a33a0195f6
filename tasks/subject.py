"""The bundle an order is about. No Prefect, no torch: the command line looks too."""

import json
from pathlib import Path

from compressors.contracts import (
    Artifact,
    Frozen,
    JaggedBag,
    Limit,
    measured_metrics,
    metric_problem,
)
from compressors.errors import CompressionError
from infra.architecture import source_digest
from infra.bundle import MANIFEST, SplitName, manifest_of
from infra.errors import ArtifactMissing
from infra.settings import load_settings
from tasks.stored import store


class Subject(Frozen):
    """The bundle an order is about, as far as a flow must know it."""

    artifact: Artifact
    name: str
    version: str
    metric: str
    rows: dict[str, int]
    longest: dict[str, int]
    architecture: str
    task: str
    grouped: bool

    def calibration(self) -> SplitName:
        """Without calibration rows of its own a bundle is calibrated on what it learned from."""
        return "calibration" if "calibration" in self.rows else "train"


def need_measurable(subject: Subject, limits: tuple[Limit, ...]) -> None:
    """Refuse before a long run a metric that cannot be measured at its end.

    Args:
        subject: the bundle.
        limits: of the order.

    Raises:
        CompressionError: the signature's metric, or one of a limit, is not measured for this
            bundle; names those that are.
    """
    task, grouped = subject.task, subject.grouped
    if problem := metric_problem(task, subject.metric, grouped=grouped):
        raise CompressionError(
            f"Bundle {subject.name}@{subject.version}: {problem} in the draft's model.json, raise "
            f"its version and run 'recpress bundle pack' again."
        )
    measured = measured_metrics(task, grouped=grouped, test_rows=subject.rows["test"])
    for limit in limits:
        if limit.metric not in measured:
            raise CompressionError(
                f"Limit '{limit}' is on a metric that is not measured for this bundle (task "
                f"{task}, {subject.rows['test']} test rows, {'a' if grouped else 'no'} group "
                f"column). Use one of {', '.join(measured)}."
            )


def find(reference: str) -> Subject:
    """The bundle that is meant, and a digest of its architecture's source.

    Not a task: a name may mean another bundle tomorrow, so it is looked up every time. Only
    ``model.json`` is read; ``pull`` verifies the rest.
    """
    artifact = resolve(reference)
    manifest = manifest_of(store().file(artifact, MANIFEST), Path(artifact.uri))
    path = manifest.network.architecture.path
    return Subject(
        artifact=artifact,
        name=manifest.name,
        version=manifest.version,
        metric=manifest.signature.metric,
        rows={split: held.rows for split, held in manifest.data.items()},
        longest={
            item.name: item.shape[0]
            for item in manifest.signature.inputs
            if isinstance(item, JaggedBag)
        },
        task=manifest.signature.task,
        grouped=manifest.signature.group is not None,
        architecture=source_digest(path, load_settings().allowed_modules),
    )


def resolve(reference: str) -> Artifact:
    """The artifact a bundle is meant by: its URI, ``name@version``, or the newest of ``name``.

    Raises:
        ArtifactMissing: no such bundle; names those that exist.
    """
    held = store()
    if Path(reference).is_dir():
        raise ArtifactMissing(
            f"{reference} is a folder, not a packed bundle. Pack it first: 'recpress bundle pack "
            f"{reference}', then name it by name@version."
        )
    if "/" in reference or ":" in reference:
        return held.artifact(reference)
    name, _, version = reference.partition("@")
    keys = held.keys("bundles/")
    mine = [key for key in keys if key.startswith(f"bundles/{name}/")]
    if version:
        mine = [key for key in mine if key == bundle_key(name, version)]
    if not mine:
        known = sorted({key.split("/")[1] + "@" + Path(key).stem for key in keys})
        raise ArtifactMissing(
            f"There is no bundle {reference!r} in {held.root}; there is "
            f"{', '.join(known) or 'none yet'}. Pack one: 'recpress bundle pack FOLDER'."
        )
    records = [json.loads(held.read(key)) for key in mine]
    newest = max(records, key=lambda record: float(record["packed_at"]))
    return Artifact.model_validate(newest["artifact"])


def bundle_key(name: str, version: str) -> str:
    """Where the store says which artifact a packed bundle is."""
    return f"bundles/{name}/{version}.json"
