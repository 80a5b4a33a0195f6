"""Calibrators: choose the range of a layer's int8 inputs from a histogram.

One pass over the calibration rows builds a histogram of the absolute inputs of a layer, in constant
memory. From it, each calibrator computes the end of the range, in the unit of the inputs: larger
inputs are clipped to it.

- min-max (``Histogram.largest``): the largest input. Nothing is clipped, but one outlier makes the
  levels coarser for all other inputs.
- ``percentile``: the range contains a given share of the inputs.
- ``least_divergence``: the range for which rounding changes the distribution of the inputs least,
  measured by the Kullback-Leibler divergence. Source: Migacz, "8-bit Inference with TensorRT", GTC
  2017. Differs: exact zeros are ignored, because every scale represents them exactly and they would
  dominate the distribution after a Relu.
- ``least_squares``: the range of least expected squared error. If inputs are uniform between two
  levels, the expected error of an input inside the range is the squared distance of the levels
  divided by 12. The error of a clipped input is its squared distance from the end of the range.
"""

import math

import torch
from torch import Tensor

BINS = 4096
"""Bins of a histogram."""

LEVELS = 127
"""Positive levels of int8."""

LEVELS_COMPARED = 128
"""Levels to which ``least_divergence`` rounds: the non-negative int8 levels, as in Migacz."""

BIN_STRIDE = 8
"""``least_divergence`` compares range ends that are this number of bins apart."""

LOWEST_EXPONENT = -100
"""A histogram ends at 2^-100 or above: with a smaller end, float32 could not represent a bin."""


class Histogram:
    """Histogram of absolute values: ``BINS`` bins of equal width from 0 to a power of two.

    The power of two is the smallest one above the largest value, so values reach at least half of
    the bins. If a larger value is added, neighbouring bins are merged. The result is the same as
    for one batch with all values, so the counts do not depend on how rows are split into batches.
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
        """Count the values of a float tensor; with NaN or infinity, only ``largest`` changes."""
        if not x.numel():
            return
        magnitude = x.detach().abs()
        self.largest = torch.maximum(self.largest, magnitude.amax())
        if not bool(torch.isfinite(self.largest)):
            return
        if self.largest > 0:
            self._grow(math.frexp(float(self.largest))[1])
        nonzero = magnitude[magnitude > 0]
        self.zeros += magnitude.numel() - nonzero.numel()
        bin_index = (nonzero.float() / self.width).long()
        self.counts += torch.bincount(bin_index, minlength=BINS)

    @property
    def width(self) -> float:
        """Width of one bin in the unit of the values: a power of two."""
        return 2.0**self._exponent / BINS

    def edges(self) -> Tensor:
        """Return the upper edges of the bins, float64 ``(BINS,)``."""
        return torch.arange(1, BINS + 1, dtype=torch.float64) * self.width

    def count_used_bins(self) -> int:
        """Return the number of bins up to the last one that is not empty."""
        filled = self.counts.nonzero()
        return int(filled[-1]) + 1 if len(filled) else 0

    def _grow(self, exponent: int) -> None:
        """Double the width of the bins until the last one ends at 2^exponent."""
        doublings = exponent - self._exponent
        if doublings <= 0:
            return
        bins_per_new_bin = 2 ** min(doublings, BINS.bit_length() - 1)
        merged_counts = self.counts.view(-1, bins_per_new_bin).sum(dim=1)
        self.counts = torch.zeros_like(self.counts)
        self.counts[: len(merged_counts)] = merged_counts
        self._exponent = exponent


def percentile(histogram: Histogram, share: float) -> float:
    """Return the smallest bin edge with at least ``share`` of all values below it.

    Exact zeros count as values.
    """
    total = histogram.zeros + int(histogram.counts.sum())
    below = histogram.zeros + histogram.counts.cumsum(0)
    # The first bin that reaches the share. float32 could not count more than 2^24 values exactly.
    bin_index = int((below.double() < share * total).sum())
    return _range_end(histogram, bin_index)


def least_divergence(histogram: Histogram) -> float:
    """Return the end of the range whose rounding has the least Kullback-Leibler divergence."""
    counts, used = histogram.counts.double(), histogram.count_used_bins()
    ends = [*range(LEVELS_COMPARED, used, BIN_STRIDE), used]
    divergences = [_divergence(counts[:end], counts[end:].sum()) for end in ends]
    return _range_end(histogram, ends[min(range(len(ends)), key=divergences.__getitem__)] - 1)


def least_squares(histogram: Histogram) -> float:
    """Return the end of the range of least squared error, for values uniform within each bin."""
    counts, edges = histogram.counts.double(), histogram.edges()
    middle = edges - histogram.width / 2
    inside = counts.cumsum(0)
    # For a range that ends at each bin edge: sums of count, value and squared value beyond it.
    count, value_sum, square_sum = (
        moment.sum() - moment.cumsum(0)
        for moment in (
            counts,
            counts * middle,
            counts * (middle.square() + histogram.width**2 / 12),
        )
    )
    rounding_error = inside * (edges / LEVELS).square() / 12
    clipping_error = square_sum - 2 * edges * value_sum + edges.square() * count
    errors = (rounding_error + clipping_error)[: histogram.count_used_bins()]
    return _range_end(histogram, int(errors.argmin()))


def _divergence(inside: Tensor, outside: Tensor) -> float:
    """Compute the Kullback-Leibler divergence between the distribution of inputs and its rounding.

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
    rounded = (total / bins.clamp(min=1))[level] * filled  # share a level's count among its bins
    if not bool(inside.any()):
        return math.inf
    is_filled = clipped > 0
    p, q = clipped[is_filled] / clipped.sum(), rounded[is_filled] / rounded.sum()
    return float((p * (p / q).log()).sum())  # infinite if values are clipped into an empty bin


def _range_end(histogram: Histogram, bin_index: int) -> float:
    """Return the upper edge of a bin, but at most the largest value."""
    largest = float(histogram.largest)
    return min(float(histogram.edges()[min(bin_index, BINS - 1)]), largest)
