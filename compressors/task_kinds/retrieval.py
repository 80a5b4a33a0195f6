"""Task kind ``retrieval``: two towers, trained to score a query's item above other items.

The losses compare every query of a batch with every item of the batch, and with the items that were
drawn from the catalogue for the batch, if any. Their input is not scores but the vectors of the
towers, float ``(rows, 2, dim)``: index 0 is the query, 1 the item. Drawn items are further rows,
whose query vector is zero (``compressors.core.scores.training_output``).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from compressors.contracts import Output
from compressors.core.batches import Batch, SampledItems
from compressors.metrics.baseline_problem import BaselineProblem
from compressors.task_kinds.protocol import DistillationRows, ScoredSample
from compressors.task_kinds.sampled_softmax import log_inclusion_of, sampled_softmax_losses


@dataclass(frozen=True)
class Retrieval:
    """Losses of retrieval.

    ``hard_loss`` is the softmax cross entropy of each query's item among the items of the batch,
    with the logQ correction: the logarithm of an item's share of the training rows is subtracted
    from its scores, since frequent items occur more often as negatives. ``soft_loss`` is the cross
    entropy between the softmax of the teacher's scores and that of the student's.

    ``soft_loss`` counts each different item of the batch once. If the batch has items that were
    drawn from the catalogue, both losses compare each query with them too, ``hard_loss`` also
    counts each different item once, and its correction is that of ``sampled_softmax.py``.

    Source: Yi et al. 2019, https://doi.org/10.1145/3298689.3346996, eq. 3 (logQ correction).
    Differs: the shares are counted in the training rows instead of estimated in a stream; other
    positive items of the same query in the batch are no negatives.
    """

    output: Output

    def hard_loss(self, score: Tensor, batch: Batch) -> Tensor:
        """Compute the mean cross entropy of the rows with a positive label.

        Args:
            score: the vectors of both towers, float ``(rows, 2, dim)``, and those of drawn items as
                further rows.
            batch: labels, items and shares of items; queries are its groups.
        """
        is_positive = batch.label > 0
        if not bool(is_positive.any()):
            return score.sum() * 0  # connected to the network, so that it has a gradient
        scores = scores_of_pairs(score, batch)
        if batch.sampled is not None:
            return _sampled_losses(scores, batch, batch.sampled)[is_positive].mean()
        if batch.item_log_share is not None:
            scores = scores - batch.item_log_share
        logits = scores.masked_fill(is_excluded(batch), -torch.inf)
        losses = logits.logsumexp(dim=1) - logits.diagonal()
        return losses[is_positive].mean()

    def soft_loss(self, rows: DistillationRows, temperature: float) -> Tensor:
        """Compute the mean cross entropy against the softmax of the teacher's scores.

        An item that occurs several times in the batch counts once.
        """
        counted = is_counted(rows.batch)
        student = scores_of_pairs(rows.student, rows.batch)[:, counted] / temperature
        teacher = scores_of_pairs(rows.teacher, rows.batch)[:, counted] / temperature
        target = teacher.softmax(dim=1)
        return -(target * student.log_softmax(dim=1)).sum(dim=1).mean() * temperature**2

    def find_score_problems(self, sample: ScoredSample) -> Iterator[BaselineProblem]:
        """Yield no problem: without other items to rank, the score of a row reveals none."""
        del sample
        yield from ()


def margin_loss(student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
    """Compute the mean squared error of margins: the score of a query's item minus that of another.

    Args:
        student: the vectors of both towers, float ``(rows, 2, dim)``, and those of drawn items as
            further rows.
        teacher: the teacher's vectors, float ``(rows, 2, dim of the teacher)``, likewise.
        batch: the rows; an item that occurs several times counts once.

    Source: Hofstätter et al. 2020, https://arxiv.org/abs/2010.02666 (margin MSE).
    """
    counted = is_counted(batch)
    margins = [
        (scores.diagonal()[:, None] - scores[:, counted])
        for scores in (scores_of_pairs(student, batch), scores_of_pairs(teacher, batch))
    ]
    return (margins[0] - margins[1]).square().mean()


def scores_of_pairs(vectors: Tensor, batch: Batch) -> Tensor:
    """Return the score of every query with every item, float ``(rows, rows + sampled)``.

    ``vectors`` has the vectors of query and item of each row, float ``(rows, 2, dim)``, and those
    of drawn items as further rows.
    """
    return vectors[: len(batch.label), 0] @ vectors[:, 1].T


def is_excluded(batch: Batch) -> Tensor:
    """Return which items of the batch are no negatives of a query, bool ``(rows, rows)``.

    They are the query's item in another row, and other positive items of the query.
    """
    excluded = _is_positive_pair(batch)
    if batch.item is not None:
        excluded |= batch.item[:, None] == batch.item[None, :]
    excluded.fill_diagonal_(fill_value=False)
    return excluded


def is_counted(batch: Batch) -> Tensor:
    """Return which items a loss compares with queries, each once, bool ``(rows + sampled,)``.

    They are the first occurrence of each item in the batch, and drawn items that no row has.
    """
    first = first_rows(batch)
    is_first = first == torch.arange(len(first), device=first.device)
    if batch.sampled is None or batch.item is None:
        return is_first
    return torch.cat([is_first, ~torch.isin(batch.sampled.item, batch.item)])


def first_rows(batch: Batch) -> Tensor:
    """Return for each row the first row of the batch that has its item, int64 ``(rows,)``."""
    device, rows = batch.label.device, len(batch.label)
    numbers = torch.arange(rows, device=device)
    if batch.item is None:
        return numbers
    _, inverse = torch.unique(batch.item, return_inverse=True)
    first = torch.full((int(inverse.max()) + 1,), rows, device=device)
    return first.scatter_reduce(0, inverse, numbers, "amin")[inverse]


def _is_positive_pair(batch: Batch) -> Tensor:
    """Return a matrix, bool ``(rows, rows)``: row j has a positive item of the query of row i."""
    if batch.group is None:
        rows = len(batch.label)
        return torch.zeros(rows, rows, dtype=torch.bool, device=batch.label.device)
    return (batch.group[:, None] == batch.group[None, :]) & (batch.label > 0)[None, :]


def _sampled_losses(scores: Tensor, batch: Batch, sampled: SampledItems) -> Tensor:
    """Compute the loss of each row among the different items of the batch and the drawn items.

    Args:
        scores: float ``(rows, rows + sampled)``.
        batch: the rows.
        sampled: the drawn items.

    Returns:
        float ``(rows,)``.
    """
    assert batch.item_log_share is not None  # noqa: S101 - items are drawn only if rows have shares
    counted, rows = is_counted(batch), len(batch.label)
    own = (counted.cumsum(0) - 1)[first_rows(batch)]  # the column of each row's item
    shares = torch.cat([batch.item_log_share, sampled.item_log_share])[counted]
    excluded = torch.zeros(rows, len(shares), dtype=torch.bool, device=scores.device)
    query, row = _is_positive_pair(batch).nonzero(as_tuple=True)
    excluded[query, own[row]] = True
    excluded[torch.arange(rows, device=scores.device), own] = False
    # The other rows of the batch are ``rows - 1`` draws of an item.
    log_inclusion = log_inclusion_of(shares, rows - 1, sampled.drawn_share)
    return sampled_softmax_losses(scores[:, counted], own, log_inclusion, excluded)
