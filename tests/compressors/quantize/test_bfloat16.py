"""bfloat16 tables: rounding to eight significant bits, overflow, lookups and gradients."""

import pytest
import torch
from error_codes import raises_code
from hypothesis import given
from random_tables import draw_normal, tables

from compressors.core.steps.table_encoder import encode_table
from compressors.errors.steps import ValueNotStorable
from compressors.quantize.tables.bfloat16 import BFloat16


@given(table=tables(max_abs=3e38))  # the largest bfloat16 is 3.39e38
def test_rounding_error_is_at_most_half_the_last_of_eight_bits(table):
    decoded = encode_table(BFloat16(), table)(torch.arange(len(table)))
    # Half of the last of 8 significant bits. Subnormal numbers are evenly spaced by 2^-133.
    assert torch.all((decoded - table).abs() <= table.abs() * 2.0**-8 + 2.0**-134)


@pytest.mark.parametrize("value", [3.4e38, -3.4e38])
def test_encoding_a_weight_that_rounds_to_infinity_raises_value_not_storable(value):
    table = torch.tensor([[1.0, value]])
    with raises_code(ValueNotStorable, "weight_beyond_bfloat16"):
        encode_table(BFloat16(), table)


@pytest.mark.parametrize("shape", [(), (7,), (3, 4), (0,)])
def test_lookup_accepts_ids_of_any_shape(shape):
    table = draw_normal(11, 5)
    ids = torch.randint(11, shape, generator=torch.Generator().manual_seed(0))
    rows = encode_table(BFloat16(), table)(ids)
    assert rows.dtype == torch.float32
    assert torch.equal(rows, table.to(torch.bfloat16).float()[ids])


def test_op_passes_opcheck_and_its_gradient_equals_plain_torch():
    ids = torch.tensor([[0, 5, 5], [2, 1, 0]])
    output_gradient = draw_normal(6, 4).reshape(2, 3, 4)
    weight = draw_normal(6, 4).to(torch.bfloat16)
    with_op, with_torch = (weight.clone().requires_grad_() for _ in range(2))
    op = torch.ops.recpress.bfloat16_table
    torch.library.opcheck(op.default, (with_op, ids))
    (op(with_op, ids) * output_gradient).sum().backward()
    (with_torch.float()[ids] * output_gradient).sum().backward()
    # Both gradients of the weights are sums in float32 that are rounded to bfloat16 once. Sums that
    # differ in their last bits may be rounded to neighboring numbers, which differ by one unit in
    # the last place: at most 2^-7 = 0.8 % of the value.
    torch.testing.assert_close(with_op.grad, with_torch.grad, rtol=1e-2, atol=0)
    assert not with_op.grad[3].any()  # no id refers to row 3
    assert with_op.grad.abs().sum() > 0
