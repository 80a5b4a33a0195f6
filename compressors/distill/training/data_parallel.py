"""Data parallel training: several processes train one network, each on a share of every batch.

Every process (a rank) has the whole network. It computes gradients on its rows. The gradients of
all ranks are added, so all ranks take the same optimizer step and end with the same values.
Batches, the validation metric of an epoch and the decision to stop are the same on all ranks.
Without a process group there is one rank, and these functions change nothing.

Source: Li et al. 2020, https://arxiv.org/abs/2006.15704 (data parallel training in torch).
Differs: gradients are summed after the backward pass, those of tables as dense tensors; batch norm
uses only the rows of its rank, and its running statistics are averaged once an epoch.
"""

from collections.abc import Collection, Iterable

import torch
from torch import Tensor, distributed

MIN_ROWS = 2
"""Smallest number of rows per rank: batch norm has no variance for one row."""


def rank() -> int:
    """Return the rank of this process, from 0."""
    return distributed.get_rank() if _has_several_ranks() else 0


def rank_share(row_numbers: Tensor, group: Tensor | None) -> tuple[Tensor, float]:
    """Return the rows of a batch that this rank computes on, and their weight among all ranks.

    Args:
        row_numbers: row numbers of the batch, int64 ``(batch,)``.
        group: group of each row, int64 ``(batch,)``, if lists must not be split; otherwise None.

    Returns:
        The row numbers in their original order, possibly none, and the rank's weight. Weights of
        all ranks add up to 1, and are such that all rows have equal weight, or all lists if lists
        are not split.
    """
    if not _has_several_ranks():
        return row_numbers, 1.0
    ranks, this_rank = distributed.get_world_size(), distributed.get_rank()
    if group is None:
        if len(row_numbers) < MIN_ROWS * ranks:  # the last batch of an epoch
            return (row_numbers, 1.0) if this_rank == 0 else (row_numbers[:0], 0.0)
        rank_rows = row_numbers[this_rank::ranks]
        return rank_rows, len(rank_rows) / len(row_numbers)
    lists, list_of_row = torch.unique(group, return_inverse=True)
    # List ``i`` goes to rank ``i % ranks``; if a rank would get too few rows, the first gets all.
    if int(torch.bincount(list_of_row % ranks, minlength=ranks).min()) < MIN_ROWS:
        return (row_numbers, 1.0) if this_rank == 0 else (row_numbers[:0], 0.0)
    rank_lists = len(range(this_rank, len(lists), ranks))
    return row_numbers[list_of_row % ranks == this_rank], rank_lists / len(lists)


def sum_gradients(leaves: Collection[Tensor], weight: float, loss: Tensor) -> Tensor:
    """Replace each gradient by the weighted sum over all ranks; return the weighted sum of losses.

    A tensor that has no gradient on any rank is not changed.

    Args:
        leaves: the trained tensors, in the same order on every rank.
        weight: weight of this rank.
        loss: loss of this rank, a scalar; zero if it has no rows.
    """
    if not _has_several_ranks():
        return loss
    has_gradient = torch.tensor(
        [leaf.grad is not None for leaf in leaves], device=loss.device
    ).int()
    distributed.all_reduce(has_gradient, op=distributed.ReduceOp.MAX)
    total = loss.detach() * weight
    distributed.all_reduce(total)
    for leaf, is_present in zip(leaves, has_gradient.tolist(), strict=True):
        if not is_present:
            continue
        leaf.grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad * weight
        distributed.all_reduce(leaf.grad)
    return total


def average_buffers(buffers: Iterable[Tensor]) -> None:
    """Average float buffers over all ranks, and copy integer buffers from the first rank."""
    if not _has_several_ranks():
        return
    for buffer in buffers:
        if buffer.is_floating_point():
            distributed.all_reduce(buffer)
            buffer.div_(distributed.get_world_size())
        else:
            distributed.broadcast(buffer, src=0)


def broadcast_from_first_rank(value: float, device: torch.device) -> float:
    """Return the first rank's value on all ranks, so that they make the same decisions.

    Values computed on different devices may differ in the last bits.
    """
    if not _has_several_ranks():
        return value
    shared = torch.tensor([value], dtype=torch.float64, device=device)
    distributed.broadcast(shared, src=0)
    return float(shared)


def _has_several_ranks() -> bool:
    return distributed.is_available() and distributed.is_initialized()
