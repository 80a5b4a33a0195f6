"""Task kind ``retrieval``: two towers, trained to score a query's item above other items.

The losses compare all queries of a batch with all of its items. They take the vectors of the towers
instead of scores: float ``(rows, 2, dim)``, of the query and of the item of each row.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from compressors.contracts import Output
from compressors.core.batches import Batch
from compressors.metrics.baseline_problem import BaselineProblem
from compressors.task_kinds.protocol import DistillationRows, ScoredSample


@dataclass(frozen=True)
class Retrieval:
    """Losses of retrieval.

    ``hard_loss`` is the softmax cross entropy of each query's item among the items of the batch,
    with the logQ correction: the logarithm of an item's share of the training rows is subtracted
    from its scores, since frequent items occur more often as negatives. ``soft_loss`` is the cross
    entropy between the softmax of the teacher's scores and that of the student's.

    Source: Yi et al. 2019, https://doi.org/10.1145/3298689.3346996, eq. 3 (logQ correction).
    Differs: the shares are counted in the training rows instead of estimated in a stream; other
    positive items of the same query in the batch are no negatives.
    """

    output: Output

    def hard_loss(self, score: Tensor, batch: Batch) -> Tensor:
        """Compute the mean cross entropy of the rows with a positive label.

        Args:
            score: the vectors of both towers, float ``(rows, 2, dim)``.
            batch: labels, items and shares of items; queries are its groups.
        """
        is_positive = batch.label > 0
        if not bool(is_positive.any()):
            return score.sum() * 0  # connected to the network, so that it has a gradient
        scores = scores_of_pairs(score)
        if batch.item_log_share is not None:
            scores = scores - batch.item_log_share
        logits = scores.masked_fill(is_excluded(batch, len(scores), scores.device), -torch.inf)
        losses = logits.logsumexp(dim=1) - logits.diagonal()
        return losses[is_positive].mean()

    def soft_loss(self, rows: DistillationRows, temperature: float) -> Tensor:
        """Compute the mean cross entropy against the softmax of the teacher's scores.

        An item that occurs several times in the batch counts once.
        """
        first = is_first_occurrence(rows.batch, len(rows.student), rows.student.device)
        student = scores_of_pairs(rows.student)[:, first] / temperature
        teacher = scores_of_pairs(rows.teacher)[:, first] / temperature
        target = teacher.softmax(dim=1)
        return -(target * student.log_softmax(dim=1)).sum(dim=1).mean() * temperature**2

    def find_score_problems(self, sample: ScoredSample) -> Iterator[BaselineProblem]:
        """Yield no problem: a sample of rows has no other items to compare with."""
        del sample
        yield from ()


def margin_loss(student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
    """Compute the mean squared error of margins: the score of a query's item minus that of another.

    Args:
        student: the vectors of both towers, float ``(rows, 2, dim)``.
        teacher: the teacher's vectors, float ``(rows, 2, dim of the teacher)``.
        batch: the rows; an item that occurs several times counts once.

    Source: Hofstätter et al. 2020, https://arxiv.org/abs/2010.02666 (margin MSE).
    """
    first = is_first_occurrence(batch, len(student), student.device)
    margins = [
        (scores.diagonal()[:, None] - scores[:, first])
        for scores in (scores_of_pairs(student), scores_of_pairs(teacher))
    ]
    return (margins[0] - margins[1]).square().mean()


def scores_of_pairs(vectors: Tensor) -> Tensor:
    """Return the score of every query with every item, float ``(queries, items)``.

    ``vectors`` has the vectors of query and item of each row, float ``(rows, 2, dim)``.
    """
    return vectors[:, 0] @ vectors[:, 1].T


def is_excluded(batch: Batch, rows: int, device: torch.device) -> Tensor:
    """Return which items of the batch are no negatives of a query, bool ``(rows, rows)``.

    They are the query's item in another row, and other positive items of the query.
    """
    excluded = torch.zeros(rows, rows, dtype=torch.bool, device=device)
    if batch.item is not None:
        excluded |= batch.item[:, None] == batch.item[None, :]
    if batch.group is not None:
        excluded |= (batch.group[:, None] == batch.group[None, :]) & (batch.label > 0)[None, :]
    excluded.fill_diagonal_(fill_value=False)
    return excluded


def is_first_occurrence(batch: Batch, rows: int, device: torch.device) -> Tensor:
    """Return which rows of the batch have an item that no earlier row has, bool ``(rows,)``."""
    if batch.item is None:
        return torch.ones(rows, dtype=torch.bool, device=device)
    _, inverse = torch.unique(batch.item, return_inverse=True)
    first = torch.full((int(inverse.max()) + 1,), rows, device=device)
    first = first.scatter_reduce(0, inverse, torch.arange(rows, device=device), "amin")
    return first[inverse] == torch.arange(rows, device=device)
