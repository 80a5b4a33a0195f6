"""Evenly spaced levels for table rows: grids, nearest levels, and stored scales and offsets.

The plain torch code here and in ``clipping.py``, which selects the range, specifies the results of
every faster kernel.

A *level* is a number to which weights are rounded: ``multiple * scale + offset``. The *scale* is
the distance of two levels, a *multiple* is a level in units of the scale, and a *grid* is the set
of all multiples. There are two kinds:

- *asymmetric*: the multiples are ``0 .. levels - 1``; ``offset`` is the lowest level.
- *symmetric*: no offset. If the number of levels is odd, one of them is zero: 255 levels for int8
  (multiples ``-127 .. 127``), 15 for int4 (``-7 .. 7``). If it is even (4, for 2 bits), the
  multiples are ``-1.5, -0.5, 0.5, 1.5``, because with a level at zero only three symmetric levels
  would fit in two bits. For rows of 16 normally distributed numbers, clipped by the rule ``mse``,
  the squared error is 9.7 % of the sum of squares with these four levels, 16.5 % with three
  levels including zero, and 13.2 % with ``-2 .. 1``. The ranking is the same for Laplace, uniform
  and Student distributions.

A *range* is the interval from the lowest to the highest level. Weights that share a scale have one
range, so the word also means this group of weights. In a tensor ``(ranges, values)``, each row has
the weights of one group.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from compressors.errors.steps import ValueNotStorable

Clipping = Literal["min_max", "least_squares", "greedy", "mse"]
"""How the range of a group of weights is selected; ``clipping.py`` has the details.

- ``min_max``: the range contains all weights.
- ``least_squares``: compare a few ranges, and refit the best one's scale and offset by regression.
- ``greedy``: shorten the range in small steps, each at the end with the smaller squared error.
- ``mse``: search for the range of least squared error.
"""
ScaleType = Literal["float16", "float32"]
"""Dtype in which scales and offsets are stored."""
RowsPerScale = Literal[
    0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536
]
"""Number of neighbouring rows that share a scale; 0: all rows of the table."""

PART_VALUES = 2**22
"""Values of a range that are processed at once; a whole table may be one range.

This limits the memory for intermediate results.
"""

SUM_VALUES = 4096
"""Values that torch sums in one call; longer ranges are split into parts of this length.

torch sums long rows with several threads, so that the last bits depend on the number of threads.
"""

SMALLEST = {torch.float16: 2.0**-24, torch.float32: torch.finfo(torch.float32).tiny}
"""Smallest scale by the dtype in which it is stored: positive, and normal in float32."""


@dataclass(frozen=True)
class Grid:
    """A grid of levels, and the settings of its scales.

    Attributes:
        levels: number of levels.
        symmetric: whether the levels are symmetric around zero, without an offset.
        clipping: the rule that fits ranges.
        scale: name of the dtype in which scales and offsets are stored.
        rows_per_scale: number of rows that share a scale; 0: all rows of the table.
    """

    levels: int
    symmetric: bool = True
    clipping: Clipping = "min_max"
    scale: ScaleType = "float16"
    rows_per_scale: int = 1

    @property
    def max_multiple(self) -> float:
        """The multiple of the highest level of a symmetric grid: 127 for 255 levels."""
        return (self.levels - 1) / 2

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which scales and offsets are stored."""
        return torch.float16 if self.scale == "float16" else torch.float32


class FittedRange(NamedTuple):
    """Stored scale and offset, ``(ranges, 1)`` each; no offset in a symmetric grid."""

    scale: Tensor
    offset: Tensor | None


def nearest_multiples(rows: Tensor, fitted: FittedRange, grid: Grid) -> Tensor:
    """Return the multiple of the nearest level for every weight: float32 ``(rows, dim)``.

    The results are integers in ``0 .. levels - 1``, or in ``-max_multiple .. max_multiple`` if the
    grid is symmetric. For an even number of symmetric levels they are odd multiples of 0.5. A
    weight halfway between two levels is rounded to the even integer, or up if levels are not
    integers.

    Args:
        rows: float, ``(rows, dim)``; the first row begins a range.
        fitted: scales and offsets of these rows, or those of the table if it has only one range.
        grid: the grid of levels.
    """
    scale = expand_to_rows(fitted.scale, len(rows), grid.rows_per_scale)
    offset = fitted.offset
    if offset is not None:
        offset = expand_to_rows(offset, len(rows), grid.rows_per_scale)
    return _round_to_multiples(rows, scale, offset, grid)


