"""Evenly spaced levels for table rows: grids, nearest levels, and stored scales and offsets.

Together with ``clipping``, which selects the range, this is the specification of every faster
kernel. A weight is approximated by ``code * scale + offset`` in one of two kinds of grid:

- *asymmetric*: all codes ``0 .. levels - 1``; ``offset`` is the lowest level.
- *symmetric*: no offset. An odd number of levels has one at zero (255 for int8, 15 for int4,
  codes ``-half .. half``). An even number (4, for 2 bits) is placed around zero, ``-1.5, -0.5,
  0.5, 1.5``: with two bits, a level at zero would leave only three levels. On normal rows of 16
  numbers, clipped by squared error, four levels around zero lose 9.7 % of the sum of squares,
  three with a zero 16.5 %, and ``-2 .. 1`` 13.2 %; the order is the same for Laplace, uniform and
  Student rows.

A *range* is the group of all weights that share a scale, and the interval that its levels cover;
tensors of ranges are ``(ranges, values)``. *Steps* are levels as multiples of the scale.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from compressors.errors.steps import ValueNotStorable

Clipping = Literal["min_max", "least_squares", "greedy", "mse"]
ScaleType = Literal["float16", "float32"]
RowsPerScale = Literal[
    0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536
]
"""Number of neighbouring rows that share a scale; 0: all rows of the table."""

CHUNK = 2**22
"""Values of one range that are processed at once: a whole table may be one range."""

PIECE = 4096
"""Longer ranges are summed in pieces of this length, so that sums do not depend on threads."""

SMALLEST = {torch.float16: 2.0**-24, torch.float32: torch.finfo(torch.float32).tiny}


@dataclass(frozen=True)
class Grid:
    """A grid of levels, and the settings of its scales.

    Attributes:
        levels: number of levels.
        symmetric: whether the levels are symmetric around zero, without an offset.
        clipping: the rule that fits ranges.
        scale: dtype of stored scales and offsets.
        rows_per_scale: number of rows that share a scale; 0: all rows of the table.
    """

    levels: int
    symmetric: bool = True
    clipping: Clipping = "min_max"
    scale: ScaleType = "float16"
    rows_per_scale: int = 1

    @property
    def half(self) -> float:
        """The highest level of a symmetric grid, as a multiple of the scale."""
        return (self.levels - 1) / 2

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which scales and offsets are stored."""
        return torch.float16 if self.scale == "float16" else torch.float32


class FittedRange(NamedTuple):
    """Stored scale and offset, ``(ranges, 1)`` each; no offset in a symmetric grid."""

    scale: Tensor
    offset: Tensor | None


def nearest(rows: Tensor, fitted: FittedRange, grid: Grid) -> Tensor:
    """Return the nearest level of every weight as a multiple of the scale: float32 ``(rows, dim)``.

    The results are integers in ``0 .. levels - 1``, or in ``-half .. half`` if the grid is
    symmetric; for an even number of symmetric levels they are halves of odd integers. A tie between
    integers is rounded to the even one; a tie between halves is rounded up.

    Args:
        rows: float, ``(rows, dim)``; the first row begins a range.
        fitted: scales and offsets of these rows, or those of the table if it has one range.
        grid: the levels.
    """
    scale = by_row(fitted.scale, len(rows), grid.rows_per_scale)
    offset = fitted.offset
    if offset is not None:
        offset = by_row(offset, len(rows), grid.rows_per_scale)
    return _nearest(rows, scale, offset, grid)


