"""Compiled loops (numba) that encode rows equal their specification in torch bit for bit.

The specification is ``clipping.fit``, which fits ranges, and ``levels.nearest_multiples``, which
rounds to levels. Arguments of ``Grid`` are: number of levels, whether it is symmetric, clipping
rule, dtype of scales, and rows per scale.
"""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from error_codes import raises_code
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from compressors.errors.compression import CompressionError
from compressors.errors.steps import ValueNotStorable
from compressors.quantize.kernels import bitpacking, clipping, row_encoding
from compressors.quantize.kernels.levels import FittedRange, Grid, nearest_multiples, squared_error
from compressors.quantize.tables.rowwise_int4 import RowwiseInt4
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8

ROOT = Path(__file__).parents[3]
# By bits of a code and whether the grid is symmetric.
LEVELS = {(8, True): 255, (8, False): 256, (4, True): 15, (4, False): 16}
GRIDS = [
    (bits, Grid(levels, symmetric, "min_max", scale, rows_per_scale))
    for ((bits, symmetric), levels), scale, rows_per_scale in itertools.product(
        LEVELS.items(), ("float16", "float32"), (1, 2, 8)
    )
] + [
    (bits, Grid(levels, symmetric, "least_squares", scale))
    for ((bits, symmetric), levels), scale in itertools.product(
        LEVELS.items(), ("float16", "float32")
    )
]


@pytest.fixture(autouse=True, scope="module")
def compile_loops() -> None:
    """Compile the loops before any example, because compilation takes seconds."""
    row_encoding.encode(torch.zeros(1, 1), Grid(15), 4)
    row_encoding.encode(torch.zeros(1, 1), Grid(15, clipping="least_squares"), 4)
    row_encoding.encode_with_scales(
        torch.zeros(1, 1), FittedRange(torch.ones(1, 1), None), Grid(15), 4
    )


def bits_of(tensor: Tensor) -> Tensor:
    """The bits of a tensor as integers, so that 0.0 and -0.0 differ."""
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


def expected_codes(multiples: Tensor, bits: int, *, symmetric: bool) -> Tensor:
    """Convert levels (multiples of the scale) to codes as the compiled loops write them."""
    if bits == 8:
        return multiples.to(torch.int8 if symmetric else torch.uint8).view(torch.uint8)
    return bitpacking.pack((multiples + 8 if symmetric else multiples).to(torch.uint8), 4)


def require_equal_encoding(rows: Tensor, grid: Grid, bits: int) -> None:
    """Require that compiled loops and specification give equal results or the same error."""
    try:
        expected = clipping.fit(rows, grid)
    except CompressionError:
        with pytest.raises(CompressionError):
            row_encoding.encode(rows, grid, bits)
        return
    codes, fitted = row_encoding.encode(rows, grid, bits)
    assert torch.equal(bits_of(fitted.scale), bits_of(expected.scale))
    assert (fitted.offset is None) == (expected.offset is None)
    if fitted.offset is not None and expected.offset is not None:
        assert torch.equal(bits_of(fitted.offset), bits_of(expected.offset))
    codes_of_levels = expected_codes(
        nearest_multiples(rows, expected, grid), bits, symmetric=grid.symmetric
    )
    assert torch.equal(codes, codes_of_levels)
    assert torch.equal(row_encoding.encode_with_scales(rows, expected, grid, bits), codes_of_levels)


