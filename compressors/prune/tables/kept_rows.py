"""Map of kept rows: one byte per row and four bytes per 128 rows.

The steps that use the map keep some rows of a table in one table. The other rows are pruned
(``prune_rows.py``) or stored in a second table (``tiers.py``). Both keep their original order. The
new index of a kept row is therefore the number of kept rows before its block of 128 rows, plus its
rank within the block. The index of a row among the other rows is computed alike. Ranks are stored
as int8, because TensorRT stores one-byte constants in one byte only as int8 (``row_map.py`` in this
folder).
"""

import torch
from torch import Tensor

BLOCK = 128
"""Rows per block. A rank in a block takes 7 bits; the sign bit says whether the row is kept."""


def select_highest(score: Tensor, count: int) -> Tensor:
    """Select the ``count`` rows of highest score: bool ``(rows,)``.

    If rows have equal scores, those with smaller ids are selected first.
    """
    chosen = torch.zeros(len(score), dtype=torch.bool)
    chosen[score.sort(descending=True, stable=True).indices[:count]] = True
    return chosen


def lookup_share(counts: Tensor, chosen: Tensor) -> float:
    """Return the share of all lookups that read the chosen rows; 0 if there are no lookups.

    ``counts`` has the lookups of each row, ``chosen`` is bool; both ``(rows,)``.
    """
    return float(counts[chosen].sum() / counts.sum().clamp(min=1))


def build_kept_map(is_kept: Tensor) -> tuple[Tensor, Tensor]:
    """Build the map from each row to its index among the kept rows or among the other rows.

    Args:
        is_kept: bool ``(rows,)``.

    Returns:
        ``within`` int8 ``(rows,)``, the rank of a row within its block of 128 rows: a kept row's
        rank among the kept rows of the block; -1 minus the rank among the other rows of the block
        for a row that is not kept. ``before`` int32 ``(blocks,)``, the number of kept rows before
        each block.
    """
    rows = len(is_kept)
    kept_rank = is_kept.cumsum(0) - 1  # among all kept rows; valid only for kept rows
    other_rank = (~is_kept).cumsum(0) - 1  # among all other rows; valid only for those
    first_rows = torch.arange(0, rows, BLOCK)
    kept_before_row = torch.cat([torch.zeros(1, dtype=torch.int64), is_kept.cumsum(0)])
    before = kept_before_row[first_rows]  # (blocks,)
    block = torch.arange(rows) // BLOCK
    kept_before = before[block]
    other_before = block * BLOCK - kept_before
    within = torch.where(is_kept, kept_rank - kept_before, -1 - (other_rank - other_before))
    return within.to(torch.int8), before.to(torch.int32)


@torch.library.custom_op("recpress::kept_row_index", mutates_args=())
def kept_row_index(within: Tensor, before: Tensor, ids: Tensor) -> Tensor:
    """Look up indices in the map of ``build_kept_map``.

    Args:
        within: int8 ``(rows,)``.
        before: int32 ``(blocks,)``.
        ids: row numbers, integers of any shape.

    Returns:
        Int64 in the shape of ``ids``. For a kept row, its index among the kept rows; for a row that
        is not kept, -1 minus its index among the other rows.
    """
    rank, block = within[ids].to(torch.int64), ids.to(torch.int64) // BLOCK
    # Kept rows (rank >= 0) before the block: ``before``. Index: before + rank.
    # Other rows before the block: BLOCK * block - before. A rank below 0 is -1 minus the rank r
    # among the other rows of the block, and the result is -1 minus their sum:
    # -1 - (r + BLOCK * block - before) = before + rank - BLOCK * block.
    return before[block].to(torch.int64) + rank - torch.where(rank < 0, BLOCK, 0) * block


@kept_row_index.register_fake
def _(within: Tensor, before: Tensor, ids: Tensor) -> Tensor:
    return within.new_empty(ids.shape, dtype=torch.int64)
