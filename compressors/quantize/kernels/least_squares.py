"""Clipping rule ``least_squares``: refit ranges to their codes.

It reaches most of the gain of a long search in seven passes over the rows.

A few ranges that clip the same share at both ends are compared, and the best is refitted. For fixed
codes, the scale and the offset of least squared error are the regression line of weights on codes;
the new scale and offset give new codes. A range keeps the result of a round only if its error, with
scale and offset as stored, decreased.

The alternation between codes and levels is LQ-Nets' QEM (Zhang et al. 2018,
https://arxiv.org/abs/1807.10029, Algorithm 1). Differs: levels stay evenly spaced, so a line is
fitted instead of a basis; the start is the best of several clipped ranges, not one.

This plain torch code is the specification of ``numba_kernels.least_squares``: sums add one number
after the other in float32, and codes are computed with the reciprocal of the scale, because a
division takes as long as all the rest. Stored codes are computed by division.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from compressors.quantize.kernels.levels import (
    PIECE,
    FittedRange,
    Grid,
    asymmetric_ends,
    decode_steps,
    range_bounds,
    stored_offset,
    stored_scale,
    symmetric_scale,
)

SHARES = (0.03, 0.06, 0.10)
"""Shares of a range that are clipped at each end, for comparison."""

ROUNDS = 2
"""Number of refits. With seven shares and three rounds errors are 1 % lower."""


class Residuals(NamedTuple):
    """Sums of codes ``q``, residuals ``r`` and their products over each range: ``(ranges, 1)``."""

    q: Tensor
    qq: Tensor
    r: Tensor
    qr: Tensor
    rr: Tensor


def least_squares(values: Tensor, grid: Grid) -> FittedRange:
    """Fit the stored scale and offset of every range.

    Args:
        values: float, one range per row, ``(ranges, values)``.
        grid: the levels.

    Raises:
        ValueNotStorable: a scale or offset is too large for the type in which it is stored.
    """
    values = values.float()
    low, high = range_bounds(values)
    best = _clipped(low, high, grid, 0.0)
    least = residuals(values, best, grid)
    for share in SHARES:
        candidate = _clipped(low, high, grid, share)
        best, least = _better(best, least, candidate, residuals(values, candidate, grid))
    for _ in range(ROUNDS):
        candidate = _refitted(best, least, values.shape[1], grid)
        best, least = _better(best, least, candidate, residuals(values, candidate, grid))
    return best


def _clipped(low: Tensor, high: Tensor, grid: Grid, share: float) -> FittedRange:
    if grid.symmetric:
        return FittedRange(symmetric_scale(torch.maximum(-low, high) * (1 - share), grid), None)
    cut = (high - low) * share
    return asymmetric_ends(low + cut, high - cut, grid)


def residuals(values: Tensor, fitted: FittedRange, grid: Grid) -> Residuals:
    """Compute the sums of codes and residuals of every range."""
    scale = fitted.scale.float()
    offset = torch.zeros_like(scale) if fitted.offset is None else fitted.offset.float()
    steps = (values - offset) * (1 / scale)
    if not grid.symmetric:
        q = steps.clamp(0, grid.levels - 1).round()
    elif grid.levels % 2:
        q = steps.clamp(-grid.half, grid.half).round()
    else:  # levels at odd multiples of a half, none at zero
        q = (steps.floor() + 0.5).clamp(-grid.half, grid.half)
    r = values - decode_steps(q, scale, offset)
    return Residuals(*(in_order(each) for each in (q, q * q, r, q * r, r * r)))


def _refitted(fitted: FittedRange, sums: Residuals, count: int, grid: Grid) -> FittedRange:
    """Return the regression line of weights on codes, with scale and offset as stored."""
    scale, largest = fitted.scale.float(), torch.finfo(grid.dtype).max
    if fitted.offset is None:
        more = _usable(sums.qr / sums.qq)
        return FittedRange(stored_scale((scale + more).clamp(0, largest), grid.half, grid), None)
    spread = sums.qq * count - sums.q * sums.q
    more = _usable((sums.qr * count - sums.q * sums.r) / spread)
    shift = _usable((sums.r - more * sums.q) / count)
    scale = stored_scale((scale + more).clamp(0, largest), grid.levels - 1, grid)
    return FittedRange(scale, stored_offset(fitted.offset.float() + shift, grid))


def _usable(change: Tensor) -> Tensor:
    """Set the change to zero for ranges with only one code or with sums that are too large."""
    return torch.where(change.abs() <= torch.finfo(torch.float32).max, change, 0.0)


def _better(
    best: FittedRange, least: Residuals, candidate: FittedRange, sums: Residuals
) -> tuple[FittedRange, Residuals]:
    """Return, for each range, the one of two fits with the smaller error, and its sums."""
    less = sums.rr < least.rr
    better = Residuals(*(torch.where(less, new, old) for new, old in zip(sums, least, strict=True)))
    scale = torch.where(less, candidate.scale, best.scale)
    if best.offset is None or candidate.offset is None:
        return FittedRange(scale, None), better
    return FittedRange(scale, torch.where(less, candidate.offset, best.offset)), better


def in_order(values: Tensor) -> Tensor:
    """Sum each row one number after the other: ``(ranges, 1)``.

    Ranges longer than ``PIECE`` are not single rows and are summed in torch's order.
    """
    if values.shape[1] > PIECE:
        return values.sum(dim=1, keepdim=True)
    total = torch.zeros_like(values[:, :1])
    for place in range(values.shape[1]):
        total = total + values[:, place : place + 1]
    return total
