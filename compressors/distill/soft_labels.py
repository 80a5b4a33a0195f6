"""The loss of a student: the teacher's predictions (soft labels), mixed with the labels.

Source: Hinton et al. 2015, https://arxiv.org/abs/1503.02531 (soft targets with a temperature).
"""

import copy
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn

from compressors.contracts import Bench, Signature, Split
from compressors.contracts.task_kind import OutputForm
from compressors.core.batches import Batch, JoinedRows, Rows
from compressors.core.scores import join_columns, score_columns, training_output
from compressors.core.units import private_copy
from compressors.distill.losses import SoftLoss, loss_of_teacher
from compressors.distill.training.trainer import Loss
from compressors.errors.steps import RowsMissing
from compressors.task_kinds.loss import hard_loss, soft_loss
from compressors.task_kinds.outputs import EDGE
from compressors.task_kinds.retrieval import margin_loss

TrainingRows = Literal["train", "traffic", "both"]
"""Which rows to train on: rows with labels, rows of logged traffic without labels, or both."""


def soft_label_loss(
    bench: Bench,
    soft_share: float,
    temperature: float,
    kind: str,
    *,
    name: SoftLoss = "task",
    top: int = 10,
    rows: TrainingRows = "train",
    predictions: Callable[[], Tensor] | None = None,
    original: nn.Module | None = None,
) -> Loss:
    """Build the loss on soft labels and labels.

    It is the loss on soft labels times ``soft_share``, plus the loss on labels times
    ``1 - soft_share``. Traffic rows (logged requests) have no label. The loss on labels is a mean
    over the labelled rows or lists of a batch, so other rows do not change it.

    Args:
        bench: provides the rows and the teacher's predictions for them.
        soft_share: weight of the teacher's predictions; labels get the rest.
        temperature: both predictions are divided by it before they are compared.
        kind: the kind of the calling step, for error messages.
        name: name of the loss between student and teacher.
        top: number of top rows, for the loss ``rankdistil``.
        rows: which rows are used.
        predictions: function that returns the predictions to compare with the teacher; if None,
            the network's output is compared.
        original: the original network, whose vectors are the soft labels of a model with two
            towers; not used for other models.

    Raises:
        RowsMissing: there are no soft labels, or their number differs from that of the rows; or a
            model with two towers has no original.
    """
    if not bench.signature.scores_rows:
        if original is None:
            raise RowsMissing("soft_labels_missing", step=kind)
        return _build_vector_loss(bench.signature, original, soft_share, temperature, name)
    teacher = torch.cat(
        [
            _read_predictions(split, soft_split, kind)
            for split, soft_split, used_for in (
                (bench.train, bench.soft_labels, ("train", "both")),
                (bench.traffic, bench.traffic_soft_labels, ("traffic", "both")),
            )
            if rows in used_for
        ]
    )

    def loss(output: Tensor, batch: Batch, row_numbers: Tensor) -> Tensor:
        soft = loss_of_teacher(
            name,
            bench.signature,
            output if predictions is None else predictions(),
            teacher[row_numbers].to(output.device),
            batch,
            temperature=temperature,
            top=top,
        )
        if soft_share == 1:
            return soft
        hard = hard_loss(bench.signature, output, batch)
        return soft_share * soft + (1 - soft_share) * hard

    return loss


def _build_vector_loss(
    signature: Signature,
    original: nn.Module,
    soft_share: float,
    temperature: float,
    name: SoftLoss,
) -> Loss:
    """Build the loss on the original's vectors and the labels, for a model with two towers."""
    on_cpu = private_copy(original).eval()

    @functools.cache
    def teacher_on(device: torch.device) -> nn.Module:
        # ``to`` replaces tensors in place, and the copy shares its tensors with the original.
        return on_cpu if device.type == "cpu" else copy.deepcopy(on_cpu).to(device)

    def loss(output: Tensor, batch: Batch, row_numbers: Tensor) -> Tensor:
        with torch.no_grad():
            teacher = teacher_on(output.device)
            vectors = training_output(teacher, batch.inputs, signature, batch.sampled).float()
        if name == "margin":
            soft = margin_loss(output, vectors, batch)
        else:
            soft = soft_loss(signature, output, vectors, batch, temperature)
        if soft_share == 1:
            return soft
        return soft_share * soft + (1 - soft_share) * hard_loss(signature, output, batch)

    return loss


