"""k-means: fit codebooks of embedding tables, and find the nearest codebook entry of each row.

Sources: Lloyd 1982 (alternating means and nearest entries); Arthur and Vassilvitskii 2007
(k-means++ seeding). Differs: deterministic (a fixed seed), fitted on a sample of large tables, rows
may have weights, and an entry without rows is moved to the row with the largest error.

The nearest entry of a row does not depend on how rows are split into blocks. The rounding of matrix
products depends on their shapes, so if two entries are about equally near, their distances are
computed again by sums in a fixed order.
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
"""Rounds end when a round lowers the error by at most this share of it."""


class KMeansFit(NamedTuple):
    """A codebook ``(levels, dim)``, and its squared error at the start and after each round.

    Each of the ``levels`` rows of a codebook is an *entry*.
    """

    codebook: Tensor
    errors: tuple[float, ...]


def sample_rows(rows: Tensor, max_rows: int = SAMPLE) -> Tensor:
    """Draw a stratified sample of rows: one from each of equal sections of a table.

    Args:
        rows: ``(rows, dim)``; it may be memory-mapped, because only the drawn rows are read.
        max_rows: largest number of rows in the sample.

    Returns:
        float32 ``(min(rows, max_rows), dim)``, the same for the same table.
    """
    count = len(rows)
    if count <= max_rows:
        return rows.float()
    bounds = torch.arange(max_rows + 1, dtype=torch.int64) * count // max_rows  # (max_rows + 1,)
    generator = torch.Generator().manual_seed(0)
    position = torch.rand(max_rows, generator=generator, dtype=torch.float64) * bounds.diff()
    return rows[bounds[:-1] + position.long()].float()


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
        The codebook in float32, and the weighted sums of squared errors, which never increase from
        round to round. If there are fewer different points than levels, some entries are equal.
    """
    point_weights = (
        torch.ones(len(points), dtype=torch.float64) if weight is None else weight.double()
    )
    codebook = _draw_entries(points, levels, point_weights, seed)
    codes = nearest_entries(points, codebook)
    point_errors = squared_distance(points, codebook[codes]) * point_weights
    errors = [float(point_errors.sum())]
    for _ in range(rounds):
        new_codebook = _update_entries(points, codes, point_weights, codebook, point_errors)
        codes = nearest_entries(points, new_codebook)
        point_errors = squared_distance(points, new_codebook[codes]) * point_weights
        error = float(point_errors.sum())
        if error >= errors[-1]:  # converged up to rounding
            break
        codebook = new_codebook
        errors.append(error)
        if errors[-2] - error <= MIN_IMPROVEMENT * errors[-2]:
            break
    return KMeansFit(codebook, tuple(errors))


def nearest_entries(points: Tensor, codebook: Tensor) -> Tensor:
    """Find the entry nearest to each point: int64 ``(points,)``; in a tie, the first one.

    Args:
        points: float32 ``(points, dim)``.
        codebook: float ``(levels, dim)``.
    """
    entries = codebook.float()
    squares = entries.square().sum(dim=1)  # (levels,)
    # A bound of the relative rounding error of a distance, which is a sum of dim products.
    tolerance = 8 * (entries.shape[1] + 2) * 2.0**-24
    largest = float(squares.max())
    codes = torch.empty(len(points), dtype=torch.int64)
    for begin in range(0, len(points), BLOCK):
        block = points[begin : begin + BLOCK]
        score = torch.addmm(squares, block, entries.t(), alpha=-2)  # (block, levels)
        least, block_codes = score.min(dim=1)
        size = block.square().sum(dim=1) + largest  # bounds the sizes of the summed terms
        is_near = score <= (least + tolerance * size).unsqueeze(1)
        ambiguous = is_near.sum(dim=1) != 1
        if bool(ambiguous.any()):
            block_codes[ambiguous] = _compute_exact_distances(block[ambiguous], entries).argmin(
                dim=1
            )
        codes[begin : begin + BLOCK] = block_codes
    return codes


def nearest_with_weights(points: Tensor, column_weights: Tensor, codebook: Tensor) -> Tensor:
    """Find the entry nearest to each point, by squared differences with a weight for each column.

    Args:
        points: float32 ``(points, dim)``.
        column_weights: weight of each squared difference, ``(points, dim)``, not negative.
        codebook: float ``(levels, dim)``.

    Returns:
        int64 ``(points,)``.
    """
    entries = codebook.float()
    codes = torch.empty(len(points), dtype=torch.int64)
    for begin in range(0, len(points), BLOCK):
        part = slice(begin, begin + BLOCK)
        squares = column_weights[part] @ entries.square().t()  # (block, levels)
        score = torch.addmm(squares, column_weights[part] * points[part], entries.t(), alpha=-2)
        codes[part] = score.argmin(dim=1)
    return codes


def squared_distance(points: Tensor, others: Tensor) -> Tensor:
    """Return the squared distance of each pair of rows ``(points, dim)``: float64 ``(points,)``."""
    return (points - others).double().square().sum(dim=1)


