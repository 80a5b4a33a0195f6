"""Where the range of a layer's int8 inputs ends: calibrators, as functions of a histogram.

One pass over the calibration rows counts how large the inputs of a layer are, in memory that does
not grow with them; each calibrator reads the largest value that int8 shall hold from the counts,
and clips what lies above.

- ``largest`` (min-max): nothing is clipped. One far input costs all others their resolution.
- ``percentile``: all but a share of the inputs lie inside.
- ``least_divergence``: Migacz, "8-bit Inference with TensorRT", GTC 2017. Of all ranges the one
  whose rounded distribution is nearest to the inputs' own in Kullback-Leibler divergence.
  Differs: exact zeros are left out, since they are zeros whatever the scale and after a Relu
  would drown the rest.
- ``least_squares``: the range of least expected squared error, which is a step's square over 12
  inside, if inputs lie evenly within a step, and the squared distance to the range's end outside.

All return the range's end, a number in the unit of the inputs.
"""

import math

import torch
from torch import Tensor

BINS = 4096
LEVELS = 127
# Migacz's: the int8 levels of one sign, zero among them.
LEVELS_COMPARED = 128
# Ranges that end between two of these are not compared for their divergence: half a part in 256.
BINS_APART = 8
LOWEST_EXPONENT = -100  # bins of inputs below 2^-100 would be too narrow for float32


class Histogram:
    """How often absolute values fell into even bins below a power of two that is above them all.

    Values lie in the same bin whatever came before them, so the counts are the same however the
    rows were split into batches. At least half the bins are in use.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.int64)
        """Values that are not zero, by bin."""
        self.zeros = 0
        """Values that are exactly zero, and in no bin."""
        self.largest = torch.zeros(())
        """The largest absolute value, float32 scalar."""
        self._exponent = LOWEST_EXPONENT

    def add(self, x: Tensor) -> None:
        """Count the values of a float tensor; NaN and infinity are not counted but ``largest``."""
        if not x.numel():
            return
        size = x.detach().abs()
        self.largest = torch.maximum(self.largest, size.amax())
        if not bool(torch.isfinite(self.largest)):
            return
        if self.largest > 0:
            self._grow(math.frexp(float(self.largest))[1])
        inside = size[size > 0]
        self.zeros += size.numel() - inside.numel()
        place = (inside.float() / self.width).long()
        self.counts += torch.bincount(place, minlength=BINS)

    @property
    def width(self) -> float:
        """Of one bin, in the unit of the values: a power of two."""
        return 2.0**self._exponent / BINS

    def edges(self) -> Tensor:
        """Upper edges of the bins, float64 ``(BINS,)``."""
        return torch.arange(1, BINS + 1, dtype=torch.float64) * self.width

    def used(self) -> int:
        """How many bins there are up to the largest value."""
        held = self.counts.nonzero()
        return int(held[-1]) + 1 if len(held) else 0

    def _grow(self, exponent: int) -> None:
        """Make the bins twice as wide until 2^exponent is the end of the last."""
        doubled = exponent - self._exponent
        if doubled <= 0:
            return
        together = 2 ** min(doubled, BINS.bit_length() - 1)
        folded = self.counts.view(-1, together).sum(dim=1)
        self.counts = torch.zeros_like(self.counts)
        self.counts[: len(folded)] = folded
        self._exponent = exponent


def percentile(seen: Histogram, share: float) -> float:
    """The least bin edge that at least ``share`` of all values, zeros among them, lie below."""
    total = seen.zeros + int(seen.counts.sum())
    below = seen.zeros + seen.counts.cumsum(0)
    # the first bin that makes it; float64 counts rows exactly
    place = int((below.double() < share * total).sum())
    return _end(seen, place)


def least_divergence(seen: Histogram) -> float:
    """The range of least Kullback-Leibler divergence from what was seen."""
    counts, used = seen.counts.double(), seen.used()
    ends = [*range(LEVELS_COMPARED, used, BINS_APART), used]
    divergences = [_divergence(counts[:end], counts[end:].sum()) for end in ends]
    return _end(seen, ends[min(range(len(ends)), key=divergences.__getitem__)] - 1)


def least_squares(seen: Histogram) -> float:
    """The range of least expected squared error, each bin's values taken as even within it."""
    counts, edges = seen.counts.double(), seen.edges()
    middle = edges - seen.width / 2
    inside = counts.cumsum(0)
    # sums over the bins outside of each range, which ends at a bin's edge
    number, first, second = (
        moment.sum() - moment.cumsum(0)
        for moment in (counts, counts * middle, counts * (middle.square() + seen.width**2 / 12))
    )
    rounded = inside * (edges / LEVELS).square() / 12
    clipped = second - 2 * edges * first + edges.square() * number
    return _end(seen, int((rounded + clipped)[: seen.used()].argmin()))


def _divergence(inside: Tensor, outside: Tensor) -> float:
    """Kullback-Leibler divergence of a range from its own rounding to levels.

    Args:
        inside: counts of the bins in it, float64 ``(bins,)``.
        outside: how many values it clips to its last bin.
    """
    wanted = inside.clone()
    wanted[-1] += outside
    level = torch.arange(len(inside)) * LEVELS_COMPARED // len(inside)
    filled = (inside > 0).double()
    levels = inside.new_zeros(LEVELS_COMPARED)
    total, bins = levels.index_add(0, level, inside), levels.index_add(0, level, filled)
    found = (total / bins.clamp(min=1))[level] * filled  # each level spread over its filled bins
    if not bool(inside.any()):
        return math.inf
    here = wanted > 0
    p, q = wanted[here] / wanted.sum(), found[here] / found.sum()
    return float((p * (p / q).log()).sum())  # infinite where values were clipped into an empty bin


def _end(seen: Histogram, place: int) -> float:
    """The upper edge of a bin, or the largest value if that lies below."""
    largest = float(seen.largest)
    return min(float(seen.edges()[min(place, BINS - 1)]), largest)
