"""Pairwise covers: few combinations of parameters that contain every pair of values."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import pytest


def pairwise(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Return combinations in which every pair of values of two axes occurs.

    Most faults of parameters show with one value or with two together (Kuhn et al., "Software fault
    interactions", 2004). Only nightly tests should use the full product. The choice is greedy: a
    combination contains the first uncovered pair, and then, axis by axis, the value that covers the
    most uncovered pairs. The result depends on the axes alone, so test ids are the same in every
    process.

    Args:
        axes: the values of each parameter.

    Returns:
        Combinations, each with one value of every axis, in the order of the axes.
    """
    indices = [range(len(axis)) for axis in axes]
    # A pair is (axis, index of its value, later axis, index of its value), as in ``Pair``.
    uncovered = {
        (first, a, second, b): None
        for first, second in itertools.combinations(range(len(axes)), 2)
        for a, b in itertools.product(indices[first], indices[second])
    }
    chosen: list[tuple[int, ...]] = [] if len(axes) > 1 else [(index,) for index in indices[0]]
    while uncovered:
        first, a, second, b = next(iter(uncovered))
        row: dict[int, int] = {first: a, second: b}
        for axis in range(len(axes)):
            if axis not in row:
                row[axis] = max(
                    indices[axis], key=lambda v: _newly_covered(uncovered, row, axis, v)
                )
        chosen.append(tuple(row[axis] for axis in range(len(axes))))
        for pair in _pairs_of(chosen[-1]):
            uncovered.pop(pair, None)
    return [tuple(axis[v] for axis, v in zip(axes, row, strict=True)) for row in chosen]


Pair = tuple[int, int, int, int]


def _pairs_of(row: Sequence[int]) -> list[Pair]:
    """Return all pairs of values in a combination: axis and value, axis and value."""
    return [(i, row[i], k, row[k]) for i, k in itertools.combinations(range(len(row)), 2)]


def _newly_covered(uncovered: dict[Pair, None], row: dict[int, int], axis: int, value: int) -> int:
    """Return how many uncovered pairs a value has with the values chosen so far."""
    pairs = (
        (axis, value, other, chosen) if axis < other else (other, chosen, axis, value)
        for other, chosen in row.items()
    )
    return sum(pair in uncovered for pair in pairs)


def parametrize_pairwise(**axes: Mapping[str, Any] | Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrize a test with a pairwise cover; a mapping's keys are the ids of its values."""
    axes_with_ids = [
        axis if isinstance(axis, Mapping) else {str(value): value for value in axis}
        for axis in axes.values()
    ]
    rows = pairwise(*(list(axis) for axis in axes_with_ids))
    values = [[axis[key] for axis, key in zip(axes_with_ids, row, strict=True)] for row in rows]
    return pytest.mark.parametrize(list(axes), values, ids=["-".join(row) for row in rows])
