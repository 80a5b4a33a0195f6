"""k-means: fit the codebooks of table codes, and find the nearest entry of each row.

Sources: Lloyd 1982 (alternating means and nearest entries); Arthur and Vassilvitskii 2007
(k-means++ seeding). Differs: deterministic (a fixed seed), fitted on a sample of large tables, rows
may have weights, and an entry without rows is moved to the row with the largest error.

The nearest entry does not depend on how rows are split into blocks: the rounding of matrix products
depends on their shapes, so if two entries are about equally near, their distances are computed
again by sums in a fixed order.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

SAMPLE = 65_536
"""Largest number of rows that a codebook is fitted on: 256 for each of 256 entries."""

BLOCK = 8_192
"""Rows whose distances to every entry are in memory at once: 8 MB for 256 entries."""

ROUNDS = 30
"""Largest number of rounds of k-means."""

MIN_IMPROVEMENT = 1e-4
"""Rounds end when one lowers the error by no more than this share of it."""


class KMeansFit(NamedTuple):
    """A codebook ``(levels, dim)``, and its squared error at the start and after each round."""

    codebook: Tensor
    errors: tuple[float, ...]


def sample_rows(rows: Tensor, most: int = SAMPLE) -> Tensor:
    """Draw a stratified sample of rows: one from each of equal sections of a table.

    Args:
        rows: ``(rows, dim)``, memory-mapped if large: only the drawn rows are read.
        most: largest number of rows in the sample.

    Returns:
        float32 ``(rows or most, dim)``, the same for the same table.
    """
    count = len(rows)
    if count <= most:
        return rows.float()
    bounds = torch.arange(most + 1, dtype=torch.int64) * count // most  # (most + 1,)
    generator = torch.Generator().manual_seed(0)
    place = torch.rand(most, generator=generator, dtype=torch.float64) * bounds.diff()
    return rows[bounds[:-1] + place.long()].float()


def kmeans(
    points: Tensor, levels: int, weight: Tensor | None = None, rounds: int = ROUNDS, seed: int = 0
) -> KMeansFit:
    """Fit a codebook by k-means.

    Args:
        points: float32 ``(points, dim)``.
        levels: number of entries of the codebook, at least 1.
        weight: weight of each point, ``(points,)``, not negative; by default equal.
        rounds: largest number of rounds.
        seed: seed for drawing the first entries.

    Returns:
        Float32 entries, of which some are equal if there are fewer different points than levels,
        and the weighted sums of squared errors, which never increase from round to round.
    """
    counts = torch.ones(len(points), dtype=torch.float64) if weight is None else weight.double()
    codebook = _seeded(points, levels, counts, seed)
    codes = nearest(points, codebook)
    point_errors = squared_distance(points, codebook[codes]) * counts
    errors = [float(point_errors.sum())]
    for _ in range(rounds):
        moved = _means(points, codes, counts, codebook, point_errors)
        codes = nearest(points, moved)
        point_errors = squared_distance(points, moved[codes]) * counts
        error = float(point_errors.sum())
        if error >= errors[-1]:  # converged up to rounding
            break
        codebook = moved
        errors.append(error)
        if errors[-2] - error <= MIN_IMPROVEMENT * errors[-2]:
            break
    return KMeansFit(codebook, tuple(errors))


def nearest(points: Tensor, codebook: Tensor) -> Tensor:
    """Find the entry nearest to each point, int64 ``(points,)``; in a tie, the first one.

    Args:
        points: float32 ``(points, dim)``.
        codebook: float ``(levels, dim)``.
    """
    entries = codebook.float()
    squares = entries.square().sum(dim=1)  # (levels,)
    # Bound of the relative rounding error of a distance, which is a sum of dim products.
    tolerance = 8 * (entries.shape[1] + 2) * 2.0**-24
    largest = float(squares.max())
    codes = torch.empty(len(points), dtype=torch.int64)
    for begin in range(0, len(points), BLOCK):
        block = points[begin : begin + BLOCK]
        score = torch.addmm(squares, block, entries.t(), alpha=-2)  # (block, levels)
        least, block_codes = score.min(dim=1)
        size = block.square().sum(dim=1) + largest
        is_near = score <= (least + tolerance * size).unsqueeze(1)
        ambiguous = is_near.sum(dim=1) != 1
        if bool(ambiguous.any()):
            block_codes[ambiguous] = _exact_distances(block[ambiguous], entries).argmin(dim=1)
        codes[begin : begin + BLOCK] = block_codes
    return codes


def nearest_under(points: Tensor, metric: Tensor, codebook: Tensor) -> Tensor:
    """Find the entry nearest to each point, with column weights for each point.

    Args:
        points: float32 ``(points, dim)``.
        metric: weight of each squared difference, ``(points, dim)``, not negative.
        codebook: float ``(levels, dim)``.

    Returns:
        int64 ``(points,)``.
    """
    entries = codebook.float()
    codes = torch.empty(len(points), dtype=torch.int64)
    for begin in range(0, len(points), BLOCK):
        part = slice(begin, begin + BLOCK)
        squares = metric[part] @ entries.square().t()  # (block, levels)
        score = torch.addmm(squares, metric[part] * points[part], entries.t(), alpha=-2)
        codes[part] = score.argmin(dim=1)
    return codes


def squared_distance(points: Tensor, others: Tensor) -> Tensor:
    """Return the squared distance of each pair of rows ``(points, dim)``: float64 ``(points,)``."""
    return (points - others).double().square().sum(dim=1)


def _exact_distances(points: Tensor, entries: Tensor) -> Tensor:
    """Return squared distances, float64 ``(points, levels)``, summed dimension by dimension."""
    total = torch.zeros(len(points), len(entries), dtype=torch.float64)
    for column in range(points.shape[1]):
        difference = points[:, column : column + 1].double() - entries[:, column].double()
        total = total + difference * difference
    return total


def _seeded(points: Tensor, levels: int, counts: Tensor, seed: int) -> Tensor:
    """Draw entries by k-means++: points by weight times squared distance to the drawn points."""
    generator = torch.Generator().manual_seed(seed)
    chosen = [_draw(counts, generator)]
    wide = points.double()
    errors = (wide - wide[chosen[0]]).square().sum(dim=1) * counts  # (points,)
    while len(chosen) < levels and bool((errors > 0).any()):
        chosen.append(_draw(errors, generator))
        new_errors = (wide - wide[chosen[-1]]).square().sum(dim=1) * counts
        errors = torch.minimum(errors, new_errors)
    chosen += chosen[:1] * (levels - len(chosen))  # if fewer points differ than levels exist
    return points[torch.tensor(chosen)].clone()


def _draw(weights: Tensor, generator: torch.Generator) -> int:
    """Draw one index with probability proportional to ``weights`` ``(n,)``; 0 if all are zero."""
    total = weights.cumsum(0)
    place = torch.rand((), generator=generator, dtype=torch.float64) * total[-1]
    index = int(torch.searchsorted(total, place, right=True))
    # Rounding may lead past the last weight that is not zero.
    return index if index < len(weights) and weights[index] > 0 else int(weights.argmax())


def _means(
    points: Tensor, codes: Tensor, counts: Tensor, codebook: Tensor, point_errors: Tensor
) -> Tensor:
    """Return the mean of each entry's points; an entry without points moves to a large error."""
    total = torch.zeros(len(codebook), points.shape[1], dtype=torch.float64)
    total.index_add_(0, codes, points.double() * counts.unsqueeze(1))
    mass = torch.zeros(len(codebook), dtype=torch.float64).index_add_(0, codes, counts)
    is_used = mass > 0
    means = codebook.clone()
    means[is_used] = (total[is_used] / mass[is_used].unsqueeze(1)).to(codebook.dtype)
    empty = (~is_used).nonzero().flatten()
    worst = point_errors.topk(min(len(empty), len(point_errors))).indices
    worst = worst[point_errors[worst] > 0]
    means[empty[: len(worst)]] = points[worst]
    return means