def decode_steps(steps: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """Decode multiples of the scale, ``(*, dim)``, to float32 weights.

    Scales and offsets are ``(*, 1)``. The product is rounded before the sum, as on every serving
    target.
    """
    scaled = steps * scale.float()
    return scaled if offset is None else scaled + offset.float()


def symmetric_scale(largest: Tensor, grid: Grid) -> Tensor:
    """Return the stored scale of ranges from ``-largest`` to ``largest``, float32 ``(ranges, 1)``.

    Raises:
        ValueNotStorable: a scale or offset is too large for the type in which it is stored.
    """
    scale = largest / grid.half
    _require_in_range("scale", scale, largest, grid)
    return stored_scale(scale, grid.half, grid)


def asymmetric_ends(low: Tensor, high: Tensor, grid: Grid) -> FittedRange:
    """Return stored scale and offset of ranges from ``low`` to ``high``, float32 ``(ranges, 1)``.

    The offset is rounded down, and the scale covers the range from there to ``high``, so that
    rounding clips nothing. A row of equal values changes only by rounding.

    Raises:
        ValueNotStorable: a scale or offset is too large for the type in which it is stored.
    """
    _require_in_range("offset", low.abs(), low.abs(), grid)
    low = low + 0.0  # the minimum may be -0.0 or 0.0; the sum is 0.0
    near = low.to(grid.dtype)
    below = torch.nextafter(near, torch.full_like(near, -torch.inf))
    offset = torch.where(near.float() > low, below, near)
    top = grid.levels - 1
    scale = (high - offset.float()).clamp(min=0) / top
    _require_in_range("scale", scale, high, grid)
    return FittedRange(stored_scale(scale, top, grid), offset)


def stored_scale(scale: Tensor, levels: float, grid: Grid) -> Tensor:
    """Convert scales, float32 ``(ranges, 1)``, to the stored dtype: positive and large enough.

    ``levels + 0.5`` times the stored scale is at least ``levels`` times the given scale.
    """
    # TensorRT requires positive scales: tiny scales become the smallest stored step, and a row of
    # zeros has zero codes for any scale.
    smallest = SMALLEST[grid.dtype]
    stored = scale.clamp(min=smallest).to(grid.dtype)
    # Float16 is evenly spaced by 2^-24 below 2^-14. If rounding a scale down there shortens the
    # range by more than half a level, the largest weights would be clipped, so it is rounded up.
    clipped = scale * levels > stored.float() * (levels + 0.5)
    return torch.where(clipped, stored + smallest, stored)


def stored_offset(offset: Tensor, grid: Grid) -> Tensor:
    """Round offsets, float32 ``(ranges, 1)``, to the nearest numbers of the stored dtype."""
    largest = torch.finfo(grid.dtype).max
    return (offset.clamp(-largest, largest) + 0.0).to(grid.dtype)


def scale_error(quantity: str, weight: float, grid: Grid) -> ValueNotStorable:
    """Build the error for a scale or offset that is too large for its stored dtype.

    Args:
        quantity: ``scale``, ``offset`` or ``scale or offset``.
        weight: the largest weight of the range.
        grid: the grid with the type of the scales.
    """
    if grid.scale == "float16":
        return ValueNotStorable("scale_beyond_float16", quantity=quantity, weight=weight)
    return ValueNotStorable("scale_beyond_float32", quantity=quantity, weight=weight)


def _require_in_range(quantity: str, value: Tensor, weight: Tensor, grid: Grid) -> None:
    if not bool((value > torch.finfo(grid.dtype).max).any()):
        return
    raise scale_error(quantity, float(weight.max()), grid)


# --- functions of ranges ---------------------------------------------------------------------


def split_into_ranges(rows: Tensor, rows_per_scale: int) -> Iterator[Tensor]:
    """Yield the rows reshaped to one range per row: all full ranges, then a shorter last one."""
    count, dim = rows.shape
    rows_per_range = rows_per_scale or count
    full = count // rows_per_range * rows_per_range
    if full:
        yield rows[:full].reshape(-1, rows_per_range * dim)
    if full < count:
        yield rows[full:].reshape(1, -1)


def range_bounds(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest value of every range, float32 ``(ranges, 1)``."""
    parts = [torch.aminmax(part, dim=1, keepdim=True) for part in torch.split(values, CHUNK, dim=1)]
    low = torch.cat([part.min for part in parts], dim=1).amin(dim=1, keepdim=True)
    high = torch.cat([part.max for part in parts], dim=1).amax(dim=1, keepdim=True)
    return low.float(), high.float()


def squared_error(values: Tensor, fitted: FittedRange, grid: Grid) -> Tensor:
    """Return the sum of squared quantization errors of every range, float32 ``(ranges, 1)``."""
    scale, offset = fitted
    total = []
    for part in torch.split(values, CHUNK, dim=1):
        error = decode_steps(_nearest(part, scale, offset, grid), scale, offset) - part.float()
        squares = error.square()
        while squares.shape[1] > PIECE:
            whole = squares.shape[1] // PIECE * PIECE
            sums = squares[:, :whole].reshape(len(squares), -1, PIECE).sum(dim=2)
            squares = torch.cat([sums, squares[:, whole:]], dim=1)
        total.append(squares.sum(dim=1, keepdim=True))
    return torch.stack(total).sum(dim=0)


def by_row(stored: Tensor, rows: int, rows_per_scale: int) -> Tensor:
    """Repeat scales or offsets ``(ranges, 1)`` for each row: ``(rows, 1)``.

    If all rows share one, it stays ``(1, 1)``.
    """
    if rows_per_scale < 2:
        return stored
    return stored.repeat_interleave(rows_per_scale, dim=0)[:rows]


def _nearest(values: Tensor, scale: Tensor, offset: Tensor | None, grid: Grid) -> Tensor:
    if offset is not None:
        steps = (values.float() - offset.float()) / scale.float()
        return steps.round().clamp(0, grid.levels - 1)
    steps = values.float() / scale.float()
    steps = steps.round() if grid.levels % 2 else steps.floor() + 0.5
    return steps.clamp(-grid.half, grid.half)
