"""Evenly spaced levels: rounding error, scales and offsets, and errors for large weights.

A grid describes evenly spaced levels. A range is a group of weights that share a scale, the
distance of two levels. A level is a multiple of the scale: from ``-max_multiple`` to
``max_multiple`` in a symmetric grid, otherwise from 0 to ``levels - 1``, added to an offset.
``SLACK`` is the relative error of float32 rounding.
"""

import pytest
import torch
from error_codes import raises_code
from grids import (
    SLACK,
    changed_grid,
    clipping_rules,
    each_asymmetric,
    each_grid,
    each_symmetric,
    round_trip,
    rows_per_scale_values,
    scale_types,
)
from hypothesis import given
from hypothesis import strategies as st
from random_tables import draw_normal, tables
from torch import Tensor

from compressors.errors.steps import ValueNotStorable
from compressors.quantize.kernels.clipping import fit
from compressors.quantize.kernels.levels import Grid, nearest_multiples

MAX_FLOAT16 = 65504.0


def require_errors_within_half_a_level(table: Tensor, grid: Grid) -> None:
    decoded, (scale, offset) = round_trip(table, grid)
    largest = table.abs().amax(dim=1, keepdim=True)
    if offset is not None:
        largest = torch.maximum(largest, offset.float().abs())
    assert torch.all((decoded - table).abs() <= scale.float() / 2 + SLACK * largest)


@each_grid
@given(table=tables(), scale=scale_types, rows_per_scale=rows_per_scale_values)
def test_round_trip_error_is_at_most_half_the_stored_scale(grid, table, scale, rows_per_scale):
    require_errors_within_half_a_level(
        table, changed_grid(grid, scale=scale, rows_per_scale=rows_per_scale)
    )


@each_grid
@pytest.mark.parametrize("largest", [1.4e-7, 1e-5, 1.1e-4, 6e-8 * 127.4, 6e-8 * 7.4, 6e-8 * 1.6])
def test_scales_of_the_smallest_float16_numbers_clip_nothing(grid, largest):
    # Such scales are small multiples of 2^-24; rounding them down would clip the largest weights.
    # 6e-8 is slightly above 2^-24, and 127.4, 7.4 and 1.6 are slightly above the highest multiples
    # of the symmetric grids (127, 7 and 1.5): these exact scales are slightly above 2^-24.
    require_errors_within_half_a_level(torch.linspace(-1, 1, 33).reshape(3, 11) * largest, grid)


@each_grid
@given(table=tables(), rows_per_scale=rows_per_scale_values)
def test_the_scale_is_no_larger_than_the_range_needs(grid, table, rows_per_scale):
    _, (scale, offset) = round_trip(table, changed_grid(grid, rows_per_scale=rows_per_scale))
    groups = torch.arange(len(table)) // (rows_per_scale or len(table))
    low, high = (
        torch.stack([extreme(table[groups == group]) for group in groups])
        for extreme in (torch.min, torch.max)
    )
    if offset is None:
        needed = torch.maximum(-low, high) / grid.max_multiple
    else:
        # Rounding an offset down changes it by at most 2^-10 of it, which widens the range.
        needed = (high - low + low.abs() * 2.0**-10 + 2.0**-24) / (grid.levels - 1)
    # float16 rounds a scale by at most one part in 2^11, or by one of its smallest steps
    assert torch.all(scale.float() <= needed.unsqueeze(1) * (1 + 2.0**-11) + 2.0**-24)
    assert torch.all(scale > 0)


@each_grid
@given(table=tables(), rows_per_scale=rows_per_scale_values, clipping=clipping_rules)
def test_codes_are_integers_within_the_grid(grid, table, rows_per_scale, clipping):
    changed = changed_grid(grid, rows_per_scale=rows_per_scale, clipping=clipping)
    multiples = nearest_multiples(table, fit(table, changed), changed)
    codes = multiples + (grid.max_multiple if grid.symmetric else 0)
    assert torch.equal(codes, codes.round())
    assert torch.all((codes >= 0) & (codes <= grid.levels - 1))


@each_grid
@pytest.mark.parametrize("scale", ["float16", "float32"])
@pytest.mark.parametrize("clipping", ["min_max", "greedy", "mse"])
def test_rows_of_zeros_have_a_positive_scale_and_are_exact_if_a_level_is_zero(
    grid, scale, clipping
):
    table = torch.zeros(4, 5)
    table[2] = torch.tensor([0.5, -1.0, 0.0, 0.25, 1.0])
    decoded, stored = round_trip(table, changed_grid(grid, scale=scale, clipping=clipping))
    # Four symmetric levels do not contain zero, so the error is half of the smallest scale.
    allowed = 2.0**-25 if grid.symmetric and grid.levels == 4 else 0.0
    assert decoded[[0, 1, 3]].abs().max() <= allowed
    assert torch.all(stored.scale > 0)
    assert torch.isfinite(stored.scale).all()
    assert all(part.dtype == getattr(torch, scale) for part in stored if part is not None)


