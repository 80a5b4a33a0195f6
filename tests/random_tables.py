"""Random embedding tables for tests of quantization formats."""

import hypothesis.extra.numpy as arrays
import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor


def tables(max_abs: float = 6e4) -> st.SearchStrategy[Tensor]:
    """Return a strategy for float32 tables whose rows have very different scales and offsets.

    Weights of the first row are at most ``max_abs`` in absolute value. The bound of each later row
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
    return st.tuples(values, st.floats(-8, np.log10(max_abs)), shift).map(scaled)


def draw_normal(rows: int, dim: int, seed: int = 3) -> Tensor:
    """Return normal weights float32 ``(rows, dim)`` from a seed."""
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))
