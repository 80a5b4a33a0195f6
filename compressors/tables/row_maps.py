"""Where the row of an id lies in a smaller table: two maps, both of int8 alone.

TensorRT keeps constants of one byte only as int8 behind a DequantizeLinear; uint8 and int16 become
four bytes in its engine without a word. So every map is written in int8, for all targets alike.

*Byte planes* hold any map: one byte a row for up to 256 places, two for up to 65,536, and so on.

*Kept order* holds which rows are kept, where kept ones stay in their order: one byte a row and four
bytes every 128 rows, whatever the table's size. It gives the place of a row among the kept ones,
and equally that of any other row among the others.
"""

import torch
from torch import Tensor

BLOCK = 128
"""Rows that share one count: a place among them takes 7 bits, and the eighth says which kind."""


def bytes_needed(places: int) -> int:
    """How many bytes a row of ``byte_planes`` takes for a number of places."""
    return max(1, -(-(places - 1).bit_length() // 8))


def byte_planes(place: Tensor, places: int) -> Tensor:
    """Places, int ``(rows,)`` in [0, places), as int8 ``(rows, bytes_needed(places))``."""
    planes = [(place >> (8 * plane)) & 255 for plane in range(bytes_needed(places))]
    return (torch.stack(planes, dim=1) - 128).to(torch.int8)


@torch.library.custom_op("recpress::planned_place", mutates_args=())
def planned_place(planes: Tensor, ids: Tensor) -> Tensor:
    """Places from ``byte_planes``: int8 ``(rows, k)``, ids ``(*,)`` -> int64 ``(*ids,)``."""
    digits = planes[ids].to(torch.int64) + 128  # (*ids, k)
    weight = 256 ** torch.arange(planes.shape[1], device=planes.device)  # (k,)
    return (digits * weight).sum(dim=-1)


@planned_place.register_fake
def _(planes: Tensor, ids: Tensor) -> Tensor:
    return planes.new_empty(ids.shape, dtype=torch.int64)


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