@each_asymmetric
@pytest.mark.parametrize("scale", ["float16", "float32"])
@pytest.mark.parametrize("value", [0.013, -0.013, 1 / 3, -7.7, 1e-6, 60000.3])
def test_a_row_of_equal_values_changes_only_by_rounding(grid, scale, value):
    decoded, stored = round_trip(torch.full((3, 6), value), changed_grid(grid, scale=scale))
    # The offset is rounded down to the previous float16 number, and the levels divide the
    # difference.
    largest_scale = 2.0**-10 * abs(value) / (grid.levels - 1) + 2.0**-24
    assert (decoded - value).abs().max() <= largest_scale / 2 + SLACK * abs(value)
    assert torch.all(stored.offset.float() <= value + SLACK * abs(value))


@each_asymmetric
def test_an_offset_reduces_the_squared_error_of_weights_of_one_sign_4_times(grid):
    table = torch.rand(50, 16, generator=torch.Generator().manual_seed(0)) * 0.1 + 0.1
    with_offset, without = (
        (round_trip(table, grid_used)[0] - table).square().sum()
        for grid_used in (grid, changed_grid(grid, symmetric=True))
    )
    # The weights are in [0.1, 0.2]. The symmetric range [-0.2, 0.2] is 4 times as long, so the
    # error is about 4 times as large, and its square 16 times. A bound of 4 leaves a margin.
    assert with_offset < without / 4


def test_four_levels_around_zero_have_less_error_than_three_with_a_zero():
    table = draw_normal(500, 16)
    errors = {
        levels: (round_trip(table, Grid(levels, clipping="mse"))[0] - table).square().sum()
        for levels in (3, 4)
    }
    assert errors[4] < 0.7 * errors[3]


@each_grid
def test_weights_too_small_for_float16_decode_to_at_most_its_smallest_number(grid):
    decoded, _ = round_trip(torch.full((2, 4), 1e-12), grid)
    assert decoded.abs().max() <= 2.0**-24


@each_symmetric
def test_a_scale_above_float16_raises_and_can_be_stored_as_float32(grid):
    table = torch.full((2, 3), MAX_FLOAT16 * grid.max_multiple * 1.01)
    with raises_code(ValueNotStorable, "scale_beyond_float16", quantity="scale"):
        fit(table, grid)
    require_errors_within_half_a_level(table, changed_grid(grid, scale="float32"))


@each_asymmetric
def test_an_offset_or_scale_above_float16_raises_and_can_be_stored_as_float32(grid):
    low = torch.tensor([[-MAX_FLOAT16 * 1.01, 0.0]])
    with raises_code(ValueNotStorable, "scale_beyond_float16", quantity="offset"):
        fit(low, grid)
    high = torch.tensor([[-1.0, MAX_FLOAT16 * grid.levels]])
    with raises_code(ValueNotStorable, "scale_beyond_float16", quantity="scale"):
        fit(high, grid)
    for table in (low, high):
        require_errors_within_half_a_level(table, changed_grid(grid, scale="float32"))


@each_asymmetric
@pytest.mark.parametrize("clipping", ["min_max", "greedy", "mse"])
def test_a_range_beyond_float32_raises_value_not_storable(grid, clipping):
    table = torch.tensor([[-3e38, 3e38]])  # the length of this range is above the largest float32
    with raises_code(ValueNotStorable, "scale_beyond_float32"):
        fit(table, changed_grid(grid, scale="float32", clipping=clipping))


@each_symmetric
def test_both_ends_of_a_row_are_exact_if_float16_represents_the_scale(grid):
    table = torch.tensor([[-1.0, 1.0, 1.0]]) * grid.max_multiple * 2.0**-6  # the scale is 2^-6
    assert torch.equal(round_trip(table, grid)[0], table)


@each_grid
@given(table=tables(), clipping=clipping_rules, data=st.data())
def test_the_fit_of_a_range_does_not_depend_on_other_ranges(grid, table, clipping, data):
    """So the blocks in which a table is encoded do not affect the result."""
    rows_per_scale = data.draw(st.sampled_from([1, 2]))
    changed = changed_grid(grid, clipping=clipping, rows_per_scale=rows_per_scale)
    all_rows = fit(table, changed)
    parts = [fit(part, changed) for part in table.split(rows_per_scale)]
    for name in ("scale", "offset"):
        if getattr(all_rows, name) is not None:
            alone = torch.cat([getattr(part, name) for part in parts])
            assert torch.equal(getattr(all_rows, name), alone)


@each_grid
@pytest.mark.parametrize("rows", [8, 11, 3])
def test_a_shared_scale_equals_the_scale_of_one_row_with_all_the_values(grid, rows):
    table = draw_normal(rows, 3, seed=rows)
    shared = fit(table, changed_grid(grid, rows_per_scale=4))
    assert len(shared.scale) == -(-rows // 4)
    for number, part in enumerate(table.split(4)):
        alone = fit(part.reshape(1, -1), grid)
        assert torch.equal(shared.scale[number], alone.scale[0])
    with_one_scale = fit(table, changed_grid(grid, rows_per_scale=0))
    assert torch.equal(with_one_scale.scale, fit(table.reshape(1, -1), grid).scale)
