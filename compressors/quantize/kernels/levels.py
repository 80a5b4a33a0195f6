"""Even levels for table rows: which there are, which is nearest, and how ends of ranges are stored.

With ``clipping``, which says where a range ends, this is the specification that every faster
kernel keeps to. A weight is stored as ``code * scale + offset`` in one of two kinds of grid:

- *asymmetric*: codes ``0 .. levels - 1``, all of them; ``offset`` is the lowest level.
- *symmetric*: no offset. An odd number of levels has one at zero (255 for int8, 15 for int4,
  codes ``-half .. half``). An even number (4, for 2 bits) lies around zero, ``-1.5, -0.5, 0.5,
  1.5``: with two bits a level at zero would leave only three. Measured on normal rows of 16
  numbers, clipped by squared error, four levels around zero lose 9.7 % of the squares, three with
  a zero 16.5 %, and ``-2 .. 1`` 13.2 %; the same order for Laplace, uniform and Student rows.

A *range* is the rows that share a scale, as one row ``(ranges, values)``.
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
"""How many neighbouring rows share a scale; 0 is the whole table."""

CHUNK = 2**22
"""Values of one range that are looked at together: a whole table may be one range."""
PIECE = 4096
"""Longer ranges are summed in pieces of this length, so that sums do not depend on threads."""

SMALLEST = {torch.float16: 2.0**-24, torch.float32: torch.finfo(torch.float32).tiny}


@dataclass(frozen=True)
class Grid:
    """Which levels there are and how they are fitted."""

    levels: int
    symmetric: bool = True
    clipping: Clipping = "min_max"
    scale: ScaleType = "float16"
    rows_per_scale: int = 1

    @property
    def half(self) -> float:
        """The highest level of a symmetric grid, in scales."""
        return (self.levels - 1) / 2

    @property
    def dtype(self) -> torch.dtype:
        """How scales and offsets are stored."""
        return torch.float16 if self.scale == "float16" else torch.float32


class FittedRange(NamedTuple):
    """Stored scale and offset, ``(ranges, 1)`` each; no offset in a symmetric grid."""

    scale: Tensor
    offset: Tensor | None


def nearest(rows: Tensor, fitted: FittedRange, grid: Grid) -> Tensor:
    """The level nearest to every weight, counted in scales: float32 ``(rows, dim)``.

    Integers in ``0 .. levels - 1``, or in ``-half .. half`` where the grid is symmetric; for an
    even number of symmetric levels halves of odd integers. Ties go to the even integer, and
    between two such halves up.

    Args:
        rows: float, ``(rows, dim)``; the first of them begins a range.
        fitted: of these rows, or of the whole table where that is one range.
        grid: the levels.
    """
    scale = by_row(fitted.scale, len(rows), grid.rows_per_scale)
    offset = fitted.offset
    if offset is not None:
        offset = by_row(offset, len(rows), grid.rows_per_scale)
    return _nearest(rows, scale, offset, grid)


def weights(steps: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """Levels counted in scales, ``(*, dim)``, as float32 weights; scales and offsets ``(*, 1)``.

    The product is rounded before the sum, as every serving target does it.
    """
    scaled = steps * scale.float()
    return scaled if offset is None else scaled + offset.float()


def symmetric_scale(largest: Tensor, grid: Grid) -> Tensor:
    """The scale of ranges that end at ``largest``, float32 ``(ranges, 1)``, as stored.

    Raises:
        CompressionError: a weight is too large for the type of the scales.
    """
    scale = largest / grid.half
    _require_in_range("scale", scale, largest, grid)
    return stored_scale(scale, grid.half, grid)


def asymmetric_ends(low: Tensor, high: Tensor, grid: Grid) -> FittedRange:
    """Scale and offset of ranges from ``low`` to ``high``, float32 ``(ranges, 1)``, as stored.

    The offset is rounded down and the scale reaches from there to ``high``: rounding clips
    nothing, and a row of one value is kept within a rounding of it.

    Raises:
        CompressionError: a weight is too large for the type of the scales.
    """
    _require_in_range("offset", low.abs(), low.abs(), grid)
    low = low + 0.0  # among zeros of both signs either may have been the lowest
    near = low.to(grid.dtype)
    below = torch.nextafter(near, torch.full_like(near, -torch.inf))
    offset = torch.where(near.float() > low, below, near)
    top = grid.levels - 1
    scale = (high - offset.float()).clamp(min=0) / top
    _require_in_range("scale", scale, high, grid)
    return FittedRange(stored_scale(scale, top, grid), offset)


def stored_scale(scale: Tensor, levels: float, grid: Grid) -> Tensor:
    """Scales, float32 ``(ranges, 1)``, as stored: positive, and not too small for ``levels``."""
    # TensorRT wants every scale positive: the smallest stored step stands for "nearly nothing",
    # and a row of zeros has zero codes under any scale.
    smallest = SMALLEST[grid.dtype]
    stored = scale.clamp(min=smallest).to(grid.dtype)
    # Float16 steps evenly by 2^-24 below 2^-14: a scale rounded down there by more than half a
    # level over the whole row would clip the row's largest weights, so it is rounded up.
    clipped = scale * levels > stored.float() * (levels + 0.5)
    return torch.where(clipped, stored + smallest, stored)


def stored_offset(offset: Tensor, grid: Grid) -> Tensor:
    """The nearest offsets, float32 ``(ranges, 1)``, as stored."""
    largest = torch.finfo(grid.dtype).max
    return (offset.clamp(-largest, largest) + 0.0).to(grid.dtype)


def beyond(quantity: str, weight: float, grid: Grid) -> ValueNotStorable:
    """The error of a range whose scale or offset is beyond the type it is stored in.

    Args:
        quantity: ``scale``, ``offset`` or ``scale or offset``.
        weight: the largest of the range.
        grid: its scale type counts.
    """
    if grid.scale == "float16":
        return ValueNotStorable("scale_beyond_float16", quantity=quantity, weight=weight)
    return ValueNotStorable("scale_beyond_float32", quantity=quantity, weight=weight)


def _require_in_range(quantity: str, value: Tensor, weight: Tensor, grid: Grid) -> None:
    if not bool((value > torch.finfo(grid.dtype).max).any()):
        return
    raise beyond(quantity, float(weight.max()), grid)


# --- over ranges -----------------------------------------------------------------------------


def ranges(rows: Tensor, rows_per_scale: int) -> Iterator[Tensor]:
    """The rows with one range a row: as many full ranges as there are, then the last one."""
    count, dim = rows.shape
    together = rows_per_scale or count
    full = count // together * together
    if full:
        yield rows[:full].reshape(-1, together * dim)
    if full < count:
        yield rows[full:].reshape(1, -1)


def ends(values: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest value of every range, float32 ``(ranges, 1)``."""
    parts = [torch.aminmax(part, dim=1, keepdim=True) for part in torch.split(values, CHUNK, dim=1)]
    low = torch.cat([part.min for part in parts], dim=1).amin(dim=1, keepdim=True)
    high = torch.cat([part.max for part in parts], dim=1).amax(dim=1, keepdim=True)
    return low.float(), high.float()


def squared_error(values: Tensor, fitted: FittedRange, grid: Grid) -> Tensor:
    """Sum of squared differences of every range, float32 ``(ranges, 1)``."""
    scale, offset = fitted
    total = []
    for part in torch.split(values, CHUNK, dim=1):
        gap = weights(_nearest(part, scale, offset, grid), scale, offset) - part.float()
        squares = gap.square()
        while squares.shape[1] > PIECE:
            whole = squares.shape[1] // PIECE * PIECE
            sums = squares[:, :whole].reshape(len(squares), -1, PIECE).sum(dim=2)
            squares = torch.cat([sums, squares[:, whole:]], dim=1)
        total.append(squares.sum(dim=1, keepdim=True))
    return torch.stack(total).sum(dim=0)


def by_row(stored: Tensor, rows: int, rows_per_scale: int) -> Tensor:
    """Scales or offsets ``(ranges, 1)`` for each of the rows, or one for all."""
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
