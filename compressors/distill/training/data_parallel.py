"""One training carried out by several processes, each on its share of every batch.

Every process (a rank) holds the whole network, computes on rows of its own and adds its gradients
to those of the others, so all take the same step and end with the same numbers. Which batches
there are, what an epoch was worth and when to stop is the same for all. Where no process group
was started there is one rank, and nothing here does anything.

Source: Li et al. 2020, https://arxiv.org/abs/2006.15704 (data parallel training in torch).
Differs: gradients are added up after the backward pass, tables' as a whole; a batch norm counts
the rows of its own rank, and its running statistics are averaged once an epoch.
"""

from collections.abc import Collection, Iterable

import torch
from torch import Tensor, distributed

LEAST = 2
"""Rows of a batch for each rank: batch norm knows no spread of a single one."""


def rank() -> int:
    """The number of this process, from 0."""
    return distributed.get_rank() if _several() else 0


def rank_share(numbers: Tensor, group: Tensor | None) -> tuple[Tensor, float]:
    """The rows of a batch that this rank computes on, and how much they weigh among all.

    Args:
        numbers: of the batch's rows, int64 ``(batch,)``.
        group: of each row, where lists must stay whole.

    Returns:
        Numbers in the order they had, possibly none, and a weight; those of all ranks add up to 1.
        Rows weigh alike, or lists where they stay whole.
    """
    if not _several():
        return numbers, 1.0
    ranks, mine = distributed.get_world_size(), distributed.get_rank()
    if group is None:
        if len(numbers) < LEAST * ranks:  # the last batch of an epoch
            return (numbers, 1.0) if mine == 0 else (numbers[:0], 0.0)
        held = numbers[mine::ranks]
        return held, len(held) / len(numbers)
    lists, place = torch.unique(group, return_inverse=True)
    if int(torch.bincount(place % ranks, minlength=ranks).min()) < LEAST:
        return (numbers, 1.0) if mine == 0 else (numbers[:0], 0.0)
    own = len(range(mine, len(lists), ranks))
    return numbers[place % ranks == mine], own / len(lists)


def sum_gradients(leaves: Collection[Tensor], weight: float, loss: Tensor) -> Tensor:
    """Replace each gradient by the weighted sum over all ranks; the same sum of their losses.

    A tensor that no rank has a gradient for keeps none.

    Args:
        leaves: what is trained, in the same order on every rank.
        weight: of this rank.
        loss: of this rank, a scalar; zero where it has no rows.
    """
    if not _several():
        return loss
    there = torch.tensor([leaf.grad is not None for leaf in leaves], device=loss.device).int()
    distributed.all_reduce(there, op=distributed.ReduceOp.MAX)
    whole = loss.detach() * weight
    distributed.all_reduce(whole)
    for leaf, wanted in zip(leaves, there.tolist(), strict=True):
        if not wanted:
            continue
        leaf.grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad * weight
        distributed.all_reduce(leaf.grad)
    return whole


def average_buffers(buffers: Iterable[Tensor]) -> None:
    """Give all ranks the mean of what each has counted, and the first rank's whole numbers."""
    if not _several():
        return
    for buffer in buffers:
        if buffer.is_floating_point():
            distributed.all_reduce(buffer)
            buffer.div_(distributed.get_world_size())
        else:
            distributed.broadcast(buffer, src=0)


def from_first_rank(value: float, device: torch.device) -> float:
    """What the first rank found: devices may differ in the last bits, and all must stop alike."""
    if not _several():
        return value
    shared = torch.tensor([value], dtype=torch.float64, device=device)
    distributed.broadcast(shared, src=0)
    return float(shared)


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized()
