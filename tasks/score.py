"""Compute the predictions of stored models for the rows of a split."""

from pathlib import Path

import torch
from prefect import task
from safetensors.torch import load_file

from compressors.contracts import Artifact
from compressors.contracts.task_kind import OutputForm
from compressors.core.batches import batches
from compressors.core.scores import network_scores
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
        The artifact of ``data.safetensors`` with ``score``: the module's scores, float32
        ``(rows,)`` or ``(rows, outputs)``, without conversion of logits to probabilities.

    Raises:
        MetricRefused: a score is not a finite number.
    """
    loaded = load_bundle(bundle)
    signature = loaded.manifest.signature
    split_batches = batches(split_of(split, rows), signature, SCORING_ROWS)
    with torch.no_grad():
        parts = [
            network_scores(loaded.model.module, batch.inputs, signature) for batch in split_batches
        ]
    scores = torch.cat(parts).to(torch.float32)
    if not bool(scores.isfinite().all()):
        raise MetricRefused(
            "bundle_scores_not_finite",
            name=loaded.manifest.name,
            version=loaded.manifest.version,
            count=int((~scores.isfinite()).sum()),
        )
    return _store_scores(scores)


@task(task_run_name="average the teachers", **TASK_OPTIONS)
def average(scores: tuple[Artifact, ...], forms: tuple[OutputForm, ...]) -> Artifact:
    """Average the predictions of several teachers, row by row.

    Logits and scores are averaged as they are; probabilities are averaged as logits.

    Args:
        scores: the results of ``score`` for each teacher, for the same rows.
        forms: the form of each output's scores.

    Returns:
        An artifact as returned by ``score``.
    """
    predictions = [load_file(local(item) / "data.safetensors")["score"] for item in scores]
    return _store_scores(mean_predictions(predictions, forms))


def _store_scores(scores: torch.Tensor) -> Artifact:
    with scratch_folder("score") as scratch:
        folder = Path(scratch)
        write(folder / "data.safetensors", {"score": scores})
        return store().put(folder)
