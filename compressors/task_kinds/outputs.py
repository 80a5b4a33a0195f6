"""Outputs of models: as logits, and as shares of the lists that rows form."""

import torch
from torch import Tensor

from compressors.contracts import Output
from compressors.core.batches import Batch

EDGE = 1e-6  # probabilities are clamped to [EDGE, 1 - EDGE], so that their logits are finite


def logits(output: Output, values: Tensor) -> Tensor:
    """Convert the values of an output to logits."""
    return values if output.form == "logit" else torch.logit(values, eps=EDGE)


def segments(batch: Batch, rows: int) -> tuple[Tensor, int]:
    """Return the number of each row's list, int64 ``(rows,)``, and the number of lists.

    Without groups the whole batch is one list.
    """
    if batch.group is None:
        return torch.zeros(rows, dtype=torch.int64, device=batch.label.device), 1
    lists, segment = torch.unique(batch.group, return_inverse=True)
    return segment, len(lists)


def sums(values: Tensor, segment: Tensor, groups: int) -> Tensor:
    """Sum values, ``(rows,)``, by list: ``(groups,)``."""
    return values.new_zeros(groups).index_add(0, segment, values)


def log_shares(score: Tensor, segment: Tensor, groups: int) -> Tensor:
    """Return each row's log-softmax within its list, ``(rows,)``."""
    top = score.detach().new_full((groups,), -torch.inf)
    top = top.scatter_reduce(0, segment, score.detach(), "amax")
    shifted = score - top[segment]
    return shifted - sums(shifted.exp(), segment, groups).log()[segment]


def listwise(score: Tensor, target: Tensor, segment: Tensor, counts: Tensor) -> Tensor:
    """Compute the mean softmax cross entropy of the groups that count."""
    each = sums(-target * log_shares(score, segment, len(counts)), segment, len(counts))
    return (each * counts).sum() / counts.sum().clamp(min=1)
