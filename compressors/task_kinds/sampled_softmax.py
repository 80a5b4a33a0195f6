"""Softmax cross entropy over a sample of items, as plain functions of tensors.

A sample consists of the items of other rows of the batch, and of items that are drawn uniformly
from the catalogue. An item counts once, and its score is reduced by the logarithm of the
probability that the sample contains it. If all items are drawn, this probability is 1, and the loss
is the softmax cross entropy over the whole catalogue.

Sources: Bengio and Senécal 2008, https://doi.org/10.1109/TNN.2007.912312 (importance sampling for
the softmax); Yi et al. 2019, https://doi.org/10.1145/3298689.3346996 (correction for items of the
batch). Differs: the correction is for a set of different items, so it is the probability of
inclusion instead of the expected number of occurrences.
"""

import torch
from torch import Tensor


def sampled_softmax_losses(
    scores: Tensor, own: Tensor, log_inclusion: Tensor, excluded: Tensor
) -> Tensor:
    """Compute the cross entropy of each row's item among the items of a sample.

    Args:
        scores: the score of each row's query with each item, float ``(rows, items)``.
        own: the column of each row's item, int64 ``(rows,)``.
        log_inclusion: logarithm of the probability that a sample contains the item, float
            ``(items,)``.
        excluded: items that are no negatives of the row's query, bool ``(rows, items)``; False for
            the row's own item.

    Returns:
        float ``(rows,)``.
    """
    logits = (scores - log_inclusion).masked_fill(excluded, -torch.inf)
    return logits.logsumexp(dim=1) - logits.gather(1, own.unsqueeze(1)).squeeze(1)


def log_inclusion_of(log_share: Tensor, rows: int, drawn_share: float) -> Tensor:
    """Compute the logarithm of the probability that a sample contains an item.

    For an item with the share ``p`` of the training rows it is
    ``log(1 - (1 - p)**rows * (1 - drawn_share))``.

    Args:
        log_share: logarithm of ``p``, float ``(items,)``; -inf for an item without a training row.
        rows: number of rows of the batch that contribute items.
        drawn_share: share of the catalogue that is drawn uniformly, above 0 and at most 1.
    """
    not_drawn = torch.log1p(log_share.new_tensor(-drawn_share))
    log_missing = torch.special.xlog1py(rows, -log_share.exp()) + not_drawn
    return torch.log(-torch.expm1(log_missing))
