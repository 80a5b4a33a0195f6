"""The bundle an order is about. No Prefect, no torch: the command line looks too."""

import json
from pathlib import Path

from compressors.contracts import SCORE_CHANGE, Artifact, Frozen, JaggedBag, Limit
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


LATENCY_BATCHES = (1, 64, 1024)


def quality_metrics(task: str, *, grouped: bool) -> tuple[str, ...]:
    """The quality metrics measured for a task."""
    if task == "ranking":
        return ("ndcg@10",)
    if task == "retrieval":
        return ("recall@20", "ndcg@20")
    return ("auc", "logloss", "normalized_entropy", *(("gauc",) if grouped else ()))


def score_change_metrics(task: str, *, grouped: bool) -> tuple[str, ...]:
    """The metrics of score change measured for a task."""
    return tuple(
        metric
        for metric in SCORE_CHANGE
        if (metric != "changed_top1" or grouped or task == "retrieval")
        and (metric != "top20_overlap" or task == "retrieval")
    )


def need_measurable(subject: Subject, limits: tuple[Limit, ...]) -> None:
    """Refuse before a long run a limit on a number that its end would not have.

    Raises:
        CompressionError: names the limit and what is measured.
    """
    batches = [size for size in LATENCY_BATCHES if size <= subject.rows["test"]]
    measured = (
        *quality_metrics(subject.task, grouped=subject.grouped),
        *score_change_metrics(subject.task, grouped=subject.grouped),
        "bytes",
        *(f"{quantile}_ms@{size}" for size in batches for quantile in ("p50", "p99")),
    )
    for limit in limits:
        if limit.metric not in measured:
            raise CompressionError(
                f"Limit '{limit}' speaks of a number that is not measured for this bundle "
                f"(task {subject.task}, {subject.rows['test']} test rows, "
                f"{'a' if subject.grouped else 'no'} group column). Measured are "
                f"{', '.join(measured)}."
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
