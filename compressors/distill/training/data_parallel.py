"""Data parallel training: several processes train one network, each on a share of every batch.

Every process (a rank) has the whole network. It computes gradients on its rows and adds them to
those of the other ranks, so all ranks take the same step and end with the same values. Batches, the
validation metric of an epoch and the decision to stop are the same on all ranks. Without a process
group there is one rank, and these functions change nothing.

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
    """The rank of this process, from 0."""
    return distributed.get_rank() if _several() else 0


def rank_share(numbers: Tensor, group: Tensor | None) -> tuple[Tensor, float]:
    """The rows of a batch that this rank computes on, and their weight among all ranks.

    Args:
        numbers: row numbers of the batch, int64 ``(batch,)``.
        group: group of each row, int64 ``(batch,)``, if lists must not be split; otherwise None.

    Returns:
        Row numbers in their original order, possibly none, and a weight; the weights of all ranks
        sum to 1. All rows have equal weight, or all lists if lists are not split.
    """
    if not _several():
        return numbers, 1.0
    ranks, this_rank = distributed.get_world_size(), distributed.get_rank()
    if group is None:
        if len(numbers) < MIN_ROWS * ranks:  # the last batch of an epoch
            return (numbers, 1.0) if this_rank == 0 else (numbers[:0], 0.0)
        rank_rows = numbers[this_rank::ranks]
        return rank_rows, len(rank_rows) / len(numbers)
    lists, list_of_row = torch.unique(group, return_inverse=True)
    if int(torch.bincount(list_of_row % ranks, minlength=ranks).min()) < MIN_ROWS:
        return (numbers, 1.0) if this_rank == 0 else (numbers[:0], 0.0)
    rank_lists = len(range(this_rank, len(lists), ranks))
    return numbers[list_of_row % ranks == this_rank], rank_lists / len(lists)


def sum_gradients(leaves: Collection[Tensor], weight: float, loss: Tensor) -> Tensor:
    """Replace each gradient by the weighted sum over all ranks; returns the same sum of losses.

    A tensor without a gradient on all ranks keeps none.

    Args:
        leaves: the trained tensors, in the same order on every rank.
        weight: weight of this rank.
        loss: loss of this rank, a scalar; zero if it has no rows.
    """
    if not _several():
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
    if not _several():
        return
    for buffer in buffers:
        if buffer.is_floating_point():
            distributed.all_reduce(buffer)
            buffer.div_(distributed.get_world_size())
        else:
            distributed.broadcast(buffer, src=0)


def from_first_rank(value: float, device: torch.device) -> float:
    """The first rank's value: devices differ in the last bits, and all ranks must stop together."""
    if not _several():
        return value
    shared = torch.tensor([value], dtype=torch.float64, device=device)
    distributed.broadcast(shared, src=0)
    return float(shared)


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized()
