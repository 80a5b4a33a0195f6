"""Measure how much of the quality budget a recipe has used, on validation rows."""

from prefect import task

from compressors.contracts import Artifact, Estimate
from infra.bundle.bundle_folder import read
from tasks.bundles.loading import fetch_split
from tasks.orchestration.documents import ScoredStage
from tasks.orchestration.task_calls import TASK_OPTIONS
from tasks.orchestration.workspace import local
from tasks.stages import compare_stages


@task(task_run_name="evaluate the quality loss", **TASK_OPTIONS)
def measure_quality_loss(
    original: ScoredStage,
    now: ScoredStage,
    metric: str,
    validation: Artifact,
    rows: int,
    seed: int,
) -> Estimate:
    """Return the metric of the original model minus that of the compressed model.

    Args:
        original: the untouched model and its predictions for the validation rows.
        now: the model as compressed so far and its predictions for these rows.
        metric: the metric to compare, by which an output is judged.
        validation: the prepared validation split (its columns as tensors), for labels and groups.
        rows: number of rows of the validation split.
        seed: seed of the bootstrap.
    """
    signature = read(local(original.bundle)).signature
    quality = compare_stages(signature, (original, now), fetch_split(validation, rows), seed)
    change = quality.paired(metric, "0", "1").difference  # stages are named by their position
    return change.model_copy(
        update={"point": -change.point, "low": -change.high, "high": -change.low}
    )
