"""``pairwise``: combinations that contain every pair of values, instead of the full product."""

import itertools
import math

import pytest
from pairwise import pairwise

AXES = {
    "one": (["a", "b", "c"],),
    "two": ([1, 2], ["a", "b", "c"]),
    "single values": ([1], [2], [3]),
    "mixed": (range(9), (1, 2, 5, 8), range(5), (True, False)),
    "ten axes of two values": tuple([(0, 1)] * 10),
    "equal values": ([0, 0], [0, 1], [1, 1]),
}


@pytest.mark.parametrize("axes", AXES.values(), ids=AXES)
def test_every_pair_of_values_occurs_in_some_combination(axes):
    result = pairwise(*axes)
    assert all(value in axis for row in result for value, axis in zip(row, axes, strict=True))
    for first, second in itertools.combinations(range(len(axes)), 2):
        covered = {(row[first], row[second]) for row in result}
        assert covered == set(itertools.product(axes[first], axes[second]))
    if len(axes) == 1:
        assert [row[0] for row in result] == list(axes[0])


def test_pairwise_returns_far_fewer_combinations_than_the_full_product():
    axes = AXES["mixed"]
    # Each pair of values of the two longest axes needs a combination. The choice is greedy, so it
    # may have slightly more than these 45; the full product has 360.
    minimum = 9 * 5
    assert minimum <= len(pairwise(*axes)) <= 1.2 * minimum
    assert 1.2 * minimum < math.prod(map(len, axes)) / 6
    # The full product has 1,024 combinations; at least 6 are needed to contain every pair.
    assert len(pairwise(*AXES["ten axes of two values"])) <= 12


def test_the_same_axes_give_the_same_combinations():
    axes = AXES["mixed"]
    assert pairwise(*axes) == pairwise(*map(list, axes))
