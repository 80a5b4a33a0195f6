"""Steps and random tables for the tests of tables with codebooks."""

import math
from typing import Any

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from compressors.core.modules.formats import PackedTable
from compressors.core.steps.step import TableStep
from compressors.quantize.tables.kmeans import KMeans
from compressors.quantize.tables.product_codes import ProductCodes
from compressors.quantize.tables.residual_codes import ResidualCodes

STEPS = (
    KMeans(bits=2),
    KMeans(bits=4, scale="none"),
    KMeans(bits=8, scale="float32"),
    ProductCodes(),
    ProductCodes(parts=3, bits=4, codebook_type="float16"),
    ProductCodes(parts=5, bits=2),
    ResidualCodes(refine=0),
    ResidualCodes(codebooks=3, bits=4),
    ResidualCodes(codebooks=5, bits=2, codebook_type="float16"),
)


def step_id(step: Any) -> str:
    """Return an id for a step: its kind and the settings that are not defaults."""
    settings = step.model_dump(exclude_defaults=True, exclude={"kind", "tables", "min_rows"})
    return "-".join([step.kind, *(f"{key}={value}" for key, value in settings.items())])


each_step = pytest.mark.parametrize("step", STEPS, ids=step_id)


def clustered_rows(rows: int, dim: int, seed: int = 0) -> Tensor:
    """Return rows float32 ``(rows, dim)`` near multiples of 12 centres, as in trained tables."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(12, dim, generator=generator)
    cluster = torch.randint(12, (rows,), generator=generator)
    sizes = torch.rand(rows, 1, generator=generator) + 0.5
    return sizes * (centres[cluster] + 0.2 * torch.randn(rows, dim, generator=generator))


def encode(step: TableStep, table: Tensor) -> dict[str, Tensor]:
    """Return the tensors that a step stores for a table.

    ``encode`` returns those with an entry for each row or group of rows. ``fit`` returns those of
    the whole table, such as codebooks; their layout has no ``rows_per_entry`` (number of rows per
    entry).
    """
    params = step.fit(table)
    layout = step.storage.layout(*table.shape, step.settings())
    table_tensors = {name: params[name] for name, spec in layout.items() if not spec.rows_per_entry}
    return {**table_tensors, **step.encode(table, params)}


def pack_table(step: TableStep, table: Tensor) -> PackedTable:
    """Return a table in the format of a step."""
    rows, dim = table.shape
    return PackedTable(step.storage, rows, dim, step.settings(), encode(step, table))


def decode_rows(step: TableStep, table: Tensor) -> Tensor:
    """Return all rows of a table after encoding and decoding, float32 ``(rows, dim)``."""
    with torch.no_grad():
        return pack_table(step, table)(torch.arange(len(table)))


def tables(largest: int = 60) -> st.SearchStrategy[Tensor]:
    """Return a strategy for float32 tables of 2 to ``largest`` rows, of three scales."""
    fractions = st.floats(-1, 1, width=32, allow_subnormal=False)
    fractions = fractions.map(lambda x: np.float32(round(x, 2)))
    shapes = st.tuples(st.integers(2, largest), st.integers(1, 9))
    values = arrays.arrays(np.float32, shapes, elements=fractions)
    scales = st.sampled_from([1e-3, 1.0, 1e3])
    return st.tuples(values, scales).map(
        lambda values_and_scale: torch.from_numpy(values_and_scale[0]) * values_and_scale[1]
    )


def compute_size(step: TableStep, rows: int, dim: int) -> int:
    """Return the bytes of a table in the layout of a step."""
    layout = step.storage.layout(rows, dim, step.settings())
    return sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in layout.values())
