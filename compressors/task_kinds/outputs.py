"""Convert model outputs to logits, and scores of a list to a softmax over the list.

A list is a group of rows that are ranked together, such as the results of one query. ``segment`` is
the index of each row's list, int64 ``(rows,)``; ``groups`` is the number of lists. The share of a
row is its softmax probability within its list.
"""

import torch
from torch import Tensor

from compressors.contracts import Output
from compressors.core.batches import Batch

EDGE = 1e-6
"""Probabilities are clamped to [EDGE, 1 - EDGE], so that their logits are finite."""


def logits(output: Output, values: Tensor) -> Tensor:
    """Convert an output's values, logits or probabilities, to logits."""
    return values if output.form == "logit" else torch.logit(values, eps=EDGE)


def list_indices(batch: Batch, rows: int) -> tuple[Tensor, int]:
    """Return the index of each row's list, int64 ``(rows,)``, and the number of lists.

    If the batch has no groups, it is one list. ``rows`` is the number of rows.
    """
    if batch.group is None:
        return torch.zeros(rows, dtype=torch.int64, device=batch.label.device), 1
    lists, segment = torch.unique(batch.group, return_inverse=True)
    return segment, len(lists)


def sum_by_list(values: Tensor, segment: Tensor, groups: int) -> Tensor:
    """Sum values ``(rows,)`` by list; returns ``(groups,)``."""
    return values.new_zeros(groups).index_add(0, segment, values)


def log_shares(score: Tensor, segment: Tensor, groups: int) -> Tensor:
    """Return each row's log-softmax within its list, ``(rows,)``."""
    largest = score.detach().new_full((groups,), -torch.inf)
    largest = largest.scatter_reduce(0, segment, score.detach(), "amax")
    shifted = score - largest[segment]
    return shifted - sum_by_list(shifted.exp(), segment, groups).log()[segment]


def listwise(score: Tensor, target: Tensor, segment: Tensor, is_used: Tensor) -> Tensor:
    """Compute the softmax cross entropy, averaged over the lists for which ``is_used`` is True.

    Args:
        score: float ``(rows,)``.
        target: the share that each row should have in its list, float ``(rows,)``.
        segment: index of each row's list, int64 ``(rows,)``.
        is_used: bool ``(groups,)``: the lists to average over.

    Returns:
        A scalar; 0 if no list is averaged.
    """
    groups = len(is_used)
    losses = sum_by_list(-target * log_shares(score, segment, groups), segment, groups)
    return (losses * is_used).sum() / is_used.sum().clamp(min=1)
