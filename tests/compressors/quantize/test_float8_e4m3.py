"""Tables of 8-bit floats: rounding error, stored bytes, scales and gradients."""

import numpy as np
import pytest
import torch
from error_codes import raises_code
from grids import SLACK, rows_per_scale_values, scale_types
from hypothesis import given
from random_tables import draw_normal, tables
from rowwise_reference import encode_float8_rows
from torch import Tensor

from compressors.core.steps.table_encoder import encode_table
from compressors.errors.steps import ValueNotStorable
from compressors.quantize.tables.float8_e4m3 import Float8E4M3, convert_from_float8


def decode_and_scales(step: Float8E4M3, table: Tensor) -> tuple[Tensor, Tensor]:
    """The decoded weights of an encoded table, and the scale of each row."""
    module = encode_table(step, table)
    rows = torch.arange(len(table))
    return module(rows), module.scale[rows // (step.rows_per_scale or len(table))].float()


@given(table=tables(), scale=scale_types, rows_per_scale=rows_per_scale_values)
def test_rounding_error_is_at_most_half_the_last_of_four_bits_or_half_the_smallest_step(
    table, scale, rows_per_scale
):
    decoded, scales = decode_and_scales(
        Float8E4M3(scale=scale, rows_per_scale=rows_per_scale), table
    )
    # Half of the last of 4 significant bits. Below 2^-6 times the scale, numbers are evenly spaced
    # by 2^-9 times the scale.
    allowed = torch.maximum(table.abs() * 2.0**-4, scales * 2.0**-10)
    # A stored scale may be rounded down, so that the largest weight is 448.5 times the scale.
    clipped = scales * 0.5
    is_largest = table.abs() > 447.9 * scales
    slack = SLACK * table.abs()  # float32 rounding of quotient and product
    assert torch.all(
        (decoded - table).abs() <= torch.where(is_largest, allowed + clipped, allowed) + slack
    )


def test_every_byte_decodes_as_the_e4m3_definition():
    """A sign bit, 4 exponent bits, 3 mantissa bits: Micikevicius et al. 2022, table 1."""
    for code in range(256):
        exponent, mantissa = (code >> 3) & 15, code & 7
        size = (8 + mantissa) * 2.0 ** (exponent - 10) if exponent else mantissa * 2.0**-9
        result = float(convert_from_float8(torch.tensor([code], dtype=torch.uint8)))
        if code & 127 == 127:
            assert np.isnan(result)
        else:
            assert result == (-size if code & 128 else size)


@pytest.mark.parametrize("rows_per_scale", [0, 1, 4])
@pytest.mark.parametrize("scale", ["float16", "float32"])
def test_stored_codes_and_scales_equal_the_numpy_reference(rows_per_scale, scale):
    table = draw_normal(40, 9) * torch.logspace(-6, 3, 40).unsqueeze(1)
    table[3] = 0.0
    table[8:12, 0] = 448.0  # the scale of these rows is 1: ties between E4M3 numbers are exact
    table[8:12, 1:] = torch.tensor([17.0, 19.0, -21.0, 23.0, 2.0**-10, -3 * 2.0**-10, 1.0625, 300])
    module = encode_table(Float8E4M3(scale=scale, rows_per_scale=rows_per_scale), table)
    expected = encode_float8_rows(table.numpy(), rows_per_scale, scale)
    assert np.array_equal(module.scale.numpy(), expected.scale)
    assert np.array_equal(module.codes.numpy(), expected.codes)


def test_no_weight_is_encoded_as_nan():
    table = draw_normal(2000, 7) * torch.logspace(-9, 3, 2000).unsqueeze(1)
    codes_without_sign = encode_table(Float8E4M3(), table).codes & 127
    assert not bool((codes_without_sign == 127).any())
    # 126 is the code of 448, to which the scale maps each row's largest weight. In the first rows
    # the weights are too small for a float16 scale.
    assert bool((codes_without_sign.amax(dim=1) == 126)[1200:].all())


def test_scales_reduce_the_error_of_small_weights_20_times():
    table = draw_normal(200, 16) * 0.001
    decoded, _ = decode_and_scales(Float8E4M3(), table)
    without_scales = table.to(torch.float8_e4m3fn).float()
    assert (decoded - table).square().sum() < 0.05 * (without_scales - table).square().sum()


@pytest.mark.parametrize("rows_per_scale", [0, 1, 4])
@pytest.mark.parametrize("shape", [(), (7,), (3, 4), (0,)])
def test_lookup_accepts_ids_of_any_shape(rows_per_scale, shape):
    step, table = Float8E4M3(rows_per_scale=rows_per_scale), draw_normal(11, 5)
    ids = torch.randint(11, shape, generator=torch.Generator().manual_seed(0))
    rows = encode_table(step, table)(ids)
    assert rows.shape == (*shape, 5)
    assert torch.equal(rows, decode_and_scales(step, table)[0][ids])


@pytest.mark.parametrize("rows_per_scale", [0, 1, 4])
def test_bytes_are_one_per_weight_and_two_per_scale(rows_per_scale):
    module = encode_table(Float8E4M3(rows_per_scale=rows_per_scale), draw_normal(11, 5))
    stored = sum(tensor.numel() * tensor.element_size() for tensor in module.buffers())
    assert stored == 11 * 5 + 2 * {0: 1, 1: 11, 4: 3}[rows_per_scale]


@pytest.mark.parametrize("rows_per_scale", [0, 1, 4])
@pytest.mark.parametrize("scale", ["float16", "float32"])
def test_op_passes_opcheck_and_its_gradient_equals_plain_torch(rows_per_scale, scale):
    module = encode_table(
        Float8E4M3(scale=scale, rows_per_scale=rows_per_scale), draw_normal(11, 5)
    )
    ids = torch.tensor([[0, 5, 5], [2, 1, 0]])
    output_gradient = draw_normal(6, 5).reshape(2, 3, 5)
    with_op, with_torch = (module.scale.clone().requires_grad_() for _ in range(2))
    op = torch.ops.recpress.float8_e4m3_table
    torch.library.opcheck(op.default, (module.codes, with_op, ids, rows_per_scale))
    (op(module.codes, with_op, ids, rows_per_scale) * output_gradient).sum().backward()
    scale_indices = ids // (rows_per_scale or 11)
    decoded = convert_from_float8(module.codes[ids]) * with_torch.float()[scale_indices]
    (decoded * output_gradient).sum().backward()
    # The same sums in another order; in float16 torch also adds repeated ids in float16.
    tolerance = 1e-5 if scale == "float32" else 5e-3
    torch.testing.assert_close(with_op.grad, with_torch.grad, rtol=tolerance, atol=tolerance)
    assert with_op.grad.abs().sum() > 0


def test_a_scale_above_float16_raises_and_can_be_stored_as_float32():
    table = torch.full((2, 3), 65504.0 * 449)
    with raises_code(ValueNotStorable, "scale_beyond_float16", quantity="scale"):
        encode_table(Float8E4M3(), table)
    decoded, _ = decode_and_scales(Float8E4M3(scale="float32"), table)
    torch.testing.assert_close(decoded, table, rtol=1e-6, atol=0)


def test_rows_of_zeros_are_exact():
    decoded, scales = decode_and_scales(Float8E4M3(), torch.zeros(3, 4))
    assert not decoded.any()
    assert torch.all(scales > 0)