def soft_label_rows(bench: Bench, rows: TrainingRows, kind: str) -> Rows | JoinedRows:
    """Return the training rows, in the order that ``soft_label_loss`` expects.

    Raises:
        RowsMissing: the bench lacks them.
    """
    labelled = None
    if rows != "traffic":
        if bench.train is None:
            raise RowsMissing("train_rows_missing", step=kind)
        labelled = Rows(bench.train, bench.signature)
        if rows == "train":
            return labelled
    if bench.traffic is None:
        raise RowsMissing("traffic_rows_missing", step=kind)
    return JoinedRows(labelled, Rows(bench.traffic, bench.signature))


def mean_predictions(scores: list[Tensor], forms: Sequence[OutputForm]) -> Tensor:
    """Average the predictions of several teachers: the mean of their logits or scores.

    Probabilities are converted to logits, averaged and converted back. This is the geometric mean
    of odds, in which a confident teacher has more weight than in a mean of probabilities. Scores of
    ranking models have no common unit: a teacher whose scores have ten times the standard deviation
    has ten times the weight.

    Args:
        scores: one float32 ``(rows,)`` or ``(rows, outputs)`` per teacher.
        forms: the form of each output.
    """
    if len(scores) == 1:
        return scores[0]
    by_output = zip(*map(score_columns, scores), strict=True)
    means = [
        _average_over_teachers(torch.stack(of_teachers).to(torch.float64), form)
        for of_teachers, form in zip(by_output, forms, strict=True)
    ]
    return join_columns(means).to(torch.float32)


def convert_scores(
    scores: Tensor, forms: Sequence[OutputForm], target_forms: Sequence[OutputForm]
) -> Tensor:
    """Convert a teacher's scores to the forms of the student's outputs.

    Args:
        scores: float ``(rows,)`` or ``(rows, outputs)``.
        forms: the form of each output of the teacher.
        target_forms: the form of each output of the student: the same, or ``logit`` for
            ``probability`` or the reverse.
    """
    if tuple(forms) == tuple(target_forms):
        return scores
    columns = []
    for column, form, target in zip(score_columns(scores), forms, target_forms, strict=True):
        if (form, target) == ("probability", "logit"):
            columns.append(torch.logit(column.double(), eps=EDGE).to(torch.float32))
        elif (form, target) == ("logit", "probability"):
            columns.append(torch.sigmoid(column))
        else:
            columns.append(column)
    return join_columns(columns)


def _average_over_teachers(scores: Tensor, form: OutputForm) -> Tensor:
    """Average the scores ``(teachers, rows)`` of one output over the teachers."""
    if form != "probability":
        return scores.mean(dim=0)
    # Probabilities are clamped to [EDGE, 1 - EDGE], so that their logits are finite.
    return torch.sigmoid(torch.logit(scores, eps=EDGE).mean(dim=0))


def _read_predictions(split: Split | None, soft: Split | None, kind: str) -> Tensor:
    """Read the teacher's stored scores of a split, ``(rows,)`` or ``(rows, outputs)``."""
    if split is None or soft is None:
        raise RowsMissing("soft_labels_missing", step=kind)
    with safe_open(Path(soft.path) / "data.safetensors", framework="pt") as file:
        teacher: Tensor = file.get_tensor("score")
    if len(teacher) != split.rows:
        raise RowsMissing("soft_labels_differ", step=kind, got=len(teacher), expected=split.rows)
    return teacher


def build_mixed_loss(
    bench: Bench,
    soft_share: float,
    temperature: float,
    kind: str,
    original: nn.Module | None = None,
) -> Loss:
    """Build the loss of ``soft_label_loss``, or only the loss on the labels if ``soft_share`` is 0.

    Raises:
        RowsMissing: there are no soft labels, or their number differs from the number of rows.
    """
    if soft_share:
        return soft_label_loss(bench, soft_share, temperature, kind, original=original)

    def loss(output: Tensor, batch: Batch, row_numbers: Tensor) -> Tensor:
        return hard_loss(bench.signature, output, batch)

    return loss
