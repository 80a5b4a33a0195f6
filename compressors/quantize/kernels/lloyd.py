"""k-means: fit the codebooks of table codes, and find the nearest entry of each row.

Sources: Lloyd 1982 (alternating means and nearest entries); Arthur and Vassilvitskii 2007
(k-means++ seeding). Differs: deterministic (a fixed seed), fitted on a sample of large tables, rows
may have weights, and an entry without rows is moved to the row with the largest error.

The nearest entry does not depend on how rows are split into blocks. The rounding of matrix products
depends on their shapes, so if two entries are about equally near, their distances are summed again
in a fixed order.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

SAMPLE = 65_536
"""Rows a codebook is fitted on, at most: 256 of them for each of 256 entries."""
BLOCK = 8_192
"""Rows whose distances to every entry are held at once: 8 MB for 256 entries."""
ROUNDS = 30
ENOUGH = 1e-4
"""Rounds end when one takes less than this share off the error."""


class KMeansFit(NamedTuple):
    """A codebook ``(levels, dim)`` and the squared error after each round, including the last."""

    codebook: Tensor
    errors: tuple[float, ...]


def sample(rows: Tensor, most: int = SAMPLE) -> Tensor:
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
        seed: seed of the first entries.

    Returns:
        Float32 entries; some are equal if there are fewer different points than levels. The error
        is weighted and summed over points, and it never increases from round to round.
    """
    counts = torch.ones(len(points), dtype=torch.float64) if weight is None else weight.double()
    codebook = _seeded(points, levels, counts, seed)
    codes = nearest(points, codebook)
    lost = squared_distance(points, codebook[codes]) * counts
    errors = [float(lost.sum())]
    for _ in range(rounds):
        moved = _means(points, codes, counts, codebook, lost)
        codes = nearest(points, moved)
        lost = squared_distance(points, moved[codes]) * counts
        error = float(lost.sum())
        if error >= errors[-1]:  # only rounding is left
            break
        codebook = moved
        errors.append(error)
        if errors[-2] - error <= ENOUGH * errors[-2]:
            break
    return KMeansFit(codebook, tuple(errors))


def nearest(points: Tensor, codebook: Tensor) -> Tensor:
    """Find the entry nearest to each point, int64 ``(points,)``; the first of equally near ones.

    Args:
        points: float32 ``(points, dim)``.
        codebook: float ``(levels, dim)``.
    """
    entries = codebook.float()
    squares = entries.square().sum(dim=1)  # (levels,)
    # Rounding error of the difference of two distances: each is a sum of dim products.
    slack = 8 * (entries.shape[1] + 2) * 2.0**-24
    largest = float(squares.max())
    codes = torch.empty(len(points), dtype=torch.int64)
    for begin in range(0, len(points), BLOCK):
        block = points[begin : begin + BLOCK]
        score = torch.addmm(squares, block, entries.t(), alpha=-2)  # (block, levels)
        least, found = score.min(dim=1)
        size = block.square().sum(dim=1) + largest
        close = score <= (least + slack * size).unsqueeze(1)
        unsure = close.sum(dim=1) != 1
        if bool(unsure.any()):
            found[unsure] = _in_order(block[unsure], entries).argmin(dim=1)
        codes[begin : begin + BLOCK] = found
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
    """Squared distances of pairs of points, both ``(points, dim)``: float64 ``(points,)``."""
    return (points - others).double().square().sum(dim=1)


def _in_order(points: Tensor, entries: Tensor) -> Tensor:
    """Squared distances ``(points, levels)``, summed dimension by dimension."""
    total = torch.zeros(len(points), len(entries), dtype=torch.float64)
    for column in range(points.shape[1]):
        gap = points[:, column : column + 1].double() - entries[:, column].double()
        total = total + gap * gap
    return total


def _seeded(points: Tensor, levels: int, counts: Tensor, seed: int) -> Tensor:
    """k-means++ seeding: draw points by weight times squared distance to the drawn points."""
    generator = torch.Generator().manual_seed(seed)
    chosen = [_drawn(counts, generator)]
    wide = points.double()
    left = (wide - wide[chosen[0]]).square().sum(dim=1) * counts  # (points,)
    while len(chosen) < levels and bool((left > 0).any()):
        chosen.append(_drawn(left, generator))
        again = (wide - wide[chosen[-1]]).square().sum(dim=1) * counts
        left = torch.minimum(left, again)
    chosen += chosen[:1] * (levels - len(chosen))  # every point is an entry already
    return points[torch.tensor(chosen)].clone()


def _drawn(share: Tensor, generator: torch.Generator) -> int:
    """Draw one index by shares ``(n,)``; the first index if all are zero."""
    total = share.cumsum(0)
    place = torch.rand((), generator=generator, dtype=torch.float64) * total[-1]
    found = int(torch.searchsorted(total, place, right=True))
    # Rounding may lead past the last share that is not zero.
    return found if found < len(share) and share[found] > 0 else int(share.argmax())


def _means(points: Tensor, codes: Tensor, counts: Tensor, codebook: Tensor, lost: Tensor) -> Tensor:
    """The mean of each entry's points; entries without points move to the largest errors."""
    total = torch.zeros(len(codebook), points.shape[1], dtype=torch.float64)
    total.index_add_(0, codes, points.double() * counts.unsqueeze(1))
    mass = torch.zeros(len(codebook), dtype=torch.float64).index_add_(0, codes, counts)
    is_used = mass > 0
    means = codebook.clone()
    means[is_used] = (total[is_used] / mass[is_used].unsqueeze(1)).to(codebook.dtype)
    empty = (~is_used).nonzero().flatten()
    worst = lost.topk(min(len(empty), len(lost))).indices
    worst = worst[lost[worst] > 0]
    means[empty[: len(worst)]] = points[worst]
    return means


def scalar_kmeans(
    values: Tensor, levels: int, weight: Tensor | None = None, rounds: int = 200
) -> KMeansFit:
    """Fit a codebook of numbers by k-means in one dimension.

    It starts from quantiles and from evenly spaced levels, and the better result is returned. The
    values are sorted once, and a round needs only sums between borders, so rounds are cheap enough
    to run until no entry changes.

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
    filled = ordered[torch.searchsorted(mass[1:], shares * whole).clamp(max=len(ordered) - 1)]
    spaced = ordered[0] + (ordered[-1] - ordered[0]) * shares
    fits = []
    for start in (filled, spaced):
        entries, errors = start.clone(), [math.inf]
        for _ in range(rounds):
            middle = (entries[1:] + entries[:-1]) / 2
            cut = torch.searchsorted(ordered, middle, right=True)
            border = torch.cat([cut.new_zeros(1), cut, cut.new_full((1,), len(ordered))])
            is_used = mass[border].diff()  # (levels,)
            moment = first[border].diff()
            mean = torch.where(is_used > 0, moment / is_used.clamp(min=1e-300), entries)
            each = second[border].diff() - 2 * mean * moment + mean.square() * is_used
            error = float(each.clamp(min=0).sum())
            if error >= errors[-1]:
                break
            entries = mean.sort().values
            errors.append(error)
        fits.append(KMeansFit(entries.float().unsqueeze(1), tuple(errors[1:])))
    return min(fits, key=lambda fit: fit.errors[-1])
