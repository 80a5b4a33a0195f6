"""Grids (evenly spaced levels) for tests of uniform quantization formats.

``each_grid`` and similar names parametrize a test. ``scale_types``, ``rows_per_scale_values`` and
``clipping_rules`` are Hypothesis strategies for the settings ``scale``, ``rows_per_scale`` and
``clipping``.
"""

from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from compressors.quantize.kernels.clipping import fit
from compressors.quantize.kernels.levels import (
    FittedRange,
    Grid,
    dequantize,
    nearest_multiples,
)

# A bound for the relative error of float32 operations, each of which adds at most 2^-24. There are
# up to five: division, rounding and multiplication, with an offset also subtraction and addition.
# 8 leaves a margin.
SLACK = 8 * 2.0**-24

# The levels of ``Grid(4)`` are -1.5, -0.5, 0.5 and 1.5 times the scale.
SYMMETRIC = [Grid(255), Grid(15), Grid(4)]
ASYMMETRIC = [Grid(256, symmetric=False), Grid(16, symmetric=False), Grid(4, symmetric=False)]
GRIDS = {
    f"{grid.levels} {'symmetric' if grid.symmetric else 'with offset'}": grid
    for grid in (*SYMMETRIC, *ASYMMETRIC)
}
each_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
each_symmetric = pytest.mark.parametrize("grid", SYMMETRIC, ids=lambda grid: str(grid.levels))
each_asymmetric = pytest.mark.parametrize("grid", ASYMMETRIC, ids=lambda grid: str(grid.levels))
scale_types = st.sampled_from(["float16", "float32"])
rows_per_scale_values = st.sampled_from([0, 1, 2, 4])  # 0: all rows of the table share a scale
clipping_rules = st.sampled_from(["min_max", "greedy", "mse"])


def changed_grid(grid: Grid, **changes: Any) -> Grid:
    """Return a copy of a grid with other values in some fields."""
    fields = {name: getattr(grid, name) for name in Grid.__dataclass_fields__}
    return Grid(**{**fields, **changes})


def round_trip(table: Tensor, grid: Grid) -> tuple[Tensor, FittedRange]:
    """Quantize and dequantize a table; return the weights, and scale and offset of each row."""
    fitted = fit(table, grid)
    scale_indices = torch.arange(len(table)) // (grid.rows_per_scale or len(table))
    scale, offset = (None if part is None else part[scale_indices] for part in fitted)
    assert scale is not None
    return dequantize(nearest_multiples(table, fitted, grid), scale, offset), FittedRange(
        scale, offset
    )