def scalar_kmeans(
    values: Tensor, levels: int, weight: Tensor | None = None, rounds: int = 200
) -> KMeansFit:
    """Fit a codebook of numbers by k-means in one dimension.

    It starts once from quantiles and once from evenly spaced levels, and returns the better result.
    The values are sorted once, and a round needs only sums between boundaries, so rounds are fast
    enough to run until the error no longer decreases.

    Args:
        values: float ``(values,)``.
        levels: number of entries of the codebook.
        weight: weight of each value, ``(values,)``.
        rounds: largest number of rounds.

    Returns:
        Entries ``(levels, 1)`` in ascending order.
    """
    ordered, order = values.double().sort()
    different = torch.unique(ordered)  # ascending
    if len(different) <= levels:
        exact = torch.cat([different, different[-1:].expand(levels - len(different))])
        return KMeansFit(exact.float().unsqueeze(1), (0.0,))
    counts = torch.ones_like(ordered) if weight is None else weight.double()[order]
    zero = ordered.new_zeros(1)
    mass = torch.cat([zero, counts.cumsum(0)])  # (values + 1,)
    first = torch.cat([zero, (counts * ordered).cumsum(0)])
    second = torch.cat([zero, (counts * ordered.square()).cumsum(0)])
    whole = float(mass[-1])
    shares = (torch.arange(levels, dtype=torch.float64) + 0.5) / levels  # (levels,)
    quantiles = ordered[torch.searchsorted(mass[1:], shares * whole).clamp(max=len(ordered) - 1)]
    spaced = ordered[0] + (ordered[-1] - ordered[0]) * shares
    fits = []
    for start in (quantiles, spaced):
        entries, errors = start.clone(), [math.inf]
        for _ in range(rounds):
            middle = (entries[1:] + entries[:-1]) / 2
            cut = torch.searchsorted(ordered, middle, right=True)
            border = torch.cat([cut.new_zeros(1), cut, cut.new_full((1,), len(ordered))])
            entry_mass = mass[border].diff()  # (levels,)
            moment = first[border].diff()
            mean = torch.where(entry_mass > 0, moment / entry_mass.clamp(min=1e-300), entries)
            entry_errors = second[border].diff() - 2 * mean * moment + mean.square() * entry_mass
            error = float(entry_errors.clamp(min=0).sum())
            if error >= errors[-1]:
                break
            entries = mean.sort().values
            errors.append(error)
        fits.append(KMeansFit(entries.float().unsqueeze(1), tuple(errors[1:])))
    return min(fits, key=lambda fit: fit.errors[-1])
