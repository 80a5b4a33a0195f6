"""Which rows of a table are kept, and where: a byte a row, and four bytes every 128 rows.

Kept rows stay in their order, so a row's place among them is how many come before its block and
its rank within; and equally for the other rows. Written in int8 for TensorRT's sake, as in
``row_map``.
"""

import torch
from torch import Tensor

BLOCK = 128
"""Rows that share one count: a place among them takes 7 bits, and the eighth says which kind."""


def most(score: Tensor, count: int) -> Tensor:
    """Which ``count`` rows have the highest score, bool ``(rows,)``; of equals the first."""
    chosen = torch.zeros(len(score), dtype=torch.bool)
    chosen[score.sort(descending=True, stable=True).indices[:count]] = True
    return chosen


def share(counts: Tensor, chosen: Tensor) -> float:
    """Share of all lookups that read the chosen rows; 0 where there were none."""
    return float(counts[chosen].sum() / counts.sum().clamp(min=1))


def kept_order(kept: Tensor) -> tuple[Tensor, Tensor]:
    """Which rows are kept, as a map from a row to its place among its own kind.

    Args:
        kept: bool ``(rows,)``.

    Returns:
        ``within`` int8 ``(rows,)``: a kept row's rank among the kept rows of its block of 128, or
        -1 minus another row's rank among the others. ``before`` int32 ``(blocks,)``: how many kept
        rows lie before each block.
    """
    rows = len(kept)
    rank = kept.cumsum(0) - 1  # among all kept rows, where the row is one
    other = (~kept).cumsum(0) - 1
    begins = torch.arange(0, rows, BLOCK)
    counted = torch.cat([torch.zeros(1, dtype=torch.int64), kept.cumsum(0)])
    before = counted[begins]  # (blocks,)
    block = torch.arange(rows) // BLOCK
    base = before[block]
    within = torch.where(kept, rank - base, -1 - (other - (block * BLOCK - base)))
    return within.to(torch.int8), before.to(torch.int32)


@torch.library.custom_op("recpress::kept_place", mutates_args=())
def kept_place(within: Tensor, before: Tensor, ids: Tensor) -> Tensor:
    """Places from ``kept_order``, int64 ``(*ids,)``.

    Of a kept row its place among the kept rows; of another row -1 minus its place among the others.
    """
    rank, block = within[ids].to(torch.int64), ids.to(torch.int64) // BLOCK
    return before[block].to(torch.int64) + rank - torch.where(rank < 0, BLOCK, 0) * block


@kept_place.register_fake
def _(within: Tensor, before: Tensor, ids: Tensor) -> Tensor:  # noqa: ARG001
    return within.new_empty(ids.shape, dtype=torch.int64)
