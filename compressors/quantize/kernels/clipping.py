"""Clipping rules: choose the quantization range of a row or of rows that share a scale.

A *range* is a group of weights that share a scale, and also the interval that its levels cover. A
symmetric range reaches from ``-end`` to ``end``; an asymmetric range has two independent ends. All
rules compare the squared errors with the *stored* scale and offset. So the comparison includes
their rounding to float16, and no rule has a larger error than ``min_max``.

- ``min_max``: the range contains all weights, and none is clipped.
- ``greedy``: Guan et al. 2019, https://arxiv.org/abs/1911.02079, Algorithm 1 with its 200 bins and
  ratio 0.16. A bin is a 200th of the range. In each iteration one end moves inwards by a bin: the
  end for which the error is then smaller. The search ends when 16 % of the range are removed, and
  the best range of all iterations is used. Differs: a symmetric range is only shortened; every
  iteration is a candidate, while PyTorch's ``choose_qparams_optimized`` stops at local minima;
  offsets are rounded down, not to the nearest number, so that rounding clips nothing.
- ``least_squares``: compare a few ranges and refit the best of them to its codes
  (``least_squares.py``).
- ``mse``: search for the range of least squared error.

  - Symmetric: compare the shares 1, 0.98, ..., 0.5 of the range. If the best share is 0.5, and the
    range has few levels or several rows, search again from there.
  - Asymmetric: move both ends inwards together by 50ths of the range, then each end in turn until
    the error no longer decreases. Repeat around the best range with smaller moves, by a 200th of
    the range or a quarter of a level. If several rows share a scale, search a second time, starting
    near the best symmetric range.

  This rule is not in the paper of Guan et al.
"""

from dataclasses import replace

import torch
from torch import Tensor

from compressors.quantize.kernels.least_squares import least_squares
from compressors.quantize.kernels.levels import (
    FittedRange,
    Grid,
    asymmetric_range,
    range_bounds,
    split_into_ranges,
    squared_error,
    symmetric_scale,
)

SHARES = tuple(1 - index / 50 for index in range(1, 26))
"""Shares of a symmetric range that ``mse`` compares: 0.98 down to 0.5."""

STEPS = 50
"""``mse`` moves each end of an asymmetric range by multiples of 1/50 of it, by less than half."""

FINE, FINE_STEPS = 200, 3
"""Afterwards ``mse`` makes up to 3 small moves to each side, of 1/200 of the range each.

If a quarter of a level is smaller, the moves have that size.
"""

ROUNDS = 4
"""Largest number of rounds in which ``mse`` moves each end of an asymmetric range in turn."""

MAX_HALVINGS = 8
"""Largest number of times that ``mse`` searches again because a symmetric range was halved."""

BINS, BINS_REMOVED = 200, 32
"""Bins of a range in ``greedy``, and how many are removed: 16 %."""

GREEDY_SHARES = tuple(1 - index / BINS for index in range(1, BINS_REMOVED + 1))
"""Shares of a symmetric range that ``greedy`` compares."""


def fit(rows: Tensor, grid: Grid) -> FittedRange:
    """Fit the scale and the offset of each group of ``rows_per_scale`` rows.

    Args:
        rows: float, ``(rows, dim)``; the first row begins a range. If all rows are one range, no
            copy of the table is made.
        grid: the grid of levels. The last range has fewer rows if ``rows_per_scale`` does not
            divide the number of rows.

    Returns:
        ``scale`` in the grid's dtype, always positive, and ``offset`` in the same dtype, None if
        symmetric: ``(ceil(rows / rows_per_scale), 1)``, or ``(1, 1)`` if all rows are one range.

    Raises:
        ValueNotStorable: a scale or offset is too large for the type in which it is stored.
    """
    if not len(rows) and grid.rows_per_scale:
        empty = torch.empty((0, 1), dtype=grid.dtype)
        return FittedRange(empty, None if grid.symmetric else empty)
    if not len(rows):  # an empty table: one range without weights
        rows = rows.new_zeros((1, rows.shape[1]))
    parts = [_fit(values, grid) for values in split_into_ranges(rows, grid.rows_per_scale)]
    offsets = [part.offset for part in parts if part.offset is not None]
    return FittedRange(
        torch.cat([part.scale for part in parts]), torch.cat(offsets) if offsets else None
    )


