"""Distillation losses between student and teacher scores: five functions of tensors.

All take the student's and the teacher's scores, float ``(rows,)``. List losses also take
``segment`` int64 ``(rows,)``, the index of each row's list, and ``lists``, the number of lists.
Each loss has its minimum where the student's predictions equal the teacher's. ``margin``,
``listwise`` and ``rankdistil`` do not change if a constant is added to all scores of a list: they
transfer the ranking but not the level, and so not the calibration, which the labels must teach.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from compressors.contracts import Signature
from compressors.core.batches import Batch
from compressors.task_kinds.loss import soft_loss
from compressors.task_kinds.outputs import list_indices, log_shares, logits, sum_by_list

SoftLoss = Literal["task", "pointwise", "margin", "listwise", "rankdistil", "calibrated_listwise"]
OF_LISTS = ("margin", "listwise", "rankdistil", "calibrated_listwise")


def loss_of_teacher(
    name: SoftLoss,
    signature: Signature,
    output: Tensor,
    teacher: Tensor,
    batch: Batch,
    *,
    temperature: float,
    top: int,
) -> Tensor:
    """Compute one of the losses for outputs in the form that the signature declares.

    Lists are the groups of the batch; without a group column the whole batch is one list. The
    predictions of CTR models are compared as logits, scores of a ranking model unchanged.

    Args:
        name: which loss; ``task`` is ``pointwise`` for CTR models and ``listwise`` for ranking
            models.
        signature: kind and form of both outputs.
        output: the student's outputs, float ``(rows,)`` or ``(rows, 1)``.
        teacher: the teacher's outputs for the same rows, float ``(rows,)``.
        batch: its groups are the lists.
        temperature: scores are divided by it before they are compared; the loss is multiplied by
            its square, so that the scale of gradients does not change.
        top: for ``rankdistil``, the number of top rows of a list.

    Returns:
        A scalar.
    """
    if name == "task":
        return soft_loss(signature, output, teacher, batch, temperature)
    declared = signature.single_output
    compares_logits = declared.form != "score" and (
        declared.task_kind.predicts_probability or name in ("pointwise", "calibrated_listwise")
    )
    score = output.reshape(-1)
    if compares_logits:
        score, teacher = logits(declared, score), logits(declared, teacher)
    score, teacher = score / temperature, teacher / temperature
    segment, lists = list_indices(batch, len(score))
    match name:
        case "pointwise":
            loss = pointwise(score, teacher) if compares_logits else F.mse_loss(score, teacher)
        case "margin":
            loss = margin(score, teacher, segment, lists)
        case "listwise":
            loss = listwise(score, teacher, segment, lists)
        case "rankdistil":
            loss = rankdistil(score, teacher, segment, lists, top)
        case "calibrated_listwise":
            loss = calibrated_listwise(score, teacher, segment, lists)
    return loss * temperature**2


def pointwise(score: Tensor, teacher: Tensor) -> Tensor:
    """Binary cross entropy between each row's two probabilities, from logits: a scalar.

    Source: Hinton et al. 2015, https://arxiv.org/abs/1503.02531, with two classes.
    """
    return F.binary_cross_entropy_with_logits(score, torch.sigmoid(teacher))


def margin(score: Tensor, teacher: Tensor, segment: Tensor, lists: int) -> Tensor:
    """Mean squared difference of student and teacher margins, over all pairs of a list: a scalar.

    A margin is the difference of two scores of a list. The mean over the ``n (n - 1)`` pairs of a
    list is twice the sample variance of ``score - teacher``, so its cost is linear in ``n``. Lists
    of one row have no pairs and are ignored.

    Source: Hofstätter et al. 2020, https://arxiv.org/abs/2010.02666 (Margin-MSE). Differs: all
    pairs of a list instead of a relevant and another passage.
    """
    count = sum_by_list(torch.ones_like(score), segment, lists)
    gap = score - teacher
    mean = sum_by_list(gap, segment, lists) / count.clamp(min=1)
    spread = sum_by_list((gap - mean[segment]).square(), segment, lists)
    paired = count > 1
    each = 2 * spread / (count - 1).clamp(min=1)
    return (each * paired).sum() / paired.sum().clamp(min=1)


def listwise(score: Tensor, teacher: Tensor, segment: Tensor, lists: int) -> Tensor:
    """Cross entropy between the softmax shares of each list, the mean over lists: a scalar.

    Source: Cao et al. 2007 (ListNet, top-one probabilities), with the teacher's scores as targets.
    """
    target = log_shares(teacher, segment, lists).exp()
    return -(target * log_shares(score, segment, lists)).sum() / lists


def rankdistil(score: Tensor, teacher: Tensor, segment: Tensor, lists: int, top: int) -> Tensor:
    """RankDistil: match the teacher's order of the top rows and keep other rows below: a scalar.

    For the ``top`` rows of each list by the teacher's scores: cross entropy of softmax shares. For
    each other row: how much further above the last top row the student scores it than the teacher
    does, squared, as a mean over these rows. The teacher's order of the other rows has no effect.

    Source: Reddi et al. 2021, RankDistil, AISTATS (match the order at the top, penalize large
    scores of rows that the teacher ranks low). Differs: the order is matched by ListNet, and
    scores are compared with the last top row instead of an absolute value, so the level is free.
    """
    place = _teacher_ranks(teacher, segment, lists)
    is_top = place < top
    top_segment = segment[is_top]
    target = log_shares(teacher[is_top], top_segment, lists).exp()
    order = -(target * log_shares(score[is_top], top_segment, lists)).sum() / lists
    count = sum_by_list(torch.ones_like(score), segment, lists)
    last = place == (count.clamp(max=top) - 1)[segment]  # one row of each list
    list_of_last = segment[last]
    edge, teacher_edge = score.new_zeros(lists), teacher.new_zeros(lists)
    edge = edge.index_add(0, list_of_last, score[last])
    teacher_edge = teacher_edge.index_add(0, list_of_last, teacher[last])
    above = (score - edge[segment]) - (teacher - teacher_edge[segment])
    rest = (~is_top).to(score.dtype)
    each = sum_by_list(F.relu(above).square() * rest, segment, lists)
    return order + (each / sum_by_list(rest, segment, lists).clamp(min=1)).sum() / lists


def calibrated_listwise(score: Tensor, teacher: Tensor, segment: Tensor, lists: int) -> Tensor:
    """Cross entropy of shares of *probabilities*, from logits, the mean over lists: a scalar.

    With the student's ``p`` and the teacher's ``q`` of a list of ``n`` rows

        loss = -1/n * sum_i q_i log(p_i / sum_j p_j)

    It is linear in ``q``: if teachers differ, or use more information than the student has, its
    minimum is at the shares of their mean, so it never contradicts the labels and ``pointwise``.
    Softmax shares of logits are not linear in ``q``, and can contradict them.

    Source: Gui et al. 2023, https://arxiv.org/abs/2312.08727 (calibration-compatible listwise
    distillation), based on the listwise loss over sigmoids of Bai et al. 2022,
    https://arxiv.org/abs/2211.01494. Differs: weights are the teacher's probabilities, divided by
    the list's length, because shares of the teacher would not be linear in ``q``.
    """
    count = sum_by_list(torch.ones_like(score), segment, lists)
    share = log_shares(F.logsigmoid(score), segment, lists)
    return -(torch.sigmoid(teacher) * share / count[segment]).sum() / lists


def _teacher_ranks(teacher: Tensor, segment: Tensor, lists: int) -> Tensor:
    """Rank of each row in its list by the teacher's scores, from 0; ties keep the order of rows."""
    by_score = teacher.argsort(descending=True, stable=True)
    order = by_score[segment[by_score].argsort(stable=True)]
    count = torch.bincount(segment, minlength=lists)
    begin = count.cumsum(0) - count
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device) - begin[segment[order]]
    return place
