"""Where the range of a row, or of rows that share a scale, ends: the rules of clipping.

All compare squared errors with the *stored* scale and offset, so what float16 rounds is part of
what is compared, and none is worse than ``min_max``.

- ``min_max``: nothing is clipped.
- ``greedy``: Guan et al. 2019, https://arxiv.org/abs/1911.02079, Algorithm 1 with its 200 bins and
  ratio 0.16: one end at a time moves by a bin, whichever costs less, until 16 % of the range are
  gone; the best range on the way is kept. Differs: a symmetric range has one end, so every step is
  taken; every range on the way counts (PyTorch's ``choose_qparams_optimized`` keeps only local
  minima); offsets are rounded down, not to the nearest, so that nothing is clipped by rounding.
- ``least_squares``: a few ranges, the best of them refitted to its own codes; ``least_squares.py``.
- ``mse``: the range of least squared error among steps of a 50th. A symmetric one takes each
  share from 1 down to 0.5; an asymmetric one moves both ends together first, then either end in
  turn while that helps, then again in steps of a 200th or of a quarter level around what was
  found. Few levels, or a shared scale, may need less than half a range: a symmetric one that was
  halved is searched again, and an asymmetric one of several rows is searched around the best
  symmetric one as well. Not the paper's.
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
    """The scale, and the offset, of every ``rows_per_scale`` rows.

    Args:
        rows: float, ``(rows, dim)``; the first of them begins a range. Where they are one range,
            nothing is copied as a whole.
        grid: the levels. The last range has fewer rows where their number does not divide.

    Returns:
        ``scale`` in the grid's type, always positive, and ``offset`` in the same type or None:
        ``(ceil(rows / rows_per_scale), 1)``, or ``(1, 1)`` for a whole table.

    Raises:
        CompressionError: a weight is too large for the type of the scales.
    """
    if not len(rows) and grid.rows_per_scale:
        none = torch.empty((0, 1), dtype=grid.dtype)
        return FittedRange(none, None if grid.symmetric else none)
    if not len(rows):  # the table's one range, of no weights
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
    """Whether ``mse`` looks below half a range.

    A row of its own with 15 levels and more would need over a hundred values before it could be
    worth clipping half its range.
    """
    return grid.levels < 15 or grid.rows_per_scale != 1


# --- one end ---------------------------------------------------------------------------------


def _best_share(
    values: Tensor, widest: Tensor, shares: tuple[float, ...], grid: Grid
) -> tuple[Tensor, Tensor]:
    """The scale of least squared error among shares of the widest, and where it is the last."""
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
    """Algorithm 1: ``begun`` and ``ended`` count the bins taken at either end."""
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
    # Among many values a few far ones hide the rest: no step towards them lowers the error, only
    # a jump does. The best symmetric range, and a quarter more, is where the search begins anew.
    around_zero = replace(grid, symmetric=True)
    widest = symmetric_scale(torch.maximum(-low, high), around_zero)
    reach = 1.25 * grid.half * _least_symmetric(values, widest, around_zero).float()
    low, high = torch.maximum(low, -reach), torch.minimum(high, reach)
    found, error = _least_ends(values, asymmetric_ends(low, high, grid), low, high, grid)
    return _where(error < least, found, best)


def _least_ends(
    values: Tensor, whole: FittedRange, low: Tensor, high: Tensor, grid: Grid
) -> tuple[FittedRange, Tensor]:
    """The best range found, as stored, and its squared error."""
    width, most = high - low, STEPS // 2 - 1
    best, least = whole, squared_error(values, whole, grid)
    begun = ended = torch.zeros_like(low)  # what was taken at either end, as shares of the width

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


# --- choosing by range -----------------------------------------------------------------------


def _only(values: Tensor, which: Tensor) -> Tensor:
    """Some of the ranges; all of them are not copied."""
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
