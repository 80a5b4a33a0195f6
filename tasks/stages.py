"""Measure the effect of each step of a recipe on bytes and quality."""

from pathlib import Path

import numpy as np
import torch
from prefect import task
from safetensors.torch import load_file

from compressors.contracts import Artifact, Signature, Split
from compressors.core.batches import batches
from infra.bundle.bundle_folder import read
from infra.store.temporary import scratch_folder
from tasks.bundles.loading import split_of
from tasks.evaluation.quality import ByQuery, Quality, row_quality
from tasks.orchestration.documents import STAGES, Scored, Stage, Stages
from tasks.orchestration.policy import KEPT
from tasks.orchestration.workspace import local, store

READING_ROWS = 65_536


@task(task_run_name="evaluate the stages", **KEPT)
def measure_stages(
    scored: tuple[Scored, ...],
    metric: str,
    test: Artifact,
    test_rows: int,
    seed: int,
) -> Artifact:
    """Compare every stage with the one before it, on the same rows.

    Args:
        scored: the stages in order, the untouched model first.
        metric: the signature's metric.
        test: the prepared test split, for labels and groups.
        test_rows: its number of rows.
        seed: seed of the bootstrap.
    """
    manifests = [read(local(item.bundle)) for item in scored]
    signature = manifests[0].signature
    plans = [manifest.plan for manifest in manifests]
    sizes = [sum(line.bytes_after for line in plan.lines) for plan in plans if plan is not None]
    if plans[0] is None and plans[1] is not None:  # an uncompressed bundle has no plan
        sizes.insert(0, sum(line.bytes_before for line in plans[1].lines))
    quality = quality_of(signature, scored, split_of(test, test_rows), seed)
    stages = []
    for place, item in enumerate(scored):
        pair = quality.paired(metric, str(max(place - 1, 0)), str(place))
        stages.append(
            Stage(
                step=item.step,
                bundle=item.bundle,
                bytes=sizes[place],
                quality=pair.candidate,
                change=pair.difference if place else None,
            )
        )
    with scratch_folder("stages") as scratch:
        (Path(scratch) / STAGES).write_bytes(Stages.dump_json(tuple(stages), indent=1))
        return store().put(Path(scratch))


def quality_of(signature: Signature, scored: tuple[Scored, ...], test: Split, seed: int) -> Quality:
    """Combine stages by number, each with its predictions for the same rows."""
    if not signature.scores_rows:
        stored = [load_file(local(item.score) / "data.safetensors") for item in scored]
        values = {
            str(place): {metric: found.numpy() for metric, found in held.items()}
            for place, held in enumerate(stored)
        }
        return ByQuery(values, test.rows, seed)
    predictions = {str(place): _predictions(signature, item) for place, item in enumerate(scored)}
    return row_quality(list(batches(test, signature, READING_ROWS)), predictions, seed)


def _predictions(signature: Signature, item: Scored) -> np.ndarray:
    """Return a stage's scores, as probabilities for log loss and entropy; keeps their order."""
    output = load_file(local(item.score) / "data.safetensors")["score"]
    is_logit = signature.single_output.form == "logit"
    return (torch.sigmoid(output.double()) if is_logit else output).numpy()
