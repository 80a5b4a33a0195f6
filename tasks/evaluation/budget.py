"""Measure the quality a model has lost against the original, on validation rows."""

from prefect import task

from compressors.contracts import Artifact, Estimate
from infra.bundle.bundle_folder import read
from tasks.bundles.loading import split_of
from tasks.orchestration.documents import Scored
from tasks.orchestration.policy import KEPT
from tasks.orchestration.workspace import local
from tasks.stages import quality_of


@task(task_run_name="weigh against the budget", **KEPT)
def quality_loss(
    original: Scored,
    now: Scored,
    metric: str,
    validation: Artifact,
    rows: int,
    seed: int,
) -> Estimate:
    """Return the metric of the original minus that of a model, on validation rows.

    Args:
        original: the untouched model and its predictions for the validation rows.
        now: the compressed model and its predictions.
        metric: the signature's metric.
        validation: the prepared validation split, for labels and groups.
        rows: its number of rows.
        seed: seed of the bootstrap.
    """
    signature = read(local(original.bundle)).signature
    quality = quality_of(signature, (original, now), split_of(validation, rows), seed)
    change = quality.paired(metric, "0", "1").difference
    return change.model_copy(
        update={"point": -change.point, "low": -change.high, "high": -change.low}
    )