def _fit(values: Tensor, grid: Grid) -> FittedRange:
    """Fit ranges of equal size, ``(ranges, values)``, by the grid's clipping rule."""
    if grid.clipping == "least_squares":
        return least_squares(values, grid)
    low, high = range_bounds(values)
    if grid.symmetric:
        widest = symmetric_scale(torch.maximum(-low, high), grid)
        if grid.clipping == "min_max":
            return FittedRange(widest, None)
        if grid.clipping == "greedy":
            return FittedRange(_select_share(values, widest, GREEDY_SHARES, grid)[0], None)
        return FittedRange(_search_symmetric(values, widest, grid), None)
    unclipped = asymmetric_range(low, high, grid)
    if grid.clipping == "min_max":
        return unclipped
    if grid.clipping == "greedy":
        return _fit_greedy(values, unclipped, low, high, grid)
    return _search_asymmetric(values, unclipped, low, high, grid)


def _searches_below_half(grid: Grid) -> bool:
    """Whether ``mse`` also searches below half of a symmetric range.

    With 15 levels or more, clipping half of the range can lower the error only if the range has
    over a hundred values, more than most rows have.
    """
    return grid.levels < 15 or grid.rows_per_scale != 1


# --- symmetric ranges ------------------------------------------------------------------------


def _select_share(
    values: Tensor, widest: Tensor, shares: tuple[float, ...], grid: Grid
) -> tuple[Tensor, Tensor]:
    """Return the best scale among shares of the widest one, and whether it is the last share.

    Both are ``(ranges, 1)``.
    """
    best, least_error = widest, squared_error(values, FittedRange(widest, None), grid)
    is_better = torch.zeros_like(least_error, dtype=torch.bool)
    for share in shares:
        scale = (widest.float() * share).to(widest.dtype)
        error = squared_error(values, FittedRange(scale, None), grid)
        is_better = (error < least_error) & (scale > 0)
        best = torch.where(is_better, scale, best)
        least_error = torch.where(is_better, error, least_error)
    return best, is_better  # after the loop: whether the last share is better than all others


def _search_symmetric(values: Tensor, widest: Tensor, grid: Grid) -> Tensor:
    """Search the scale of each symmetric range by ``mse``: ``(ranges, 1)``, as stored.

    ``widest`` is the scale without clipping.
    """
    best, is_last = _select_share(values, widest, SHARES, grid)
    for _ in range(MAX_HALVINGS if _searches_below_half(grid) else 0):
        halved = is_last.squeeze(1)
        if not bool(halved.any()):
            break
        halved_values = _select_ranges(values, halved)
        smaller, is_still_last = _select_share(halved_values, best[halved], SHARES, grid)
        best = _replace_ranges(best, halved, smaller)
        is_last = _replace_ranges(torch.zeros_like(is_last), halved, is_still_last)
    return best


# --- asymmetric ranges -----------------------------------------------------------------------


def _fit_greedy(
    values: Tensor, unclipped: FittedRange, low: Tensor, high: Tensor, grid: Grid
) -> FittedRange:
    """Fit asymmetric ranges by Algorithm 1 of Guan et al."""
    bin_width = (high - low) / BINS
    low_bins = high_bins = torch.zeros_like(low)  # number of bins removed at each end
    best, least_error = unclipped, squared_error(values, unclipped, grid)
    for _ in range(BINS_REMOVED):
        from_low = asymmetric_range(
            low + (low_bins + 1) * bin_width, high - high_bins * bin_width, grid
        )
        from_high = asymmetric_range(
            low + low_bins * bin_width, high - (high_bins + 1) * bin_width, grid
        )
        low_error = squared_error(values, from_low, grid)
        high_error = squared_error(values, from_high, grid)
        moves_low = low_error < high_error
        error = torch.where(moves_low, low_error, high_error)
        best = _select_ranges_where(
            error < least_error, _select_ranges_where(moves_low, from_low, from_high), best
        )
        least_error = torch.minimum(error, least_error)
        low_bins, high_bins = low_bins + moves_low.float(), high_bins + (~moves_low).float()
    return best


