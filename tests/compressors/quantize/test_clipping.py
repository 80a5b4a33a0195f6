"""Clipping rules never increase the squared error, and are close to an exhaustive search.

A grid describes evenly spaced levels. A range is a group of weights that share a scale
(``rows_per_scale`` rows), and the interval that its levels cover. Clipping makes the interval
smaller: a rule selects its ends, for symmetric grids as a share of the largest absolute weight.
"""

import pytest
import torch
from grids import (
    GRIDS,
    changed_grid,
    each_asymmetric,
    each_grid,
    round_trip,
    rows_per_scale_values,
    scale_types,
)
from hypothesis import given
from random_tables import draw_normal, tables
from torch import Tensor

from compressors.quantize.kernels import clipping
from compressors.quantize.kernels.clipping import fit
from compressors.quantize.kernels.levels import (
    Grid,
    asymmetric_range,
    range_bounds,
    split_into_ranges,
    squared_error,
)

INT4 = GRIDS["15 symmetric"]  # the levels -7 to 7


def error(table: Tensor, grid: Grid) -> Tensor:
    """Squared error of every range, in float64."""
    squares = (round_trip(table, grid)[0] - table).double().square().sum(dim=1)
    range_of_row = torch.arange(len(table)) // (grid.rows_per_scale or len(table))
    return torch.zeros(int(range_of_row[-1]) + 1, dtype=torch.float64).index_add_(
        0, range_of_row, squares
    )


@pytest.mark.parametrize(
    ("grid", "rule"),
    [
        # One rule for each grid, in turn, is not marked ``nightly``.
        pytest.param(
            grid,
            rule,
            id=f"{name}-{rule}",
            marks=pytest.mark.nightly if (grid_index + rule_index) % 2 else (),
        )
        for grid_index, (name, grid) in enumerate(GRIDS.items())
        for rule_index, rule in enumerate(("greedy", "mse"))
    ],
)
@given(table=tables(), scale=scale_types, rows_per_scale=rows_per_scale_values)
def test_clipping_never_increases_the_error_of_a_range(grid, rule, table, scale, rows_per_scale):
    unclipped = changed_grid(grid, scale=scale, rows_per_scale=rows_per_scale)
    # Errors are compared in float32: sums of a few dozen squares have relative errors of 1e-6. Very
    # small squares are multiples of 1e-45, the smallest positive float32.
    allowed_error = error(table, unclipped) * (1 + 1e-5) + 1e-45
    assert torch.all(error(table, changed_grid(unclipped, clipping=rule)) <= allowed_error)


def test_mse_finds_the_best_share_of_every_symmetric_row():
    """The reference encodes the table for every share and takes the best one of each row."""
    table = draw_normal(200, 24)
    grid = changed_grid(INT4, scale="float32")
    widest = fit(table, grid).scale
    errors_of_shares = []
    for share in (1.0, *clipping.SHARES):
        scale = (widest * share).double()
        codes = (table.double() / scale).round().clamp(-7, 7)
        errors_of_shares.append((codes * scale - table.double()).square().sum(dim=1))
    result = error(table, changed_grid(grid, clipping="mse"))
    torch.testing.assert_close(result, torch.stack(errors_of_shares).amin(dim=0), rtol=1e-4, atol=0)
    # Clipping lowers the error of normal rows of 24 weights, on average by more than 5 %.
    assert result.sum() < 0.95 * error(table, grid).sum()


