"""Float16 tables and layers: stored in half, computed in float32."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from compressors.dense.float16 import narrow
from compressors.errors import CompressionError

unhurried = settings(deadline=None)  # a busy machine is not a wrong answer

OPS = torch.ops.recpress


@unhurried
@given(st.floats(-65504, 65504, width=32))
def test_a_weight_moves_by_at_most_half_a_float16_step(value):
    weight = torch.tensor([value])
    error = (narrow("w", weight).float() - weight).abs().item()
    assert error <= max(abs(value) * 2.0**-11, 2.0**-25)


@pytest.mark.parametrize("value", [65520.0, -7e4, 1e30])
def test_a_weight_beyond_float16_is_refused_by_name(value):
    with pytest.raises(CompressionError, match=r"'user\.weight' holds .* beyond float16's 65504"):
        narrow("user.weight", torch.tensor([[0.0, value]]))


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (0,)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_a_lookup_gives_the_stored_rows_in_float32(shape, dtype):
    weight = torch.randn(5, 3).half()
    ids = torch.randint(5, shape, dtype=dtype)
    rows = OPS.float16_table(weight, ids)
    assert rows.dtype == torch.float32
    assert torch.equal(rows, weight.float()[ids.long()])


@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6), (0, 6)])
def test_a_layer_computes_in_float32(shape):
    x, weight, bias = torch.randn(shape), torch.randn(4, 6).half(), torch.randn(4).half()
    y = OPS.float16_linear(x, weight, bias)
    assert y.dtype == torch.float32
    assert torch.equal(y, F.linear(x, weight.float(), bias.float()))


def test_the_ops_keep_torchs_rules_for_custom_ops():
    weight, ids = torch.randn(5, 3).half().requires_grad_(), torch.tensor([[0, 4, 4]])
    torch.library.opcheck(OPS.float16_table.default, (weight, ids))
    x = torch.randn(2, 3, 6, requires_grad=True)
    layer = (torch.randn(4, 6).half().requires_grad_(), torch.randn(4).half().requires_grad_())
    torch.library.opcheck(OPS.float16_linear.default, (x, *layer))


# Gradients of float16 leaves are float16: one part in 2^11, on sums of a few numbers near 1.
HALF = {"rtol": 2e-3, "atol": 2e-3}


def test_the_tables_gradient_is_that_of_plain_torch():
    weight, ids = torch.randn(5, 3).half(), torch.tensor([[0, 4, 4], [1, 0, 0]])
    up = torch.randn(2, 3, 3)
    ours, plain = (weight.clone().requires_grad_() for _ in range(2))
    (OPS.float16_table(ours, ids) * up).sum().backward()
    (plain.float()[ids] * up).sum().backward()
    torch.testing.assert_close(ours.grad, plain.grad, **HALF)
    assert not ours.grad[[2, 3]].any()
    assert ours.grad[4].any()


@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6)])
def test_the_layers_gradients_are_those_of_plain_torch(shape):
    leaves = (torch.randn(shape), torch.randn(4, 6).half(), torch.randn(4).half())
    up = torch.randn(*shape[:-1], 4)
    ours, plain = ([t.clone().requires_grad_() for t in leaves] for _ in range(2))
    (OPS.float16_linear(*ours) * up).sum().backward()
    (F.linear(plain[0], plain[1].float(), plain[2].float()) * up).sum().backward()
    for found, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(found.grad, expected.grad, **HALF)
        assert found.grad.any()
