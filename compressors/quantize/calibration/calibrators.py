"""Calibrators: choose the range of a layer's int8 inputs from a histogram.

One pass over the calibration rows builds a histogram of the absolute inputs of a layer, in constant
memory. Each calibrator computes from it the largest value that int8 represents; larger inputs are
clipped.

- ``largest`` (min-max): nothing is clipped. One outlier reduces the resolution of all others.
- ``percentile``: all inputs except a share are inside the range.
- ``least_divergence``: Migacz, "8-bit Inference with TensorRT", GTC 2017. The range with the least
  Kullback-Leibler divergence between the distribution of the inputs and its rounding.
  Differs: exact zeros are ignored, since they are zeros for any scale and would dominate the
  distribution after a Relu.
- ``least_squares``: the range of least expected squared error. Inside the range the error is the
  square of a step over 12, if inputs are uniform within a step; outside it is the squared distance
  to the end of the range.

Each returns the end of the range, a number in the unit of the inputs.
"""

import math

import torch
from torch import Tensor

BINS = 4096
"""Bins of a histogram."""

LEVELS = 127
"""Positive levels of int8."""

LEVELS_COMPARED = 128
"""Levels to which ``least_divergence`` rounds, as in Migacz: int8 levels of one sign, with zero."""

BINS_APART = 8
"""Distance, in bins, between the range ends that ``least_divergence`` compares."""

LOWEST_EXPONENT = -100
"""A histogram covers at least 2^-100; narrower bins would be too small for float32."""


class Histogram:
    """Histogram of absolute values, with equal bins from 0 to a power of two.

    The power of two is the smallest above the largest value.

    The bin of a value does not depend on earlier values, so the counts do not depend on how the
    rows are split into batches. At least half the bins are in use.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.int64)
        """Number of values in each bin, int64 ``(BINS,)``, without exact zeros."""
        self.zeros = 0
        """Number of values that are exactly zero."""
        self.largest = torch.zeros(())
        """The largest absolute value, float32 scalar."""
        self._exponent = LOWEST_EXPONENT

    def add(self, x: Tensor) -> None:
        """Count the values of a float tensor; NaN and infinity only change ``largest``."""
        if not x.numel():
            return
        size = x.detach().abs()
        self.largest = torch.maximum(self.largest, size.amax())
        if not bool(torch.isfinite(self.largest)):
            return
        if self.largest > 0:
            self._grow(math.frexp(float(self.largest))[1])
        nonzero = size[size > 0]
        self.zeros += size.numel() - nonzero.numel()
        place = (nonzero.float() / self.width).long()
        self.counts += torch.bincount(place, minlength=BINS)

    @property
    def width(self) -> float:
        """Width of one bin in the unit of the values: a power of two."""
        return 2.0**self._exponent / BINS

    def edges(self) -> Tensor:
        """Return the upper edges of the bins, float64 ``(BINS,)``."""
        return torch.arange(1, BINS + 1, dtype=torch.float64) * self.width

    def used(self) -> int:
        """Return the number of bins up to the last one that is not empty."""
        filled = self.counts.nonzero()
        return int(filled[-1]) + 1 if len(filled) else 0

    def _grow(self, exponent: int) -> None:
        """Double the width of the bins until the last one ends at 2^exponent."""
        doubled = exponent - self._exponent
        if doubled <= 0:
            return
        merged = 2 ** min(doubled, BINS.bit_length() - 1)
        folded = self.counts.view(-1, merged).sum(dim=1)
        self.counts = torch.zeros_like(self.counts)
        self.counts[: len(folded)] = folded
        self._exponent = exponent


def percentile(seen: Histogram, share: float) -> float:
    """Return the smallest bin edge with at least ``share`` of all values, with zeros, below it."""
    total = seen.zeros + int(seen.counts.sum())
    below = seen.zeros + seen.counts.cumsum(0)
    # The first bin that reaches the share; float64 counts rows exactly.
    place = int((below.double() < share * total).sum())
    return _end(seen, place)


def least_divergence(seen: Histogram) -> float:
    """Return the range of least Kullback-Leibler divergence from the observed distribution."""
    counts, used = seen.counts.double(), seen.used()
    ends = [*range(LEVELS_COMPARED, used, BINS_APART), used]
    divergences = [_divergence(counts[:end], counts[end:].sum()) for end in ends]
    return _end(seen, ends[min(range(len(ends)), key=divergences.__getitem__)] - 1)


def least_squares(seen: Histogram) -> float:
    """Return the range of least expected squared error, for values uniform within each bin."""
    counts, edges = seen.counts.double(), seen.edges()
    middle = edges - seen.width / 2
    inside = counts.cumsum(0)
    # Sums over the bins outside of each range; ranges end at bin edges.
    number, first, second = (
        moment.sum() - moment.cumsum(0)
        for moment in (counts, counts * middle, counts * (middle.square() + seen.width**2 / 12))
    )
    rounded = inside * (edges / LEVELS).square() / 12
    clipped = second - 2 * edges * first + edges.square() * number
    return _end(seen, int((rounded + clipped)[: seen.used()].argmin()))


def _divergence(inside: Tensor, outside: Tensor) -> float:
    """Return the Kullback-Leibler divergence of the values in a range from their rounding.

    Args:
        inside: counts of the bins in the range, float64 ``(bins,)``.
        outside: number of larger values, which are clipped to the last bin.
    """
    clipped = inside.clone()
    clipped[-1] += outside
    level = torch.arange(len(inside)) * LEVELS_COMPARED // len(inside)
    filled = (inside > 0).double()
    levels = inside.new_zeros(LEVELS_COMPARED)
    total, bins = levels.index_add(0, level, inside), levels.index_add(0, level, filled)
    rounded = (total / bins.clamp(min=1))[level] * filled  # spread each level over its filled bins
    if not bool(inside.any()):
        return math.inf
    is_filled = clipped > 0
    p, q = clipped[is_filled] / clipped.sum(), rounded[is_filled] / rounded.sum()
    return float((p * (p / q).log()).sum())  # infinite if values were clipped into an empty bin


def _end(seen: Histogram, place: int) -> float:
    """Return the upper edge of a bin, or the largest value if it is smaller."""
    largest = float(seen.largest)
    return min(float(seen.edges()[min(place, BINS - 1)]), largest)
