"""Compute the predictions of stored models for the rows of a split."""

from pathlib import Path
from typing import Literal

import torch
from prefect import task
from safetensors.torch import load_file

from compressors.contracts import Artifact
from compressors.core.batches import batches
from compressors.core.state.safetensors_stream import write
from compressors.distill.soft_labels import mean_predictions
from compressors.errors.metrics import MetricRefused
from infra.store.temporary import scratch_folder
from tasks.bundles.loading import SCORING_ROWS, load_bundle, split_of
from tasks.orchestration.policy import TASK_OPTIONS
from tasks.orchestration.workspace import local, store


@task(task_run_name="score", **TASK_OPTIONS)
def score(bundle: Artifact, split: Artifact, rows: int) -> Artifact:
    """Score every row of a prepared split with the torch module.

    The scores serve as soft labels, and to measure the effect of each step of a recipe. They do not
    affect the verdict, which is based on scores of the served graphs in the target's runtime.

    Args:
        bundle: the model.
        split: the prepared rows.
        rows: number of rows.

    Returns:
        The artifact of ``data.safetensors`` with ``score`` float32 ``(rows,)``: the module's
        output, without conversion of logits to probabilities.

    Raises:
        MetricRefused: a score is not a finite number.
    """
    loaded = load_bundle(bundle)
    signature = loaded.manifest.signature
    split_batches = batches(split_of(split, rows), signature, SCORING_ROWS)
    with torch.no_grad():
        parts = [loaded.model.module(**batch.inputs).reshape(-1) for batch in split_batches]
    scores = torch.cat(parts).to(torch.float32)
    if not bool(scores.isfinite().all()):
        raise MetricRefused(
            "bundle_scores_not_finite",
            name=loaded.manifest.name,
            version=loaded.manifest.version,
            count=int((~scores.isfinite()).sum()),
        )
    return _store_scores(scores)


@task(task_run_name="average {output}", **TASK_OPTIONS)
def average(
    scores: tuple[Artifact, ...],
    output: Literal["logit", "probability", "score"],
) -> Artifact:
    """Average the predictions of several teachers, row by row.

    Logits and scores are averaged as they are; probabilities are averaged as logits.

    Args:
        scores: the results of ``score`` for each teacher, for the same rows.
        output: the form of the scores.

    Returns:
        An artifact as returned by ``score``.
    """
    predictions = [load_file(local(item) / "data.safetensors")["score"] for item in scores]
    return _store_scores(mean_predictions(predictions, output))


def _store_scores(scores: torch.Tensor) -> Artifact:
    with scratch_folder("score") as scratch:
        folder = Path(scratch)
        write(folder / "data.safetensors", {"score": scores})
        return store().put(folder)