def rows_from_bits(bit_patterns: list[int], dim: int) -> Tensor:
    """Rows of float32 numbers with these bits; zero replaces NaN and infinity."""
    numbers = np.array(bit_patterns, np.uint32).view(np.float32)
    numbers = np.where(np.isfinite(numbers), numbers, np.float32(0))
    return torch.from_numpy(numbers[: len(numbers) // dim * dim].reshape(-1, dim).copy())


# The bits of any float32, and of floats of moderate size, so that no number dominates a row.
ANY_BITS = st.integers(0, 2**32 - 1)
MODERATE_FLOATS = st.builds(
    lambda sign, exponent, rest: sign << 31 | exponent << 23 | rest,
    st.integers(0, 1),
    st.integers(96, 143),
    st.integers(0, 2**23 - 1),
)
# Both zeros, the smallest and the largest subnormal number, the smallest normal number, and the
# largest, the smallest and the smallest normal number of float16.
SPECIAL_BITS = st.sampled_from(
    [0, 1 << 31, 1, 0x7FFFFF, 0x800000, 0x477FE000, 0x33800000, 0x38800000]
)


@pytest.mark.parametrize(("bits", "grid"), GRIDS)
@given(
    st.lists(ANY_BITS | MODERATE_FLOATS | SPECIAL_BITS, min_size=1, max_size=60),
    st.integers(1, 20),
)
# A row of 65504, the largest number of float16, and 65504.02: the lower end of the whole range is a
# float16, the higher lower end of a clipped range is not.
@example([0x477FE000, 0x477FE006], 2)
def test_encoding_any_finite_rows_equals_the_specification_bit_for_bit(
    bits: int, grid: Grid, bit_patterns: list[int], dim: int
):
    rows = rows_from_bits(bit_patterns, min(dim, len(bit_patterns)))
    require_equal_encoding(rows, grid, bits)


@pytest.mark.parametrize(("bits", "grid"), GRIDS)
@given(st.integers(-20, 20), st.integers(0, 2**16), st.sampled_from([1, 2, 7, 8, 15, 16, 33, 64]))
def test_encoding_normal_rows_equals_the_specification_bit_for_bit(
    bits: int, grid: Grid, power: int, seed: int, dim: int
):
    rows = torch.randn(70, dim, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    rows[seed % 70] = 0
    rows[seed % 7] = rows[seed % 7].abs() + 2.0**power  # all of one sign
    require_equal_encoding(rows, grid, bits)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_ties_between_levels_are_rounded_as_in_the_specification(bits: int, symmetric: bool):
    grid = Grid(LEVELS[bits, symmetric], symmetric, "min_max", "float32")
    top = grid.max_multiple if symmetric else grid.levels - 1
    rows = torch.arange(-2 * int(top), 2 * int(top) + 1).float().unsqueeze(0) / 2
    require_equal_encoding(rows if symmetric else rows.abs(), grid, bits)


@pytest.mark.parametrize("rule", ["min_max", "least_squares", "greedy", "mse"])
@pytest.mark.parametrize("step_class", [RowwiseInt8, RowwiseInt4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rows_per_scale", [0, 1, 4])
def test_a_steps_encoded_block_equals_the_specification(
    step_class, rule, symmetric, rows_per_scale
):
    step = step_class(clipping=rule, symmetric=symmetric, rows_per_scale=rows_per_scale)
    rows = torch.randn(41, 10, generator=torch.Generator().manual_seed(1)).half()
    result = step.encode(rows, step.fit(rows))
    fitted = clipping.fit(rows, step.grid)
    bits = 8 if step_class is RowwiseInt8 else 4
    codes = expected_codes(nearest_multiples(rows, fitted, step.grid), bits, symmetric=symmetric)
    assert torch.equal(result["codes"].view(torch.uint8), codes)
    assert result.keys() == {"codes"} | (
        ({"scale"} | (set() if symmetric else {"offset"})) if rows_per_scale else set()
    )
    if rows_per_scale:
        assert torch.equal(result["scale"], fitted.scale)


def quantize_by_torch(rows: Tensor) -> Tensor:
    """A table after torch's 4-bit prepack and unpack: asymmetric, float16 scale and offset."""
    packed = torch.ops.quantized.embedding_bag_4bit_prepack(rows)
    result: Tensor = torch.ops.quantized.embedding_bag_4bit_unpack(packed)
    return result[:, : rows.shape[1]]


def sample_tables(dim: int) -> dict[str, Tensor]:
    """Random tables of several distributions, by name."""
    torch.manual_seed(dim)
    shape = (2000, dim)
    return {
        "normal": torch.randn(shape) * 0.1,
        "laplace": torch.distributions.Laplace(0.0, 1.0).sample(shape),
        "uniform": torch.rand(shape) * 2 - 1,
        "log-normal": torch.randn(shape).exp(),
        "student": torch.distributions.StudentT(3.0).sample(shape),
    }


@pytest.mark.parametrize("dim", [8, 10, 16, 64, 128])
def test_least_squares_has_less_error_than_torchs_4_bit_prepack(dim: int):
    for name, rows in sample_tables(dim).items():
        step = RowwiseInt4(symmetric=False, clipping="least_squares")
        result = step.encode(rows, {})
        ids = torch.arange(len(rows))
        weights = step.storage.lookup(result, ids, dim, step.settings())
        ratio = (weights - rows).square().sum() / (quantize_by_torch(rows) - rows).square().sum()
        # 0.71 to 0.89 were measured; the tables are random, so slightly more is allowed.
        assert float(ratio) < 0.92, (name, float(ratio))


@given(st.integers(0, 2**16), st.sampled_from([1, 2, 3, 8, 16, 33]), st.sampled_from(list(LEVELS)))
def test_least_squares_never_has_a_larger_error_than_min_max(
    seed: int, dim: int, bits_and_symmetry: tuple[int, bool]
):
    rows = torch.randn(70, dim, generator=torch.Generator().manual_seed(seed))
    errors = []
    for rule in ("min_max", "least_squares"):
        grid = Grid(LEVELS[bits_and_symmetry], bits_and_symmetry[1], rule)
        fitted = clipping.fit(rows, grid)
        errors.append(squared_error(rows, fitted, grid))
    # Errors are float32 sums, and codes computed with a reciprocal may differ at ties.
    assert bool((errors[1] <= errors[0] * (1 + 1e-4) + 1e-12).all())


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("rows_per_scale", [1, 8])
def test_results_and_errors_do_not_depend_on_the_number_of_threads(
    threads: int, rows_per_scale: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(row_encoding, "THREAD_VALUES", 64)
    rows = torch.randn(1001, 12, generator=torch.Generator().manual_seed(2))
    grid = Grid(15, True, "min_max", "float16", rows_per_scale)
    at_once = row_encoding.encode(rows, grid, 4)
    one_scale_grid = Grid(15, True, "min_max", "float16", 0)
    fitted = clipping.fit(rows, one_scale_grid)
    codes_with_one_scale = row_encoding.encode_with_scales(rows, fitted, one_scale_grid, 4)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        codes, result = row_encoding.encode(rows, grid, 4)
        assert torch.equal(codes, at_once[0])
        assert torch.equal(result.scale, at_once[1].scale)
        assert torch.equal(
            row_encoding.encode_with_scales(rows, fitted, one_scale_grid, 4), codes_with_one_scale
        )
        assert torch.equal(row_encoding.encode_with_scales(rows, at_once[1], grid, 4), at_once[0])
        rows[777, 3] = float("nan")
        with raises_code(ValueNotStorable, "row_not_finite", row=777):
            row_encoding.encode(rows, grid, 4)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_nonfinite_weight_raises_an_error_with_its_row(bad: float, symmetric: bool):
    rows = torch.ones(200, 3)
    rows[131, 1] = bad
    with raises_code(ValueNotStorable, "row_not_finite", row=131):
        row_encoding.encode(rows, Grid(255, symmetric, "min_max", "float32"), 8)


@pytest.mark.parametrize(
    ("largest", "grid", "code"),
    [
        (1e9, Grid(255, True, "min_max", "float16"), "scale_beyond_float16"),
        (1e9, Grid(16, False, "min_max", "float16"), "scale_beyond_float16"),
        (3e38, Grid(16, False, "min_max", "float32"), "scale_beyond_float32"),
    ],
)
def test_a_weight_too_large_for_the_scale_raises_value_not_storable(largest, grid, code):
    rows = torch.ones(100, 4)
    rows[70, 2], rows[70, 3] = largest, -largest
    weight = float(rows.max())
    with raises_code(ValueNotStorable, code, quantity="scale or offset", weight=weight):
        row_encoding.encode(rows, grid, 8 if grid.levels > 16 else 4)


def test_encoding_no_rows_returns_no_codes():
    codes, fitted = row_encoding.encode(torch.zeros(0, 5), Grid(15), 4)
    assert codes.shape == (0, 3)
    assert fitted.scale.shape == (0, 1)
    assert row_encoding.encode_with_scales(
        torch.zeros(0, 5), FittedRange(torch.ones(1, 1), None), Grid(15), 4
    ).shape == (0, 3)


def test_encoding_a_strided_view_equals_encoding_contiguous_rows():
    rows = torch.randn(64, 40)[::2, ::3]
    codes, _ = row_encoding.encode(rows, Grid(255), 8)
    assert torch.equal(codes, row_encoding.encode(rows.contiguous(), Grid(255), 8)[0])


def test_importing_the_registries_does_not_import_numba():
    code = "import sys; import compressors.core.registries; assert 'numba' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


@pytest.mark.slow
def test_numba_writes_nothing_to_the_cache_folders_of_users(tmp_path):
    """numba's caches are pickles: a user who can write to such a folder can run code here."""
    module = "compressors.quantize.kernels.numba_kernels"
    code = (
        f"from {module} import _to_float16_bits; import numpy; _to_float16_bits(numpy.float32(1))"
    )
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120, env=environment)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
