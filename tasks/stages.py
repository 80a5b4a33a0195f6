"""Measure the effect of each step of a recipe on bytes and quality.

A stage is the model after one step of the recipe; the first stage is the untouched model.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from prefect import task
from safetensors.torch import load_file

from compressors.contracts import Artifact, Plan, Signature, Split
from compressors.core.scores import join_columns, score_columns
from infra.bundle.bundle_folder import read
from infra.bundle.shards import stored_tensors
from infra.store.temporary import scratch_folder
from tasks.bundles.loading import fetch_split
from tasks.evaluation.quality import Quality, QueryQuality, row_quality
from tasks.orchestration.documents import STAGES, ScoredStage, Stage, StageQuality, Stages
from tasks.orchestration.task_calls import TASK_OPTIONS
from tasks.orchestration.workspace import local, store


@task(task_run_name="evaluate the stages", **TASK_OPTIONS)
def measure_stages(
    scored: tuple[ScoredStage, ...],
    metrics: tuple[str, ...],
    test: Artifact,
    test_rows: int,
    seed: int,
) -> Artifact:
    """Measure bytes and quality of every stage, and its change from the previous stage.

    Args:
        scored: the stages in order with their predictions for the test rows.
        metrics: the metric by which each output is judged.
        test: the prepared test split (its columns as tensors), for labels and groups.
        test_rows: number of rows of the test split.
        seed: seed of the bootstrap.

    Returns:
        The artifact of ``stages.json``.
    """
    folders = [local(stage.bundle) for stage in scored]
    manifests = [read(folder) for folder in folders]
    signature = manifests[0].signature
    sizes = bytes_of_stages([manifest.plan for manifest in manifests], folders)
    quality = compare_stages(signature, scored, fetch_split(test, test_rows), seed)
    stages = []
    for index, stage in enumerate(scored):
        first, *others = (_find_quality_of_stage(quality, metric, index) for metric in metrics)
        stages.append(
            Stage(
                step=stage.step,
                bundle=stage.bundle,
                bytes=sizes[index],
                quality=first.quality,
                change=first.change,
                other_outputs=dict(zip(metrics[1:], others, strict=True)),
            )
        )
    with scratch_folder("stages") as scratch:
        (Path(scratch) / STAGES).write_bytes(Stages.dump_json(tuple(stages), indent=1))
        return store().put(Path(scratch))


def _find_quality_of_stage(quality: Quality, metric: str, index: int) -> StageQuality:
    """Return one metric of a stage, and its change from the previous stage."""
    # ``paired`` compares two stages on the same rows, by name; a stage's name is its index. The
    # first stage is compared with itself, for its quality; it has no change.
    pair = quality.paired(metric, str(max(index - 1, 0)), str(index))
    return StageQuality(quality=pair.candidate, change=pair.difference if index else None)


def bytes_of_stages(plans: Sequence[Plan | None], folders: Sequence[Path]) -> list[int]:
    """Return the bytes of the weights of every stage.

    An uncompressed bundle has no plan. Its bytes are ``bytes_before`` of the next stage's plan; if
    no stage follows, they are the bytes of the stored tensors.

    Args:
        plans: the plans of the stages, in order.
        folders: the folders of the stages' bundles, in the same order.
    """
    sizes = []
    for plan, next_plan, folder in zip(plans, (*plans[1:], None), folders, strict=True):
        if plan is not None:
            sizes.append(plan.bytes_after)
        elif next_plan is not None:
            sizes.append(next_plan.bytes_before)
        else:
            sizes.append(sum(tensor.fact.bytes for tensor in stored_tensors(folder).values()))
    return sizes


def compare_stages(
    signature: Signature, scored: tuple[ScoredStage, ...], test: Split, seed: int
) -> Quality:
    """Return the quality of the stages, named "0", "1", ... in their order.

    Args:
        signature: the signature that all stages have.
        scored: the stages with their stored predictions for the rows of ``test``.
        test: the prepared rows.
        seed: seed of the bootstrap.
    """
    if not signature.scores_rows:  # retrieval: the predictions are the metrics of each query
        stored = [load_file(local(stage.score) / "data.safetensors") for stage in scored]
        metrics_of_queries = {
            str(index): {metric: values.numpy() for metric, values in tensors.items()}
            for index, tensors in enumerate(stored)
        }
        return QueryQuality(metrics_of_queries, test.rows, seed)
    scores = {str(index): _read_scores(signature, stage) for index, stage in enumerate(scored)}
    return row_quality(signature, test, scores, seed)


def _read_scores(signature: Signature, stage: ScoredStage) -> np.ndarray:
    """Return a stage's scores; logits are converted to probabilities for log loss."""
    columns = score_columns(load_file(local(stage.score) / "data.safetensors")["score"])
    scores = [
        torch.sigmoid(column.double()) if output.form == "logit" else column
        for output, column in zip(signature.outputs, columns, strict=True)
    ]
    return join_columns(scores).numpy()