@each_asymmetric
def test_mse_error_is_within_1_percent_of_a_search_over_all_pairs_of_ends(grid):
    table = draw_normal(100, 16)
    low, high = range_bounds(table)
    move = (high - low) / clipping.STEPS
    move_counts = range(clipping.STEPS // 2)
    errors_of_pairs = [
        squared_error(
            table, asymmetric_range(low + low_moves * move, high - high_moves * move, grid), grid
        )
        for low_moves in move_counts
        for high_moves in move_counts
    ]
    smallest_error = torch.stack(errors_of_pairs).amin(dim=0).sum()
    # The search moves one end at a time, so it may miss the best pair. It then tries smaller moves,
    # which the reference does not.
    assert error(table, changed_grid(grid, clipping="mse")).sum() <= 1.01 * smallest_error


@each_asymmetric
def test_greedy_error_is_within_2_percent_of_torchs_implementation(grid):
    """Torch has the same search, but stops at local minima and rounds offsets to the nearest."""
    table = draw_normal(100, 16)
    bits = grid.levels.bit_length() - 1
    share = 0.16  # the largest part of a range that the search removes
    result = [
        torch.choose_qparams_optimized(row, row.numel(), clipping.BINS, share, bits)
        for row in table
    ]
    high, low = (torch.cat(parts).unsqueeze(1) for parts in zip(*result, strict=True))
    scale = ((high - low) / (grid.levels - 1)).half().float()
    low = low.half().float()
    codes = ((table - low) / scale).round().clamp(0, grid.levels - 1)
    error_of_torch = (codes * scale + low - table).square().sum()
    # With 256 levels, offsets are rounded by at most an eighth of a level.
    assert error(table, changed_grid(grid, clipping="greedy")).sum() <= 1.02 * error_of_torch


@each_grid
def test_greedy_removes_at_most_16_percent_of_a_range(grid):
    table = draw_normal(300, 16)
    without_clipping, result = (
        fit(table, changed_grid(grid, clipping=rule)).scale for rule in ("min_max", "greedy")
    )
    # Both scales are rounded to float16.
    assert torch.all(result.float() >= 0.84 * without_clipping.float() * (1 - 2.0**-9))
    # A bin, the step of the search, is a 200th of the range: longer than the distance of two levels
    # if there are 256 levels.
    if grid.levels < 20:
        assert (result < without_clipping).float().mean() > 0.7


def test_mse_clips_one_large_weight_among_many_small_weights():
    table = torch.full((1, 64), 0.5)
    table[0, 0] = 1.0
    unclipped, clipped = (
        fit(table, changed_grid(INT4, clipping=rule)).scale for rule in ("min_max", "mse")
    )
    assert float(unclipped) == pytest.approx(1 / 7, rel=1e-3)
    assert float(clipped) < float(unclipped)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("outlier", [5, 100])
def test_mse_with_two_bits_and_one_scale_finds_the_optimal_scale_despite_an_outlier(
    symmetric, outlier
):
    """The size of a single outlier does not affect the scale, the distance of two levels."""
    table = draw_normal(4000, 16)
    table[7, 3] = outlier
    grid = Grid(4, symmetric=symmetric, rows_per_scale=0)
    scale = float(fit(table, changed_grid(grid, clipping="mse")).scale)
    # 0.9957 is the distance of the best four evenly spaced levels for a normal distribution (Max
    # 1960).
    assert scale == pytest.approx(0.9957, rel=0.05)
    assert scale < float(fit(table, grid).scale) / 2


@each_grid
@pytest.mark.parametrize("rule", ["min_max", "greedy", "mse"])
def test_a_range_fitted_in_parts_is_close_to_the_range_fitted_at_once(grid, rule, monkeypatch):
    table = draw_normal(64, 10)
    one_range = changed_grid(grid, rows_per_scale=0, clipping=rule)
    at_once = fit(table, one_range)
    # 640 values in parts of 100: the last part is shorter.
    monkeypatch.setattr("compressors.quantize.kernels.levels.PART_VALUES", 100)
    in_parts = fit(table, one_range)
    # Sums of squares in another order may lead to a range that differs by one move of the search.
    for name in ("scale", "offset"):
        if getattr(at_once, name) is not None:
            torch.testing.assert_close(
                getattr(in_parts, name), getattr(at_once, name), rtol=0.03, atol=1e-3
            )


def test_ranges_of_a_table_with_one_scale_share_its_memory():
    table = draw_normal(1000, 8)
    (values,) = split_into_ranges(table, 0)
    assert values.data_ptr() == table.data_ptr()
    assert values.shape == (1, 8000)


@pytest.mark.parametrize("clipping", ["min_max", "least_squares", "greedy", "mse"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rows_per_scale", [0, 1, 4])
def test_fit_of_an_empty_table_returns_the_number_of_scales_of_its_layout(
    clipping, symmetric, rows_per_scale
):
    levels = 15 if symmetric else 16
    grid = Grid(levels, symmetric, clipping, rows_per_scale=rows_per_scale)
    scale, offset = fit(torch.empty(0, 6), grid)
    expected = (0 if rows_per_scale else 1, 1)
    assert scale.shape == expected
    assert scale.dtype == torch.float16
    assert (offset is None) == symmetric
    if offset is not None:
        assert offset.shape == expected
