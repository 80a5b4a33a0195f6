"""Compute the predictions of stored models for the rows of a split, or read them from the data."""

from pathlib import Path

import torch
from prefect import task
from safetensors.torch import load_file

from compressors.contracts import Artifact, DenseInput
from compressors.contracts.task_kind import OutputForm
from compressors.core.batches import batches
from compressors.core.scores import network_scores
from compressors.core.state.safetensors_stream import write
from compressors.distill.soft_labels import convert_scores, mean_predictions
from compressors.errors.metrics import MetricRefused
from infra.bundle.bundle_folder import SplitName, read
from infra.data.splits import prepare
from infra.errors import DataRefused
from infra.store.temporary import scratch_folder
from tasks.bundles.loading import SCORING_ROWS, data_path, fetch_split, load_bundle
from tasks.orchestration.task_calls import TASK_OPTIONS
from tasks.orchestration.workspace import local, store


@task(task_run_name="score", **TASK_OPTIONS)
def score(bundle: Artifact, split: Artifact, rows: int) -> Artifact:
    """Score every row of a prepared split with the torch module.

    The scores serve as soft labels, and to measure the effect of each step of a recipe. They do not
    affect the verdict, which is based on scores of the served graphs in the target's runtime.

    Args:
        bundle: the model.
        split: the prepared rows, whose columns are stored as tensors.
        rows: number of rows.

    Returns:
        The artifact of ``data.safetensors`` with ``score``: the module's scores, float32
        ``(rows,)`` or ``(rows, outputs)``, without conversion of logits to probabilities.

    Raises:
        MetricRefused: a score is not a finite number.
    """
    loaded = load_bundle(bundle)
    signature = loaded.manifest.signature
    split_batches = batches(fetch_split(split, rows), signature, SCORING_ROWS)
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


@task(task_run_name="read the scores of {split}", **TASK_OPTIONS)
def read_scores(
    bundle: Artifact, split: SplitName, columns: tuple[str, ...], forms: tuple[OutputForm, ...]
) -> Artifact:
    """Read scores of a teacher from columns of a bundle's data.

    Args:
        bundle: the bundle with the data.
        split: name of the split.
        columns: the column of each output.
        forms: the form of each column's scores: ``logit``, ``probability`` or ``score``.

    Returns:
        An artifact as returned by ``score``.

    Raises:
        DataRefused: a column is missing, or has values that are no finite numbers, or, for
            probabilities, values outside [0, 1].
    """
    manifest = read(local(bundle))
    score_input = DenseInput(name="scores", columns=columns, shape=(len(columns),))
    changes = {"inputs": (score_input,), "group": None, "time": None, "towers": None, "item": None}
    signature = manifest.signature.remove_labels().model_copy(update=changes)
    with scratch_folder("scores") as scratch:
        prepare(data_path(manifest, split), signature, Path(scratch))
        scores = load_file(Path(scratch) / "data.safetensors")["scores"].clone()
    for index, (column, form) in enumerate(zip(columns, forms, strict=True)):
        values = scores[:, index]
        outside = torch.nonzero((values < 0) | (values > 1)).reshape(-1)
        if form == "probability" and len(outside):
            raise DataRefused(
                "column_no_probability",
                column=column,
                split=split,
                count=len(outside),
                row=int(outside[0]),
                value=float(values[outside[0]]),
            )
    return _store_scores(scores if manifest.signature.has_several_outputs else scores[:, 0])


@task(task_run_name="average the teachers", **TASK_OPTIONS)
def average(
    scores: tuple[Artifact, ...],
    forms: tuple[OutputForm, ...],
    forms_of_teachers: tuple[tuple[OutputForm, ...], ...],
) -> Artifact:
    """Average the predictions of several teachers, row by row.

    Logits and scores are averaged as they are; probabilities are averaged as logits.

    Args:
        scores: the results of ``score`` or ``read_scores`` for each teacher, for the same rows.
        forms: the form of each output of the result.
        forms_of_teachers: for each teacher, the form of each output's scores.

    Returns:
        An artifact as returned by ``score``.
    """
    predictions = [
        convert_scores(
            load_file(local(item) / "data.safetensors")["score"], forms_of_teacher, forms
        )
        for item, forms_of_teacher in zip(scores, forms_of_teachers, strict=True)
    ]
    return _store_scores(mean_predictions(predictions, forms))


def _store_scores(scores: torch.Tensor) -> Artifact:
    with scratch_folder("score") as scratch:
        folder = Path(scratch)
        write(folder / "data.safetensors", {"score": scores.contiguous()})
        return store().put(folder)
