"""Distillation losses between student and teacher scores: five functions of tensors.

The loss of a network with several outputs is the sum of their losses, each times the output's
``loss_weight``. The five functions compute the loss of one output. All take ``score``, the
student's scores, and ``teacher``, the teacher's, both float ``(rows,)``. List losses also take
``list_index`` int64 ``(rows,)``, the index of each row's list, and ``num_lists``, the number of
lists. Each loss has its minimum where the student's predictions equal the teacher's.

``margin``, ``listwise`` and ``rankdistil`` do not change if a constant is added to all scores of a
list. So they transfer the ranking but not the calibration (that predicted probabilities equal
observed rates). Keep some weight on the labels if probabilities are used.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from compressors.contracts import Output, Signature
from compressors.core.batches import Batch
from compressors.core.scores import score_columns, scores_of
from compressors.task_kinds.loss import soft_loss
from compressors.task_kinds.outputs import list_indices, log_shares, logits, sum_by_list

SoftLoss = Literal["task", "pointwise", "margin", "listwise", "rankdistil", "calibrated_listwise"]
LIST_LOSSES = ("margin", "listwise", "rankdistil", "calibrated_listwise")
"""Losses that compare the rows of a list with each other, so a batch must not split lists."""


def loss_of_teacher(
    name: SoftLoss,
    signature: Signature,
    scores: Tensor,
    teacher: Tensor,
    batch: Batch,
    *,
    temperature: float,
    top: int,
) -> Tensor:
    """Compute one of the losses between the scores of two models.

    Lists are the groups of the batch; without a group column, the whole batch is one list.

    Whether scores are converted to logits before they are compared depends on the form that the
    signature declares and on the task. (``task`` follows its own rule, in ``soft_loss``.)

    - The form is ``score``: no conversion. ``pointwise`` is then the mean squared error.
    - The form is ``logit`` or ``probability``, and the task predicts probabilities (CTR): logits.
    - The form is ``logit`` or ``probability`` in another task, such as ranking: logits for
      ``pointwise`` and ``calibrated_listwise``, no conversion for the other losses.

    Args:
        name: which loss; ``task`` is ``pointwise`` for CTR models and ``listwise`` for ranking
            models.
        signature: declares the kind and the form (such as logit) of each output.
        scores: the student's scores, float ``(rows,)`` or ``(rows, outputs)``.
        teacher: the teacher's scores for the same rows, in the same shape.
        batch: the rows, with their groups.
        temperature: scores are divided by it before they are compared; the loss is multiplied by
            its square, so that the scale of gradients does not change.
        top: for ``rankdistil``, the number of top rows of a list.

    Returns:
        A scalar.
    """
    if name == "task":
        return soft_loss(signature, scores, teacher, batch, temperature)
    columns = zip(
        signature.outputs,
        score_columns(scores_of(scores, signature)),
        score_columns(teacher),
        strict=True,
    )
    losses = [
        declared.loss_weight
        * _compute_loss_of_output(
            name, declared, score, teacher_score, batch, temperature=temperature, top=top
        )
        for declared, score, teacher_score in columns
    ]
    return torch.stack(losses).sum()


def _compute_loss_of_output(
    name: SoftLoss,
    declared: Output,
    score: Tensor,
    teacher: Tensor,
    batch: Batch,
    *,
    temperature: float,
    top: int,
) -> Tensor:
    """Compute a loss of one output; arguments as for ``loss_of_teacher``, scores ``(rows,)``."""
    compares_logits = declared.form != "score" and (
        declared.task_kind.predicts_probability or name in ("pointwise", "calibrated_listwise")
    )
    if compares_logits:
        score, teacher = logits(declared, score), logits(declared, teacher)
    score, teacher = score / temperature, teacher / temperature
    list_index, num_lists = list_indices(batch, len(score))
    match name:
        case "pointwise":
            loss = pointwise(score, teacher) if compares_logits else F.mse_loss(score, teacher)
        case "margin":
            loss = margin(score, teacher, list_index, num_lists)
        case "listwise":
            loss = listwise(score, teacher, list_index, num_lists)
        case "rankdistil":
            loss = rankdistil(score, teacher, list_index, num_lists, top)
        case _:
            loss = calibrated_listwise(score, teacher, list_index, num_lists)
    return loss * temperature**2


def pointwise(score: Tensor, teacher: Tensor) -> Tensor:
    """Compute the binary cross entropy between the probabilities of both logits: a scalar.

    Source: Hinton et al. 2015, https://arxiv.org/abs/1503.02531, with two classes.
    """
    return F.binary_cross_entropy_with_logits(score, torch.sigmoid(teacher))


def margin(score: Tensor, teacher: Tensor, list_index: Tensor, num_lists: int) -> Tensor:
    """Compute the mean squared difference of margins, over pairs and then over lists: a scalar.

    A margin is the difference of two scores of a list. The mean over the ``n (n - 1)`` pairs of a
    list is twice the sample variance of ``score - teacher``, so its cost is linear in ``n``. Lists
    of one row have no pairs and are ignored. The result is the mean over the other lists.

    Source: Hofstätter et al. 2020, https://arxiv.org/abs/2010.02666 (Margin-MSE). Differs: all
    pairs of a list, instead of pairs of a relevant and a non-relevant passage.
    """
    count = sum_by_list(torch.ones_like(score), list_index, num_lists)
    difference = score - teacher
    mean = sum_by_list(difference, list_index, num_lists) / count.clamp(min=1)
    squares = sum_by_list((difference - mean[list_index]).square(), list_index, num_lists)
    has_pairs = count > 1
    loss_of_list = 2 * squares / (count - 1).clamp(min=1)  # squares / (count - 1) is the variance
    return (loss_of_list * has_pairs).sum() / has_pairs.sum().clamp(min=1)


def listwise(score: Tensor, teacher: Tensor, list_index: Tensor, num_lists: int) -> Tensor:
    """Compute the cross entropy between two softmax distributions, a mean over lists: a scalar.

    A row's *softmax share* is the softmax of its score over the rows of its list. The teacher's
    shares are the targets for the student's shares.

    Source: Cao et al. 2007 (ListNet, top-one probabilities), with the teacher's scores as targets.
    """
    target = log_shares(teacher, list_index, num_lists).exp()
    return -(target * log_shares(score, list_index, num_lists)).sum() / num_lists


def rankdistil(
    score: Tensor, teacher: Tensor, list_index: Tensor, num_lists: int, top: int
) -> Tensor:
    """Compute RankDistil: match the teacher's order of top rows, keep others below: a scalar.

    The top rows of a list are the ``top`` rows with the teacher's highest scores. The loss of a
    list is the sum of two terms; the result is the mean over lists.

    - Top rows: the cross entropy of softmax shares, as in ``listwise``, over the top rows only.
    - Other rows: with ``d``, a row's score minus the score of the last top row, the mean over these
      rows of ``max(0, d_student - d_teacher) ** 2``. The student need not match the teacher's order
      of these rows.

    Source: Reddi et al. 2021, RankDistil, AISTATS (match the order at the top, penalize large
    scores of rows that the teacher ranks low). Differs: the order is matched by ListNet, and
    scores are compared with the last top row instead of an absolute value, so a constant added to
    all scores does not change the loss.
    """
    rank = _rank_by_teacher(teacher, list_index, num_lists)
    is_top = rank < top
    top_list = list_index[is_top]
    target = log_shares(teacher[is_top], top_list, num_lists).exp()
    top_loss = -(target * log_shares(score[is_top], top_list, num_lists)).sum() / num_lists
    count = sum_by_list(torch.ones_like(score), list_index, num_lists)
    is_last = rank == (count.clamp(max=top) - 1)[list_index]  # the last top row of each list
    list_of_last = list_index[is_last]
    last_score, last_teacher = score.new_zeros(num_lists), teacher.new_zeros(num_lists)
    last_score = last_score.index_add(0, list_of_last, score[is_last])
    last_teacher = last_teacher.index_add(0, list_of_last, teacher[is_last])
    excess = (score - last_score[list_index]) - (teacher - last_teacher[list_index])
    is_other = (~is_top).to(score.dtype)
    summed = sum_by_list(F.relu(excess).square() * is_other, list_index, num_lists)
    others = sum_by_list(is_other, list_index, num_lists).clamp(min=1)
    return top_loss + (summed / others).sum() / num_lists


def calibrated_listwise(
    score: Tensor, teacher: Tensor, list_index: Tensor, num_lists: int
) -> Tensor:
    """Compute the listwise loss of sigmoid probabilities, a mean over lists: a scalar.

    Scores are logits. With the student's probabilities ``p`` and the teacher's ``q`` of a list of
    ``n`` rows,

        loss = -1/n * sum_i q_i log(p_i / sum_j p_j)

    A row's *share* is its probability divided by the sum of the list: ``p_i / sum_j p_j``.

    The loss is linear in ``q``. So if ``q`` varies for the same student inputs (several teachers
    differ, or a teacher uses more information than the student has), the mean loss has its minimum
    where the student's shares are the shares of the mean of ``q``. The minima of ``pointwise`` and
    of the loss on labels agree with this, so the losses do not conflict ("calibration-compatible").
    ``listwise`` is not linear in ``q``, so its minimum may be elsewhere.

    Source: Gui et al. 2023, https://arxiv.org/abs/2312.08727 (calibration-compatible listwise
    distillation), based on the listwise loss over sigmoids of Bai et al. 2022,
    https://arxiv.org/abs/2211.01494. Differs: weights are the teacher's probabilities, divided by
    the list's length, because shares of the teacher would not be linear in ``q``.
    """
    count = sum_by_list(torch.ones_like(score), list_index, num_lists)
    share = log_shares(F.logsigmoid(score), list_index, num_lists)
    return -(torch.sigmoid(teacher) * share / count[list_index]).sum() / num_lists


def _rank_by_teacher(teacher: Tensor, list_index: Tensor, num_lists: int) -> Tensor:
    """Rank each row in its list by the teacher's scores, from 0; ties keep the order of rows."""
    by_score = teacher.argsort(descending=True, stable=True)
    permutation = by_score[list_index[by_score].argsort(stable=True)]
    count = torch.bincount(list_index, minlength=num_lists)
    begin = count.cumsum(0) - count
    rank = torch.empty_like(permutation)
    rank[permutation] = (
        torch.arange(len(permutation), device=permutation.device) - begin[list_index[permutation]]
    )
    return rank