def dequantize(multiples: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """Convert multiples of the scale, ``(*, dim)``, to float32 weights.

    Scales and offsets are ``(*, 1)``. The product is rounded to float32 before the offset is added,
    without a fused multiply-add, as on every serving target.
    """
    scaled = multiples * scale.float()
    return scaled if offset is None else scaled + offset.float()


def symmetric_scale(largest: Tensor, grid: Grid) -> Tensor:
    """Compute the stored scale of ranges from ``-largest`` to ``largest``.

    ``largest`` is float32 ``(ranges, 1)``.

    Raises:
        ValueNotStorable: a scale is too large for the type in which it is stored.
    """
    scale = largest / grid.max_multiple
    _require_in_range("scale", scale, largest, grid)
    return stored_scale(scale, grid.max_multiple, grid)


def asymmetric_range(low: Tensor, high: Tensor, grid: Grid) -> FittedRange:
    """Compute the stored scale and offset of ranges from ``low`` to ``high``.

    Both ends are float32 ``(ranges, 1)``. The offset is rounded down, and the levels reach from
    the rounded offset to ``high``, so that rounding clips nothing. If all values of a row are
    equal, they change only by the rounding of offset and scale.

    Raises:
        ValueNotStorable: a scale or offset is too large for the type in which it is stored.
    """
    _require_in_range("offset", low.abs(), low.abs(), grid)
    # If a row contains both zeros, the minimum may be -0.0 or 0.0. The sum is 0.0 for both, so that
    # every kernel stores the same bits.
    low = low + 0.0
    rounded = low.to(grid.dtype)
    below = torch.nextafter(rounded, torch.full_like(rounded, -torch.inf))
    offset = torch.where(rounded.float() > low, below, rounded)
    top = grid.levels - 1
    scale = (high - offset.float()).clamp(min=0) / top
    _require_in_range("scale", scale, high, grid)
    return FittedRange(stored_scale(scale, top, grid), offset)


def stored_scale(scale: Tensor, top: float, grid: Grid) -> Tensor:
    """Convert scales, float32 ``(ranges, 1)``, to the stored dtype, positive and without clipping.

    Args:
        scale: exact scales, at least 0.
        top: the highest multiple. The end of the range is ``top * scale``. The stored scale is so
            large that the end is at most half a level above the highest level:
            ``top * scale <= (top + 0.5) * stored``.
        grid: the grid with the stored dtype.
    """
    # TensorRT requires positive scales, so tiny scales become the smallest number of the dtype. A
    # row of zeros is exact for any scale, except with four symmetric levels, which have no zero:
    # then the error is half of the smallest scale.
    smallest = SMALLEST[grid.dtype]
    stored = scale.clamp(min=smallest).to(grid.dtype)
    # Float16 numbers below 2^-14 are multiples of 2^-24. If rounding such a scale down shortens the
    # range by more than half a level, the largest weights would be clipped, so it is rounded up.
    clipped = scale * top > stored.float() * (top + 0.5)
    return torch.where(clipped, stored + smallest, stored)


def stored_offset(offset: Tensor, grid: Grid) -> Tensor:
    """Round offsets, float32 ``(ranges, 1)``, to the nearest numbers of the stored dtype."""
    largest = torch.finfo(grid.dtype).max
    return (offset.clamp(-largest, largest) + 0.0).to(grid.dtype)


def scale_error(quantity: str, weight: float, grid: Grid) -> ValueNotStorable:
    """Build the error for a scale or offset that is too large for its stored dtype.

    Args:
        quantity: what is too large: ``scale``, ``offset`` or ``scale or offset``.
        weight: the largest weight of the range.
        grid: the grid; the error names the dtype of its scales.
    """
    if grid.scale == "float16":
        return ValueNotStorable("scale_beyond_float16", quantity=quantity, weight=weight)
    return ValueNotStorable("scale_beyond_float32", quantity=quantity, weight=weight)


def _require_in_range(quantity: str, value: Tensor, weight: Tensor, grid: Grid) -> None:
    """Raise if a scale or offset is too large for its stored dtype.

    Raises:
        ValueNotStorable: names the ``quantity`` and the largest ``weight`` of all ranges.
    """
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
    split = torch.split(values, PART_VALUES, dim=1)
    parts = [torch.aminmax(part, dim=1, keepdim=True) for part in split]
    low = torch.cat([part.min for part in parts], dim=1).amin(dim=1, keepdim=True)
    high = torch.cat([part.max for part in parts], dim=1).amax(dim=1, keepdim=True)
    return low.float(), high.float()


def squared_error(values: Tensor, fitted: FittedRange, grid: Grid) -> Tensor:
    """Return the sum of squared quantization errors of every range, float32 ``(ranges, 1)``."""
    scale, offset = fitted
    total = []
    for part in torch.split(values, PART_VALUES, dim=1):
        error = (
            dequantize(_round_to_multiples(part, scale, offset, grid), scale, offset) - part.float()
        )
        squares = error.square()
        while squares.shape[1] > SUM_VALUES:
            split = squares.shape[1] // SUM_VALUES * SUM_VALUES  # values of complete sums
            sums = squares[:, :split].reshape(len(squares), -1, SUM_VALUES).sum(dim=2)
            squares = torch.cat([sums, squares[:, split:]], dim=1)
        total.append(squares.sum(dim=1, keepdim=True))
    return torch.stack(total).sum(dim=0)


def expand_to_rows(stored: Tensor, rows: int, rows_per_scale: int) -> Tensor:
    """Repeat scales or offsets ``(ranges, 1)`` for each row of their range: ``(rows, 1)``.

    If all rows of the table are one range, the result is ``(1, 1)``.
    """
    if rows_per_scale < 2:
        return stored
    return stored.repeat_interleave(rows_per_scale, dim=0)[:rows]


def _round_to_multiples(values: Tensor, scale: Tensor, offset: Tensor | None, grid: Grid) -> Tensor:
    """Compute ``nearest_multiples`` with one scale and one offset per row, ``(*, 1)`` each."""
    if offset is not None:
        multiples = (values.float() - offset.float()) / scale.float()
        return multiples.round().clamp(0, grid.levels - 1)
    multiples = values.float() / scale.float()
    multiples = multiples.round() if grid.levels % 2 else multiples.floor() + 0.5
    return multiples.clamp(-grid.max_multiple, grid.max_multiple)
