"""Clipping rules: choose the quantization range of a row or of rows that share a scale.

All rules compare squared errors with the *stored* scale and offset, so the comparison includes
their rounding to float16, and no rule is worse than ``min_max``.

- ``min_max``: nothing is clipped.
- ``greedy``: Guan et al. 2019, https://arxiv.org/abs/1911.02079, Algorithm 1 with its 200 bins and
  ratio 0.16. One end at a time moves inwards by a bin, the end that costs less, until 16 % of the
  range are removed; the result is the best range of all steps. Differs: a symmetric range has one
  end, so every step moves it; all ranges are candidates (PyTorch's ``choose_qparams_optimized``
  keeps only local minima); offsets are rounded down, not to the nearest, so that rounding clips
  nothing.
- ``least_squares``: a few ranges, the best of them refitted to its codes; ``least_squares.py``.
- ``mse``: a search for the range of least squared error in steps of a 50th. For symmetric ranges,
  it compares each share from 1 down to 0.5. For asymmetric ranges, it moves both ends together,
  then either end in turn while the error falls, then again in steps of a 200th or of a quarter
  level around the best range. Few levels, or a shared scale, may need less than half a range: a
  symmetric range that was halved is searched again, and an asymmetric range of several rows is also
  searched around the best symmetric range. This rule is not in the paper.
"""

from dataclasses import replace

import torch
from torch import Tensor

from compressors.quantize.kernels.least_squares import least_squares
from compressors.quantize.kernels.levels import (
    FittedRange,
    Grid,
    asymmetric_ends,
    ends,
    ranges,
    squared_error,
    symmetric_scale,
)

SHARES = tuple(1 - place / 50 for place in range(1, 26))
"""What of a symmetric range ``mse`` tries: 0.98 down to 0.5."""
STEPS = 50
"""Into how many steps ``mse`` divides an asymmetric range; either end takes less than half."""
FINE, FINE_STEPS = 200, 3
"""The smaller steps of ``mse``, unless a quarter level is less, and how many it goes each way."""
ROUNDS = 4
"""How often ``mse`` goes through both ends of an asymmetric range at most, in steps of a size."""
OCTAVES = 8
"""How often a symmetric range that was halved is searched again at most."""
BINS, BINS_TAKEN = 200, 32
"""Guan et al.'s bins, and how many of them 16 % are."""
TAKEN = tuple(1 - place / BINS for place in range(1, BINS_TAKEN + 1))
"""What of a symmetric range ``greedy`` tries."""


def fit(rows: Tensor, grid: Grid) -> FittedRange:
    """Fit the scale and the offset of each group of ``rows_per_scale`` rows.

    Args:
        rows: float, ``(rows, dim)``; the first row starts a range. If all rows are one range, they
            are not copied as a whole.
        grid: the levels. The last range has fewer rows if the number of rows does not divide.

    Returns:
        ``scale`` in the grid's type, always positive, and ``offset`` in the same type or None:
        ``(ceil(rows / rows_per_scale), 1)``, or ``(1, 1)`` if the table has one range.

    Raises:
        CompressionError: a weight is too large for the type of the scales.
    """
    if not len(rows) and grid.rows_per_scale:
        none = torch.empty((0, 1), dtype=grid.dtype)
        return FittedRange(none, None if grid.symmetric else none)
    if not len(rows):  # an empty table: one range without weights
        rows = rows.new_zeros((1, rows.shape[1]))
    parts = [_fit(values, grid) for values in ranges(rows, grid.rows_per_scale)]
    offsets = [part.offset for part in parts if part.offset is not None]
    return FittedRange(
        torch.cat([part.scale for part in parts]), torch.cat(offsets) if offsets else None
    )


def _fit(values: Tensor, grid: Grid) -> FittedRange:
    if grid.clipping == "least_squares":
        return least_squares(values, grid)
    low, high = ends(values)
    if grid.symmetric:
        widest = symmetric_scale(torch.maximum(-low, high), grid)
        if grid.clipping == "min_max":
            return FittedRange(widest, None)
        if grid.clipping == "greedy":
            return FittedRange(_best_share(values, widest, TAKEN, grid)[0], None)
        return FittedRange(_least_symmetric(values, widest, grid), None)
    whole = asymmetric_ends(low, high, grid)
    if grid.clipping == "min_max":
        return whole
    if grid.clipping == "greedy":
        return _greedy(values, whole, low, high, grid)
    return _least_asymmetric(values, whole, low, high, grid)


def _searched_again(grid: Grid) -> bool:
    """Whether ``mse`` also searches below half a range.

    A range of one row with 15 levels or more would need over a hundred values before clipping half
    of it could lower the error.
    """
    return grid.levels < 15 or grid.rows_per_scale != 1


# --- one end ---------------------------------------------------------------------------------