def _compute_exact_distances(points: Tensor, entries: Tensor) -> Tensor:
    """Return squared distances, float64 ``(points, levels)``, summed dimension by dimension."""
    total = torch.zeros(len(points), len(entries), dtype=torch.float64)
    for column in range(points.shape[1]):
        difference = points[:, column : column + 1].double() - entries[:, column].double()
        total = total + difference * difference
    return total


def _draw_entries(points: Tensor, levels: int, point_weights: Tensor, seed: int) -> Tensor:
    """Draw the first entries from the points by k-means++.

    The probability of a point is proportional to its weight times its squared distance to the
    nearest point already drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = [_draw_index(point_weights, generator)]
    exact_points = points.double()
    errors = (exact_points - exact_points[chosen[0]]).square().sum(
        dim=1
    ) * point_weights  # (points,)
    while len(chosen) < levels and bool((errors > 0).any()):
        chosen.append(_draw_index(errors, generator))
        new_errors = (exact_points - exact_points[chosen[-1]]).square().sum(dim=1) * point_weights
        errors = torch.minimum(errors, new_errors)
    chosen += chosen[:1] * (levels - len(chosen))  # fewer different points than levels
    return points[torch.tensor(chosen)].clone()


def _draw_index(weights: Tensor, generator: torch.Generator) -> int:
    """Draw one index with probability proportional to ``weights`` ``(n,)``; 0 if all are zero."""
    total = weights.cumsum(0)
    position = torch.rand((), generator=generator, dtype=torch.float64) * total[-1]
    index = int(torch.searchsorted(total, position, right=True))
    # Because of rounding, the index may be after the last positive weight.
    return index if index < len(weights) and weights[index] > 0 else int(weights.argmax())


def _update_entries(
    points: Tensor, codes: Tensor, point_weights: Tensor, codebook: Tensor, point_errors: Tensor
) -> Tensor:
    """Replace each entry by the weighted mean of its points.

    Entries without points are moved to the points with the largest errors.
    """
    total = torch.zeros(len(codebook), points.shape[1], dtype=torch.float64)
    total.index_add_(0, codes, points.double() * point_weights.unsqueeze(1))
    mass = torch.zeros(len(codebook), dtype=torch.float64).index_add_(0, codes, point_weights)
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

    The search starts once from quantiles and once from evenly spaced levels, and the better result
    is returned. The values are sorted once. A round then needs only differences of cumulative sums,
    so rounds are fast enough to run until the error no longer decreases.

    Args:
        values: float ``(values,)``.
        levels: number of entries of the codebook.
        weight: weight of each value, ``(values,)``.
        rounds: largest number of rounds.

    Returns:
        Entries ``(levels, 1)`` in ascending order.
    """
    sorted_values, permutation = values.double().sort()
    distinct = torch.unique(sorted_values)  # ascending
    if len(distinct) <= levels:
        exact = torch.cat([distinct, distinct[-1:].expand(levels - len(distinct))])
        return KMeansFit(exact.float().unsqueeze(1), (0.0,))
    point_weights = (
        torch.ones_like(sorted_values) if weight is None else weight.double()[permutation]
    )
    # Cumulative sums over the sorted values: of the weights (mass), of weight times value (first
    # moment), and of weight times squared value (second moment).
    zero = sorted_values.new_zeros(1)
    mass = torch.cat([zero, point_weights.cumsum(0)])  # (values + 1,)
    first = torch.cat([zero, (point_weights * sorted_values).cumsum(0)])
    second = torch.cat([zero, (point_weights * sorted_values.square()).cumsum(0)])
    total = float(mass[-1])
    shares = (torch.arange(levels, dtype=torch.float64) + 0.5) / levels  # (levels,)
    quantiles = sorted_values[
        torch.searchsorted(mass[1:], shares * total).clamp(max=len(sorted_values) - 1)
    ]
    evenly_spaced = sorted_values[0] + (sorted_values[-1] - sorted_values[0]) * shares
    fits = []
    for start in (quantiles, evenly_spaced):
        entries, errors = start.clone(), [math.inf]
        for _ in range(rounds):
            midpoints = (entries[1:] + entries[:-1]) / 2
            inner = torch.searchsorted(sorted_values, midpoints, right=True)
            boundaries = torch.cat(
                [inner.new_zeros(1), inner, inner.new_full((1,), len(sorted_values))]
            )
            entry_mass = mass[boundaries].diff()  # (levels,)
            moment = first[boundaries].diff()
            mean = torch.where(entry_mass > 0, moment / entry_mass.clamp(min=1e-300), entries)
            entry_errors = (
                second[boundaries].diff() - 2 * mean * moment + mean.square() * entry_mass
            )
            error = float(entry_errors.clamp(min=0).sum())
            if error >= errors[-1]:
                break
            entries = mean.sort().values
            errors.append(error)
        fits.append(KMeansFit(entries.float().unsqueeze(1), tuple(errors[1:])))
    return min(fits, key=lambda fit: fit.errors[-1])
