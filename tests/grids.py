"""Grids (evenly spaced levels) and random tables for tests of uniform quantization formats.

``each_grid`` and similar names parametrize a test. ``scale_types``, ``sharing`` and ``rules`` are
Hypothesis strategies for the settings ``scale``, ``rows_per_scale`` and ``clipping``.
"""

from typing import Any

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from compressors.quantize.kernels.clipping import fit
from compressors.quantize.kernels.levels import FittedRange, Grid, decode_multiples, nearest

# A bound for relative rounding errors in float32, each at most 2^-24: of a quotient, its rounding
# and a product, with an offset also of a difference and a sum. These are five; 8 leaves a margin.
SLACK = 8 * 2.0**-24

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
sharing = st.sampled_from([0, 1, 2, 4])  # rows that share a scale; 0: all rows of the table
rules = st.sampled_from(["min_max", "greedy", "mse"])


def changed_grid(grid: Grid, **changes: Any) -> Grid:
    """Return a copy of a grid with other values in some fields."""
    fields = {name: getattr(grid, name) for name in Grid.__dataclass_fields__}
    return Grid(**{**fields, **changes})


def tables(largest: float = 6e4) -> st.SearchStrategy[Tensor]:
    """Return a strategy for float32 tables whose rows have very different scales and offsets.

    Weights of the first row are at most ``largest`` in absolute value. The bound of each later row
    is a thousandth of the bound of the row before it.
    """

    def scaled(values_power_shift: tuple[np.ndarray, float, float]) -> Tensor:
        table, power, shift = values_power_shift
        scales = np.float32(10.0) ** (power - 3 * np.arange(len(table), dtype=np.float32))
        shifted = table * np.float32(1 - abs(shift)) + np.float32(shift)
        return torch.from_numpy((shifted * scales[:, None]).astype(np.float32))

    shapes = st.tuples(st.integers(1, 5), st.integers(1, 9))
    fractions = st.floats(-1, 1, width=32, allow_subnormal=False)
    values = arrays.arrays(np.float32, shapes, elements=fractions)
    shift = st.floats(-0.99, 0.99)
    return st.tuples(values, st.floats(-8, np.log10(largest)), shift).map(scaled)


def random_normal(rows: int, dim: int, seed: int = 3) -> Tensor:
    """Return normal weights float32 ``(rows, dim)`` from a seed."""
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))


def round_trip(table: Tensor, grid: Grid) -> tuple[Tensor, FittedRange]:
    """Quantize and dequantize a table; return the weights, and scale and offset of each row."""
    fitted = fit(table, grid)
    scale_indices = torch.arange(len(table)) // (grid.rows_per_scale or len(table))
    scale, offset = (None if part is None else part[scale_indices] for part in fitted)
    assert scale is not None
    return decode_multiples(nearest(table, fitted, grid), scale, offset), FittedRange(scale, offset)