def _best_share(
    values: Tensor, widest: Tensor, shares: tuple[float, ...], grid: Grid
) -> tuple[Tensor, Tensor]:
    """The best scale among shares of the widest, and the ranges where it is the last share."""
    best, least = widest, squared_error(values, FittedRange(widest, None), grid)
    better = torch.zeros_like(least, dtype=torch.bool)
    for share in shares:
        scale = (widest.float() * share).to(widest.dtype)
        error = squared_error(values, FittedRange(scale, None), grid)
        better = (error < least) & (scale > 0)
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best, better


def _least_symmetric(values: Tensor, widest: Tensor, grid: Grid) -> Tensor:
    best, last = _best_share(values, widest, SHARES, grid)
    for _ in range(OCTAVES if _searched_again(grid) else 0):
        again = last.squeeze(1)
        if not bool(again.any()):
            break
        found, still = _best_share(_only(values, again), best[again], SHARES, grid)
        best, last = _put(best, again, found), _put(torch.zeros_like(last), again, still)
    return best


# --- two ends --------------------------------------------------------------------------------


def _greedy(
    values: Tensor, whole: FittedRange, low: Tensor, high: Tensor, grid: Grid
) -> FittedRange:
    """Algorithm 1; ``begun`` and ``ended`` count the bins removed at the low and the high end."""
    step = (high - low) / BINS
    begun = ended = torch.zeros_like(low)
    best, least = whole, squared_error(values, whole, grid)
    for _ in range(BINS_TAKEN):
        from_low = asymmetric_ends(low + (begun + 1) * step, high - ended * step, grid)
        from_high = asymmetric_ends(low + begun * step, high - (ended + 1) * step, grid)
        first, second = (squared_error(values, one, grid) for one in (from_low, from_high))
        lower = first < second
        error = torch.where(lower, first, second)
        best = _where(error < least, _where(lower, from_low, from_high), best)
        least = torch.minimum(error, least)
        begun, ended = begun + lower.float(), ended + (~lower).float()
    return best


def _least_asymmetric(
    values: Tensor, whole: FittedRange, low: Tensor, high: Tensor, grid: Grid
) -> FittedRange:
    best, least = _least_ends(values, whole, low, high, grid)
    if grid.rows_per_scale == 1:
        return best
    # A few outliers among many values make the first minimum a poor one: small steps inwards do
    # not lower the error, only a large one does. So search again from 1.25 times the best
    # symmetric range.
    around_zero = replace(grid, symmetric=True)
    widest = symmetric_scale(torch.maximum(-low, high), around_zero)
    reach = 1.25 * grid.half * _least_symmetric(values, widest, around_zero).float()
    low, high = torch.maximum(low, -reach), torch.minimum(high, reach)
    candidate, error = _least_ends(values, asymmetric_ends(low, high, grid), low, high, grid)
    return _where(error < least, candidate, best)


def _least_ends(
    values: Tensor, whole: FittedRange, low: Tensor, high: Tensor, grid: Grid
) -> tuple[FittedRange, Tensor]:
    """The best range, with scale and offset as stored, and its squared error."""
    width, most = high - low, STEPS // 2 - 1
    best, least = whole, squared_error(values, whole, grid)
    begun = ended = torch.zeros_like(low)  # removed at each end, as shares of the width

    def take(first: Tensor, second: Tensor) -> None:
        nonlocal best, least, begun, ended
        tried = asymmetric_ends(low + first * width, high - second * width, grid)
        error = squared_error(values, tried, grid)
        better = error < least
        best, least = _where(better, tried, best), torch.where(better, error, least)
        begun, ended = torch.where(better, first, begun), torch.where(better, second, ended)

    def in_turn(around: bool, step: float, places: range) -> None:
        for _ in range(ROUNDS):
            before, kept = (begun, ended), (begun if around else torch.zeros_like(low), ended)
            for place in places:
                take((kept[0] + place * step).clamp(min=0), kept[1])
            kept = (begun, ended if around else torch.zeros_like(low))
            for place in places:
                take(kept[0], (kept[1] + place * step).clamp(min=0))
            if torch.equal(before[0], begun) and torch.equal(before[1], ended):
                break

    for place in range(1, most + 1):
        both = torch.full_like(low, place / STEPS)
        take(both, both)
    in_turn(around=False, step=1 / STEPS, places=range(most + 1))
    fine = 1 / max(FINE, 4 * (grid.levels - 1))
    in_turn(around=True, step=fine, places=range(-FINE_STEPS, FINE_STEPS + 1))
    return best, least


# --- selection by range ----------------------------------------------------------------------


def _only(values: Tensor, which: Tensor) -> Tensor:
    """Select some of the ranges, without a copy if all are selected."""
    return values if bool(which.all()) else values[which]


def _put(into: Tensor, which: Tensor, values: Tensor) -> Tensor:
    changed = into.clone()
    changed[which] = values
    return changed


def _where(first: Tensor, yes: FittedRange, no: FittedRange) -> FittedRange:
    offset = torch.where(first, _offset(yes), _offset(no))
    return FittedRange(torch.where(first, yes.scale, no.scale), offset)


def _offset(fitted: FittedRange) -> Tensor:
    if fitted.offset is None:
        raise ValueError("an asymmetric range has an offset")
    return fitted.offset
