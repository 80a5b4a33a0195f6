"""Map of kept rows: one byte per row and four bytes per 128 rows.

Kept rows stay in order, so the place of a kept row is the number of kept rows before its block plus
its rank within the block. The same holds for the other rows. The map is int8 because of TensorRT,
as in ``row_map``.
"""

import torch
from torch import Tensor

BLOCK = 128
"""Rows that share one count: a place among them takes 7 bits, and the eighth says which kind."""


def most(score: Tensor, count: int) -> Tensor:
    """Select the ``count`` rows of highest score, bool ``(rows,)``; of equal rows the first."""
    chosen = torch.zeros(len(score), dtype=torch.bool)
    chosen[score.sort(descending=True, stable=True).indices[:count]] = True
    return chosen


def share(counts: Tensor, chosen: Tensor) -> float:
    """Share of all lookups that read the chosen rows; 0 if there are no lookups."""
    return float(counts[chosen].sum() / counts.sum().clamp(min=1))


def kept_order(kept: Tensor) -> tuple[Tensor, Tensor]:
    """Build the map from each row to its place among the kept rows or among the others.

    Args:
        kept: bool ``(rows,)``.

    Returns:
        ``within`` int8 ``(rows,)``: a kept row's rank among the kept rows of its block of 128, or
        -1 minus another row's rank among the others. ``before`` int32 ``(blocks,)``: the number of
        kept rows before each block.
    """
    rows = len(kept)
    rank = kept.cumsum(0) - 1  # among all kept rows; valid only for kept rows
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
    """Look up places in the map of ``kept_order``: int64 ``(*ids,)``.

    For a kept row, its place among the kept rows; else -1 minus its place among the other rows.
    """
    rank, block = within[ids].to(torch.int64), ids.to(torch.int64) // BLOCK
    return before[block].to(torch.int64) + rank - torch.where(rank < 0, BLOCK, 0) * block


@kept_place.register_fake
def _(within: Tensor, before: Tensor, ids: Tensor) -> Tensor:
    return within.new_empty(ids.shape, dtype=torch.int64)