def _search_asymmetric(
    values: Tensor, unclipped: FittedRange, low: Tensor, high: Tensor, grid: Grid
) -> FittedRange:
    """Search both ends of each asymmetric range by ``mse``.

    ``unclipped`` is the range from ``low`` to ``high`` as stored.
    """
    best, least_error = _search_ends(values, unclipped, low, high, grid)
    if grid.rows_per_scale == 1:
        return best
    # With a few outliers among many values, the first search may stop at a poor minimum: only a
    # large move inwards lowers the error, small ones do not. So search again, starting from 1.25
    # times the best symmetric range.
    around_zero = replace(grid, symmetric=True)
    widest = symmetric_scale(torch.maximum(-low, high), around_zero)
    reach = 1.25 * grid.max_multiple * _search_symmetric(values, widest, around_zero).float()
    low, high = torch.maximum(low, -reach), torch.minimum(high, reach)
    candidate, error = _search_ends(values, asymmetric_range(low, high, grid), low, high, grid)
    return _select_ranges_where(error < least_error, candidate, best)


def _search_ends(
    values: Tensor, widest: FittedRange, low: Tensor, high: Tensor, grid: Grid
) -> tuple[FittedRange, Tensor]:
    """Return the best range inside ``low`` to ``high``, as stored, and its squared error.

    ``widest`` is the range from ``low`` to ``high`` with stored scale and offset.
    """
    width, max_number = high - low, STEPS // 2 - 1
    best, least_error = widest, squared_error(values, widest, grid)
    low_cut = high_cut = torch.zeros_like(low)  # share of the width removed at each end

    def compare(new_low: Tensor, new_high: Tensor) -> None:
        """Evaluate ranges with these shares removed; update the best ones where the error falls."""
        nonlocal best, least_error, low_cut, high_cut
        candidate = asymmetric_range(low + new_low * width, high - new_high * width, grid)
        error = squared_error(values, candidate, grid)
        better = error < least_error
        best = _select_ranges_where(better, candidate, best)
        least_error = torch.where(better, error, least_error)
        low_cut = torch.where(better, new_low, low_cut)
        high_cut = torch.where(better, new_high, high_cut)

    def move_in_turn(from_best: bool, step: float, numbers: range) -> None:
        """Move the low end, then the high end, until neither lowers the error.

        A move is ``step`` times one of ``numbers``, as a share of the width. It starts from the
        best range, or from the end of the widest range if ``from_best`` is False.
        """
        for _ in range(ROUNDS):
            before = low_cut, high_cut
            start, fixed = low_cut if from_best else torch.zeros_like(low), high_cut
            for number in numbers:
                compare((start + number * step).clamp(min=0), fixed)
            fixed, start = low_cut, high_cut if from_best else torch.zeros_like(low)
            for number in numbers:
                compare(fixed, (start + number * step).clamp(min=0))
            if torch.equal(before[0], low_cut) and torch.equal(before[1], high_cut):
                break

    for index in range(1, max_number + 1):
        both = torch.full_like(low, index / STEPS)
        compare(both, both)
    move_in_turn(from_best=False, step=1 / STEPS, numbers=range(max_number + 1))
    fine = 1 / max(FINE, 4 * (grid.levels - 1))
    move_in_turn(from_best=True, step=fine, numbers=range(-FINE_STEPS, FINE_STEPS + 1))
    return best, least_error


# --- selection by range ----------------------------------------------------------------------


def _select_ranges(values: Tensor, mask: Tensor) -> Tensor:
    """Return the values of the ranges where ``mask`` is true; no copy if it is true for all."""
    return values if bool(mask.all()) else values[mask]


def _replace_ranges(into: Tensor, mask: Tensor, values: Tensor) -> Tensor:
    """Return a copy of ``into`` with these values where ``mask`` is true."""
    changed = into.clone()
    changed[mask] = values
    return changed


def _select_ranges_where(
    condition: Tensor, ranges: FittedRange, others: FittedRange
) -> FittedRange:
    """Select each asymmetric range from ``ranges`` if its condition is true, else from others."""
    offset = torch.where(condition, _get_offset(ranges), _get_offset(others))
    return FittedRange(torch.where(condition, ranges.scale, others.scale), offset)


def _get_offset(fitted: FittedRange) -> Tensor:
    if fitted.offset is None:
        raise ValueError("an asymmetric range has an offset")
    return fitted.offset
